"""The first signal ends a command, later ones have no effect. A run ends between two batches."""

import os
import signal
import subprocess
import sys

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from kd_lightning.cli import stop_signals
from kd_lightning.cli.quiet import RANKS
from kd_lightning.cli.stop_signals import StopSignals, record_signals


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


@pytest.fixture
def trainer(stop):
    """A trainer whose handler of SIGTERM is there, as in a run."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    record_signals(trainer)
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    yield trainer
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_trainer_records_the_first(trainer, stop, number):
    os.kill(os.getpid(), number)
    assert trainer.received_sigterm
    assert stop.received == number
    for other in (signal.SIGINT, signal.SIGTERM):  # at once
        os.kill(os.getpid(), other)
    assert stop.received == number


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_sigint_after_the_pause_ends_a_long_step(trainer, stop, first, monkeypatch):
    monkeypatch.setattr(stop_signals, "_PAUSE", 0.0)
    os.kill(os.getpid(), first)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == first


def test_a_trainer_records_the_first_in_its_run(trainer, stop, monkeypatch):
    """An earlier one may have been lost in a destructor, where Python ignores exceptions."""
    monkeypatch.setattr(stop_signals, "_PAUSE", 0.0)
    stop.received = signal.SIGINT
    os.kill(os.getpid(), signal.SIGINT)
    assert trainer.received_sigterm


def test_sigint_is_announced_on_one_process(trainer, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    os.kill(os.getpid(), signal.SIGINT)
    assert not capfd.readouterr().err


def test_announcement(trainer, monkeypatch, capfd):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "SIGINT: the run ends after this batch; once more after 3 seconds: at once\n"


def test_announcement_that_nobody_reads(trainer, capfd):
    """Like ``| tee``, which has got the signal, too."""
    read, write = os.pipe()
    os.close(read)
    before = os.dup(2)
    os.dup2(write, 2)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(write)
    assert trainer.received_sigterm


def test_no_announcement_without_stderr(trainer, monkeypatch, capfd):
    monkeypatch.setattr("sys.stderr", None)  # another file may have its number
    os.kill(os.getpid(), signal.SIGINT)
    assert not capfd.readouterr().err


def test_a_handler_of_another_library_does_not_count(stop):
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_restore(stop):
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_the_command_there_is_no_traceback(number):
    """While Python runs what libraries have registered for the end of the process."""
    code = f"""
import atexit, signal, sys
from kd_lightning.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(signal.raise_signal, {int(number)})
sys.argv = ["kd-lightning", "--help"]
main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    assert done.returncode == -number


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


def test_no_loader_tells_that_a_signal_has_ended_its_workers(stop, monkeypatch):
    before = signal.getsignal(signal.SIGCHLD)
    loader = DataLoader(range(4), num_workers=2)
    try:
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        batches = iter(loader)
        of_loader = signal.getsignal(signal.SIGCHLD)
        assert of_loader != before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        for worker in batches._workers:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # PyTorch finds those that nobody has waited for
            worker.is_alive()
        stop.restore()
        assert signal.getsignal(signal.SIGCHLD) == of_loader  # a later run in this process has it
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_other_handlers_of_ended_children_stay(stop):
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    other = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGCHLD) == other
    finally:
        signal.signal(signal.SIGCHLD, before)
