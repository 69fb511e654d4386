"""Teach a LightningModule that is not ours: it keeps its own loss, and learns from a teacher, too."""

from __future__ import annotations

from functools import partial, update_wrapper
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.features.outputs import Output
from kd_lightning.modules._shared.checks import check_soft_weight
from kd_lightning.modules._shared.network_calls import Mask
from kd_lightning.modules.teaching_steps import Teaching
from kd_lightning.teachers.teacher import Teacher


class teach(LightningModule):  # noqa: N801  (it is used as a function, and is a class so that configs can name it)
    r"""Let any LightningModule learn from a frozen teacher: ``module = teach(MyModule(), teacher)``.

    The loss of ``training_step`` becomes ``(1 - soft_weight) * hard + soft_weight * soft``. The hard loss is what the
    module's own ``training_step`` returns. For the soft loss, the teacher gets whatever the module's network was called
    with (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). The module itself comes back: its class, metrics,
    batches, optimisers, logs and checkpoints stay its own, and validation and test are as before. Modules of
    ``pytorch_lightning`` work, too.

    The teacher is in no checkpoint, no optimiser and no reducer. A checkpoint holds its fingerprint: to resume with
    another teacher is an error. With several calls of the network in a step, each row of each call counts the same.
    With manual optimisation, each ``manual_backward`` of a loss that depends on calls of the network gets their soft
    loss, at its full weight (a ``hard / n`` of micro-batches does not divide it). Calls without a gradient are no
    training, and are left out.

    Logs ``teach/hard``, ``teach/soft`` and, with ``unlabeled``, ``teach/unlabeled``: the share of batches without a
    hard loss. ``SoftWeightAnnealing()`` anneals the module's new attribute ``soft_weight``.

    Args:
        module: The LightningModule. It is changed in place.
        teacher: The trained network, or a :class:`~kd_lightning.Teacher` around it. None is for ``test`` and
            ``predict`` alone.
        network: Dotted path of the module's network; "" for the module itself, where ``training_step`` calls
            ``self(...)``.
        soft_loss: Loss called as ``(student_output, teacher_output)``, or with a third argument as
            ``(student_logits, teacher_logits, target)``. The target is the class indices (B,) of the batch if the
            network is called with the batch's inputs as they are, and None otherwise and for dense outputs. The
            module's ``unpack``, if it has one, names both. Default: None, which means ``KDLoss`` at temperature 4.
        soft_weight: Weight of the soft loss, in [0, 1], see :class:`DistillModule`.
        class_dim: The dimension of the outputs that holds classes: -1 for tokens (B, T, C), 1 for maps (B, C, H, W).
            The soft loss gets rows (N, C) then. Default: None, which means that it gets outputs as they are, such as
            (B, C).
        mask: Which positions of dense outputs count: a key of the batch (such as "attention_mask": not 0 where a
            position counts), or a function of the batch. Default: None, which means all.
        output: What picks the logits out of an output: a key, an attribute, a number, or a function. Default: None,
            which means what :func:`~kd_lightning.features.outputs.logits_of` finds: the tensor itself, ``logits`` or
            ``out``, or the first tensor of a tuple that is no scalar.
        unlabeled: Train on the soft loss alone where the module's own loss is not finite, is None, or cannot be
            computed (its ``training_step`` raises an error after it has called the network), as for a batch without
            labels.

    Returns:
        The module.

    Raises:
        InputError: If an argument is out of range, the module already has a teacher or a ``soft_weight``, or shares
            trained parameters with the teacher. In training, if the network is never called, its outputs have no
            gradient, or outputs, mask and teacher do not fit.
    """

    def __new__(
        cls,
        module: LightningModule,
        teacher: nn.Module | None,
        network: str = "net",
        *,
        soft_loss: nn.Module | None = None,
        soft_weight: float = 0.5,
        class_dim: int | None = None,
        mask: Mask | None = None,
        output: Output | None = None,
        unlabeled: bool = False,
    ) -> Any:
        """Return the module, changed."""
        if not isinstance(module, nn.Module) or not callable(getattr(module, "training_step", None)):
            raise InputError(f"module must be a LightningModule, got {type(module).__name__}")
        if isinstance(getattr(module, "teaching", None), Teaching):
            raise InputError("module has a teacher already; teach it once")
        for name in ("soft_weight", "teaching"):
            if hasattr(module, name):
                raise InputError(f"module: {type(module).__name__} has an attribute {name} of its own; rename it")
        check_soft_weight(soft_weight)
        teacher = teacher if teacher is None or isinstance(teacher, Teacher) else Teacher(teacher)
        if teacher is not None and teacher.cache is not None and output is not None:
            raise InputError(
                "output must be left out with a teacher that has a cache, which holds what it finds itself"
            )
        if teacher is not None and teacher.missing_classes:
            raise InputError(f"teacher does not know the classes {teacher.missing_classes}, but must know all")
        teaching = Teaching(module, teacher, network, soft_loss, class_dim, mask, output, unlabeled)
        module.soft_weight = soft_weight  # type: ignore[assignment]
        module.teaching = teaching
        for name, function in teaching.wrappers().items():
            own = getattr(module, name)
            setattr(module, name, update_wrapper(partial(function, own), own))
        return module

    def __init__(
        self,
        module: LightningModule,
        teacher: nn.Module | None,
        network: str = "net",
        *,
        soft_loss: nn.Module | None = None,
        soft_weight: float = 0.5,
        class_dim: int | None = None,
        mask: Mask | None = None,
        output: Output | None = None,
        unlabeled: bool = False,
    ) -> None:
        """Declare the arguments. It never runs, since ``__new__`` returns an object of another class."""

    @classmethod
    def load_from_checkpoint(cls, *_args: Any, **_kwargs: Any) -> Any:
        """Raise InputError: a checkpoint is one of the module's own class."""
        raise InputError("teach: load a checkpoint by the module's own class, as MyModule.load_from_checkpoint(path)")
