"""Building at first use: whatever goes wrong, the integers are the same and the reason is said once."""

import concurrent.futures
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bitsmith.kernels import build, choose
from bitsmith.kernels.build import NotBuilt, built, cache_folder
from bitsmith.kernels.native import Native
from bitsmith.kernels.operands import Activations
from bitsmith.kernels.torch_path import TorchPath
from tests.architecture.package import ROOT

QUICK = ("-O0",)  # of the plain library: what is tested is the building


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has not yet chosen."""
    monkeypatch.setenv("BITSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BITSMITH_KERNELS", raising=False)
    choose.best.cache_clear()
    choose.native.cache_clear()
    yield tmp_path / "cache"
    choose.best.cache_clear()
    choose.native.cache_clear()


@pytest.fixture
def compiler(cache: Path) -> None:
    try:
        build._compiler()
    except NotBuilt as error:
        pytest.skip(str(error))


def product() -> torch.Tensor:
    codes = torch.arange(64, dtype=torch.uint8).view(4, 16) % 8
    backend = choose.best()
    return backend.sums(Activations(torch.full((2, 16), -128, dtype=torch.int8)), backend.pack(codes, 3))


EXPECTED = (torch.arange(64).view(4, 16) % 8).sum(1).mul(-128).expand(2, 4).int()


def test_without_a_compiler_torch_gives_the_same_integers_and_says_so_once(cache, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match="there is no C compiler") as said:
        assert torch.equal(product(), EXPECTED)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(product(), EXPECTED)
    facts = choose.describe()
    assert facts["kernels"].startswith("torch")
    assert "no C compiler" in facts["kernels_why"]


def test_a_compiler_that_fails_is_quoted(cache, monkeypatch) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -c 'import sys; sys.exit(\"out of cheese\")'")
    with pytest.warns(UserWarning, match="out of cheese"):
        assert torch.equal(product(), EXPECTED)
    assert not list(cache.glob(".*.part"))


def test_a_cache_that_cannot_be_made_is_a_reason(cache, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITSMITH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be made"):
        assert torch.equal(product(), EXPECTED)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_a_reason(cache, compiler) -> None:
    cache.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="was not built"):
        assert torch.equal(product(), EXPECTED)


def test_a_cache_that_others_may_write_to_is_not_trusted(cache, compiler) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(NotBuilt, match="by others"):
        built("portable", flags=QUICK)


def test_a_built_library_is_used_again(cache, compiler, monkeypatch) -> None:
    first = built("portable", flags=QUICK)
    monkeypatch.setattr(build, "_compile", None)
    assert built("portable", flags=QUICK) == first
    assert [path.suffix for path in cache.iterdir()] == [".so"]


@pytest.mark.parametrize("damage", ["a flipped byte", "half of it", "nothing left"])
def test_a_damaged_library_is_built_anew(cache, compiler, damage: str) -> None:
    path = built("portable", flags=QUICK)
    data = path.read_bytes()
    middle = len(data) // 2
    broken = {
        "a flipped byte": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "half of it": data[:middle],
        "nothing left": b"",
    }[damage]
    path.write_bytes(broken)
    assert built("portable", flags=QUICK).read_bytes() != broken
    assert len(list(cache.glob("*.so"))) == 1


def test_two_processes_at_once_do_no_harm(cache, compiler) -> None:
    program = (
        "from bitsmith.kernels.build import built; from bitsmith.kernels.native import Native;"
        f"print(Native(built('portable', flags={QUICK!r}), 'portable').path)"
    )

    def run(_: int) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = set(pool.map(run, range(2)))
    assert found == {f"{path}\n" for path in cache.glob("*.so")}
    assert not list(cache.glob(".*.part"))


def test_a_library_that_computes_wrong_integers_is_not_used(cache, compiler, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_KERNELS", "portable")
    monkeypatch.setattr(choose, "built", lambda name: built(name, flags=QUICK))
    wrong = Native.sums

    def off_by_one(self, x, weight, out=None):
        return wrong(self, x, weight, out) + (weight.bits == 5)

    monkeypatch.setattr(Native, "sums", off_by_one)
    with pytest.warns(UserWarning, match="wrong integers: 5 bits"):
        assert isinstance(choose.best(), TorchPath)


def test_an_instruction_set_can_be_asked_for(cache, compiler, monkeypatch) -> None:
    monkeypatch.setattr(choose, "built", lambda name: built(name, flags=QUICK))
    monkeypatch.setenv("BITSMITH_KERNELS", "portable")
    assert choose.best().name == "portable"
    assert choose.describe()["kernels"] == "portable"
    choose.best.cache_clear()
    monkeypatch.setenv("BITSMITH_KERNELS", "torch")
    assert choose.best().name == "torch"
    choose.best.cache_clear()
    monkeypatch.setenv("BITSMITH_KERNELS", "abacus")
    with pytest.warns(UserWarning, match="BITSMITH_KERNELS=abacus does not run here"):
        assert choose.best().name == "torch"


def test_the_cache_is_where_the_environment_says(monkeypatch) -> None:
    monkeypatch.delenv("BITSMITH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/bitsmith")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/bitsmith"
