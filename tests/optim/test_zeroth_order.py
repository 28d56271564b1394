"""Forward-only training: the estimate is the gradient's, weights come back to the bit, memory stays that of a
forward pass, and what is learned is more than noise."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitsmith as bs
from bitsmith.errors import BitsmithError, FormatError, SchemeError, SiteError, TrainingDiverged
from bitsmith.numerics.noise import BLOCK
from bitsmith.optim.parts import PARTS, pack_rest
from bitsmith.optim.zeroth_order import ZerothOrder
from bitsmith.quantization.integer_layers import PackedWeight
from bitsmith.quantization.integer_products import run_on_kernels

TARGET = torch.tensor([0.5, -1.0, 2.0, 0.0, -0.25])
CURVATURE = torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0])
START = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.5])


def quadratic(w: Tensor) -> Tensor:
    return (CURVATURE * (w - TARGET).double() ** 2).sum() / 2


def estimates(count: int, **options: Any) -> Tensor:
    """(count, 5): steps of one seed each, divided by -lr."""
    found = []
    for seed in range(count):
        w = START.clone()
        optimizer = ZerothOrder([w], lr=1.0, eps=0.125, seed=seed, **options)
        optimizer.step(lambda w=w: quadratic(w))
        found.append((START - w).double())
    return torch.stack(found)


@pytest.mark.parametrize("noise", ["signs", "normal"])
def test_the_mean_over_seeds_is_the_gradient(noise: str) -> None:
    found = estimates(600, noise=noise)
    gradient = (CURVATURE * (START - TARGET)).double()
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - gradient).abs() < 4 * error).all()
    # Signs leave out their own element: |g|^2 - g_i^2; normal numbers double it: |g|^2 + g_i^2.
    own = gradient**2 * (-1 if noise == "signs" else 1)
    torch.testing.assert_close(found.var(0), (gradient**2).sum() + own, rtol=0.3, atol=0.0)


def test_more_directions_divide_the_variance() -> None:
    one, eight = estimates(300).var(0).sum(), estimates(200, directions=8).var(0).sum()
    assert float(one / eight) == pytest.approx(8, rel=0.3)


def weights(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(8, 4, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    odd = torch.randn(BLOCK + 77, generator=generator)
    return [conv, odd, 1e-6 * torch.randn(5, generator=generator), torch.zeros(3), torch.randn(2, 3).double()]


@pytest.mark.parametrize("noise", ["signs", "normal"])
@pytest.mark.parametrize("directions", [1, 3])
def test_weights_come_back_to_the_bit(noise: str, directions: int) -> None:
    tensors = weights()
    before = [t.clone() for t in tensors]
    optimizer = ZerothOrder(tensors, lr=0.0, noise=noise, directions=directions)
    seen: list[Tensor] = []

    def closure() -> float:
        seen.append(tensors[1].clone())
        return float(len(seen))

    optimizer.step(closure)
    restored = [t.clone() for t in tensors]
    for _ in range(10):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(tensors, restored, strict=True))
    # They were put on a lattice, once, of 2^-21 of the largest or of eps at most.
    for tensor, was in zip(restored, before, strict=True):
        assert float((tensor - was).abs().max()) <= 2**-21 * (float(was.abs().max()) + 5e-3)
    away = seen[2 * directions] - restored[1], seen[2 * directions + 1] - restored[1]
    torch.testing.assert_close(away[0], -away[1], rtol=0, atol=0)
    assert float(away[0].square().mean()) == pytest.approx(1e-6, rel=0.05)


def test_an_error_in_the_closure_leaves_the_weights() -> None:
    w = START.clone()
    optimizer = ZerothOrder([w], lr=0.1)
    calls: list[int] = []

    def closure() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return math.inf if len(calls) > 2 else 0.0

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(w, START)
    with pytest.raises(TrainingDiverged, match="the loss is not finite"):
        optimizer.step(closure)
    assert torch.equal(w, START)


def test_steps_below_the_lattice_count_in_the_mean() -> None:
    w = torch.ones(4000)
    optimizer = ZerothOrder([w], lr=1e-9, eps=1.0)  # a float32 at 1 does not take steps below 6e-8
    for _ in range(20):
        optimizer.step(lambda: w.double().sum())
    noise = 1e-9 * math.sqrt(20 * 4000)  # of the other elements, in every one
    assert float(w.double().sum() / 4000 - 1) == pytest.approx(-20e-9, abs=6 * noise / math.sqrt(4000) + 2e-8)
    assert not torch.equal(w, torch.ones(4000))


def test_a_tensor_that_grows_keeps_being_restored() -> None:
    w = torch.full((50,), 1e-3)
    optimizer = ZerothOrder([w], lr=0.5, eps=0.01)
    for _ in range(40):
        optimizer.step(lambda: (w - 100).double().square().mean())
    assert float(w.mean()) > 1
    optimizer.param_groups[0]["lr"] = 0.0
    before = w.clone()
    optimizer.step(lambda: w.sum())
    assert torch.equal(w, before)


def test_what_others_write_is_put_on_the_lattice_and_then_restored() -> None:
    w = torch.randn(1000)
    optimizer = ZerothOrder([w], lr=0.0)
    optimizer.step(lambda: 1.0)
    w.add_(torch.rand(1000))
    for eps in (1e-3, 0.5, 0.01):  # as a schedule might
        optimizer.param_groups[0]["eps"] = eps
        optimizer.step(lambda: 1.0)
        before = w.clone()
        optimizer.step(lambda: 1.0)
        assert torch.equal(w, before)


def test_momentum_is_the_sum_of_the_steps_it_remembers() -> None:
    w, plain = START.clone(), START.clone()
    with_momentum = ZerothOrder([w], lr=0.01, momentum=0.5, history=2, seed=3)
    steps: list[Tensor] = []
    for step in range(4):
        with torch.no_grad():
            plain.copy_(w)
        alone = ZerothOrder([plain], lr=0.01, seed=3)
        alone.steps = step
        alone.step(lambda: quadratic(plain))
        steps.insert(0, plain - w)
        expected = w + sum(0.5**age * s for age, s in enumerate(steps[:3]))
        with_momentum.step(lambda: quadratic(w))
        torch.testing.assert_close(w, expected, rtol=0, atol=2e-6)


# ---- models


def mlp(seed: int = 0, hidden: int = 48) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3)]
    return nn.Sequential(*layers)


def rows(count: int, gain: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of 3 clouds; ``gain`` shifts them as contrast does."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, 3, (count,), generator=generator)
    x = centres[y] + 0.5 * torch.randn(count, 8, generator=generator)
    return gain * x + (1 - gain) * 1.5, y


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """W4A8 in its middle layer, 8 bits outside, on points without a shift."""
    model = mlp()
    x, y = rows(600)
    for prepared in (False, True):
        if prepared:
            bs.prepare(model, weights=bs.Scheme(bits=4), activations=bs.Scheme(bits=8))
            bs.calibrate(model, [x])
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def packed(model: nn.Module) -> nn.Module:
    return bs.finalize(model, rows(4)[0])


def train(model: nn.Module, optimizer: ZerothOrder, steps: int, gain: float = 0.3) -> None:
    x, y = rows(200, gain, seed=1)
    for _ in range(steps):
        optimizer.step(lambda: F.cross_entropy(model(x), y))


FORMS: dict[str, Callable[[nn.Module], tuple[nn.Module, dict[str, Any]]]] = {
    "latent weights": lambda m: (copy.deepcopy(m), {"lr": 0.02, "eps": 0.02, "unit": "rms"}),
    "codes": lambda m: (packed(m), {"lr": 0.15, "eps": 0.5}),
    "codes with a residual": lambda m: (packed(m), {"lr": 0.15, "eps": 0.5, "residual": True}),
    "scales of codes": lambda m: (
        packed(m),
        {"lr": 0.03, "eps": 0.02, "unit": "rms", "parts": ("scales", "biases")},
    ),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_model_recovers_from_a_shift_beyond_noise(form: str, trained: nn.Module) -> None:
    x, y = rows(600, 0.3, seed=2)
    left = []
    for seed in range(3):
        model, options = FORMS[form](trained)
        before = loss_of(model, x, y)
        train(model, ZerothOrder(model, normalize=True, seed=seed, **options), 60)
        left.append(loss_of(model, x, y) / before)
    mean, error = torch.tensor(left).mean(), torch.tensor(left).std() / math.sqrt(3)
    assert mean + 3 * error < 0.95


@pytest.mark.parametrize("form", list(FORMS))
def test_a_resumed_run_ends_at_the_same_bits(form: str, trained: nn.Module) -> None:
    def start() -> tuple[nn.Module, ZerothOrder]:
        model, options = FORMS[form](trained)
        return model, ZerothOrder(model, normalize=True, momentum=0.9, history=3, directions=2, **options)

    model, optimizer = start()
    train(model, optimizer, 7)
    other, resumed = start()
    train(other, resumed, 3)
    saved = copy.deepcopy((other.state_dict(), resumed.state_dict()))
    last, final = start()
    last.load_state_dict(saved[0])
    final.load_state_dict(saved[1])
    train(last, final, 4)
    ended = last.state_dict()
    assert all(torch.equal(tensor, ended[name]) for name, tensor in model.state_dict().items())


def test_the_state_is_a_few_numbers(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    optimizer = ZerothOrder(model, lr=0.01, momentum=0.9)
    train(model, optimizer, 3)

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        return (
            [leaf for inner in value for leaf in leaves(inner)]
            if isinstance(value, list | tuple)
            else [value]
        )

    found = leaves(optimizer.state_dict())
    assert len(found) < 60
    assert all(leaf is None or isinstance(leaf, int | float | str) for leaf in found)


# ---- codes


def codes_of(model: nn.Module) -> list[Tensor]:
    return [m.integers().clone() for m in model.modules() if isinstance(m, PackedWeight)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kernels", [False, True])
def test_codes_are_never_written_before_the_step(bits: int, kernels: bool) -> None:
    model = mlp(hidden=300)
    bs.prepare(model, weights=bs.Scheme(bits=bits), activations=bs.Scheme(bits=8), first_last_bits=None)
    bs.calibrate(model, [rows(50)[0]])
    model = packed(model)
    if kernels:
        assert run_on_kernels(model)
    x, stored = rows(20)[0], [b.clone() for b in model.buffers()]
    outputs, plain = [], model(x)
    before, seen = codes_of(model), []

    def closure() -> float:
        seen.append(codes_of(model))
        outputs.append(model(x))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), stored, strict=True))
        return 1.0

    ZerothOrder(model, lr=0.1, eps=0.75).step(closure)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), stored, strict=True))  # L+ - L- was 0
    assert torch.equal(model(x), plain)
    assert not torch.equal(outputs[0], plain)
    assert not torch.equal(outputs[0], outputs[1])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for was, above, below in zip(before, *seen, strict=True):
        up, down = above - was, below - was
        most = math.ceil(0.75 * 2 ** max(bits - 4, 0))
        inside = (was >= low + most) & (was <= high - most)
        assert torch.equal(up[inside], -down[inside])
        assert int(above.min()) >= low
        assert int(above.max()) <= high
        size = 0.75 * 2 ** max(bits - 4, 0)
        spread = up[inside].double()
        assert float(spread.abs().mean()) == pytest.approx(size, rel=0.1)
        assert abs(float(spread.mean())) < 5 * size * 1.2 / math.sqrt(len(spread))


@pytest.mark.parametrize("residual", [False, True])
def test_steps_of_codes_are_right_in_the_mean(residual: bool) -> None:
    """Of a linear function of the values: each code moves against its gradient, by lr * g / s in units of
    v."""
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    bs.prepare(model, weights=bs.Scheme(bits=4), first_last_bits=None)
    model = bs.finalize(model, torch.zeros(1, 64))
    weight = next(m for m in model.modules() if isinstance(m, PackedWeight))
    weight.codes.fill_(0x88)  # codes of 0
    slope = torch.linspace(-1, 1, 512).view(8, 64)
    total = torch.zeros(8, 64)
    for seed in range(200):
        weight.codes.fill_(0x88)
        optimizer = ZerothOrder(model, lr=0.02, eps=0.5, seed=seed, residual=residual)
        optimizer.step(lambda: float((slope * weight.integers()).double().sum()))
        moved = weight.integers().float()
        if residual:
            moved += optimizer.state[weight.codes]["residual"].view(8, 64) / 254
        total += moved
    mean = total / 200
    agreement = float((mean * -slope).sum() / slope.square().sum())
    assert agreement == pytest.approx(0.02, rel=0.25)


def test_a_residual_carries_what_no_whole_code_holds() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    bs.prepare(model, weights=bs.Scheme(bits=8), first_last_bits=None)
    model = bs.finalize(model, torch.zeros(1, 8))
    weight = next(m for m in model.modules() if isinstance(m, PackedWeight))
    before = weight.integers().clone()
    optimizer = ZerothOrder(model, lr=1e-4, eps=1 / 16, residual=True)
    optimizer.step(lambda: float(weight.integers().double().sum()))
    assert torch.equal(weight.integers(), before)
    assert bool(optimizer.state[weight.codes]["residual"].any())


def test_rows_of_an_embedding_move_as_the_whole_table_does() -> None:
    model = nn.Sequential(nn.Embedding(500, 20), nn.Linear(20, 2))
    bs.prepare(model, weights=bs.Scheme(bits=4, granularity="channel"), first_last_bits=None)
    model = bs.finalize(model, torch.arange(4)[None])
    index = torch.tensor([[3, 499, 3, 0]])
    looked_up, whole = [], []

    def closure() -> float:
        looked_up.append(model[0](index))
        whole.append(model[0].weight()[index])
        return 0.0

    ZerothOrder(model, lr=0.1, eps=0.5).step(closure)
    assert torch.equal(torch.stack(looked_up), torch.stack(whole))
    assert not torch.equal(looked_up[0], looked_up[1])


def test_channels_of_several_widths_move_within_their_own_grids() -> None:
    model = nn.Sequential(nn.Linear(33, 6))
    bs.prepare(model, weights=bs.Scheme(bits=(2, 4, 8, 2, 4, 8), granularity="channel"), first_last_bits=None)
    model = bs.finalize(model, torch.zeros(1, 33))
    weight = next(m for m in model.modules() if isinstance(m, PackedWeight))
    optimizer = ZerothOrder(model, lr=3.0, eps=0.5)
    before = weight.integers().clone()
    for _ in range(5):
        optimizer.step(lambda: float(weight.integers().double().sum()))
    after = weight.integers()
    assert not torch.equal(after, before)
    for row, bits in enumerate((2, 4, 8, 2, 4, 8)):
        assert int(after[row].min()) >= -(2 ** (bits - 1))
        assert int(after[row].max()) < 2 ** (bits - 1)


# ---- memory


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor) and not any(
                isinstance(a, Tensor)
                and a.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                for a in args
            ):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("noise", ["signs", "normal"])
def test_no_direction_is_ever_there_as_a_whole(noise: str) -> None:
    w = torch.randn(40 * BLOCK)
    optimizer = ZerothOrder([w], lr=1e-4, noise=noise, momentum=0.9, directions=2)
    with Largest() as largest:
        for _ in range(2):
            optimizer.step(lambda: 1.0)
    assert 0 < largest.bytes <= 5 * BLOCK  # of 160 in the tensor


def test_a_step_of_codes_makes_nothing_larger_than_a_forward_does() -> None:
    model = nn.Sequential(nn.Linear(2048, 1024))
    bs.prepare(model, weights=bs.Scheme(bits=4), first_last_bits=None)
    model = bs.finalize(model, torch.zeros(1, 2048))
    x = torch.randn(4, 2048)
    with torch.no_grad(), Largest() as forward:
        model(x)
    optimizer = ZerothOrder(model, lr=1.0, eps=0.5)
    with Largest() as step:
        optimizer.step(lambda: model(x).square().mean())
    assert 0 < step.bytes <= forward.bytes


# ---- the light variant


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)


def attention() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Attention(), nn.LayerNorm(8), nn.Linear(8, 3))
    bs.prepare(model, weights=bs.Scheme(bits=4), activations=bs.Scheme(bits=8))
    bs.calibrate(model, [torch.randn(4, 5, 8)])
    return model.eval()


def test_the_light_variant_trains_a_few_layers_and_packs_the_rest() -> None:
    model, x = attention(), torch.randn(2, 5, 8)
    before = model(x)
    assert pack_rest(model) == ["1.q_proj", "1.v_proj"]
    assert torch.equal(model(x), before)
    assert [n for n, p in model.named_parameters() if p.ndim == 2 and n.endswith("weight")] == [
        "1.q_proj.weight",
        "1.v_proj.weight",
    ]
    stored = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = ZerothOrder(model, lr=0.1, eps=0.02, unit="rms", normalize=True)
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(x)[:, 0], torch.tensor([0, 2])))
    assert not torch.equal(model(x), before)
    assert all(torch.equal(b, stored[n]) for n, b in model.named_buffers())
    after = model(x)
    whole = bs.finalize(model, x)
    torch.testing.assert_close(whole(x), after, rtol=0, atol=1e-6)
    assert not any(n.endswith("proj.weight") for n, _ in whole.named_parameters())


# ---- what is refused


def test_parts_and_layers_choose_what_trains(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ZerothOrder(
        model, lr={"weights": 0.1, "biases": 0.1}, parts=("weights", "biases"), layers=("2",), normalize=True
    )
    train(model, optimizer, 2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"2.weight", "2.bias"}
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "biases"]
    assert set(PARTS) == {"weights", "scales", "biases", "others", "transforms"}


REFUSED: dict[str, tuple[Callable[[], Any], type[BitsmithError], str]] = {
    "eps of 0": (lambda: ZerothOrder([START.clone()], lr=1, eps=0), SchemeError, "eps.*above 0"),
    "eps below the lattice": (
        lambda: ZerothOrder([START.clone()], lr=1, eps=1e-9),
        SchemeError,
        "eps.* or more for",
    ),
    "lr below 0": (lambda: ZerothOrder([START.clone()], lr=-1.0), SchemeError, "lr.*0 or more"),
    "lr of words": (lambda: ZerothOrder([START.clone()], lr="much"), SchemeError, "lr.*a finite number"),  # type: ignore[arg-type]
    "no direction": (lambda: ZerothOrder([START.clone()], lr=1, directions=0), SchemeError, "directions"),
    "momentum of 1": (lambda: ZerothOrder([START.clone()], lr=1, momentum=1.0), SchemeError, "momentum"),
    "another noise": (lambda: ZerothOrder([START.clone()], lr=1, noise="sign"), SchemeError, "signs"),
    "another part": (lambda: ZerothOrder(attention(), lr=1, parts=("weight",)), SchemeError, "weights"),
    "no lr for a part": (
        lambda: ZerothOrder(attention(), lr={"scales": 1.0}),
        SchemeError,
        "an entry weights",
    ),
    "no closure": (lambda: ZerothOrder([START.clone()], lr=1).step(), SchemeError, "needs a closure"),
    "no tensor": (lambda: ZerothOrder([], lr=1), SiteError, "no tensor to train"),
    "a float model": (lambda: ZerothOrder(mlp(), lr=1), SiteError, "no quantized layer"),
    "all frozen": (
        lambda: ZerothOrder(attention().requires_grad_(False), lr=1),
        SiteError,
        "nothing to train",
    ),
    "no such layer": (lambda: ZerothOrder(attention(), lr=1, layers=("*.o",)), SiteError, "matches no layer"),
    "bfloat16": (lambda: ZerothOrder([START.bfloat16()], lr=1), SchemeError, "bfloat16"),
    "gaps": (lambda: ZerothOrder([torch.ones(4, 4)[:, ::2]], lr=1), SchemeError, "one piece"),
    "another's state": (
        lambda: ZerothOrder([START.clone()], lr=1).load_state_dict({"state": {}, "param_groups": []}),
        FormatError,
        "no state of a ZerothOrder",
    ),
    "no light layer": (lambda: pack_rest(prepared_mlp()), SiteError, "Name layers of this model"),
    "a light glob": (lambda: pack_rest(prepared_mlp(), ("7",)), SiteError, "no layer"),
}


def prepared_mlp() -> nn.Module:
    model = mlp()
    bs.prepare(model, weights=bs.Scheme(bits=4))
    return model


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_trained_is_refused_in_one_line(case: str) -> None:
    make, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
