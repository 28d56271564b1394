"""ResNet-20/32/56 for 32x32 images (He et al. 2016, 1512.03385, section 4.2), with option-A shortcuts.

Module names are torchvision's (`conv1`, `bn1`, `layer1.0.conv1`, ..., `fc`), so that the weights that
circulate for CIFAR-10 (akamaster/pytorch_resnet_cifar10) load by name. Option A: a shortcut that changes the
size takes every second pixel and pads the channels with zeros, half on each side; it has no parameters.
"""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.errors import FormatError
from bitsmith.files import load_tensors
from bitsmith.tasks.factory import suggestion
from bitsmith.tasks.normalize import Normalize


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """ReLU(bn2(conv2(ReLU(bn1(conv1 x)))) + shortcut x)."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: the input itself, subsampled and zero-padded where the block changes its size."""
        if self.stride == 1 and self.padding == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class ResNet(nn.Module):
    """(N, C, 32, 32) -> logits (N, classes); 6·blocks + 2 layers, 16, 32 and 64 channels."""

    def __init__(self, normalize: Normalize, blocks: int, classes: int) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = nn.Conv2d(normalize.mean.numel(), 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.normalize(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file of float weights by name. Raises FormatError on any name or shape that differs.

    BatchNorm's `num_batches_tracked` may be absent, as it is in the weights that circulate.
    """
    where = str(path)
    tensors, _ = load_tensors(path, "weights file")
    own = model.state_dict()
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    if missing:
        remedy = suggestion(missing[0], list(tensors))
        raise FormatError(
            f"tensor {missing[0]} is missing ({len(missing)} in all)", where=where, remedy=remedy
        )
    for name, tensor in tensors.items():
        if name not in own:
            remedy = suggestion(name, list(own))
            raise FormatError(f"tensor {name} is not in the model", where=where, remedy=remedy)
        if tensor.shape != own[name].shape:
            raise FormatError(
                f"tensor {name} has another shape",
                where=where,
                got=str(tuple(tensor.shape)),
                expected=str(tuple(own[name].shape)),
                remedy="Build the model with the depth, classes and channels of these weights",
            )
    model.load_state_dict(tensors, strict=False)
