"""Activation memory against a hand count."""

import torch
from torch import Tensor, nn

from bitsmith.quantization import Scheme, calibrate, measure, prepare
from bitsmith.quantization.liveness import LiveTensor
from bitsmith.tasks.models import build

FREE = {"weights": None, "activations": Scheme(bits=8), "first_last_bits": None}


def peak(model: nn.Module, x: Tensor, bits: dict[str, int]) -> int:
    return int(measure(model, x).activation_bytes(bits))


def test_a_chain_is_as_by_hand() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    prepare(model, **FREE)
    for samples in (1, 3):  # per sample
        x = torch.rand(samples, 16)
        # x: 16 at a, with the first layer and its ReLU: 64 at b; these with the second's 8 at c; then less
        assert peak(model, x, {"0.input": 8, "2.input": 4, "4.input": 2}) == 16 + 32
        assert peak(model, x, {"0.input": 2, "2.input": 8, "4.input": 8}) == 64 + 8
        assert peak(model, x, {}) == (16 + 64) * 4


def test_a_pooled_tensor_is_held_at_the_width_of_what_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 1, 3))
    prepare(model, **FREE)
    # 4 x 8 x 8 and their maxima 4 x 4 x 4, both at 2 bits
    assert peak(model, torch.rand(3, 1, 8, 8), {"0.input": 1, "3.input": 2}) == 64 + 16


def test_what_is_computed_from_twice_takes_memory_of_its_own() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(h.sigmoid() * h)

    model = Gate()
    prepare(model, **FREE)
    # h and its sigmoid in float, then with their product at 2 bits
    assert peak(model, torch.rand(2, 8), {"first.input": 8, "second.input": 2}) == 2 * 32 * 4 + 8


def test_an_activation_function_in_place_is_as_one_that_is_not() -> None:
    def size(inplace: bool) -> int:
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(inplace), nn.Linear(64, 8))
        prepare(model, **FREE)
        return peak(model, torch.rand(2, 16), {"0.input": 8, "2.input": 4})

    assert size(inplace=True) == size(inplace=False) == 32 + 8 * 4  # 64 at 4 bits, and 8 in float


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def test_what_a_residual_addition_reads_stays_in_float_and_alive() -> None:
    model = Residual()
    prepare(model, **FREE)
    bits = {"first.input": 2, "second.input": 4}
    # x (float: the addition reads it), the output of second and the sum
    assert peak(model, torch.rand(2, 32), bits) == 3 * 32 * 4
    live = measure(model, torch.rand(2, 32)).live
    assert LiveTensor(32, ("second.input",)) in live.tensors
    assert LiveTensor(32, ("first.input",)) not in live.tensors


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 4), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), -1)
        return self.left(x) + self.right(x)


def test_what_several_sites_read_is_held_at_the_widest() -> None:
    model = Branches()
    prepare(model, **FREE)
    x = torch.rand(2, 8, 8)
    assert peak(model, x, {"left.input": 2, "right.input": 4}) == 32 + 2 * 16
    assert peak(model, x, {"left.input": 6, "right.input": 4}) == 48 + 2 * 16
    assert peak(model, x, {"left.input": 6}) == 256 + 2 * 16


def test_a_batchnorm_that_is_folded_takes_no_memory() -> None:
    def size(*middle: nn.Module) -> int:
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(4, 1, 3)).eval()
        prepare(model, Scheme(bits=8, granularity="channel"), Scheme(bits=8), first_last_bits=None)
        calibrate(model, [torch.rand(2, 1, 8, 8)])
        cost = measure(model, torch.rand(2, 1, 8, 8))
        return int(cost.activation_bytes(cost.present))

    assert size(nn.BatchNorm2d(4)) == size() == 4 * 64 + 36 * 4


def test_memory_grows_with_bits_and_is_differentiable() -> None:
    for name in ("digits_cnn", "digits_vit"):
        model = build(name)
        prepare(model, Scheme(bits=8, granularity="channel"), Scheme(bits=8))
        cost = measure(model, torch.rand(2, 1, 8, 8))
        found = [cost.activation_bytes(dict.fromkeys(cost.present, b)) for b in (1, 2, 4, 6, 8)]
        assert found == sorted(found)
        assert all(isinstance(size, int) for size in found)
        assert found[0] <= found[-1] <= cost.report()["activation_bytes_float"] == cost.activation_bytes({})
    bits = {site: torch.tensor(4.0, requires_grad=True) for site in cost.present}
    size = cost.activation_bytes(bits)
    size.backward()
    assert size.item() == cost.activation_bytes(dict.fromkeys(cost.present, 4))
    assert any(b.grad is not None and b.grad > 0 for b in bits.values())
