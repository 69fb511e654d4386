"""The base of modules with one frozen teacher."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.modules._shared.checks import check_same_teacher, check_two_networks, find_samples
from kd_lightning.modules.supervised import SupervisedModule
from kd_lightning.teachers.teacher import Teacher


class TaughtModule(SupervisedModule):
    """A module with a frozen teacher, or with none. It refuses to resume with another one.

    A method sets ``teacher`` by :meth:`make_teacher`.
    """

    teacher: nn.Module | None

    def make_teacher(self, teacher: nn.Module | None) -> Teacher | None:
        """Return a teacher for the student; None stays None.

        Raises:
            InputError: If both share what training changes, or if the teacher does not know all classes.
        """
        check_two_networks("teacher", teacher, self.student)
        if teacher is None:
            return None
        made = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        made.share_layers(self.student)
        made.class_dim = self.class_dim
        if made.missing_classes:
            raise InputError(f"teacher does not know the classes {made.missing_classes}, but must know all")
        return made

    def teacher_logits(self, batch: Batch) -> Tensor | None:
        """Return the teacher's logits, None without a teacher."""
        teacher = self.teacher
        return None if teacher is None else teacher(batch)

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, hashes the teacher's weights before a plugin casts them.

        A teacher that depends on samples finds them in the data.
        """
        super().setup(stage)
        if isinstance(self.teacher, Teacher):
            find_samples([self.teacher], self._trainer, stage)
            if stage == TrainerFn.FITTING:
                self.teacher.fingerprint(anew=True)

    def teardown(self, stage: str) -> None:
        """Runs at the end of each run. After a test, the numbers of samples are not those of test samples any more."""
        super().teardown(stage)
        if stage == TrainerFn.TESTING and isinstance(self.teacher, Teacher):
            find_samples([self.teacher], None, stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Adds the teacher's fingerprint, not the teacher."""
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.teacher, Teacher):
            checkpoint["teacher_fingerprint"] = self.teacher.fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. In a fit, refuses another teacher."""
        super().on_load_checkpoint(checkpoint)
        fingerprint = checkpoint.get("teacher_fingerprint")
        if self.is_fitting and fingerprint and isinstance(self.teacher, Teacher):
            check_same_teacher("teacher", self.teacher, fingerprint)
