"""The first signal ends a command, later ones have no effect."""

import os
import signal

import pytest

from kd_lightning.cli.stop_signals import StopSignals


@pytest.fixture
def stop():
    signals = StopSignals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:  # what ran these tests may ignore them
            signal.signal(number, signal.SIG_DFL)
        signals.install()
        yield signals
    finally:
        signals.restore()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_first_and_second(stop, number, error):
    assert stop.received is None
    with pytest.raises(error):
        os.kill(os.getpid(), number)
    assert stop.received == number
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == number


def test_sigterm_is_recorded_where_another_handler_calls_this_one(stop):
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *arguments: handler(*arguments))  # as Lightning does
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGTERM


def test_restore(stop):
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_is_ignored_stays_ignored(stop):
    stop.restore()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop.install()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_forked_process_ends_as_usual(stop):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
