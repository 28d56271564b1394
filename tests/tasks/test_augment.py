"""Crop and flip: each output is a shifted, perhaps mirrored copy of its own input."""

import pytest
import torch
import torch.nn.functional as F

from bitsmith.tasks.augment import crop_and_flip


def slow_crop_and_flip(images, generator, padding):
    """The readable twin: one image at a time."""
    count, _, height, width = images.shape
    tops = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    lefts = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    flips = torch.randint(0, 2, (count, 1), generator=generator)
    result = []
    for image, top, left, flip in zip(images, tops, lefts, flips, strict=True):
        crop = F.pad(image, (padding,) * 4)[:, top : top + height, left : left + width]
        result.append(crop.flip(2) if flip else crop)
    return torch.stack(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("padding", [1, 4])
def test_the_gather_equals_its_slow_twin(dtype, padding):
    images = torch.randint(0, 256, (50, 3, 12, 9)).to(dtype)
    fast = crop_and_flip(images, torch.Generator().manual_seed(5), padding)
    slow = slow_crop_and_flip(images, torch.Generator().manual_seed(5), padding)
    assert fast.dtype == dtype
    assert fast.is_contiguous()
    assert torch.equal(fast, slow)


def test_about_half_of_the_images_are_mirrored_and_all_offsets_occur():
    # One bright column, left of the middle: its place tells offset and mirroring apart.
    images = torch.zeros(4000, 1, 32, 32)
    images[..., 10] = 1
    place = crop_and_flip(images, torch.Generator().manual_seed(0))[:, 0, 16].argmax(1)
    assert set(place.tolist()) == set(range(6, 15)) | set(range(17, 26))
    assert 0.46 < (place > 16).float().mean() < 0.54


def test_the_input_is_left_alone():
    images = torch.rand(8, 3, 32, 32)
    before = images.clone()
    crop_and_flip(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
