"""`Shift`: one way in which the world changes between training and use; and the table of those of images.

Every draw comes from a generator seeded by (seed, shift, severity), so that a float and a quantized model see
identical images. Accuracies compare models here; they do not compare with ImageNet-C's tables. The functions
are in corruptions.py and geometry.py; attacks on a model in adversarial.py, typos in text_shifts.py; which
shifts some data know is said by the data, and how a suite of them is measured is in suites.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, nearest
from bitsmith.tasks import corruptions, geometry
from bitsmith.tasks.classification import evaluate, to_float

if TYPE_CHECKING:  # which is measured by them
    from bitsmith.tasks.dataset import Data

SEVERITIES = (1, 2, 3, 4, 5)
MEASURED = (1, 3, 5)  # whose mean is a shift's figure
DEFAULT = ("noise", "blur", "contrast", "rotation", "translation")

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]

# The order decides the seeds: new names go to the end.
CORRUPTIONS: dict[str, Corruption] = {
    "noise": corruptions.noise,
    "blur": corruptions.blur,
    "contrast": corruptions.contrast,
    "rotation": geometry.rotation,
    "translation": geometry.translation,
    "shot_noise": corruptions.shot_noise,
    "impulse_noise": corruptions.impulse_noise,
    "defocus_blur": corruptions.defocus_blur,
    "motion_blur": corruptions.motion_blur,
    "brightness": corruptions.brightness,
    "pixelate": corruptions.pixelate,
    "jpeg": corruptions.jpeg,
    "shear": geometry.shear,
    "elastic": geometry.elastic,
}


@dataclass(frozen=True)
class Shift:
    """Test rows as they might look elsewhere.

    ``rows(severity, seed, attacked)`` are (inputs as the model takes them, targets). Where there is but one
    such world (another domain), it is not ``graded``, and severity says nothing. ``attacks``: whether rows
    are made against the model that they are measured on ("own"), the float model ("float") or none ("").
    """

    name: str
    suite: str
    rows: Callable[[int, int, nn.Module | None], tuple[Tensor, Tensor]]
    graded: bool = True
    attacks: Literal["", "own", "float"] = ""


def shifted(name: str, images: Tensor, severity: int, seed: int = 0) -> Tensor:
    """The images (N, C, H, W), float32 in 0..1 or uint8, under a named shift; the same for the same seed.

    Raises DataError for a name or severity that there is not.
    """
    if name not in CORRUPTIONS:
        near = nearest(name, CORRUPTIONS, 1)
        raise DataError(
            f"unknown shift {name!r}",
            where="shifts",
            expected=", ".join(CORRUPTIONS),
            remedy=f"Did you mean {near[0]}?" if near else "",
        )
    check_severities([severity], f"shift {name}")
    # A generator of its own for each shift and severity: leaving one out does not change the others.
    return CORRUPTIONS[name](
        to_float(images), severity, generator_of(list(CORRUPTIONS).index(name), severity, seed)
    )


def generator_of(number: int, severity: int, seed: int) -> torch.Generator:
    """What shift ``number`` draws from. No two of (number, severity, seed < 2**33) share a seed."""
    high, low = divmod(number, 10)
    return torch.Generator().manual_seed((high << 40) + seed * 100 + low * 10 + severity)


def check_severities(severities: Sequence[int], where: str) -> None:
    """Raise DataError unless there are severities, and all of them are 1 to 5."""
    if not severities:
        raise DataError("no severity was chosen", where=where, expected="some of 1 to 5")
    for severity in severities:
        if severity not in SEVERITIES:
            raise DataError("there is no such severity", where=where, got=severity, expected="1 to 5")


def evaluate_shifts(
    model: nn.Module,
    data: Data,
    *,
    severities: Sequence[int] = MEASURED,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Accuracy on the shifted test split: {"noise": ..., ..., "mean": ...}, each averaged over severities.

    The five shifts of DEFAULT; any other suite, and several models at once, by `suites.measure_shifts`.
    """
    check_severities(severities, "evaluate_shifts")
    result = {}
    for name in DEFAULT:
        accuracies = [
            evaluate(model, shifted(name, data.test_x, severity, seed), data.test_y, batch_size, device)[
                "accuracy"
            ]
            for severity in severities
        ]
        result[name] = sum(accuracies) / len(accuracies)
    result["mean"] = sum(result.values()) / len(result)
    return result
