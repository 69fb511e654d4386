"""SIGINT and SIGTERM end a command; further ones have no effect while it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from kd_lightning.cli.quiet import rank_of_environment

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PAUSE = 3.0
"""Seconds after a signal in which others have no effect: the time that a program needs to end."""

_ANNOUNCEMENT = b"SIGINT: the run ends after this batch; once more after 3 seconds: at once\n"
_LOADER_MODULE = "torch.utils.data._utils.signal_handling"


class StopSignals:
    """Handlers of SIGINT and SIGTERM, which end this program at the first signal.

    SIGINT raises KeyboardInterrupt, SIGTERM raises SystemExit. While a trainer runs, both are recorded alone, and
    Lightning ends the run after the batch: an exception in the middle of a step could leave a lock of a logger taken,
    for which the end of the run would then wait forever, or be lost in a destructor. A second SIGINT, after a pause,
    raises KeyboardInterrupt wherever the program is.

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

    def end(self) -> None:
        """Let a signal end the process at once, without an exception in what libraries do at its end."""
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)

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
        self._silence_loaders()
        recorder = _recorder()
        if number == signal.SIGINT:
            if recorder is not None and recorder.record(signal.SIGTERM):
                if rank_of_environment() == "0" and sys.stderr is not None:  # else 2 may be a file of the run
                    with contextlib.suppress(OSError):  # the reader has got the signal, too, and is gone
                        os.write(2, _ANNOUNCEMENT)  # not by print, which this may have interrupted
                return
            raise KeyboardInterrupt
        if recorder is None:
            raise SystemExit(128 + number)

    def _silence_loaders(self) -> None:
        """Let PyTorch's data loaders not raise, wherever the program is, that this signal has ended their workers."""
        number = getattr(signal, "SIGCHLD", None)  # Windows has none
        handler = None if number is None else signal.getsignal(number)
        if number is not None and getattr(handler, "__module__", None) == _LOADER_MODULE:
            self._before[number] = signal.signal(number, signal.SIG_DFL)


def record_signals(trainer: Any) -> None:
    """Make a trainer's handler of SIGTERM record the signal and pass it on, and nothing else.

    Lightning's handler also calls a collective operation, within whatever step it interrupts. The processes then wait
    for one another without end. Its training loop compares the record of all processes before each step anyway.
    """
    connector = trainer._signal_connector
    connector._sigterm_notifier_fn = _Recorder(connector)


def end_processes(trainer: Any) -> None:
    """Pass SIGTERM on to the processes that a trainer has started, unless it has done so; they may still start up."""
    trainer._signal_connector._sigterm_notifier_fn.record(signal.SIGTERM)


class _Recorder:
    """A trainer's handler of SIGTERM."""

    def __init__(self, connector: Any) -> None:
        self._connector = connector

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.record(number)

    def record(self, number: int) -> bool:
        """Record a signal, and pass it on to the processes that the trainer has started.

        Returns:
            Whether it is the first one of this run.
        """
        is_first = not self._connector.received_sigterm
        self._connector.received_sigterm = True
        if is_first and (launcher := self._connector.trainer.strategy.launcher) is not None:
            launcher.kill(number)
        return is_first


def _recorder() -> _Recorder | None:
    """Return that of the trainer that runs; Lightning's handler calls it and others, one behind another."""
    handlers = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", ())
    return next((handler for handler in handlers if isinstance(handler, _Recorder)), None)
