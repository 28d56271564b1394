"""liveness: which activations exist at the same time in one forward, and so how much memory a plan needs.

A tensor lives from the operation that makes it to the last one that reads it; views share a storage and are
one tensor. What only quantizers read is held at the width of its site (the widest, where several read it);
any other activation counts as float. As in the kernels of runtimes, an activation function is computed by
the operation before it, whose own result then takes no memory. What only selects or places values (max
pooling, concatenation, upsampling to the nearest) gives for rounded values what it gives, rounded: a tensor
that such operations read is held at the width of what they make, its codes on one grid with those beside it.
This counts what must exist, not what an allocator keeps: no fragmentation, no workspaces, no other fusion or
reuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitsmith.quantization.layers import in_eval_mode
from bitsmith.quantization.quantizer import Quantizer
from bitsmith.quantization.scheme import FLOAT

MAX_POOLS = {
    getattr(torch.ops.aten, name)
    for name in (
        "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
        "mkldnn_max_pool2d", "mkldnn_max_pool3d",
    )
}  # fmt: skip
PLACING = MAX_POOLS | {
    getattr(torch.ops.aten, name) for name in ("cat", "upsample_nearest1d", "upsample_nearest2d")
}


@dataclass(frozen=True)
class LiveTensor:
    """elements: per sample; sites: the only readers, or () for a tensor that stays in float."""

    elements: int
    sites: tuple[str, ...]

    def bytes_at(self, bits: int) -> int:
        """Whole bytes at this width."""
        return math.ceil(self.elements * bits / 8)


@dataclass(frozen=True)
class Liveness:
    """tensors, and the moments (indices of tensors) that no other moment contains."""

    tensors: tuple[LiveTensor, ...] = ()
    moments: tuple[tuple[int, ...], ...] = ()

    def peak_bytes(self, bits: Mapping[str, Any]) -> Any:
        """The most bytes that live at one time, per sample. Integers: exact; tensors: elements * bits / 8,
        differentiable. Sites without bits are in float."""
        sizes = [_size(tensor, bits) for tensor in self.tensors]
        totals = [sum(sizes[i] for i in moment) for moment in self.moments]
        return max(totals, default=0)


def _size(tensor: LiveTensor, bits: Mapping[str, Any]) -> Any:
    widest = max((bits.get(site, FLOAT) for site in tensor.sites), default=FLOAT)
    return tensor.bytes_at(widest) if isinstance(widest, int) else tensor.elements * widest / 8


@torch.no_grad()
def liveness(model: nn.Module, example: Any, folded: Iterable[str] = ()) -> Liveness:
    """Run ``model`` on ``example`` (a batch, or a tuple of arguments) in eval mode and watch its tensors.

    folded: modules that `finalize` folds away: their output is their input.
    """
    modules = dict(model.named_modules())
    absent = {id(modules[name]) for name in folded}
    arguments = example if isinstance(example, tuple) else (example,)
    watch = _Watch(model, arguments)
    hooks = []
    for module in model.modules():
        if isinstance(module, Quantizer) or id(module) in absent:
            hooks.append(module.register_forward_pre_hook(watch.enter))
            hooks.append(module.register_forward_hook(watch.leave))
    try:
        with in_eval_mode(model), watch:
            output = model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    watch.clock += 1
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            watch.touch(_key(leaf), in_float=True)
    return watch.result()


class _Watch(TorchDispatchMode):
    """Notes when each storage is made and read.

    A storage that is freed may come back at the same address, so that an output which shares nothing with its
    operator's inputs always is a new tensor.
    """

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.samples = arguments[0].shape[0]
        self.clock = 0
        self.inside = 0  # of modules whose steps the runtime does not have
        self.index: dict[int, int | None] = {
            _key(t): None for t in (*model.parameters(), *model.buffers())
        }  # None: no activation
        self.coded: set[int] = set()  # storages that stand for the codes of an activation
        self.sizes: list[int] = []
        self.born: list[int] = []
        self.last: list[int] = []
        self.readers: list[set[str]] = []
        self.in_float: list[bool] = []
        self.reads: list[int] = []
        self.source: dict[int, int] = {}  # tensor -> the one that it was computed from, value by value
        self.parts: dict[int, list[int]] = {}  # tensor -> those whose values it selects or places
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, Tensor):
                self.make(leaf)

    def make(self, tensor: Tensor) -> None:
        self.coded.discard(_key(tensor))
        batched = tensor.ndim > 0 and tensor.shape[0] % self.samples == 0
        self.index[_key(tensor)] = len(self.sizes)
        self.sizes.append(tensor.numel() // self.samples if batched else tensor.numel())
        self.born.append(self.clock)
        self.last.append(self.clock)
        self.readers.append(set())
        self.in_float.append(False)
        self.reads.append(0)

    def touch(self, key: int, in_float: bool) -> None:
        at = self.index.get(key)
        if at is not None:
            self.last[at] = self.clock
            self.reads[at] += 1
            self.in_float[at] |= in_float

    def enter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        at = self.index.get(_key(inputs[0]))
        if at is not None:
            self.last[at] = self.clock
            if _of_activation(module):
                self.reads[at] += 1
                self.readers[at].add(module.name)  # type: ignore[arg-type]
        self.inside += 1

    def leave(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output is inputs[0]:  # of a site in float: its codes, too, are told apart from what others read
            output = output.clone()
        self.inside -= 1
        self.index[_key(output)] = self.index.get(_key(inputs[0]))
        if _of_activation(module):
            self.coded.add(_key(output))
        else:
            self.coded.discard(_key(output))
        return output

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.inside:
            return output
        returned = func._schema.returns
        if returned and all(r.alias_info is not None and not r.alias_info.is_write for r in returned):
            return output  # a view reads nothing
        self.clock += 1
        read = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and _key(leaf) not in read]
        from_one = [at for key in read if (at := self.index.get(key)) is not None]
        placed = func.overloadpacket in PLACING and not read & self.coded
        joined = len(from_one) == 1 and not read & self.coded and torch.Tag.pointwise in func.tags
        for key in read:
            self.touch(key, in_float=key not in self.coded and not placed and not (joined and not made))
        if read and all(key in self.index and self.index[key] is None for key in read):
            for leaf in made:  # of weights alone: another form of them
                self.index[_key(leaf)] = None
            return output
        for leaf in made[:1] if placed else made:  # a runtime keeps no indices of the largest
            self.make(leaf)
            if joined:
                self.source[len(self.sizes) - 1] = from_one[0]
            elif placed:
                self.parts[len(self.sizes) - 1] = from_one
        return output

    def _join(self) -> None:
        """Let a tensor take the place of the one that it alone was computed from, or share its width."""
        joined = {to: at for to, at in self.source.items() if self.reads[at] == 1}
        for to in sorted({*joined, *self.parts}, reverse=True):  # a tensor comes after all that it is made of
            if to in joined:
                self.readers[joined[to]], self.in_float[joined[to]] = self.readers[to], self.in_float[to]
            for at in self.parts.get(to, ()):
                self.readers[at] |= self.readers[to]
                self.in_float[at] |= self.in_float[to]
        for to, at in joined.items():
            self.sizes[at], self.born[to] = 0, self.born[at]

    def result(self) -> Liveness:
        self._join()
        kept = [i for i, size in enumerate(self.sizes) if size]
        place = {i: at for at, i in enumerate(kept)}
        tensors = [
            LiveTensor(self.sizes[i], () if self.in_float[i] else tuple(sorted(self.readers[i])))
            for i in kept
        ]
        moments = []
        starts = sorted({self.born[i] for i in kept})
        for start, following in zip(starts, [*starts[1:], self.clock + 1], strict=True):
            alive = [i for i in kept if self.born[i] <= start <= self.last[i]]
            if any(self.last[i] < following for i in alive):  # else the next moment holds all of this one
                moments.append(tuple(place[i] for i in alive))
        return Liveness(tuple(tensors), tuple(moments))


def _of_activation(module: nn.Module) -> bool:
    """Whether codes come out; what a weight's quantizer gives, also of rows looked up, are values."""
    return isinstance(module, Quantizer) and module.kind == "activation"


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
