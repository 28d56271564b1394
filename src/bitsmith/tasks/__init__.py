"""What models are trained for: classes of images and of their pixels, next tokens of text."""

from bitsmith.tasks.classification import evaluate, predict, to_float
from bitsmith.tasks.data import load
from bitsmith.tasks.dataset import Data
from bitsmith.tasks.examples import Examples
from bitsmith.tasks.masks import MaskData
from bitsmith.tasks.models import build
from bitsmith.tasks.shifts import evaluate_shifts
from bitsmith.tasks.text import TextData

__all__ = [
    "Data",
    "Examples",
    "MaskData",
    "TextData",
    "build",
    "evaluate",
    "evaluate_shifts",
    "load",
    "predict",
    "to_float",
]
