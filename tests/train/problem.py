"""A small problem with everything that makes resuming hard: BatchNorm, dropout, augmentation, a method."""

import torch
from torch import Tensor, nn

from bitsmith.methods.method import Method
from bitsmith.train import Batches, TrainConfig
from bitsmith.train.distillation import Loss, cross_entropy
from bitsmith.train.run import Run


def data(rows: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (rows, 1, 6, 6) whose class 0..2 is a bright row, in noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (rows,), generator=generator)
    x = 0.3 * torch.randn(rows, 1, 6, 6, generator=generator)
    x[torch.arange(rows), 0, 2 * y] += 1
    return x, y


def network(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64, 3),
        )


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise and a random roll: an augmentation that draws twice."""
    columns = int(torch.randint(0, 3, (1,), generator=generator))
    return images.roll(columns, dims=-1) + 0.1 * torch.randn(images.shape, generator=generator)


class Anchor(Method):
    """Pulls the last layer to a slow average of itself, with noise: a method with tensors and a generator."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("strength", torch.tensor(0.0))
        self.register_buffer("anchor", torch.zeros(3, 64))
        self.register_buffer("noise", torch.zeros(3, 64))
        self.generator = torch.Generator().manual_seed(seed)

    def attach(self, model: nn.Module) -> None:
        self.layers = [model[-1]]
        self.anchor.copy_(model[-1].weight.detach())

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state)

    def penalty(self) -> Tensor:
        return self.strength * (self.layers[0].weight - self.anchor - self.noise).square().sum()

    def after_backward(self, closure) -> None:
        weight = self.layers[0].weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.01 * weight.grad.sign())
        closure()
        with torch.no_grad():
            weight.copy_(before)

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        self.strength.fill_(0.1 * (step + 1) / steps)
        self.anchor.lerp_(self.layers[0].weight, 0.1)
        self.noise.copy_(0.01 * torch.randn(3, 64, generator=self.generator))


def attached(model: nn.Module) -> Anchor:
    method = Anchor()
    method.attach(model)
    return method


def start(
    model: nn.Module, config: TrainConfig, rows: int = 40, methods=(), task_loss: Loss = cross_entropy
) -> Run:
    """A run at step 0, to be stepped by hand."""
    x, y = data(rows)
    batches = Batches(x, y, batch_size=config.batch_size, accumulation=config.accumulation, seed=config.seed)
    model.train()
    return Run(
        model,
        batches,
        config,
        methods=methods,
        task_loss=task_loss,
        device=torch.device("cpu"),
        precision="float32",
    )


def same_state(left: nn.Module, right: nn.Module) -> bool:
    """Equal to the last bit, buffers included."""
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
