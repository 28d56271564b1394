"""Bitsmith: from a float PyTorch model to a verified low-bit one.

The public names, at most 25; tests/architecture/test_public_names.py pins them. Each is imported from the
folder where it lives when it is first used, so that `import bitsmith` costs nothing and works without the
extras. Everything else is imported by its path (`from bitsmith.train import TrainConfig, train`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitsmith.errors import BitsmithError as BitsmithError
    from bitsmith.export import load as load
    from bitsmith.export import save as save
    from bitsmith.export import to_onnx as to_onnx
    from bitsmith.export import verify as verify
    from bitsmith.methods import Method as Method
    from bitsmith.methods.budget_search import BudgetSearch as BudgetSearch
    from bitsmith.quantization import Budget as Budget
    from bitsmith.quantization import MatMul as MatMul
    from bitsmith.quantization import Plan as Plan
    from bitsmith.quantization import Scheme as Scheme
    from bitsmith.quantization import Target as Target
    from bitsmith.quantization import allocate as allocate
    from bitsmith.quantization import calibrate as calibrate
    from bitsmith.quantization import commit as commit
    from bitsmith.quantization import measure as measure
    from bitsmith.quantization import parameter_groups as parameter_groups
    from bitsmith.quantization import plan_of as plan_of
    from bitsmith.quantization import prepare as prepare
    from bitsmith.quantization import reestimate_batchnorm as reestimate_batchnorm
    from bitsmith.quantization import sites as sites
    from bitsmith.quantization.finalize import finalize as finalize
    from bitsmith.recipe import run as run

__version__ = "0.1.0"

__all__ = [
    "BitsmithError",
    "Budget",
    "BudgetSearch",
    "MatMul",
    "Method",
    "Plan",
    "Scheme",
    "Target",
    "allocate",
    "calibrate",
    "commit",
    "finalize",
    "load",
    "measure",
    "parameter_groups",
    "plan_of",
    "prepare",
    "reestimate_batchnorm",
    "run",
    "save",
    "sites",
    "to_onnx",
    "verify",
]

HOMES = {
    "errors": ("BitsmithError",),
    "export": ("load", "save", "to_onnx", "verify"),
    "methods": ("Method",),
    "methods.budget_search": ("BudgetSearch",),
    "quantization": (
        "Budget",
        "MatMul",
        "Plan",
        "Scheme",
        "Target",
        "allocate",
        "calibrate",
        "commit",
        "measure",
        "parameter_groups",
        "plan_of",
        "prepare",
        "reestimate_batchnorm",
        "sites",
    ),
    "quantization.finalize": ("finalize",),
    "recipe": ("run",),
}


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"bitsmith.{home}"), name)
    raise AttributeError(f"module 'bitsmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
