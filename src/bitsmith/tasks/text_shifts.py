"""Ways in which text changes between training and use: typing errors, capitals, another register of prose.

Text becomes other text; making tokens and windows of it again is done by text.py. The text that is predicted
changes along with the text that is read, so that losses count the model's surprise at both.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

from bitsmith.errors import DataError

TYPOS = (0.01, 0.02, 0.05, 0.1, 0.2)  # of the letters
CAPITALS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the words
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # each a little to the right of the one above
REGISTER = 60_000  # characters of other prose

TextShift = Callable[[str, int, random.Random], str]


def typos(text: str, severity: int, draw: random.Random) -> str:
    """Typing errors: in a share of the letters a neighbouring key is hit, the letter changes places with the
    next one, or it is left out, each as often."""
    near, share = neighbours(), TYPOS[severity - 1]
    found, at = [], 0
    while at < len(text):
        letter = text[at]
        wrong = draw.random() < share and letter.lower() in near
        kind = draw.randrange(3) if wrong else -1
        if kind == 0:
            other = draw.choice(near[letter.lower()])
            found.append(other.upper() if letter.isupper() else other)
        elif kind == 1 and at + 1 < len(text):
            found += [text[at + 1], letter]
            at += 1
        elif kind != 2:
            found.append(letter)
        at += 1
    return "".join(found)


def neighbours() -> dict[str, str]:
    """The keys beside each letter on a QWERTY keyboard, in its own row and the ones above and below."""
    places = {key: (row, at + 0.5 * row) for row, keys in enumerate(ROWS) for at, key in enumerate(keys)}
    return {
        key: "".join(
            other
            for other, (above, left) in places.items()
            if other != key and abs(above - row) <= 1 and abs(left - at) <= 1
        )
        for key, (row, at) in places.items()
    }


def casing(text: str, severity: int, draw: random.Random) -> str:
    """A share of the words in capitals."""
    share = CAPITALS[severity - 1]
    return re.sub(r"\w+", lambda word: word[0].upper() if draw.random() < share else word[0], text)


# The order decides the seeds: new names go to the end.
TEXT_SHIFTS: dict[str, TextShift] = {"typos": typos, "casing": casing}
OTHER_PROSE = "docstrings"


def docstrings(length: int = REGISTER) -> str:
    """Documentation inside of Python's standard library: programmers who explain, in every Python.

    It differs between Python versions. Raises DataError where the library comes without its sources.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                found.setdefault(text)
        if sum(map(len, found)) >= length:
            break
    if not found:
        raise DataError(
            "this Python comes without the sources of its library",
            where=f"shift {OTHER_PROSE}",
            remedy="Give a text of yours: --data text:PATH",
        )
    return "\n\n".join(found)[:length]
