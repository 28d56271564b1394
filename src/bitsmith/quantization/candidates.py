"""candidates: which sites a search may change, which widths each of them may have, and in which groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from bitsmith.errors import SchemeError, SiteError, TargetError, listing, matching
from bitsmith.quantization.channel_groups import even_sizes
from bitsmith.quantization.quantizer import Quantizer, sites
from bitsmith.quantization.scheme import FLOAT
from bitsmith.quantization.target import Target, get_target

KINDS = {"both": ("weight", "activation"), "weights": ("weight",), "activations": ("activation",)}  # of sites


def free_sites(model: nn.Module, wanted: Sequence[str] | None, where: str) -> list[str]:
    """The sites that a search may change: those that match the globs, or all that nobody asked for by name.

    where: the method, for messages. Raises SiteError for a glob that matches nothing, or where no site is
    free.
    """
    quantizers = sites(model)
    free = [name for name, q in quantizers.items() if not q.pinned]
    if wanted:
        free = matching(f"{where}.sites", wanted, quantizers, "site")
    if not free:
        raise SiteError(
            "there is no site whose width is free",
            where=where,
            remedy="Drop `bits` from the overrides, or set first_last_bits: null",
        )
    return free


def site_candidates(
    model: nn.Module, names: Sequence[str], candidates: Sequence[int]
) -> dict[str, list[int]]:
    """Site -> the candidates that its grid and the model's target hold, ascending. Raises SchemeError."""
    target = get_target(getattr(model, "bitsmith_target", "native"))
    quantizers = sites(model)
    found = {}
    for name in names:
        found[name] = [b for b in candidates if _holds(quantizers[name], b, target)]
        if not found[name]:
            raise SchemeError(
                f"target {target.name} stores none of these widths",
                where=f"{name}.candidates",
                got=listing(map(str, candidates)),
                expected=f"some of {listing(map(str, target.weight_containers))}"
                + (", or 32" if target.has_float else ""),
            )
    return found


def group_sizes(
    model: nn.Module, names: Iterable[str], groups: int, where: str
) -> dict[str, tuple[int, ...]]:
    """Site -> channels of each group, for the weights among ``names``; none for one group. Raises
    SchemeError for a weight without a scale per channel, TargetError where the model's target holds no
    widths per channel."""
    if groups == 1:
        return {}
    target = get_target(getattr(model, "bitsmith_target", "native"))
    if target.channel_widths != "own":
        raise TargetError(
            f"target {target.name} does not store the channels of a weight at widths of their own",
            where=where,
            remedy="Choose one width for each tensor, or target: native",
        )
    quantizers = sites(model)
    weights = [name for name in names if quantizers[name].kind == "weight"]
    for name in weights:
        if quantizers[name].scheme.granularity != "channel":
            raise SchemeError(
                "only weights with a scale per output channel can have widths by groups of channels",
                where=f"{name}.granularity",
                got=quantizers[name].scheme.granularity,
                remedy="Set granularity: channel, or choose one width for each tensor",
            )
    return {name: even_sizes(quantizers[name].range.shape[1], groups) for name in weights}


def _holds(quantizer: Quantizer, bits: int, target: Target) -> bool:
    if bits == FLOAT:
        return target.has_float
    if quantizer.kind == "weight" and bits not in target.weight_containers:
        return False
    try:
        quantizer.check_width(bits)
    except SchemeError:
        return False
    return True
