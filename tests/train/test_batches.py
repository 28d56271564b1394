"""Batches are a pure function of (seed, epoch, step)."""

import pytest
import torch

from bitsmith.errors import DataError
from bitsmith.train.batches import Batches, seed_for
from bitsmith.train.distillation import IGNORED, cross_entropy
from tests.train.problem import data, shift


def rows_of_epoch(batches: Batches, epoch: int) -> list[int]:
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return [row for step in steps for part in batches.step(step) for row in part.y.tolist()]


def numbered(**arguments) -> Batches:
    return Batches(torch.zeros(23, 1), torch.arange(23), batch_size=5, **arguments)


def test_an_epoch_sees_every_row_once_with_the_small_last_batch() -> None:
    batches = numbered()
    assert batches.steps_per_epoch == 5
    assert sorted(rows_of_epoch(batches, 0)) == list(range(23))
    assert len(batches.step(4)[0].y) == 3


def test_the_order_differs_by_epoch_and_by_seed_and_repeats_for_the_same() -> None:
    batches = numbered()
    first = rows_of_epoch(batches, 0)
    assert first != rows_of_epoch(batches, 1)
    assert first == rows_of_epoch(batches, 0) == rows_of_epoch(numbered(), 0)
    assert first != rows_of_epoch(numbered(seed=1), 0)


def test_any_step_can_be_made_again_with_its_augmentation() -> None:
    x, y = data()
    batches = Batches(x, y, batch_size=8, augment=shift)
    first, later = batches.step(3)[0].x, batches.step(7)[0].x
    assert torch.equal(batches.step(3)[0].x, first)
    assert not torch.equal(first, later)


def test_splitting_a_batch_changes_neither_rows_nor_augmentation() -> None:
    x, y = data()
    whole = Batches(x, y, batch_size=8, augment=shift).step(2)
    parts = Batches(x, y, batch_size=8, augment=shift, accumulation=3).step(2)
    assert [len(part.y) for part in parts] == [3, 3, 2]
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert [part.weight for part in parts] == [part.share for part in parts]
    assert torch.equal(torch.cat([part.x for part in parts]), whole[0].x)


def test_parts_of_sequences_weigh_by_the_targets_that_count() -> None:
    y = torch.full((4, 6), IGNORED)
    for row, count in enumerate((1, 2, 3, 6)):
        y[row, :count] = row
    x = torch.randn(4, 6, 5)
    parts = Batches(x, y, batch_size=4, accumulation=2).step(0)
    assert [float(part.weight) for part in parts] == [
        pytest.approx(int((part.y != IGNORED).sum()) / 12) for part in parts
    ]
    together = sum(part.weight * cross_entropy(part.x, part.y) for part in parts)
    torch.testing.assert_close(together, cross_entropy(x, y))
    assert Batches(x, y, batch_size=4).step(0)[0].weight == 1
    assert [part.share for part in parts] == [0.5, 0.5]


def test_bytes_become_floats_in_0_to_1() -> None:
    x = torch.tensor([[0], [51], [255]], dtype=torch.uint8)
    batch = Batches(x, torch.arange(3), batch_size=3).step(0)[0]
    assert dict(zip(batch.y.tolist(), batch.x[:, 0].tolist(), strict=True)) == pytest.approx(
        {0: 0.0, 1: 0.2, 2: 1.0}
    )


def test_a_teacher_is_asked_once_per_row_where_nothing_is_augmented() -> None:
    x, y = data()
    asked = []

    def teacher(inputs: torch.Tensor) -> torch.Tensor:
        asked.append(len(inputs))
        return inputs.flatten(1).sum(1, keepdim=True)

    batches = Batches(x, y, batch_size=8, accumulation=2, teacher=teacher)
    for step in range(2 * batches.steps_per_epoch):
        for part in batches.step(step):
            assert torch.equal(part.teacher_logits, part.x.flatten(1).sum(1, keepdim=True))
    assert sum(asked) == len(x)


def test_a_teacher_sees_the_augmented_inputs() -> None:
    x, y = data()
    batches = Batches(x, y, batch_size=8, accumulation=2, augment=shift, teacher=lambda inputs: inputs + 1)
    for part in batches.step(1):
        assert torch.equal(part.teacher_logits, part.x + 1)


def test_seeds_differ_by_every_part() -> None:
    seeds = {seed_for(0), seed_for(1), seed_for(0, "order", 1), seed_for(0, "order", 2), seed_for(0, "x", 1)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("inputs", "targets"), [(3, 4), (0, 0)])
def test_rows_that_do_not_pair_up_are_refused(inputs: int, targets: int) -> None:
    with pytest.raises(DataError, match="do not pair up"):
        Batches(torch.zeros(inputs, 1), torch.zeros(targets), batch_size=2)


def test_tokens_pass_unchanged_and_too_many_logits_of_a_teacher_are_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, asked = torch.randint(0, 9, (6, 4)), []

    def teacher(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return torch.nn.functional.one_hot(x, 9).float()

    found = []
    for kept in (6 * 4 * 9, 6 * 4 * 9 - 1):
        monkeypatch.setattr("bitsmith.train.batches.KEPT", kept)
        asked.clear()
        batches = Batches(tokens, tokens, batch_size=4, teacher=teacher)
        before = len(asked)
        part = batches.step(0)[0]
        assert part.x.dtype == torch.int64
        assert torch.equal(part.x, part.y)
        assert (len(asked) > before) == (kept < 6 * 4 * 9)
        found.append(part.teacher_logits)
    assert torch.equal(*found)
