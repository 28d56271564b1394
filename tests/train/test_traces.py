"""What methods tell over the steps: thinned to a curve, and the same after an interruption."""

import itertools
from pathlib import Path

import pytest
import torch

from bitsmith.errors import Interrupted
from bitsmith.methods.budget_search import BudgetSearch
from bitsmith.quantization import Scheme, calibrate, prepare
from bitsmith.train import Progress, TrainConfig, TrainResult, train
from bitsmith.train.traces import MOST, Traces
from tests.train.problem import attached, data, network


def told(steps: int) -> Traces:
    traces = Traces()
    for step in range(1, steps + 1):
        traces.add(step, {"M.x": torch.tensor(float(step)), "M.y": torch.tensor(-1.0)})
    return traces


@pytest.mark.parametrize("steps", [1, 2, 80, MOST - 1, MOST, MOST + 1, 1000, 12_345])
def test_a_long_run_keeps_evenly_spread_steps_and_the_last(steps: int) -> None:
    rows = told(steps).rows()
    kept = [row["step"] for row in rows]
    assert len(kept) <= MOST
    assert len(kept) >= min(steps, MOST // 2)
    assert (kept[0], kept[-1]) == (1, steps)
    assert len({b - a for a, b in itertools.pairwise(kept[:-1])}) <= 1
    assert all(row == {"step": row["step"], "M.x": row["step"], "M.y": -1.0} for row in rows)


def test_nothing_told_is_nothing_kept() -> None:
    traces = Traces()
    traces.add(1, {})
    assert traces.rows() == []
    assert told(0).state_dict()["rows"] == []


@pytest.mark.parametrize("after", [1, 57, MOST, MOST + 3, 700])
def test_saved_and_loaded_goes_on_as_if_it_had_not_been(after: int) -> None:
    halves = Traces()
    halves.load_state_dict(told(after).state_dict())
    for step in range(after + 1, 801):
        halves.add(step, {"M.x": torch.tensor(float(step)), "M.y": torch.tensor(-1.0)})
    assert halves.rows() == told(800).rows()


def search(path: Path | None = None, after: int = 0) -> TrainResult:
    model = network(dropout=0.0)
    prepare(model, Scheme(bits=4, granularity="channel"), Scheme(bits=4), first_last_bits=None)
    x, y = data()
    method = BudgetSearch({"bops": 0.02}, x[:2], search_share=0.5)
    method.attach(model)
    calibrate(model, [x])
    done = [0]

    def count(told: Progress) -> None:
        done[0] = told.step

    return train(
        model,
        x,
        y,
        TrainConfig(epochs=4, batch_size=10, learning_rate=0.01, device="cpu"),
        methods=[method],
        checkpoint=path,
        progress=count,
        resume=True,
        stop=(lambda: done[0] >= after) if after else None,
    )


def test_a_search_is_traced_at_every_step_up_to_its_decision() -> None:
    result = search()
    assert result.steps == 16
    assert [row["step"] for row in result.traces] == list(range(1, 9))
    names = {"entropy", "temperature", "multiplier_bops", "used_bops"}
    assert set(result.traces[0]) == {"step"} | {f"BudgetSearch.{name}" for name in names}
    used = [row["BudgetSearch.used_bops"] for row in result.traces]
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("after", [3, 8, 11])
def test_an_interrupted_search_has_the_same_traces(tmp_path: Path, after: int) -> None:
    with pytest.raises(Interrupted):
        search(tmp_path / "c", after)
    assert search(tmp_path / "c").traces == search().traces


def test_a_checkpoint_of_before_traces_were_kept_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsmith.train.run import Run

    whole = Run.state_dict
    monkeypatch.setattr(Run, "state_dict", lambda run: {k: v for k, v in whole(run).items() if k != "traces"})
    with pytest.raises(Interrupted):
        search(tmp_path / "c", 3)
    assert [row["step"] for row in search(tmp_path / "c").traces] == list(range(4, 9))


def test_methods_without_a_decision_are_traced_to_the_end() -> None:
    model = network()
    result = train(
        model, *data(), TrainConfig(epochs=2, batch_size=20, device="cpu"), methods=[attached(model)]
    )
    assert [row["step"] for row in result.traces] == [1, 2, 3, 4]
