"""Doctor's checks of why a teacher may not help: on the views that it teaches from, and by finished runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.data.labeled_views import LabeledViews, Read, labeled_views
from kd_lightning.errors import InputError
from kd_lightning.features.layers import count_macs
from kd_lightning.inputs import call
from kd_lightning.losses.base import Task
from kd_lightning.losses.protocols import is_own, temperature_of
from kd_lightning.report.cures import with_cure
from kd_lightning.report.selection_check import selection
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import load_weights
from kd_lightning.teachers.decisions import Change, Decisions, change_by_teacher, decisions_of
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.findings import Finding, LabeledLogits, Rows, collect_rows, match_labels
from kd_lightning.teachers.reasons import verdict
from kd_lightning.teachers.student_checks import capacity, following, helps, student_alone
from kd_lightning.teachers.taught_samples import memory, soft_targets_of_views, view_strength, wrong_decisions
from kd_lightning.teachers.teacher import Teacher
from kd_lightning.teachers.training_checks import balance, gradient_norms, pool

GRADIENT = "gradient/"
"""Start of the names under which the callback GradientBalance logs."""
Network = Callable[[Batch], Tensor]


class History(NamedTuple):
    """What is known of a config beside its module and data.

    Attributes:
        config: The config. Default: None, which means that it is not known.
        taught: A finished run of the config, with the teacher. Default: None.
        alone: A finished run of its baseline, the student without the teacher. Default: None.
        helps: Whether figures of the test part show that the teacher helps. Default: None, which means that validation
            samples decide.
        comparable: Whether ``experiment`` can compare the config, so that finished runs are looked for.
    """

    config: Mapping[str, Any] | None = None
    taught: Run | None = None
    alone: Run | None = None
    helps: bool | None = None
    comparable: bool = True


class Why:
    """The checks of a module that learns from soft targets. Each measurement is made once.

    Args:
        module: The module, or what stands for one that is taught.
        teachers: Its teacher, or its ensemble.
        data: The datamodule, set up for a fit.
        read: See :func:`~kd_lightning.data.labeled_views.labeled_views`.
        device: Device of the module.
        history: Finished runs.
    """

    def __init__(
        self,
        module: Any,
        teachers: Teacher | Ensemble,
        data: Any,
        read: Read,
        device: torch.device,
        history: History,
    ) -> None:
        self.module = module
        self.teachers = [teachers] if isinstance(teachers, Teacher) else [*teachers]
        self.teach: Network = teachers if isinstance(teachers, Teacher) else partial(_pooled, teachers, 1.0)
        self.soften = self.teach
        if not isinstance(teachers, Teacher):
            self.soften = partial(_pooled, teachers, temperature_of(module.soft_loss))
        self.data, self.read, self.device, self.history = data, read, device, history
        self.task: Task = module.task
        self._to_rows = getattr(module, "to_rows", None)
        self._own_labels = is_own(module.hard_loss) if self._to_rows else False
        self._found: dict[tuple[str, str], Any] = {}
        self._helps: bool | None = None

    def findings(self, before: Sequence[Finding], training: Batch) -> Iterator[Finding]:
        """Yield all findings, the verdict last. What cannot be measured is named, and is no error.

        Args:
            before: Findings of the other checks.
            training: A training batch.
        """
        found = [*before]
        checks = {
            "training views": self._views,
            "capacity": lambda: self._capacity(training),
            "student alone": self._alone,
            "following": self._following,
            "gradients over training": lambda: self._balance(training),
            "unlabeled samples": self._pool,
            "selection": self._selection,
        }
        self.module.eval()
        for name, check in checks.items():
            try:
                for one in check():
                    found.append(with_cure(one, self.module, self.data, self.history.config))
                    yield found[-1]
            except Exception as error:  # of networks and data of any kind; what is not measured must not end a check
                reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                yield Finding(name, f"not checked: {reason.partition(chr(10))[0]}")
        helpful = self._helps if self.history.helps is None else self.history.helps
        measured = self.history.taught is not None and self.history.alone is not None
        yield verdict(found, helps=helpful, measured=measured if self.history.comparable else None)

    # What is measured.

    @property
    def _labeled(self) -> LabeledViews:
        found: LabeledViews = self._once(("views", ""), lambda: labeled_views(self.data, self.read, self.device))
        return found

    def _once(self, key: tuple[str, str], make: Callable[[], Any]) -> Any:
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    def _matched(self, who: str, network: Network, part: str) -> LabeledLogits | None:
        """Return a network's logits of labeled samples with their labels; None if there are no such samples."""
        batches: list[Batch] = getattr(self._labeled, part)
        if not batches:
            return None
        rows: Rows = self._once((who, part), lambda: self._rows(network, batches))
        try:
            found = match_labels(rows.logits, rows.y, self.task, rows.sample)
        except InputError:
            if not self._own_labels:
                raise
            return None
        return found if len(found.correct) else None

    def _decisions(self, who: str, network: Network, part: str) -> Decisions | None:
        found = self._matched(who, network, part)
        return None if found is None else decisions_of(found, self.task)

    def _rows(self, network: Network, batches: Sequence[Batch]) -> Rows:
        """Compute outputs; ``sample`` is the index of the sample, which its views and positions have in common."""
        rows = collect_rows(network, batches, self.task, self._to_rows)
        known = [batch.index for batch in batches if batch.index is not None]
        count = sum(map(len, batches))
        index = torch.cat(known).cpu() if len(known) == len(batches) else torch.arange(count)
        return rows._replace(sample=index if rows.sample is None else index[rows.sample])

    def _student(self, batch: Batch) -> Tensor:
        logits: Tensor = self.module(batch.x)
        return logits

    def _of_run(self, who: Literal["taught", "alone"], part: str) -> LabeledLogits | None:
        """Return the logits of the student of a finished run as :meth:`_matched` does; None without a run."""
        run: Run | None = getattr(self.history, who)
        if run is None:
            return None
        with weights_of(self.module.student, run):
            return self._matched(who, self._student, part)

    def _decided(self, who: Literal["taught", "alone"], part: str) -> Decisions | None:
        found = self._of_run(who, part)
        return None if found is None else decisions_of(found, self.task)

    def _change(self, views: LabeledLogits) -> Change | None:
        """Return what the teacher changes on labeled training views, by finished runs; None without them."""
        try:
            taught, alone = self._of_run("taught", "training"), self._of_run("alone", "training")
        except Exception:  # of weights that do not fit; the checks of the runs name it
            return None
        return None if taught is None or alone is None else change_by_teacher(views, taught, alone)

    # The checks.

    def _views(self) -> Iterator[Finding]:
        if self.task == "regression":
            yield Finding("training views", "not checked: values of regression are neither right nor wrong")
            return
        views = self._matched("teacher", self.teach, "training")
        if views is None:
            yield Finding("training views", "not checked: there are no labeled training samples with one label each")
            return
        seen = decisions_of(views, self.task)
        unseen = self._decisions("teacher", self.teach, "held_out")
        plain_unseen = self._decisions("teacher", self.teach, "held_out_plain")
        if (other := unseen or plain_unseen) is None:
            yield Finding("memory", "not checked: there are no labeled validation samples")
        else:
            yield memory(seen, other, same_views=unseen is not None)
        names = getattr(self.data, "class_names", None)
        share, noisy = self._labeled.labeled_share, self._labeled.noisy
        change = self._change(views)
        yield wrong_decisions(views, self.task, names, labeled=share, noisy=noisy, change=change)
        if unseen is not None and plain_unseen is not None:
            yield view_strength(plain_unseen, unseen, "validation samples")
        elif (plain := self._decisions("teacher", self.teach, "training_plain")) is not None:
            yield view_strength(plain, seen, "labeled training samples")
        else:
            kind = type(self.data).__name__
            yield Finding("view strength", f"not checked: {kind} has no samples by index to transform otherwise")
        if not is_own(self.module.soft_loss):
            soft = self._matched("soft targets", self.soften, "training") if self.soften is not self.teach else views
            assert soft is not None
            yield soft_targets_of_views(soft.logits, self.module.soft_loss, self.task, soft.sample)

    def _capacity(self, training: Batch) -> Iterator[Finding]:
        run = getattr(self.module, "call", call)
        try:
            macs = (
                count_macs(self.module.student, training.x, run),
                sum(count_macs(one.network, one.prepare(training.teacher_x)) for one in self.teachers),
            )
        except Exception:  # of a network that the counter cannot run
            macs = None
        yield capacity(self.module.student, [one.network for one in self.teachers], macs)

    def _alone(self) -> Iterator[Finding]:
        alone = self.history.alone
        if self.task == "regression" or alone is None:
            return
        teacher = self._decisions("teacher", self.teach, "held_out_plain")
        if teacher is None:
            yield Finding("student alone", "not checked: there are no labeled validation samples")
            return
        decisions, fitted = (self._decided("alone", part) for part in ("held_out_plain", "training_plain"))
        assert decisions is not None
        with_teacher = self._decided("taught", "held_out_plain")
        self._helps = helps(with_teacher, decisions)
        yield student_alone(teacher, decisions, fitted, with_teacher, alone.folder.as_posix())

    def _following(self) -> Iterator[Finding]:
        taught = self.history.taught
        if self.task == "regression" or taught is None or is_own(self.module.soft_loss):
            return
        batches = self._labeled.training
        if not batches:
            yield Finding("following", "not checked: there are no labeled training samples")
            return
        rows: Rows = self._once(("teacher", "training"), lambda: self._rows(self.teach, batches))
        students: list[Tensor] = []
        for who, run in (("taught", taught), ("alone", self.history.alone)):
            if run is not None:
                with weights_of(self.module.student, run):
                    found: Rows = self._once((who, "training"), lambda: self._rows(self._student, batches))
                students.append(found.logits)
        where = taught.folder.as_posix()
        yield following(students[0], rows.logits, self.task, self.module.soft_loss, rows.sample, where, *students[1:])

    def _balance(self, training: Batch) -> Iterator[Finding]:
        run = self.history.taught
        if run is None:
            text = (
                "not checked: there is no finished run of this config"
                if self.history.comparable
                else ("not checked: finished runs are known with a SemiSupervisedDataModule alone")
            )
            text += "; the callback GradientBalance logs them"
            yield Finding("gradients over training", text)
            return
        rows = [row for row in run.rows() if f"{GRADIENT}hard" in row]
        if len(rows) > 1:
            names = [key for key in rows[0] if key.startswith(GRADIENT)]
            rows = [row for row in rows if all(name in row for name in names)]
            courses = {name.removeprefix(GRADIENT): [row[name] for row in rows] for name in names}
            when = f"{len(rows)} epochs of {run.folder.as_posix()}"
        else:
            start = _term_norms(self.module, training)
            with weights_of(self.module.student, run):
                end = _term_norms(self.module, training)
            courses = {name: [start[name], end[name]] for name in start.keys() & end.keys()}
            when = f"one batch with the first weights, and with those of {run.folder.as_posix()}"
        features = getattr(self.module, "features", None)
        others = {"hard", "auxiliary_hard", *(features.all if features else ())}
        yield balance(courses, courses.keys() - others, self._labeled.labeled_share, when)

    def _pool(self) -> Iterator[Finding]:
        counts = self._labeled.counts
        if counts is None:
            kind = type(self.data).__name__
            yield Finding("unlabeled samples", f"not checked: {kind} does not count its labeled samples")
            return
        views = None if self.task == "regression" else self._matched("teacher", self.teach, "training")
        if views is None or (views.y.ndim > 1 and self.task != "binary"):
            labeled, unlabeled, _ = counts
            yield Finding("unlabeled samples", f"{unlabeled} beside {labeled} labeled ones")
            return
        classes = 2 if self.task == "binary" else views.logits.shape[1]
        yield pool(counts[0], counts[1], classes, counts[2])

    def _selection(self) -> Iterator[Finding]:
        config = self.history.config or {}
        monitor = (config.get("checkpoint") or {}).get("monitor")
        split = getattr(self.data, "split", None)
        if monitor is None or split is None or not split.val:
            return
        runs = [run for run in (self.history.taught, self.history.alone) if run is not None]
        yield selection(len(split.val), monitor, runs, stops=config.get("early_stopping") is not None)


