"""The metric of image classification: logits, accuracy and cross-entropy over a whole split.

Works on any module from images to logits: float, prepared, packed, or a runtime's wrapper. The model is put
in eval mode and back, so that calling this in the middle of training changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import DataError


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0..1; float images unchanged."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@torch.no_grad()
def predict(
    model: nn.Module, images: Tensor, batch_size: int = 256, device: torch.device | str | None = None
) -> Tensor:
    """Logits (N, classes), float32 on the CPU, of images (N, C, H, W) float32 or uint8.

    ``device`` is where the model already is; found by its first tensor where not given.
    """
    if len(images) == 0:
        raise DataError("there is nothing to predict", where="predict", got="0 images")
    place = torch.device(device) if device is not None else device_of(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        batches = (to_float(images[i : i + batch_size]) for i in range(0, len(images), batch_size))
        return torch.cat([model(batch.to(place)).float().cpu() for batch in batches])
    finally:
        # Module by module: some may have been in eval mode inside a training model (frozen BatchNorm).
        for module, training in modes.items():
            module.training = training


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """{"accuracy": a fraction in 0..1, "loss": mean cross-entropy in nats}."""
    return score(predict(model, images, batch_size, device), labels)


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics of logits (N, classes) that are already there, e.g. a runtime's."""
    labels = labels.cpu()
    return {
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits.double(), labels).item(),
    }


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer (a packed model has buffers alone)."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")
