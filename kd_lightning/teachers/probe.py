"""A check of a teacher's first outputs in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.losses.base import Task
from kd_lightning.teachers.checks import accuracy, soft_targets
from kd_lightning.teachers.findings import Finding, Rows, collect_rows, join, match_labels
from kd_lightning.teachers.teacher import Teacher


class TeacherProbe:
    """Checks the first two outputs of a teacher, and passes the findings to ``report``.

    The probe costs no forward pass: it records outputs that the run needs anyway, in Lightning's sanity check or in
    training. After two outputs it removes its hook.

    Args:
        teacher: The teacher.
        soft_loss: The loss that compares the student with it. None if there is none: soft targets are not checked.
        task: Of teacher and student.
        report: Called with the findings.
        to_rows: Turns a batch and its dense outputs into rows, as that of a module. Default: None, which means that
            outputs are (B, C).
    """

    def __init__(
        self,
        teacher: Teacher,
        soft_loss: nn.Module | None,
        task: Task,
        report: Callable[[list[Finding]], Any],
        to_rows: Callable[..., Any] | None = None,
    ) -> None:
        self.soft_loss = soft_loss
        self.task = task
        self.report = report
        self.to_rows = to_rows
        self._recorded: list[Rows] = []
        self._samples = 0
        self._handle = teacher.register_forward_hook(self._record)

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()

    @torch.no_grad()
    def _record(self, teacher: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        try:
            batch = inputs[0]
            self._recorded.append(collect_rows(lambda _: logits, [batch], self.task, self.to_rows, self._samples))
            self._samples += len(batch)
            if len(self._recorded) < 2:
                return
            self.close()
            findings = self._check()
        except Exception:  # training either works, or raises the better error
            self.close()
            return
        self.report(findings)

    def _check(self) -> list[Finding]:
        logits, y, sample = join(self._recorded)
        found = [accuracy(match_labels(logits, y, self.task, sample), None, self.task, "labels")]
        if self.task != "regression" and self.soft_loss is not None:
            found.append(soft_targets(logits, self.soft_loss, self.task, sample))
        return found
