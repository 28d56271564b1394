"""A small U-Net (Ronneberger et al. 2015, 1505.04597) for segmentation: (N, C, H, W) -> (N, classes, H, W).

    encoder level i    two 3x3 convolutions of 2^i·width channels, BatchNorm and ReLU; then 2x2 max pooling
    bottom             the same, one level deeper
    decoder level i    up to twice the side, [up, skip] concatenated, two 3x3 convolutions
    head               a 1x1 convolution

Other than in the paper: padded convolutions, so that maps keep their size and skips are not cropped;
BatchNorm; and a choice of how maps grow: "transposed", a 2x2 transposed convolution of stride 2, or
"nearest", a 1x1 convolution whose pixels are then doubled (the same function as doubling first, at a
quarter of its cost). What is concatenated goes into one convolution, and so through one quantizer: up and
skip lie on one grid, and a runtime may put their codes side by side without rounding either again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, RecipeError, listing
from bitsmith.tasks.normalize import Normalize


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions with BatchNorm and ReLU, (N, inputs, H, W) -> (N, outputs, H, W)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _transposed(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _nearest(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="nearest"),
    )


UPSAMPLINGS = {"transposed": _transposed, "nearest": _nearest}


class UNet(nn.Module):
    """The U-Net of ``depth`` poolings, ``width`` channels on its first level and twice as many on each below.

    Raises RecipeError for an upsampling that there is not, DataError in forward for a side that 2^depth does
    not divide.
    """

    def __init__(
        self,
        normalize: Normalize,
        classes: int,
        width: int = 16,
        depth: int = 2,
        upsampling: str = "transposed",
    ) -> None:
        super().__init__()
        if upsampling not in UPSAMPLINGS:
            raise RecipeError(
                "there is no such upsampling",
                where="model unet: upsampling",
                got=upsampling,
                expected=listing(UPSAMPLINGS),
            )
        if depth < 1 or width < 1:
            raise RecipeError(
                "a U-Net has at least one level and channel",
                where="model unet",
                got=f"depth {depth}, width {width}",
            )
        channels = [width * 2**level for level in range(depth + 1)]
        self.normalize = normalize
        self.encoder = nn.ModuleList(
            _block(inputs, outputs)
            for inputs, outputs in zip([normalize.mean.numel(), *channels], channels[:-1], strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.bottom = _block(channels[-2], channels[-1])
        self.up = nn.ModuleList(UPSAMPLINGS[upsampling](2 * c, c) for c in reversed(channels[:-1]))
        self.decoder = nn.ModuleList(_block(2 * c, c) for c in reversed(channels[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes, H, W)."""
        step = 2 ** len(self.encoder)
        if images.shape[-2] % step or images.shape[-1] % step:
            raise DataError(
                f"a U-Net of {len(self.encoder)} poolings needs sides that {step} divides",
                where="model unet",
                got=f"{images.shape[-2]} x {images.shape[-1]} pixels",
                remedy="Resize the images (data argument size), or give the model another depth",
            )
        x, skips = self.normalize(images), []
        for block in self.encoder:
            skips.append(block(x))
            x = self.pool(skips[-1])
        x = self.bottom(x)
        for up, block, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = block(torch.cat([up(x), skip], dim=1))
        logits: Tensor = self.head(x)
        return logits
