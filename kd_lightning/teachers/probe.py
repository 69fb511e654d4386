"""A look at a teacher's first outputs in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.losses.base import Task
from kd_lightning.teachers.checks import Finding, accuracy, answers, judge, soft_targets
from kd_lightning.teachers.teacher import Teacher


class TeacherProbe:
    """The short preflight: listens to a teacher's first two answers, and hands to ``say`` what it finds.

    Costs no forward pass and leaves no trace: they are answers that the run needs anyway, in Lightning's sanity check,
    else in training.
    """

    def __init__(self, teacher: Teacher, soft_loss: nn.Module, task: Task, say: Callable[[list[Finding]], Any]) -> None:
        self._seen: list[tuple[Tensor, Tensor | None]] = []
        self._what = (soft_loss, task, say)
        self._handle = teacher.register_forward_hook(self._look)

    def close(self) -> None:
        """Look no more."""
        self._handle.remove()

    @torch.no_grad()
    def _look(self, teacher: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        soft_loss, task, say = self._what
        try:
            self._seen.append((answers(lambda _: logits, [inputs[0]], task), inputs[0].y))
            if len(self._seen) < 2:
                return
            self.close()
            seen, labels = zip(*self._seen, strict=True)
            y = None if any(y is None for y in labels) else torch.cat(labels)
            judged = judge(torch.cat(seen), y, task)
            findings = [accuracy(judged, None, task, "labels"), soft_targets(torch.cat(seen), soft_loss, task)]
        except Exception:  # whatever it is, training either does without or says it better
            self.close()
            return
        say(findings)
