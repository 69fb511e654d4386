"""SimKD: the student learns its teacher's last map, and ends in the teacher's classifier."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.simkd import SimKDStudent
from kd_lightning.features.term import FeatureTerm
from kd_lightning.losses.features.simkd import SimKDLoss
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules.distill import DistillModule
from kd_lightning.runs.weights import plain_key
from kd_lightning.teachers.teacher import Teacher


class SimKDModule(DistillModule):
    """Train a student that ends in its teacher's classifier, on the teacher's last map alone (SimKD, Chen et al. 2022).

    The objective is the mean squared distance between the projector's map and the teacher's,
    :class:`~kd_lightning.losses.features.SimKDLoss`. There is no hard and no soft term, so that labels are for
    validation alone. The teacher's classifier is frozen.

    Logs ``train/feature``, ``feature_weight``, ``val/feature``, and in validation and test what :class:`DistillModule`
    does.

    Source: https://arxiv.org/abs/2203.14001.

    Args:
        student: A :class:`~kd_lightning.SimKDStudent` with this teacher's classifier.
        teacher: The trained network, or a :class:`Teacher` around it, whose ``preprocess`` may give the maps another
            size. None is for ``test`` and ``predict`` alone.
        **kwargs: The arguments of :class:`SupervisedModule`.

    Raises:
        InputError: If the student is of another class; if the teacher has a class map; in a fit, if the student's
            classifier is not the teacher's.
    """

    saved_arguments: ClassVar[tuple[str, ...]] = ()
    has_soft_term: ClassVar[bool] = False

    def __init__(self, student: nn.Module, teacher: nn.Module | None, **kwargs: Any) -> None:
        network = student._modules.get("_orig_mod") or student  # under torch.compile
        if not isinstance(network, SimKDStudent):
            raise InputError(f"student must be a SimKDStudent, got {type(student).__name__}")
        if isinstance(teacher, Teacher) and teacher.classes is not None:
            raise InputError("teacher: classes must be left out, since the student returns what the teacher does")
        features = {"feature": FeatureTerm({"projector": network.teacher_layer}, SimKDLoss())}
        super().__init__(student, teacher, soft_loss=None, soft_weight=0.0, features=features, **kwargs)
        del self.soft_weight  # SoftWeightAnnealing would have no effect

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the feature term."""
        with self.capture_features(batch) as captured:  # a pass of the teacher ends at its layer
            self(batch.x)
        return self.feature_losses(captured, batch)

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, compares the classifier of the student with the teacher's."""
        super().setup(stage)
        if stage == TrainerFn.FITTING and isinstance(self.teacher, Teacher):
            self._check_head(self.teacher.network)

    def _check_head(self, teacher: nn.Module) -> None:
        own: Any = (self.student._modules.get("_orig_mod") or self.student).head
        weights = {plain_key(key): tensor for key, tensor in teacher.state_dict().items()}
        for key, tensor in own.state_dict().items():
            if key not in weights or not torch.equal(weights[key].to(tensor), tensor):
                raise InputError(
                    f"student: its classifier must be the teacher's, got another {key}; SimKDStudent and SimKDModule "
                    "need the same teacher"
                )
