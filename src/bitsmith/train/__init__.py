"""Training: one plain loop, its settings, schedules, distillation, averaging and exact checkpoints."""

from bitsmith.train.batches import Batches
from bitsmith.train.config import TrainConfig
from bitsmith.train.distillation import distillation_loss
from bitsmith.train.loop import Progress, TrainResult, train

__all__ = ["Batches", "Progress", "TrainConfig", "TrainResult", "distillation_loss", "train"]
