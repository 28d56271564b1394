"""A small exported model and images for it to adapt to; and, as a process, what a test must not do itself.

python -m tests.recipe.adapting FOLDER     measures the memory of an adaptation (memory.json in FOLDER),
                                           begins another one in FOLDER/killed, and kills itself
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import bitsmith as bs
from bitsmith.bench.memory import resident_peak
from bitsmith.files import write_json
from bitsmith.recipe.adapt import AdaptSettings, adapt
from bitsmith.recipe.progress import Event
from bitsmith.tasks import build

CLASSES = 3
SETTINGS = AdaptSettings(epochs=4, batch_size=16, even_if_worse=True)


def wide() -> nn.Module:
    """Weights that are larger than every block in which an update works."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, CLASSES)
    )


def export(
    folder: Path, model: nn.Module | None = None, weights: bs.Scheme | None = None, **options: Any
) -> Path:
    """An untrained model of 4-bit weights and 8-bit activations, exported; its norms know the data."""
    model = build("digits_cnn", classes=CLASSES, seed=0) if model is None else model
    x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        model.train()(x)
    scheme = weights or bs.Scheme(bits=4, granularity="channel")
    bs.prepare(model, scheme, bs.Scheme(bits=8), target="native", **options)
    bs.calibrate(model, [x])
    return bs.save(bs.finalize(model, x[:1]), folder)


def write_images(path: Path, rows: int = 64, size: int = 8, classes: int = CLASSES, **more: Any) -> str:
    """Images as bright as their class is late; half as many test images. Returns the data's name."""
    draw = np.random.default_rng(0)
    labels = np.resize(np.arange(classes), rows)
    images = draw.random((rows, 1, size, size), dtype=np.float32) / 2
    images += (labels / classes / 2).astype(np.float32)[:, None, None, None]
    half = rows // 2
    np.savez(path, train_x=images, train_y=labels, test_x=images[:half], test_y=labels[:half], **more)
    return f"npz:{path}"


def killed_at(step: int) -> Any:
    """A progress callback that ends the process, without a chance to clean up, once ``step`` is reached."""

    def watch(event: Event) -> None:
        if event.stage == "adapt" and event.done >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch


def main(folder: Path) -> None:
    """Measure, begin, and die."""
    torch.set_num_threads(1)
    small, large = f"npz:{folder / 'small.npz'}", f"npz:{folder / 'large.npz'}"
    shutil.copytree(folder / "model", folder / "warm")
    limited = AdaptSettings(steps=1, batch_size=2, memory_limit=10**9, even_if_worse=True)
    adapt(folder / "warm", small, limited)  # now every library is there
    before = resident_peak()
    settings = AdaptSettings(steps=2, batch_size=64, memory_limit=20_000_000, even_if_worse=True)
    record = adapt(folder / "model", large, settings, out=folder / "large", delta=folder / "delta")
    write_json(folder / "memory.json", {"growth": resident_peak() - before, **record["memory"]})
    shutil.copytree(folder / "model", folder / "killed")
    adapt(folder / "killed", small, SETTINGS, progress=killed_at(5), checkpoint_seconds=0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
