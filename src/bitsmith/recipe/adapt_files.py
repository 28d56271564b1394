"""What adaptations leave in files: deltas that are applied to their base, copies that are merged.

No model is built: both work on the tensors of native files. What they write says what it came from, as an
adaptation does, so that it can be adapted and merged again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bitsmith.errors import FormatError, RecipeError
from bitsmith.export.delta import apply_delta, model_digest
from bitsmith.export.merge import merged
from bitsmith.export.native import CONFIG, read_stored, write_stored
from bitsmith.files import write_json
from bitsmith.recipe.adapt import RECORD, check_place, read_record
from bitsmith.recipe.adapt_model import check_model
from bitsmith.recipe.directory import hold


def apply_to(base: str | Path, delta: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Turn the model in ``base`` into the one that ``delta`` was made from, in place or in ``out``. Returns
    the record. Raises FormatError for a delta of another model."""
    source, place = Path(base), Path(base if out is None else out)
    check_model(source)
    text, tensors = (source / CONFIG).read_bytes(), read_stored(source)[1]
    made = apply_delta(delta, text, tensors)
    return _write(source, place, text, tensors, made, {"applied": str(delta)})


def merge_copies(
    base: str | Path,
    copies: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    rounding: str = "stochastic",
    seed: int = 0,
) -> dict[str, Any]:
    """Average what the ``copies`` changed in the model in ``base``: folders of adapted models, or deltas.

    Writes it in place, or to the folder ``out``; returns the record. Raises FormatError for a copy of another
    model.
    """
    source, place = Path(base), Path(base if out is None else out)
    check_model(source)
    if not copies:
        raise RecipeError(
            "there is nothing to merge", where="--merge", remedy="Name adapted models or deltas"
        )
    text, tensors = (source / CONFIG).read_bytes(), read_stored(source)[1]
    digest = model_digest(text, tensors)
    found = [
        _copy(Path(copy), text, digest) if Path(copy).is_dir() else apply_delta(copy, text, tensors)
        for copy in copies
    ]
    made = merged(text, tensors, found, rounding, seed)
    facts = {"merged": [model_digest(text, copy) for copy in found], "rounding": rounding, "seed": seed}
    return _write(source, place, text, tensors, made, facts)


def _copy(place: Path, text: bytes, base: str) -> dict[str, Tensor]:
    """The tensors of an adapted model, of which its record says that it came from ``base``."""
    check_model(place)
    own, tensors = (place / CONFIG).read_bytes(), read_stored(place)[1]
    record = read_record(place)
    known = (
        record is not None and record["result"] == model_digest(own, tensors) and base in record["ancestors"]
    )
    if own != text or not known:
        raise FormatError(
            "this model does not say that it was adapted from the base",
            where=str(place),
            got="no record of it" if record is None else f"one adapted from {record['base'][:12]}",
            expected=f"one adapted from {base[:12]}",
            remedy=f"Merge copies of one base, each with its {RECORD}, or their deltas",
        )
    return tensors


def _write(
    source: Path,
    place: Path,
    text: bytes,
    base: dict[str, Tensor],
    made: dict[str, Tensor],
    settings: dict[str, Any],
) -> dict[str, Any]:
    with hold(place):
        check_place(source, place)
        digest, earlier = model_digest(text, base), read_record(source)
        known = earlier is not None and earlier["result"] == digest
        record = {
            "version": 1,
            "base": digest,
            "ancestors": [*(earlier["ancestors"] if earlier and known else []), digest],
            "settings": settings,
            "result": model_digest(text, made),
        }
        write_json(place / RECORD, record)
        write_stored(place, text, made)
    return record
