"""Which rows a step sees, and how they are augmented: pure functions of (seed, epoch, step).

There is no data loader with a position to save: the permutation of an epoch and the noise of a batch are
drawn from generators seeded by hashes, so that any step can be made again, which is what an exact resume
needs. The last, smaller batch of an epoch is kept. All tensors live on the training device.
Without augmentation a teacher sees the same inputs every epoch, so its logits are computed once, unless they
are too many to keep, as those of a language model are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmith.errors import DataError
from bitsmith.train.distillation import counted

KEPT = 2**26  # logits of a teacher: 256 MB

Augment = Callable[[Tensor, torch.Generator], Tensor]
AugmentBoth = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Teacher = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step's batch; ``share`` is its part of the rows, ``weight`` that of the targets that count,
    which is the factor of its loss."""

    x: Tensor
    y: Tensor
    teacher_logits: Tensor | None
    share: float
    weight: float | Tensor


def seed_for(seed: int, *parts: int | str) -> int:
    """A seed that differs for every (seed, parts), the same on every machine."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class Batches:
    """Steps of ``batch_size`` rows in a new order every epoch, each split into ``accumulation`` parts."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        augment: Augment | None = None,
        augment_both: AugmentBoth | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        if len(x) != len(y) or len(x) == 0:
            raise DataError(
                "inputs and targets do not pair up",
                where="train data",
                got=f"{len(x)} and {len(y)} rows",
                expected="as many of both, at least one",
            )
        self.x, self.y, self.teacher, self.augment, self.augment_both = x, y, teacher, augment, augment_both
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self._teacher_logits: Tensor | None = None
        if teacher is not None and augment is None and augment_both is None:
            first, *others = x.split(batch_size)
            logits = teacher(as_float(first))
            if logits.numel() * len(x) <= KEPT * len(first):
                rest = (teacher(as_float(part)) for part in others)
                self._teacher_logits = torch.cat([logits, *rest])
        self.steps_per_epoch = -(-len(x) // batch_size)
        self._noise = torch.Generator(device=x.device)
        self._order: Tensor | None = None
        self._epoch = -1

    def order(self, epoch: int) -> Tensor:
        """The permutation of the rows in this epoch."""
        if self._order is None or self._epoch != epoch:
            generator = torch.Generator().manual_seed(seed_for(self.seed, "order", epoch))
            self._order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
            self._epoch = epoch
        return self._order

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step ``step``, counted from 0 over all epochs.

        The whole batch is augmented before it is split, so that the split changes nothing.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        x, y = as_float(self.x[rows]), self.y[rows]
        self._noise.manual_seed(seed_for(self.seed, "augment", epoch, index))
        if self.augment is not None:
            x = self.augment(x, self._noise)
        if self.augment_both is not None:
            x, y = self.augment_both(x, y, self._noise)
        soft = [self._soft(*pair) for pair in zip(self._split(x), self._split(rows), strict=True)]
        targets = self._split(y)
        return [
            MicroBatch(part, target, logits, len(part) / len(x), weight)
            for part, target, logits, weight in zip(
                self._split(x), targets, soft, weights(targets), strict=True
            )
        ]

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(self.accumulation) if self.accumulation > 1 else (tensor,)

    def _soft(self, x: Tensor, rows: Tensor) -> Tensor | None:
        if self._teacher_logits is not None:
            return self._teacher_logits[rows]
        return self.teacher(x) if self.teacher is not None else None


def weights(targets: Sequence[Tensor]) -> list[float | Tensor]:
    """The part that each micro-batch has of all targets that count, 0-D; where all do, of the rows."""
    masks = [mask for part in targets if (mask := counted(part)) is not None]
    if len(targets) == 1 or not masks:
        rows = sum(len(part) for part in targets)
        return [len(part) / rows for part in targets]
    sums = torch.stack([mask.sum() for mask in masks])
    return list(sums / sums.sum())


def as_float(x: Tensor) -> Tensor:
    """Images stored as bytes become float32 in 0..1; everything else passes, tokens (int64) as well."""
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x
