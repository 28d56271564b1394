"""Ways in which pixels change between training and use: noise, blur, light, resolution, compression.

In the spirit of ImageNet-C (Hendrycks and Dietterich 2019, 1903.12261), in plain torch for whole batches,
with one difference: lengths are set relative to the image's side, so that they mean the same for 8x8 digits
and 32x32 photographs. Each function takes images (N, C, H, W) float32 in 0..1, a severity 1..5 and the
generator that all of its draws come from, and returns images in 0..1. Moving pixels about is in geometry.py;
the table of names, and how seeds are made, in shifts.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE_STD = (0.05, 0.1, 0.15, 0.2, 0.3)  # of the full range
PHOTONS = (60.0, 25.0, 12.0, 5.0, 3.0)  # that a white pixel counts
IMPULSES = (0.03, 0.06, 0.09, 0.17, 0.27)  # share of the values that are lost
BLUR_SIGMA = (0.12, 0.18, 0.24, 0.32, 0.42)  # pixels, times the square root of the side
DEFOCUS_RADIUS = (0.3, 0.4, 0.5, 0.65, 0.8)  # pixels, times the square root of the side
MOTION_RADIUS = (0.4, 0.6, 0.8, 1.1, 1.5)  # half of the way, in pixels, times the square root of the side
CONTRAST = (0.75, 0.55, 0.4, 0.25, 0.15)  # what is left of the difference from the image's mean
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV
PIXELATE = (0.85, 0.7, 0.5, 0.375, 0.25)  # of the side that is left
JPEG_QUALITY = (25, 18, 15, 10, 7)

# ITU-T T.81 (1992), tables K.1 and K.2: how coarsely luminance and chrominance are rounded at quality 50.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# JFIF: Y, Cb, Cr of R, G, B; the latter two without their offset of 128, which leaves again.
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
BLOCK = 8


def noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise, independent per pixel and channel."""
    draws = torch.randn(images.shape, generator=generator)
    return (images + NOISE_STD[severity - 1] * draws).clamp_(0, 1)


def shot_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Photons counted in poor light: Poisson(λ·x)/λ, of mean x and variance x/λ."""
    photons = PHOTONS[severity - 1]
    return (torch.poisson(images * photons, generator=generator) / photons).clamp_(0, 1)


def impulse_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Salt and pepper: a share of the values becomes 0 or 1, as often the one as the other."""
    draws, share = torch.rand(images.shape, generator=generator), IMPULSES[severity - 1]
    return images.masked_fill(draws < share, 0.0).masked_fill(draws < share / 2, 1.0)


def blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian blur; edges are replicated. Draws nothing."""
    return gaussian_blur(images, BLUR_SIGMA[severity - 1] * _root(images)).clamp_(0, 1)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Images, or fields of any other values, blurred by ``sigma`` pixels; edges are replicated."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    images = F.pad(images, (radius,) * 4, mode="replicate")
    images = F.conv2d(images, kernel.unsqueeze(2), groups=images.shape[1])
    return F.conv2d(images, kernel.unsqueeze(3), groups=images.shape[1])


def defocus_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Each point spread over a disk; edges are replicated. Draws nothing."""
    kernel = disk(DEFOCUS_RADIUS[severity - 1] * _root(images))
    radius, channels = len(kernel) // 2, images.shape[1]
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    return F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels).clamp_(0, 1)


