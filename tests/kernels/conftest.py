"""Each instruction set of this machine, and torch: every test of an operation runs on all of them.

The 256-bit VNNI kernels have a second spelling in AVX512, so that they are tested on more machines.
"""

import pytest

from bitsmith.kernels.build import NotBuilt, built
from bitsmith.kernels.choose import Backend, native, torch_path
from bitsmith.kernels.native import Native
from bitsmith.kernels.processor import FLAGS, INSTRUCTION_SETS, instruction_sets


@pytest.fixture(scope="session", params=[*INSTRUCTION_SETS, "torch"])
def backend(request: pytest.FixtureRequest) -> Backend:
    name = request.param
    if name == "torch":
        return torch_path()
    try:
        if name in instruction_sets():
            return native(name)
        if name == "avxvnni" and "avx512vnni" in instruction_sets():
            return Native(built(name, flags=[*FLAGS["avx512vnni"][:-1]]), name)
    except NotBuilt as error:
        pytest.skip(str(error))
    pytest.skip(f"this processor has no {name}")
