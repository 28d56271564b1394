"""Peak memory of one form of a model, measured in a process of its own.

What is measured: the largest resident set (Linux: VmHWM of /proc/self/status; elsewhere ru_maxrss) of a
process that opens this form and runs one batch, and the same before it opened it, when only libraries were
loaded. The difference is what the model, its outputs and the runtime's buffers took at most; shared pages
count as well. ru_maxrss would not do on Linux: a new process inherits there that of the one that started it.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitsmith.errors import RunError
from bitsmith.files import read_json, write_json


def peak_memory(path: Path, name: str, batch: Tensor, factory: str | None = None) -> dict[str, int]:
    """{"peak_bytes", "libraries_bytes", "model_bytes": their difference} of the form ``name`` of the model in
    ``path``. Raises RunError where its process fails."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, answer = Path(folder) / "batch.npy", Path(folder) / "memory.json"
        np.save(inputs, batch.numpy())
        command = [sys.executable, "-m", "bitsmith.bench.memory", str(path), name, str(inputs), str(answer)]
        command += [str(torch.get_num_threads()), factory or ""]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"the process that measures memory failed: {said}", where=f"{path} ({name})")
        found: dict[str, int] = read_json(answer)
        return found


def measure_here(path: Path, name: str, batch: Tensor, factory: str | None) -> dict[str, int]:
    """As `peak_memory`, of this process, which should be new."""
    from bitsmith.bench.contenders import contender

    if name == "onnxruntime":
        importlib.import_module("onnxruntime")
    before = resident_peak()
    predict: Any = contender(path, name, factory)
    with torch.inference_mode():
        predict(batch)
    after = resident_peak()
    return {"peak_bytes": after, "libraries_bytes": before, "model_bytes": after - before}


def resident_peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    _, _path, _name, _inputs, _answer, _threads, _factory = sys.argv
    torch.set_num_threads(int(_threads))
    _batch = torch.from_numpy(np.load(_inputs, allow_pickle=False))
    write_json(Path(_answer), measure_here(Path(_path), _name, _batch, _factory or None))
