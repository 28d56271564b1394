"""The progressive schedule: which precision when, what it hands over, and how it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitsmith.errors import SchemeError
from bitsmith.methods.progressive_bits import ProgressiveBits, paper_schedule
from bitsmith.quantization import Scheme, calibrate, parameter_groups, prepare, sites

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


def stepping(bits: int = 4, **options: object) -> tuple[nn.Module, ProgressiveBits]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    prepare(model, Scheme(bits=bits, granularity="channel"), Scheme(bits=bits), first_last_bits=None)
    method = ProgressiveBits(**options)
    method.attach(model)
    calibrate(model, [X])
    return model, method


def widths_over(model: nn.Module, method: ProgressiveBits, steps: int) -> list[dict[str, float]]:
    """Site -> width in each step of a training."""
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-2))
    seen = []
    for step in range(steps):
        seen.append({name: float(q.bits.expected()) for name, q in sites(model).items()})
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        method.after_backward(lambda: torch.zeros(()))
        optimizer.step()
        method.after_step(step, steps)
    return seen


def test_the_papers_table_in_shares_of_the_steps() -> None:
    model, method = stepping(4)
    seen = [step["0.weight"] for step in widths_over(model, method, 25)]
    assert seen == [8, 7, 6, 5.5, 5] + 2 * [4.75] + 2 * [4.5] + 2 * [4.25] + 14 * [4]


@pytest.mark.parametrize("goal", [1, 2, 3, 4])
def test_to_fewer_bits_it_goes_on_and_leaves_as_many_steps_at_the_goal(goal: int) -> None:
    schedule = paper_schedule(goal)
    assert [b for b, _ in schedule] == sorted((b for b, _ in schedule), reverse=True)
    assert schedule[-1][0] > goal
    assert sum(share for _, share in schedule) == pytest.approx(11 / 25)


def test_activations_move_only_where_they_are_asked_to() -> None:
    model, method = stepping(4)
    assert {step["2.input"] for step in widths_over(model, method, 10)} == {4}
    model, method = stepping(4, tensors="both", schedule=[(8, 0.2), (5, 0.3)])
    assert [step["2.input"] for step in widths_over(model, method, 10)] == 2 * [8] + 3 * [5] + 5 * [4]


def test_some_sites_alone() -> None:
    model, method = stepping(4, sites=["2.*"], schedule=[(8, 0.5)])
    first = widths_over(model, method, 4)[0]
    assert first["2.weight"] == 8
    assert first["0.weight"] == 4


def test_scales_settle_alone_after_each_step_down() -> None:
    model, method = stepping(4, schedule=[(8, 0.5)], scale_steps=2)
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-2))
    weight, quantizer = model[2].weight, sites(model)["2.weight"]
    moved = []
    for step in range(10):
        before = weight.detach().clone(), quantizer.range.detach().clone()
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        method.after_backward(lambda: torch.zeros(()))
        optimizer.step()
        method.after_step(step, 10)
        moved.append((not torch.equal(before[0], weight), not torch.equal(before[1], quantizer.range)))
    assert moved == 5 * [(True, True)] + 2 * [(False, True)] + 3 * [(True, True)]


def test_its_plan_is_what_the_model_was_prepared_at_once_it_is_there() -> None:
    for bits in (2, 3):
        model, method = stepping(bits, tensors="both")
        assert method.plan() is None
        widths_over(model, method, 25)
        assert {q.bits.whole() for q in sites(model).values()} == {bits}
        assert set(method.plan().bits.values()) == {bits}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": [(6, 0.1), (7, 0.1)]}, r"schedule\.1.*7 bits after 6.*fewer"),
        ({"schedule": [(9, 0.1)]}, r"schedule\.0"),
        ({"schedule": [(6, 0.6), (5, 0.5)]}, "less than all steps"),
        ({"schedule": [6, 5]}, r"schedule\.0"),
        ({"schedule": [(6, 0.0)]}, "share of the steps"),
        ({"scale_steps": -1}, "scale_steps"),
        ({"tensors": "weight"}, "Did you mean weights"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        ProgressiveBits(**options)
