"""How many of our files a reader opens to follow one weight: at most three, in at most twelve calls.

Counted by the interpreter: every Python function of ours that the forward of one W4A8 Linear enters.
"""

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

import bitsmith as bs
from tests.architecture.package import PACKAGE

FILES, CALLS = 3, 12


def our_calls(work: Any) -> list[tuple[str, str]]:
    """(file, function) of every function of ours that ``work`` enters."""
    calls = []

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            calls.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_the_forward_of_a_linear_is_three_files_and_twelve_calls() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    bs.prepare(
        model,
        weights=bs.Scheme(bits=4, granularity="channel"),
        activations=bs.Scheme(bits=8),
        first_last_bits=None,
    )
    x = torch.randn(8, 64)
    bs.calibrate(model, [x])
    calls = our_calls(lambda: model(x))
    assert len(calls) >= 3, "the counter saw nothing"
    assert len({file for file, _ in calls}) <= FILES, calls
    assert len(calls) <= CALLS, calls
