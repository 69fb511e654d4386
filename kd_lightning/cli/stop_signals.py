"""SIGINT and SIGTERM end a command; further ones have no effect while it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PAUSE = 3.0
"""Seconds after a signal in which others have no effect: the time that a program needs to end."""


class StopSignals:
    """Handlers of SIGINT and SIGTERM, which end this program at the first signal.

    SIGINT raises KeyboardInterrupt, SIGTERM raises SystemExit. While a trainer runs, SIGTERM is recorded alone:
    Lightning ends the run after the batch.

    Attributes:
        received: The first signal. None if none has come.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._process = os.getpid()
        self._next = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Install the handlers. A signal that the caller of this program ignores stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked process, such as a loader's worker
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.received is not None and now < self._next:
            return
        self.received = self.received or signal.Signals(number)
        self._next = now + _PAUSE
        if signal.getsignal(number) == self._handle:  # Lightning's handler of SIGTERM calls this one
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def record_sigterm(trainer: Any) -> None:
    """Make a trainer's handler of SIGTERM record the signal and pass it on, and nothing else.

    Lightning's handler also calls a collective operation, within whatever step it interrupts. The processes then wait
    for one another without end. Its training loop compares the record of all processes before each step anyway.
    """
    connector = trainer._signal_connector
    connector._sigterm_notifier_fn = partial(_record, connector)


def _record(connector: Any, number: int, _: FrameType | None) -> None:
    launcher = connector.trainer.strategy.launcher
    if launcher is not None and not connector.received_sigterm:
        launcher.kill(number)
    connector.received_sigterm = True
