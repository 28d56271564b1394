"""`TableData`: rows of numbers with a class each, and the same table where one feature lies higher.

Covariate shift by a split of one feature: training, validation and test rows are those at or below its
q-quantile, the shifted rows those above, which the model has never seen the like of. The classes' shares
move with it, as they do in the world.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, MissingExtra, nearest
from bitsmith.tasks.augment import Augmentation
from bitsmith.tasks.dataset import hold_out
from bitsmith.tasks.examples import SPLITS
from bitsmith.tasks.labelled import Labelled, check_labels
from bitsmith.tasks.shifts import Shift

FOLDS = 5


@dataclass(frozen=True, eq=False)
class TableData(Labelled):
    """Rows (N, features) float32 with labels (N,) int64; ``shifted_x``: those where ``feature`` is high.

    Raises DataError where anything is amiss.
    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    shifted_x: Tensor
    shifted_y: Tensor
    feature: str
    classes: tuple[str, ...]
    name: str = "table"
    augment: Augmentation | None = None

    unit: ClassVar[str] = "rows"
    default_shifts: ClassVar[tuple[str, ...]] = ("covariate",)

    def __post_init__(self) -> None:
        for split in (*SPLITS, "shifted"):
            rows, where = getattr(self, f"{split}_x"), f"{self.name}: {split}_x"
            if rows.ndim != 2 or rows.dtype != torch.float32 or rows.shape[1:] != self.train_x.shape[1:]:
                got = f"{rows.dtype} of shape {tuple(rows.shape)}"
                raise DataError(
                    "rows have the wrong form", where=where, got=got, expected="float32 (N, features)"
                )
            if not len(rows) and split != "val":
                raise DataError("there are no rows", where=where, got="0 rows", expected="at least one")
            if not bool(rows.isfinite().all()):
                raise DataError("there are NaN or infinite values", where=where, expected="finite numbers")
            check_labels(getattr(self, f"{split}_y"), len(rows), self.classes, f"{self.name}: {split}_y")

    def shifts(self) -> tuple[Shift, ...]:
        """The rows beyond the quantile."""
        return (Shift("covariate", "covariate", self._beyond, graded=False),)

    def _beyond(self, severity: int, seed: int, model: nn.Module | None) -> tuple[Tensor, Tensor]:
        return self.shifted_x, self.shifted_y

    def facts(self) -> dict[str, Any]:
        """The task, and the feature that is high in the shifted rows."""
        return {"task": "tabular", "shifted_feature": self.feature}


def breast_cancer(
    seed: int = 0, feature: str = "mean texture", quantile: float = 0.75, validation: float = 0.125
) -> TableData:
    """scikit-learn's 569 tumours, 30 measurements each (float32), malignant or benign.

    Train, validation and test (a fifth) are rows whose ``feature`` is at most its ``quantile``; the shifted
    rows are those above. Raises DataError, MissingExtra.
    """
    where = "data breast_cancer"
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        raise MissingExtra("vision", "scikit-learn", "the breast_cancer data set") from None
    bunch = load_breast_cancer()
    names = [str(name) for name in bunch.feature_names]
    if feature not in names:
        near = nearest(str(feature), names, 1)
        raise DataError(
            "there is no such feature",
            where=f"{where}: feature",
            got=feature,
            remedy=f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(names)}",
        )
    if isinstance(quantile, bool) or not isinstance(quantile, int | float) or not 0 < quantile < 1:
        raise DataError("this is no quantile", where=f"{where}: quantile", got=quantile, expected="0 < q < 1")
    rows, labels = torch.from_numpy(bunch.data).float(), torch.from_numpy(bunch.target).long()
    measured = rows[:, names.index(feature)]
    below = measured <= measured.quantile(quantile)
    x, y = rows[below], labels[below]
    kept, test = hold_out(y, 1 / FOLDS, seed, where)
    train, val = hold_out(y[kept], validation, seed, f"{where}: validation")
    train, val = kept[train], kept[val]
    classes = tuple(str(name) for name in bunch.target_names)
    return TableData(
        x[train],
        y[train],
        x[val],
        y[val],
        x[test],
        y[test],
        rows[~below],
        labels[~below],
        feature=feature,
        classes=classes,
        name="breast_cancer",
    )
