"""A check of a teacher's first outputs in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.losses.base import Task
from kd_lightning.teachers.checks import accuracy, soft_targets
from kd_lightning.teachers.findings import Finding, collect_logits, match_labels
from kd_lightning.teachers.teacher import Teacher


class TeacherProbe:
    """Checks the first two outputs of a teacher, and passes the findings to ``report``.

    The probe costs no forward pass: it records outputs that the run needs anyway, in Lightning's sanity check or in
    training. After two outputs it removes its hook.

    Args:
        teacher: The teacher.
        soft_loss: The loss that compares the student with it.
        task: Of teacher and student.
        report: Called with the findings.
    """

    def __init__(
        self, teacher: Teacher, soft_loss: nn.Module, task: Task, report: Callable[[list[Finding]], Any]
    ) -> None:
        self.soft_loss = soft_loss
        self.task = task
        self.report = report
        self._recorded: list[tuple[Tensor, Tensor | None]] = []  # logits and labels
        self._handle = teacher.register_forward_hook(self._record)

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()

    @torch.no_grad()
    def _record(self, teacher: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        try:
            self._recorded.append((collect_logits(lambda _: logits, [inputs[0]], self.task), inputs[0].y))
            if len(self._recorded) < 2:
                return
            self.close()
            findings = self._check()
        except Exception:  # training either works, or raises the better error
            self.close()
            return
        self.report(findings)

    def _check(self) -> list[Finding]:
        recorded, labels = zip(*self._recorded, strict=True)
        logits = torch.cat(recorded)
        y = None if any(y is None for y in labels) else torch.cat(labels)
        matched = match_labels(logits, y, self.task)
        return [accuracy(matched, None, self.task, "labels"), soft_targets(logits, self.soft_loss, self.task)]
