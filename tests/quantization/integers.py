"""Small models that train on integers, and what looks at their codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.optim import IntegerSGD
from bitsmith.quantization import integer_training
from bitsmith.quantization.integer_gradients import WeightGradient
from bitsmith.quantization.integer_layers import PackedWeight
from bitsmith.quantization.integer_prepare import prepare_integer


class Taken:
    """A sink that keeps the whole gradient of a layer's weight."""

    def __init__(self, layer: integer_training.IntLayer) -> None:
        layer.sink, self.rows, self.shape = self, None, layer.weight.shape

    def __call__(self, gradient: WeightGradient) -> None:
        count = self.shape[0] if gradient.rows is None else len(gradient.rows)
        middle = count // 2
        self.gradient = torch.cat([gradient.block(0, middle), gradient.block(middle, count)])
        self.rows = gradient.rows


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(layer: nn.Module, bits: int = 4, **options: object) -> integer_training.IntLayer:
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    prepare_integer(model, bits, first_last_bits=None, **options)  # type: ignore[arg-type]
    return model[0]  # type: ignore[return-value]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(12 * 3 * 3, 33),
        nn.ReLU(),
        nn.Linear(33, 10),
    )


def stepped(model: nn.Module, steps: int = 2) -> nn.Module:
    optimizer = IntegerSGD(model, lr=0.5)
    for seed in range(steps):
        F.cross_entropy(model(drawn(6, 1, 8, 8, seed=seed)), torch.arange(6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.detach()
    return model


def codes_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}
    assert found
    return {name: (weight.codes.clone(), weight.scale.clone()) for name, weight in found.items()}


def assert_same(left: dict[str, tuple[Tensor, Tensor]], right: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert left.keys() == right.keys()
    for a, b in zip(left.values(), right.values(), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
