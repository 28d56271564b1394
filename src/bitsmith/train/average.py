"""Exponential moving average (EMA) of the latent weights; quantized after averaging.

It holds all float parameters of the model, ranges included. Logits and trained bit-widths stay out: their
average is no decision. Buffers stay out, too: BatchNorm statistics of other weights are wrong for the
averaged ones, so the caller re-estimates them after `copy_to`. Unlike torch.optim.swa_utils.AveragedModel no
second module exists, only its tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitsmith.quantization import sites


class Average:
    """θ̄ ← d_t·θ̄ + (1 - d_t)·θ,  d_t = min(decay, (1 + t)/(10 + t)) after the t-th step (t = 1, 2, ...).

    The rising decay forgets the start, which a constant one keeps with weight decay^t: much in a short run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        widths = {id(p) for quantizer in sites(model).values() for p in quantizer.bits.parameters()}
        averaged = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not name.endswith("logits") and id(parameter) not in widths
        }
        self.parameters: list[Tensor] = list(averaged.values())
        self.values = {name: parameter.detach().clone() for name, parameter in averaged.items()}
        self._list = list(self.values.values())

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._list, self.parameters, 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrite the model's parameters with their averages."""
        for parameter, value in zip(self.parameters, self._list, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **self.values}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, value in self.values.items():
            stored = state[name]
            assert isinstance(stored, Tensor)
            value.copy_(stored)