def disk(radius: float, fine: int = 16) -> Tensor:
    """(2r + 1, 2r + 1): the share of a disk that each pixel covers, counted on fine² points a pixel."""
    reach = math.ceil(radius - 0.5)
    points = (torch.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    inside = (points[:, None] ** 2 + points**2 <= radius**2).float()
    covered = F.avg_pool2d(inside[None, None], fine)[0, 0]
    return covered / covered.sum()


def motion_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Each point spread over a line through it, whose direction is drawn for each image."""
    count, channels = images.shape[:2]
    kernels = streaks(
        torch.rand(count, generator=generator) * math.pi, MOTION_RADIUS[severity - 1] * _root(images)
    )
    radius = kernels.shape[-1] // 2
    padded = F.pad(images, (radius,) * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    weights = kernels.repeat_interleave(channels, 0).unsqueeze(1)
    return F.conv2d(padded, weights, groups=count * channels).view(images.shape).clamp_(0, 1)


def streaks(angles: Tensor, radius: float, points: int = 65) -> Tensor:
    """(N, 2r + 1, 2r + 1): lines of half-length ``radius`` at ``angles`` (N,), spread bilinearly."""
    reach = math.ceil(radius)
    way, pixels = torch.linspace(-radius, radius, points), torch.arange(-reach, reach + 1)
    rows, columns = (
        (1 - (direction[:, None, None] * way[:, None] - pixels).abs()).clamp_(min=0)
        for direction in (angles.sin(), angles.cos())
    )
    return torch.einsum("npr,npc->nrc", rows, columns) / points


def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Every image pulled towards its own mean grey. Draws nothing."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + CONTRAST[severity - 1] * (images - mean)


def brightness(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """More light: the value of HSV, a pixel's largest channel, is raised; hue and saturation stay. Draws
    nothing."""
    value = images.amax(1, keepdim=True)
    brighter = (value + BRIGHTNESS[severity - 1]).clamp(max=1)
    return torch.where(value > 0, images * (brighter / value.clamp(min=1e-8)), brighter).clamp_(0, 1)


def pixelate(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """As if taken with fewer pixels: areas are averaged, and shown as squares. Draws nothing."""
    for axis in (2, 3):
        side = images.shape[axis]
        coarse = max(1, round(PIXELATE[severity - 1] * side))
        through = areas(coarse, side) @ areas(side, coarse)
        images = (through @ images) if axis == 2 else images @ through.T
    return images.clamp(0, 1)


def areas(source: int, target: int) -> Tensor:
    """(target, source): the share of each target cell that each source cell covers, on a line of length 1."""
    ends = [torch.arange(cells + 1, dtype=torch.float64) / cells for cells in (target, source)]
    last = torch.minimum(ends[0][1:, None], ends[1][1:])
    first = torch.maximum(ends[0][:-1, None], ends[1][:-1])
    return ((last - first).clamp(min=0) * target).float()


def jpeg(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """What JPEG's rounding leaves: see `compressed`. Draws nothing."""
    return compressed(images, JPEG_QUALITY[severity - 1])


def compressed(images: Tensor, quality: int) -> Tensor:
    """Each 8x8 block as D⁻¹(T·round(D(x)/T)), D the orthonormal DCT-II of 255·x - 128, T quality's table.

    Colours as Y, Cb, Cr. JPEG's loss without its file: no chroma subsampling, and pixels are not rounded. A
    side that is no multiple of 8 is filled up by its edge.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
    colours = images.shape[1] == 3
    mixed = torch.einsum("dc,nchw->ndhw", torch.tensor(TO_YCBCR), padded) if colours else padded
    levels = 255 * mixed - (torch.tensor([128.0, 0, 0]).view(-1, 1, 1) if colours else 128.0)
    names = (LUMINANCE, CHROMINANCE, CHROMINANCE) if colours else (LUMINANCE,)
    steps = torch.stack([quantization_table(quality, name) for name in names])[:, None, None]

    rows, columns = (side // BLOCK for side in padded.shape[2:])
    blocks = levels.view(*levels.shape[:2], rows, BLOCK, columns, BLOCK).transpose(3, 4)
    matrix = dct_matrix()
    coefficients = matrix @ blocks @ matrix.T
    blocks = matrix.T @ (steps * (coefficients / steps).round()) @ matrix
    levels = blocks.transpose(3, 4).reshape(levels.shape)

    mixed = (levels + (torch.tensor([128.0, 0, 0]).view(-1, 1, 1) if colours else 128.0)) / 255
    back = torch.linalg.inv(torch.tensor(TO_YCBCR)) if colours else None
    restored = mixed if back is None else torch.einsum("dc,nchw->ndhw", back, mixed)
    return restored[..., :height, :width].clamp(0, 1)


def dct_matrix() -> Tensor:
    """(8, 8) orthonormal: D[k, n] = c_k·cos(π(2n + 1)k/16), c_0 = √(1/8), else 1/2."""
    n = torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * n + 1) * n[:, None] / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def quantization_table(quality: int, base: tuple[tuple[int, ...], ...] = LUMINANCE) -> Tensor:
    """(8, 8): a table of T.81 scaled as the Independent JPEG Group does, 100 the finest, 1 the coarsest."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * scale + 50) // 100).clamp(1, 255).float()


def _root(images: Tensor) -> float:
    """The square root of the shorter side."""
    return math.sqrt(min(images.shape[2:]))
