"""calibrate: run a few batches in float and set the range of every activation site from what was seen.

A site keeps its exact extremes and an evenly spaced sample of at most 2^18 values: enough that every range
rule (numerics.calibrate) is stable, small enough that calibrating a large model costs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, SiteError
from bitsmith.numerics import blocks
from bitsmith.quantization.layers import in_eval_mode
from bitsmith.quantization.quantizer import Quantizer, sites

SAMPLE = 2**18
SAMPLE_PER_BATCH = 2**15


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], *, overwrite: bool = False) -> None:
    """Set the ranges of all activation sites from ``batches`` of inputs (a tensor, or a tuple of arguments).

    Raises SiteError where ranges were trained already (unless ``overwrite``) or a quantizer is never called,
    DataError where an input is not finite or there is no batch.
    """
    activations = {name: q for name, q in sites(model).items() if q.kind == "activation"}
    for name, quantizer in activations.items():
        if not overwrite and quantizer.is_trained():
            raise SiteError(
                "this range was trained; calibrating would wipe it",
                where=name,
                remedy="Pass overwrite=True if that is meant",
            )
    seen: dict[str, list[Tensor]] = {name: [] for name in activations}
    extremes: dict[str, tuple[float, float]] = {}

    def look(quantizer: Quantizer, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().float()
        values = (
            blocks.rows_of(x, quantizer.scheme.granularity, None, quantizer.axis, False)
            if (quantizer.scheme.granularity == "channel")
            else x.reshape(1, -1)
        )
        lowest, highest = (float(v) for v in values.aminmax())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise DataError(
                "activations are not finite here",
                where=quantizer.name,
                remedy="The float model itself produces NaN or infinity",
            )
        low, high = extremes.get(quantizer.name, (lowest, highest))
        extremes[quantizer.name] = (min(low, lowest), max(high, highest))
        step = -(-values.numel() // SAMPLE_PER_BATCH) | 1  # odd: no beat with widths and channels
        seen[quantizer.name].append(values[:, ::step].clone())

    def passes(quantizer: Quantizer, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return arguments[0]

    hooks = []
    for quantizer in sites(model).values():
        if quantizer.kind == "activation":
            hooks.append(quantizer.register_forward_pre_hook(look))
        hooks.append(quantizer.register_forward_hook(passes))
    count = 0
    try:
        with in_eval_mode(model):
            for batch in batches:
                arguments = batch if isinstance(batch, tuple) else (batch,)
                if any(
                    isinstance(a, Tensor) and a.is_floating_point() and not bool(a.isfinite().all())
                    for a in arguments
                ):
                    raise DataError(
                        "calibration data has NaN or infinite values",
                        where=f"batch {count}",
                        remedy="Clean the data",
                    )
                model(*arguments)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise DataError("there is no batch to calibrate on", where="calibrate")
    for name, quantizer in activations.items():
        if not seen[name]:
            raise SiteError(
                "the quantizer of this site was never called",
                where=name,
                remedy="The model bypasses this layer: set its bits to 32 in overrides, or remove it",
            )
        values = torch.cat(seen[name], 1)
        values = values[:, :: -(-values.numel() // SAMPLE) | 1]
        if len(values) == 1:  # min-max is exact, whatever the sample missed
            values = torch.cat([values, values.new_tensor([extremes[name]])], 1)
        quantizer.calibrate(values, *extremes[name])
