"""Two ranks that share a quantized model (FSDP2, gloo, CPU) train it as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitsmith.files import load_tensors
from tests.contracts.fsdp import fit, model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.contracts.fsdp", str(rank), "2", str(tmp_path)],
            env=environment,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    sharded, _ = load_tensors(tmp_path / "state")
    plain = model()
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    losses = torch.tensor(fit(plain, 0, 1), dtype=torch.float64)
    torch.testing.assert_close(sharded.pop("losses"), losses, rtol=0, atol=1e-6)
    assert sharded.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    still = {n for n, p in plain.named_parameters() if torch.equal(p, start[n])}
    assert all(name.endswith("zero_shift") for name in still), (
        "only a zero point may have had nothing clipped"
    )
