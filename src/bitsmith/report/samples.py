"""Reads samples.json: what the float and the quantized model of a run wrote after the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmith.errors import FormatError
from bitsmith.files import read_json


@dataclass(frozen=True)
class Sample:
    """A prompt, and the texts (with the prompt) of "float" and "quantized"."""

    prompt: str
    texts: dict[str, str]


def read_samples(path: Path) -> tuple[Sample, ...]:
    """The samples of a run; none where there is no file. Raises FormatError."""
    if not path.exists():
        return ()
    found = read_json(path, "samples").get("samples")
    if not isinstance(found, list) or not all(_is_texts(entry) for entry in found):
        raise FormatError(
            "samples is not a list of texts",
            where=str(path),
            remedy="Delete the file (the report leaves out what it held), or run again",
        )
    return tuple(
        Sample(entry["prompt"], {name: text for name, text in entry.items() if name != "prompt"})
        for entry in found
    )


def _is_texts(entry: Any) -> bool:
    texts = entry.values() if isinstance(entry, dict) and "prompt" in entry else (None,)
    return all(isinstance(text, str) for text in texts)
