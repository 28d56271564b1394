"""How the rows of a convolution's matrix lie in an image (batch, height, width, channels)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """`image` of c/kernels.h: input (tap y, tap x, channel) of row (b, y, x) is the pixel
    (y * up + tap y * tap + shift) / down, or ``empty`` off the image and off its grid."""

    height: int
    width: int
    channels: int
    pixel: int  # bytes from one pixel to the next
    rows: int
    columns: int
    taps_y: int
    taps_x: int
    up_y: int
    up_x: int
    down_y: int
    down_x: int
    tap_y: int
    tap_x: int
    shift_y: int
    shift_x: int
    empty: int = 0

    FIELDS: ClassVar[tuple[str, ...]] = ()

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return self.taps_y * self.taps_x * self.channels

    def row_count(self, image: Tensor) -> int:
        """Rows of the matrix of a batch."""
        return image.shape[0] * self.rows * self.columns

    def check(self, image: Tensor) -> None:
        """ValueError where the image does not lie as this says: C would read what is not its own."""
        strides = (self.pixel * self.width * self.height, self.pixel * self.width, self.pixel, 1)
        sizes = (self.height, self.width, self.channels)
        wrong = image.numel() > 0 and any(
            size > 1 and had != due
            for size, had, due in zip(image.shape, image.stride(), strides, strict=True)
        )
        if tuple(image.shape[1:]) != sizes or wrong or image.element_size() != 1:
            raise ValueError(f"an image {tuple(image.shape)} does not lie as {self} says")

    def numbers(self) -> list[int]:
        """In the order of C."""
        return [getattr(self, name) for name in self.FIELDS]

    @classmethod
    def forward(
        cls,
        size: tuple[int, int],
        channels: int,
        pixel: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        empty: int = 0,
    ) -> Geometry:
        """Of a convolution itself: pixel = y * stride + tap * dilation - padding."""
        rows, columns = (
            (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
        )
        shift = (-padding[0], -padding[1])
        return cls(
            *size, channels, pixel, rows, columns, *kernel, *stride, 1, 1, *dilation, *shift, empty=empty
        )

    @classmethod
    def of_input_gradient(
        cls,
        size: tuple[int, int],
        gradient: tuple[int, int],
        channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Geometry:
        """Of the gradient of an input of ``size``, read from one of ``gradient``: pixel = (y + padding -
        tap * dilation) / stride where that is whole."""
        backward = (-dilation[0], -dilation[1])
        return cls(*gradient, channels, channels, *size, *kernel, 1, 1, *stride, *backward, *padding)


Geometry.FIELDS = tuple(f.name for f in fields(Geometry))
