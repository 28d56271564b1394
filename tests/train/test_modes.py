"""What trains: settings that belong to a mode, optimizers by name, and the loop without a backward pass."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import RecipeError, TrainingDiverged
from bitsmith.methods.weight_anchor import WeightAnchor
from bitsmith.optim import IntegerAdam, IntegerSGD, IntegerSign, ZerothOrder, state_bytes
from bitsmith.quantization.integer_packed import resume_integer
from bitsmith.train import Progress, TrainConfig, TrainResult, train
from bitsmith.train.loop import _fingerprint
from bitsmith.train.modes import make_optimizer, usual_rate

X = torch.rand(48, 12, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)
FORWARD = {"mode": "zeroth_order", "batch_size": 16, "learning_rate": 0.02}


@functools.cache
def _packed(bits: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    bs.prepare(model.eval(), bs.Scheme(bits=bits, granularity="channel"), bs.Scheme(bits=8))
    bs.calibrate(model, [X])
    return bs.finalize(model, X[:2])


def packed(bits: int = 3) -> nn.Module:
    return copy.deepcopy(_packed(bits))


def forward_only(
    model: nn.Module | None = None, epochs: int = 4, *, changes: Any = None, **options: Any
) -> tuple[nn.Module, TrainResult]:
    model = packed() if model is None else model
    return model, train(model, X, Y, TrainConfig(**FORWARD | (changes or {}), epochs=epochs), **options)


def test_forward_only_training_learns_and_leaves_codes_alone() -> None:
    model, before = packed(), packed().state_dict()
    model.get_submodule("0").weight.scale.mul_(0.3)  # as if its inputs had become dim
    losses = [nn.functional.cross_entropy(model.eval()(X), Y).item()]
    forward_only(model, epochs=12, changes={"learning_rate": 0.1})
    losses.append(nn.functional.cross_entropy(model(X), Y).item())
    assert losses[1] < 0.9 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.endswith("codes"))
    assert not torch.equal(after["3.weight.scale"], before["3.weight.scale"])


def test_both_passes_of_a_step_see_the_same_rows_and_the_loss_told_is_their_mean() -> None:
    seen: list[tuple[Tensor, float]] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        found = nn.functional.cross_entropy(logits, targets)
        assert not torch.is_grad_enabled()
        seen.append((targets, found.item()))
        return found

    told: list[Progress] = []
    forward_only(epochs=1, loss=loss, progress=told.append)
    losses = [now.loss for now in told if now.record is None]
    assert len(seen) == 6
    for step, ((rows, above), (same, below)) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        assert torch.equal(rows, same)
        assert losses[step] == pytest.approx((above + below) / 2)


def test_accumulation_changes_memory_and_nothing_else() -> None:
    whole, parts = (forward_only(changes={"accumulation": n})[0].state_dict() for n in (1, 4))
    for name, tensor in whole.items():
        assert torch.allclose(tensor.float(), parts[name].float(), atol=1e-4), name


@pytest.mark.parametrize("parts", ["scales", "codes", "all"])
def test_a_cut_run_goes_on_to_the_same_bits(parts: str, tmp_path: Path) -> None:
    class Cut(BaseException):
        pass

    def cut(now: Progress) -> None:
        if now.step == 5:
            raise Cut

    changes = {"parts": parts, "directions": 2}
    place: dict[str, Any] = {"checkpoint": tmp_path / "x", "checkpoint_seconds": 0.0}
    with pytest.raises(Cut):
        forward_only(changes=changes, progress=cut, **place)
    model, result = forward_only(changes=changes, resume=True, **place)
    assert result.resumed_at in (4, 5)
    uncut, whole = forward_only(changes=changes)
    resumed, expected = model.state_dict(), uncut.state_dict()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert result.traces == whole.traces
    start = packed().state_dict()
    assert torch.equal(expected["0.weight.codes"], start["0.weight.codes"]) == (parts == "scales")


def test_a_loss_that_is_not_finite_stops_it_before_the_weights_move() -> None:
    model = packed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TrainingDiverged, match="not finite"):
        forward_only(model, loss=lambda logits, targets: logits.sum() * torch.inf)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.float(), before[name].float(), rtol=1e-5), name


def test_traces_say_what_moved() -> None:
    model = packed()
    resume_integer(model)
    config = TrainConfig(epochs=2, batch_size=16, mode="integer", learning_rate=0.05)
    rows = train(model, X, Y, config).traces
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert 0 < max(row["IntegerAdam.moved"] for row in rows) <= 1
    assert all(0 <= row["IntegerAdam.saturated"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", IntegerAdam), ("sgd", IntegerSGD), ("sign", IntegerSign)]
)
def test_integer_optimizers_by_name(name: str, kind: type) -> None:
    model = packed()
    resume_integer(model)
    config = TrainConfig(
        mode="integer", integer_optimizer=name, learning_rate=0.1, weight_decay=0.01,
        range_learning_rate_factor=0.5, seed=3,
    )  # fmt: skip
    made = make_optimizer(model, config, 0.2)
    assert type(made) is kind
    assert isinstance(made, IntegerAdam | IntegerSGD | IntegerSign)
    assert (made.lr, made.rule.weight_decay, made.rule.scale_rate, made.seed) == (0.2, 0.01, 0.5, 3)


def test_the_forward_only_optimizer_moves_codes_by_half_a_code_and_floats_by_epsilon() -> None:
    config = TrainConfig(
        mode="zeroth_order", parts="all", learning_rate=0.1, range_learning_rate_factor=0.5, epsilon=0.01
    )
    made = make_optimizer(packed(), config)
    assert isinstance(made, ZerothOrder)
    rates = {group["name"]: (group["lr"], group["eps"]) for group in made.param_groups}
    assert rates == {"weights": (0.1, 0.5), "scales": (0.05, 0.01), "biases": (0.1, 0.01)}


def test_state_of_forward_only_training_is_that_of_inference_and_a_residual_where_codes_move() -> None:
    model = packed(4)
    per = {parts: state_bytes(model, made(model, parts)) for parts in ("scales", "all")}
    assert per["scales"].optimizer == 0
    assert per["all"].optimizer == per["all"].weights == 12 * 16 + 16 * 4
    assert per["all"].per_weight == per["scales"].per_weight + 1


def made(model: nn.Module, parts: str) -> ZerothOrder:
    found = make_optimizer(model, TrainConfig(mode="zeroth_order", parts=parts))
    assert isinstance(found, ZerothOrder)
    return found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradients": 4}, "train.gradients: this is a setting of mode integer; got 4"),
        ({"mode": "integer", "epsilon": 0.1}, "a setting of mode zeroth_order"),
        ({"mode": "zeroth_order", "integer_optimizer": "sgd"}, "a setting of mode integer"),
        ({"mode": "integer", "ema": 0.9}, "train.ema: not with mode integer: there is no float weight"),
        ({"mode": "integer", "gradient_clip": 1.0}, "no set of gradients is kept"),
        ({"mode": "integer", "accumulation": 2}, "no set of gradients is kept"),
        ({"mode": "integer", "precision": "auto"}, "products are of integers"),
        ({"mode": "integer", "device": "cuda"}, "train on the CPU"),
        ({"mode": "integer", "optimizer": "sgd"}, "train.integer_optimizer names"),
        ({"mode": "zeroth_order", "optimizer": "sgd"}, "needs no gradients"),
        ({"mode": "zeroth_order", "gradient_clip": 1.0}, "there is no gradient"),
        ({"mode": "zeroth_order", "weight_decay": 0.1}, "do not decay"),
        ({"mode": "zeroth_order", "precision": "bfloat16"}, "difference of two losses"),
        ({"mode": "integers"}, "there is no such mode; got integers.*Did you mean integer"),
        ({"mode": "integer", "gradients": 3}, "4 to 8"),
    ],
)
def test_what_does_not_go_with_a_mode_is_refused_with_the_reason(settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        TrainConfig(**settings)
    assert "\n" not in str(error.value)


def test_no_decay_and_the_cpu_are_fine_with_every_mode() -> None:
    for mode in ("integer", "zeroth_order"):
        TrainConfig(mode=mode, weight_decay=0.0, device="cpu")


def test_methods_have_no_place_in_forward_only_training() -> None:
    with pytest.raises(RecipeError, match=r"methods: there is no backward pass.*got WeightAnchor"):
        forward_only(methods=[WeightAnchor()])


def test_each_choice_has_its_usual_rate() -> None:
    assert usual_rate({}) == usual_rate({"mode": "nonsense"}) == {}
    assert usual_rate({"mode": "integer"}) == usual_rate({"mode": "integer", "integer_optimizer": "adam"})
    assert usual_rate({"mode": "integer", "integer_optimizer": "nonsense"}) == {}
    rates = [usual_rate({"mode": "integer", "integer_optimizer": n}) for n in ("adam", "sgd", "sign")]
    assert len({rate["learning_rate"] for rate in rates}) == 3


def test_a_checkpoint_of_before_there_were_modes_still_fits() -> None:
    plain = _fingerprint(TrainConfig(), [], X, Y)
    assert not {"train.mode", "train.parts"} & plain.keys()
    assert _fingerprint(TrainConfig(mode="integer"), [], X, Y)["train.mode"] == "integer"
