"""Built-in models whose parameters were never written to: what a file is loaded into that brings all of them.

A float model that is only a skeleton would take, for a moment, many times what its packed one does. Memory
that nobody writes to costs nothing, so it is enough to draw no numbers. On torch's meta device it would be
the same, at the price of 70 MB of modules that this imports; and buffers would lose what was computed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from bitsmith.tasks.models import build

# Functions of nn.init that ask for a mode do so before they call the tensor's own.
DRAWN = (Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_)


class _Undrawn(TorchFunctionMode):
    """Inside, in this thread, tensors that would be filled with random numbers stay as they are."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function in DRAWN:
            return args[0] if args else given["tensor"]
        return function(*args, **given)


def build_hollow(name: str, **arguments: Any) -> nn.Module:
    """`build`, with whatever lies in the memory of parameters that are drawn. Raises what that raises."""
    with _Undrawn():
        return build(name, **arguments)
