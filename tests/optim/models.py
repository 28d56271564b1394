"""Small models and points that shift, for training without gradients; and a watch on what operations
allocate."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitsmith as bs
from bitsmith.optim.zeroth_order import ZerothOrder


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


def prepared_mlp() -> nn.Module:
    model = mlp()
    bs.prepare(model, weights=bs.Scheme(bits=4))
    return model


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


def trained_mlp() -> nn.Module:
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
