"""outliers: the few input channels of a Linear whose values dwarf the others get a width of their own.

One such channel stretches the range of the whole input, so that at few bits the others round to zero. Before
`prepare`, `split_outliers` makes two layers of such a Linear, which together compute what it did:

    y = outliers(x[chosen]) + rest(x[others])

Then each is quantized like any layer: an override keeps `*.outliers.*` at 8 bits, and cost, plan, finalize
and every export hold the parts for what they are. A native file says which layers are split, and where
(`splits_of`), so that it loads into the model as it was before (`split_as`).

Differences from LLM.int8 (2208.07339). Channels are chosen once, by data, so that a file can hold them; and
they stay integers. A rotation (QuaRot and its kin) would need no choice, but costs a float product in front
of the layer, dearer in bit operations than the layer itself at 4 bits.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import SiteError, check_value, matching
from bitsmith.quantization.layers import in_eval_mode


class SplitLinear(nn.Module):
    """A Linear in two: ``chosen`` input channels go through `outliers`, the others through `rest`."""

    chosen: Tensor
    others: Tensor

    def __init__(self, layer: nn.Linear, chosen: Sequence[int]) -> None:
        super().__init__()
        inside = torch.zeros(layer.in_features, dtype=torch.bool)
        inside[list(chosen)] = True
        self.register_buffer("chosen", inside.nonzero().flatten().int())
        self.register_buffer("others", (~inside).nonzero().flatten().int())
        self.to(layer.weight.device)
        self.outliers = _part(layer, self.chosen, None)
        self.rest = _part(layer, self.others, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        few: Tensor = self.outliers(x.index_select(-1, self.chosen))
        return few + self.rest(x.index_select(-1, self.others))


def _part(layer: nn.Linear, channels: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """The Linear of some input channels."""
    part = nn.Linear(len(channels), layer.out_features, bias=False, device=layer.weight.device)
    part.weight = nn.Parameter(layer.weight.detach().index_select(1, channels), layer.weight.requires_grad)
    part.register_parameter("bias", bias)
    return part


@torch.no_grad()
def split_outliers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    share: float = 0.01,
    above: float = 4.0,
    layers: Sequence[str] | None = None,
) -> dict[str, list[int]]:
    """Split the Linear layers of a float ``model`` that have outliers, in place. Returns layer -> channels.

    A channel is an outlier where its largest value over ``batches`` is more than ``above`` times that of the
    median channel; of these the largest, at most ``share`` of the inputs, at least one. layers: globs; by
    default all. A layer whose weight is tied to another's stays whole.

    Raises SiteError for a glob that matches no Linear, SchemeError for numbers out of range.
    """
    check_options(share, above)
    uses = Counter(id(m.weight) for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor))
    found = linear_layers(model, layers)
    wanted = {name: layer for name, layer in found.items() if uses[id(layer.weight)] == 1}
    split = {}
    for name, largest in _largest(model, wanted, batches).items():
        most = max(1, math.floor(share * len(largest)))
        top = largest.topk(min(most, len(largest) - 1)).indices
        chosen = top[largest[top] > above * largest.median()].sort().values.tolist()
        if chosen:
            split[name] = chosen
    _split(model, split)
    return split


def check_options(share: float, above: float) -> None:
    """Raises SchemeError for numbers out of range."""
    check_value("split_outliers.share", share, 0 < share < 1, "a share of the channels between 0 and 1")
    check_value("split_outliers.above", above, above >= 1, "a ratio of at least 1")


def linear_layers(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """The Linear layers that could be split, or those of them that globs name. Raises SiteError for a glob
    that matches none."""
    found = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and name}
    named = matching("outliers.layers", layers, found, "Linear layer") if layers else list(found)
    return {name: found[name] for name in named}


def splits_of(model: nn.Module) -> dict[str, list[int]]:
    """Layer -> channels of a model that was split, prepared and packed ones as well."""
    return {name: m.chosen.tolist() for name, m in model.named_modules() if isinstance(m, SplitLinear)}


def split_as(model: nn.Module, splits: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of ``model`` with the layers split that `splits_of` another said; itself where that is none. One
    that is split already stays. Raises SiteError for what is no Linear, or has no such channels."""
    if not splits:
        return model
    made, layers = copy.deepcopy(model), dict(model.named_modules())
    wanted = {
        name: list(chosen) for name, chosen in splits.items() if type(layers.get(name)) is not SplitLinear
    }
    for name, chosen in wanted.items():
        layer = layers.get(name)
        fits = type(layer) is nn.Linear and name and set(chosen) < set(range(layer.in_features))
        if not (fits and chosen):
            raise SiteError(
                "this layer cannot be split there",
                where=name,
                got=f"{type(layer).__name__}, channels {chosen[:8]}",
                expected="a Linear, and some of its inputs",
            )
    _split(made, wanted)
    return made


def _split(model: nn.Module, splits: Mapping[str, Sequence[int]]) -> None:
    for name, chosen in splits.items():
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), child, SplitLinear(layer, chosen))


def _largest(model: nn.Module, layers: dict[str, nn.Linear], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Layer -> largest |x| of each input channel, (in_features,)."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            top = arguments[0].detach().abs().flatten(0, -2).amax(0)
            seen[name] = torch.maximum(seen[name], top) if name in seen else top

        return hook

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    try:
        with in_eval_mode(model):
            for batch in batches:
                model(*(batch if isinstance(batch, tuple) else (batch,)))
    finally:
        for hook in hooks:
            hook.remove()
    return seen
