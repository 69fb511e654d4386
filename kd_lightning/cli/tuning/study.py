"""A search that outlives processes: its trials stand in a journal, which several processes share."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kd_lightning.cli.tuning.locks import JournalLock, make_lock
from kd_lightning.cli.tuning.space import Setting, Values
from kd_lightning.cli.tuning.trial import REPORTS, Metric, remove_folder
from kd_lightning.errors import InputError
from kd_lightning.runs.folder import lock_folder

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

_STARTUP = 5
"""Number of trials before the sampler models their values, and of whole ones before a trial is pruned."""
_OWN, _SETTINGS, _NUMBER, _REASON, _FOLDS, _SECONDS = "own", "settings", "number", "reason", "folds", "seconds"
"""What the journal holds of a trial. One that has failed without a reason was stopped, and does not count."""


def require_optuna() -> None:
    """Raise InputError if Optuna is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise InputError("--tune needs optuna: pip install 'kd-lightning[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Ended:
    """A trial that has ended.

    Attributes:
        number: Number of the trial, from 1 on.
        state: ``"complete"``, ``"pruned"`` or ``"failed"``.
        value: Its value; of a pruned trial the last one that it had. None of a failed one.
        values: Its settings by path; empty for the config's own.
        folds: The value of each fold.
        reason: Why it failed, or where it was pruned.
        seconds: How long it took.
    """

    number: int
    state: str
    value: float | None
    values: dict[str, Any]
    folds: list[float]
    reason: str
    seconds: float


@dataclass
class Started:
    """A trial of this process.

    Attributes:
        number: Number of the trial, from 1 on.
        values: Its settings by path; empty for the config's own.
        folder: Its folder, which is locked until it has ended.
        own: Whether its settings are the config's own.
    """

    number: int
    values: dict[str, Any]
    folder: Path
    own: bool
    trial: Trial
    lock: IO[str]
    began: float


class Search:
    """The trials of one config, of which this process runs one at a time.

    The journal's file holds all studies of a folder. The name of a study has a hash of everything that decides about
    its values, so that another config, space or data never continue it. The settings of trial k depend on this name, k
    and the trials before, so that a search that was stopped goes on as if it had not been.

    The first trial has the config's own settings, and is never pruned. Others are pruned, from a quarter of their fit
    on, if they are worse than the median of the whole trials at the same share of theirs.

    Args:
        folder: Folder of the journal and of the trials.
        name: Name of the config.
        identity: What decides about the values.
        space: The settings. If empty, the own ones are the only trial.
        own: The config's own values, by path.
        metric: The metric.
        total: Number of trials.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        identity: Sequence[Any],
        space: Sequence[Setting],
        own: Values,
        metric: Metric,
        total: int,
    ) -> None:
        require_optuna()
        import optuna

        digest = hashlib.sha256(json.dumps([name, *identity], sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.name = name
        self.study_name = f"{name.replace('/', '_')}-{digest}"
        self.space = space
        self.own = own
        self.metric = metric
        self.total = total if space else 1
        self.folder = folder / self.study_name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._starts = make_lock(folder / "starts.lock")
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=REPORTS // 4)
        better = optuna.study.StudyDirection.MAXIMIZE if metric.mode == "max" else optuna.study.StudyDirection.MINIMIZE
        with self._starts:
            storage = _open_journal(folder / "journal.log")
            self._study: Study = optuna.create_study(
                study_name=self.study_name, storage=storage, direction=better, pruner=pruner, load_if_exists=True
            )

    # What has been tried.

    def ended(self) -> list[Ended]:
        """Return the trials that have ended, by number; of more than are wanted, the first ones."""
        return [_ended(trial) for trial in self._trials() if trial.state.is_finished()]

    @property
    def is_done(self) -> bool:
        """Whether as many trials as wanted have ended."""
        return len(self.ended()) >= self.total

    def best(self) -> Ended:
        """Return the best whole trial.

        Raises:
            InputError: If all have failed.
        """
        ended = self.ended()
        whole = [one for one in ended if one.state == "complete" and one.value is not None]
        if not whole:
            reason = next((one.reason for one in ended if one.reason), "none has a value")
            raise InputError(f"--tune: all {len(ended)} trials of {self.name} have failed; the first: {reason}")
        best = whole[0]
        for one in whole[1:]:
            if self.metric.is_better(one.value or 0.0, best.value or 0.0):
                best = one
        return best

    def running(self) -> int:
        """Return the number of trials that run, in any process."""
        return sum(not trial.state.is_finished() for trial in self._trials())

    def _trials(self) -> list[FrozenTrial]:
        """Return the trials 1 ... N that have ended or run, by number; not those that were stopped."""
        with _journal_is_whole():
            trials = self._study.get_trials(deepcopy=False)
        numbered = {trial.user_attrs.get(_NUMBER): trial for trial in trials if not _was_stopped(trial)}
        return [numbered[number] for number in range(1, self.total + 1) if number in numbered]

    # One trial.

    def start(self) -> Started | None:
        """Begin a trial of this process; None if as many as wanted have ended or run."""
        with self._starts:
            self._end_dead()
            counted = self._trials()
            taken = {trial.user_attrs[_NUMBER] for trial in counted}
            number = next((n for n in range(1, self.total + 1) if n not in taken), None)
            if number is None:
                return None
            own = not any(trial.user_attrs.get(_OWN) for trial in counted)
            return self._start(number, own)

    def _start(self, number: int, own: bool) -> Started:
        import optuna

        seed = int(hashlib.sha256(f"{self.study_name}/{number}".encode()).hexdigest()[:8], 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is new in some versions
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP, constant_liar=True)
            inside = {one.path: one for one in self.space if not own or one.allows(self.own.get(one.path))}
            if own and not any(trial.state.name == "WAITING" for trial in self._study.get_trials(deepcopy=False)):
                fixed = {path: _stored(one, self.own[path]) for path, one in inside.items()}
                self._study.enqueue_trial(fixed, user_attrs={_OWN: True})
            with _journal_is_whole():
                trial = self._study.ask()
            folder = self.folder / f"trial_{trial.number:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
            values = {path: _suggest(trial, one) for path, one in inside.items()}
        values = {} if own else values
        trial.set_user_attr(_SETTINGS, json.dumps(values))
        trial.set_user_attr(_NUMBER, number)
        return Started(number, values, folder, own, trial, lock, time.monotonic())

    def same_as(self, started: Started) -> Ended | None:
        """Return a whole trial of the same settings, whose value this one would have, too."""
        own = dict(self.own)
        values = own | started.values
        whole = [one for one in self.ended() if one.state == "complete"]
        return next((one for one in whole if own | one.values == values), None)

    def report(self, started: Started, step: int, value: float) -> bool:
        """Record the value of a trial so far, and return whether it is pruned."""
        with _journal_is_whole():
            started.trial.report(value, step)
            return not started.own and started.trial.should_prune()

    def end(self, started: Started, folds: Sequence[float], value: float) -> None:
        """Record the value of a trial."""
        started.trial.set_user_attr(_FOLDS, [*folds])
        self._tell(started, "COMPLETE", value)

    def prune(self, started: Started, reason: str) -> None:
        """Record that a trial was pruned."""
        started.trial.set_user_attr(_REASON, reason)
        self._tell(started, "PRUNED")

    def fail(self, started: Started, reason: str) -> None:
        """Record that a trial has no value."""
        started.trial.set_user_attr(_REASON, reason)
        self._tell(started, "FAIL")

    def stop(self, started: Started) -> None:
        """Record that a trial was stopped, and remove its folder; another one takes its number."""
        with suppress(ValueError, RuntimeError, OSError):  # the next process finds it then
            self._tell(started, "FAIL")
        started.lock.close()
        remove_folder(started.folder)

    def _tell(self, started: Started, state: str, value: float | None = None) -> None:
        import optuna

        started.trial.set_user_attr(_SECONDS, round(time.monotonic() - started.began, 3))
        with _journal_is_whole():
            self._study.tell(started.trial, value, state=optuna.trial.TrialState[state])
        started.lock.close()

    def _end_dead(self) -> None:
        """Record that trials were stopped whose process is gone, and remove their folders."""
        import optuna

        for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            folder = self.folder / f"trial_{trial.number:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = lock_folder(folder)
            except InputError:  # its process lives
                continue
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            lock.close()
            remove_folder(folder)


def _was_stopped(trial: FrozenTrial) -> bool:
    return trial.state.name == "FAIL" and _REASON not in trial.user_attrs


def _suggest(trial: Trial, setting: Setting) -> Any:
    if setting.values:
        return json.loads(trial.suggest_categorical(setting.path, [json.dumps(one) for one in setting.values]))
    if setting.whole:
        return trial.suggest_int(setting.path, int(setting.low), int(setting.high), log=setting.log)
    return trial.suggest_float(setting.path, setting.low, setting.high, log=setting.log)


def _stored(setting: Setting, value: Any) -> Any:
    return json.dumps(value) if setting.values else value


def _ended(trial: FrozenTrial) -> Ended:
    attributes = trial.user_attrs
    return Ended(
        int(attributes[_NUMBER]),
        {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed"),
        trial.value,
        json.loads(attributes[_SETTINGS]),
        [*attributes.get(_FOLDS, ())],
        str(attributes.get(_REASON, "")),
        float(attributes.get(_SECONDS, 0.0)),
    )


def _open_journal(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    lock = JournalLock(path.with_suffix(".lock"))
    lock.acquire()
    try:
        _cut_broken_line(path)
    finally:
        lock.release()
    with _journal_is_whole():
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]


def _cut_broken_line(path: Path) -> None:
    """Remove the end of a line that a killed process has left; Optuna would append to it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _journal_is_whole() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "log format" not in str(error) and not isinstance(error, json.JSONDecodeError):
            raise
        raise InputError(f"--tune: the journal of the search is damaged ({error}); remove its folder") from error
