"""Fractional bits: what they are pressed to, what they are rounded to, and how they refuse."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, BudgetError, SchemeError, TargetError
from bitsmith.methods.fractional_bits import FractionalBits
from bitsmith.quantization import Scheme, calibrate, measure, parameter_groups, plan_of, prepare, sites
from bitsmith.quantization.finalize import finalize

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 4


def network(width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


def learning(width: int = 12, device: str = "native", **options: object) -> tuple[nn.Module, FractionalBits]:
    model = network(width)
    prepare(model, Scheme(bits=8, granularity="channel"), Scheme(bits=8), first_last_bits=None, target=device)
    method = FractionalBits(X[:1], **options)
    method.attach(model)
    calibrate(model, [X])
    return model, method


def fit(model: nn.Module, method: FractionalBits, steps: int, rate: float = 5e-3) -> list[dict[str, Tensor]]:
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=rate))
    traces = []
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        penalty = method.penalty()
        if penalty.requires_grad:
            penalty.backward()
        traces.append({name: value.clone() for name, value in method.traces().items()})
        optimizer.step()
        method.after_step(step, steps)
    return traces


# ---- the start


def test_widths_start_at_the_widest_or_where_they_are_asked_to() -> None:
    for options, low, high in (
        ({}, 8.0, 8.0),
        ({"start": 4.5}, 4.5, 4.5),
        ({"start": "random", "bits": (3, 5)}, 3.0, 5.0),
    ):
        _, method = learning(strength=0.1, **options)
        b = method.real().detach()
        assert bool(((b >= low - 1e-4) & (b <= high + 1e-4)).all())
        assert ("start" not in options) or options["start"] != "random" or float(b.std()) > 0.1


def test_a_categorical_width_starts_sure_of_the_widest() -> None:
    _, method = learning(strength=0.1, parametrization="categorical", bits=(2, 8))
    p = next(iter(method.widths.values())).probabilities()
    assert float(p[-1].detach()) == pytest.approx(0.9 + 0.1 / 7, abs=1e-3)


# ---- the penalty


def test_averages_are_those_of_the_cost_model_and_differentiable() -> None:
    model, method = learning(strength=0.1, start=4.5, per="channel")
    cost = measure(model, X[:1])
    bits = {name: q.bits.expected() for name, q in sites(model).items()}
    expected = [cost.average_bits(bits, kind) for kind in ("weight", "activation")]
    torch.testing.assert_close(method.averages(method.real()), torch.stack(expected))


@pytest.mark.parametrize("regularizer", ["linear", "quadratic", "size"])
def test_regularizers_follow_their_formula(regularizer: str) -> None:
    _, method = learning(strength=0.3, start=4.0, regularizer=regularizer)
    elements = {"0.weight": 72, "0.input": 6, "2.weight": 144, "2.input": 12, "4.weight": 48, "4.input": 12}
    mean = sum(elements.values()) / 6
    expected = {
        "linear": 6 * 4.0,
        "quadratic": 6 * 4.0**2 / 8,
        "size": sum(4.0 * n / mean for n in elements.values()),
    }[regularizer]
    assert float(method.penalty().detach()) == pytest.approx(0.3 * expected, rel=1e-5)
    method.penalty().backward()
    for width in method.widths.values():
        assert bool((width.offset.grad > 0).all())


@pytest.mark.parametrize("per", ["tensor", "channel", 3])
def test_channels_together_press_as_hard_as_their_tensor(per: str | int) -> None:
    _, method = learning(strength=0.3, start=4.0, per=per)
    assert float(method.penalty().detach()) == pytest.approx(0.3 * 6 * 4.0, rel=1e-5)


def test_a_strength_presses_widths_down_and_more_of_it_further() -> None:
    ends = []
    for strength in (0.01, 1.0):
        model, method = learning(strength=strength, learn_share=1.0)
        fit(model, method, 60)
        ends.append(float(method.learned.mean()))
    assert ends[1] < ends[0] <= 8.0
    assert ends[1] < 6.0


@pytest.mark.parametrize(
    ("mode", "parametrization"),
    [
        *((mode, "continuous") for mode in ("sampled", "argmax", "mixed", "real")),
        ("mixed", "categorical"),
        *(
            pytest.param(mode, "categorical", marks=pytest.mark.slow)
            for mode in ("sampled", "argmax", "real")
        ),
    ],
)
def test_a_target_is_reached_from_above(mode: str, parametrization: str) -> None:
    target = {"average_weight_bits": 4.2, "average_activation_bits": 5.0}
    model, method = learning(target=target, mode=mode, parametrization=parametrization, learn_share=0.8)
    fit(model, method, 150)
    assert method.averages(method.learned).tolist() == pytest.approx(list(target.values()), abs=0.4)


# ---- rounding


def test_allocate_hits_the_average_to_a_hundredth_of_a_bit_and_never_passes_it() -> None:
    model, method = learning(32, target={"average_weight_bits": 4.2}, per="channel", tensors="weights")
    fit(model, method, 40)
    cost = measure(model, X[:1])
    average = cost.average_bits(plan_of(model).bits, "weight")
    assert 4.19 <= average <= 4.2


def test_allocate_is_the_best_of_all_roundings_within_the_average() -> None:
    _, method = learning(target={"average_weight_bits": 4.3}, tensors="weights", start=5.0, bits=(2, 6))
    b = torch.tensor([3.2, 4.7, 5.4])
    names, sizes = list(method.widths), [72, 144, 48]
    found = method._rounded(b)
    plans = [plan for plan in itertools.product(range(2, 7), repeat=3) if average(plan, sizes) <= 4.3]
    dearest = max(average(plan, sizes) for plan in plans)
    best = min(
        (plan for plan in plans if average(plan, sizes) >= dearest * (1 - 0.01 / 4.3)),
        key=lambda plan: sum(n * 4.0 ** (own - k) for n, own, k in zip(sizes, b.tolist(), plan, strict=True)),
    )
    assert [found[name] for name in names] == list(best)


def average(plan: tuple[int, ...], sizes: list[int]) -> float:
    return sum(n * k for n, k in zip(sizes, plan, strict=True)) / sum(sizes)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_widths_that_are_all_at_their_lower_end_stay_there(per: str) -> None:
    model, method = learning(20, strength=5.0, per=per, bits=(2, 4), learn_share=1.0)
    fit(model, method, 40)
    assert float(method.learned.max()) < 2.001
    assert set(plan_of(model).bits.values()) == {2}


@pytest.mark.parametrize(
    ("rounding", "expected"), [("nearest", [3, 5, 5]), ("ceil", [4, 5, 6]), ("floor", [3, 4, 5])]
)
def test_other_roundings_go_site_by_site(rounding: str, expected: list[int]) -> None:
    _, method = learning(strength=0.1, tensors="weights", rounding=rounding)
    assert list(method._rounded(torch.tensor([3.2, 4.7, 5.4])).values()) == expected
    method.storable = {name: [2, 4, 8] for name in method.storable}
    stored = {"nearest": [4, 4, 4], "ceil": [4, 8, 8], "floor": [2, 4, 4]}[rounding]
    assert list(method._rounded(torch.tensor([3.2, 4.7, 5.4])).values()) == stored


def test_rows_that_never_were_in_play_are_calibrated_to_the_trained_weights() -> None:
    model, method = learning(target={"average_weight_bits": 3.0}, tensors="weights", rounding="floor")
    method.storable = {name: [2] for name in method.storable}  # a device that holds two bits only
    fit(model, method, 10)  # widths have come down a little: the row of two bits was never in play
    fresh = network()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    prepare(fresh, Scheme(bits=2, granularity="channel"), None, first_last_bits=None)
    quantizer = sites(model)["2.weight"]
    assert quantizer.bits.whole() == 2
    moved = float((sites(fresh)["2.weight"].levels().scale / quantizer.levels().scale).log().abs().mean())
    assert moved < 0.2


# ---- what is stored


def test_widths_per_channel_are_stored_at_their_true_size_and_run_after_loading(tmp_path: Path) -> None:
    model, method = learning(32, target={"average_weight_bits": 3.4}, per="channel", tensors="weights")
    fit(model, method, 40)
    model.eval()
    plan = plan_of(model)
    assert any(isinstance(bits, tuple) for bits in plan.bits.values())
    packed = finalize(model, X)
    bs.save(packed, tmp_path / "model")
    cost = measure(model, X[:1])
    said = cost.weight_bytes(plan.bits)
    codes = cost.average_bits(plan.bits, "weight") * sum(layer.weight_elements for layer in cost.layers) / 8
    held = sum(t.numel() * t.element_size() for t in packed_tensors(tmp_path / "model"))
    assert held == pytest.approx(said, rel=0.01)
    assert codes < said
    loaded = bs.load(tmp_path / "model", into=network(32), kernels=False)
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)


def packed_tensors(path: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    (file,) = path.glob("*.safetensors")
    return list(load_file(file).values())


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (6, 3)}, r"fractional_bits\.bits.*\[6, 3\].*smaller first"),
        ({"bits": (0, 8)}, r"fractional_bits\.bits"),
        ({"start": 9}, r"fractional_bits\.start.*9"),
        ({"target": {"average_weight_bits": 9}}, r"target\.average_weight_bits.*9.*bits from 1 to 8"),
        ({"target": {"average_weight_bit": 4}}, "Did you mean average_weight_bits"),
        ({"target": {}, "strength": 0.0}, "nothing makes the widths smaller"),
        ({"target": {"average_weight_bits": 4}, "strength": 1.0}, "two ways of the same"),
        ({"mode": "mix"}, "Did you mean mixed"),
        ({"rounding": "round"}, r"fractional_bits\.rounding"),
        ({"per": "row"}, r"fractional_bits\.per"),
        ({"per": 0}, r"fractional_bits\.per"),
        ({"learn_share": 0.0}, r"fractional_bits\.learn_share"),
        ({"strength": -1.0}, r"fractional_bits\.strength"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        FractionalBits(X[:1], **{"strength": 0.0 if "target" in options else 0.1, **options})


def test_a_target_of_sites_that_are_not_learned_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"target\.average_activation_bits.*no site of this kind is free"):
        learning(target={"average_activation_bits": 4}, tensors="weights")


def test_a_target_below_the_narrowest_widths_says_what_they_cost() -> None:
    with pytest.raises(BudgetError, match=r"the cheapest plan costs 3 .*budget is 2"):
        learning(target={"average_weight_bits": 2}, bits=(3, 8))


def test_a_device_without_widths_per_channel_says_so(tmp_path: Path) -> None:
    file = tmp_path / "npu.json"
    file.write_text(json.dumps({"version": 1, "name": "npu", "weight_bits": [2, 4, 8]}))
    with pytest.raises(TargetError, match=r"fractional_bits\.per: .*Choose one width for each tensor"):
        learning(device="onnxruntime", strength=0.1, per="channel")


def test_a_site_has_one_owner() -> None:
    model, _ = learning(strength=0.1)
    with pytest.raises(BitsmithError, match="belong to another method"):
        FractionalBits(X[:1], strength=0.1).attach(model)
