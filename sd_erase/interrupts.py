"""Signals that ask a process to end, turned into the exception that Ctrl-C raises: what runs is recorded and can be resumed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# SIGTERM: kill, container runtimes, batch systems; SIGHUP: the terminal is gone (Windows has none)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """A signal of `SIGNALS` arrived."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # as shells give it


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Raise `Terminated` in the main thread when such a signal arrives; one that is ignored (nohup) stays so."""

    def handle(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():  # only there handlers can be set
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, handler)