def find_teachers(module: Any) -> Teacher | Ensemble | None:
    """Return the frozen teacher, or the ensemble, whose soft targets a module learns from; None without any."""
    for found in (getattr(module, "teacher", None), getattr(module, "ensemble", None)):
        if isinstance(found, Teacher | Ensemble):
            return found
    return None


def _pooled(ensemble: Ensemble, temperature: float, batch: Batch) -> Tensor:
    """Return the pooled logits of an ensemble for a batch, dense ones as one teacher returns them."""
    logits = ensemble(batch)
    if ensemble.class_dim is None:
        return ensemble.pool(logits, None, temperature)
    place = ensemble.class_dim % (logits.ndim - 1) + 1
    rows = logits.movedim(place, -1)
    pooled = ensemble.pool(rows.flatten(1, -2), None, temperature)
    return pooled.view(rows.shape[1:]).movedim(-1, place - 1)


def _term_norms(module: Any, training: Batch) -> dict[str, float]:
    """Return the norm of the gradient of each weighted term on the student, in training mode."""
    parameters = [parameter for parameter in module.student.parameters() if parameter.requires_grad]
    module.train()
    try:
        return gradient_norms(module.losses(training), parameters)
    finally:
        module.eval()


@contextmanager
def weights_of(student: nn.Module, run: Run) -> Iterator[None]:
    """Within it, a student has the deployed weights of a run."""
    before = {name: value.detach().clone() for name, value in student.state_dict().items()}
    try:
        load_weights(student, run.weights)
        yield
    finally:
        student.load_state_dict(before)
