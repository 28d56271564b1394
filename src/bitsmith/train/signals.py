"""SIGINT and SIGTERM as a flag that the loop reads between two steps.

Python's default for SIGINT raises in the middle of a step, where nothing consistent can be saved. A second
SIGINT still does, for whoever cannot wait. Handlers are only installed in the main thread (elsewhere Python
allows none) and the previous ones return afterwards.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """``received`` names the signal that came, or is empty."""

    received: str = ""


@contextlib.contextmanager
def catch_signals() -> Iterator[StopFlag]:
    """While inside, SIGINT and SIGTERM only set the flag."""
    flag = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.received = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            # None: installed by C code, which Python cannot put back
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
