"""What models are trained for: image classification (data, metric, shifts) and language modelling."""

from bitsmith.tasks.classification import evaluate, predict, to_float
from bitsmith.tasks.data import load
from bitsmith.tasks.dataset import Data
from bitsmith.tasks.examples import Examples
from bitsmith.tasks.models import build
from bitsmith.tasks.shifts import evaluate_shifts
from bitsmith.tasks.text import TextData

__all__ = [
    "Data",
    "Examples",
    "TextData",
    "build",
    "evaluate",
    "evaluate_shifts",
    "load",
    "predict",
    "to_float",
]
