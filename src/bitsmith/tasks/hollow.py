"""Built-in models without memory for their parameters: what a file is loaded into that brings all of them.

A float model that is only a skeleton would take, for a moment, many times what its packed one does.
Parameters become tensors of the meta device as modules register them; buffers, which may hold what a
constructor computed, stay.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bitsmith.tasks.models import build


def build_hollow(name: str, **arguments: Any) -> nn.Module:
    """`build`, its parameters on the meta device. Raises what that raises."""
    here = threading.get_ident()  # the hook sees the modules of all threads

    def hollowed(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return None  # as it is
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hollowed)  # type: ignore[arg-type]
    try:
        return build(name, **arguments)
    finally:
        handle.remove()


def fill(model: nn.Module) -> None:
    """Give the parameters that are still hollow memory, in place; whatever is in it."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(filled))
