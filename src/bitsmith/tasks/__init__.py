"""Image classification: data, built-in models, the metric, and accuracy under shifts of the input."""

from bitsmith.tasks.classification import evaluate, predict
from bitsmith.tasks.data import load
from bitsmith.tasks.dataset import Data, to_float
from bitsmith.tasks.models import build
from bitsmith.tasks.shifts import evaluate_shifts

__all__ = ["Data", "build", "evaluate", "evaluate_shifts", "load", "predict", "to_float"]
