"""Checks of values that several modules share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task
from kd_lightning.runs.metric_direction import check_callbacks
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.frozen_parameters import unfreeze, was_trained
from kd_lightning.teachers.shared_layers import is_training as mode_of
from kd_lightning.teachers.shared_layers import set_training
from kd_lightning.teachers.teacher import Teacher


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of the allowed ones."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_soft_weight(soft_weight: float) -> None:
    """Raise InputError unless ``soft_weight`` lies in [0, 1]."""
    if not 0.0 <= soft_weight <= 1.0:
        raise InputError(f"soft_weight must lie in [0, 1], got {soft_weight}")


def check_same_teacher(name: str, teacher: Teacher, fingerprint: str) -> None:
    """Raise InputError unless a checkpoint's fingerprint is the teacher's.

    Args:
        name: Name of the teacher in the message.
        teacher: The teacher of this run.
        fingerprint: The fingerprint in the checkpoint.
    """
    if not teacher.matches(fingerprint):
        raise InputError(
            f"{name}: the checkpoint was trained with another teacher (fingerprint {fingerprint[:12]}..., this one has "
            f"{teacher.fingerprint()[:12]}...); resume with the same weights, attributes, preprocess "
            "and classes"
        )


def find_samples(teachers: Iterable[Teacher], trainer: Trainer | None, stage: str) -> None:
    """Let teachers find their samples in the data of a stage. In predict, which has no use for them, they find none.

    Args:
        teachers: The teachers.
        trainer: The trainer; None after the stage.
        stage: Name of the stage: "fit", "validate", "test" or "predict".
    """
    data: Any = None if stage == TrainerFn.PREDICTING else getattr(trainer, "datamodule", None)
    for teacher in teachers:
        teacher.find_samples(data, "test" if stage == TrainerFn.TESTING else "train")


def check_trainable(name: str, network: nn.Module) -> None:
    """Raise InputError unless a network has a parameter that requires a gradient."""
    parameters = list(network.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise InputError(f"{name}: at least one parameter must require a gradient, got none of {len(parameters)}")


def check_start(student: nn.Module, trainer: Trainer | None, stage: str) -> None:
    """Raise InputError if the trainer's strategy shards the weights.

    In a fit, also raise it if the student has nothing to train, or a callback follows a metric in the wrong direction.
    """
    if trainer is None:
        return
    require_whole_weights(trainer, type(trainer.lightning_module).__name__)
    if stage != TrainerFn.FITTING:
        return
    check_trainable("student", student)
    check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]


def check_two_networks(name: str, network: Any, student: nn.Module) -> None:
    """Raise InputError if a network is the student, or shares with it what training changes.

    Both may have parameters that were frozen before: the student may be the frozen network with adapters of its own.
    A :class:`Teacher` has frozen parameters, and put layers in eval mode. What both have is as before again.

    Args:
        name: Name of the network in the message.
        network: A teacher or a peer.
        student: The student.
    """
    is_training = network.is_training_outside if isinstance(network, Teacher) else mode_of
    network = network.network if isinstance(network, Teacher) else network
    if not callable(getattr(network, "parameters", None)):
        return
    own, names = [*network.parameters()], {id(p): key for key, p in student.named_parameters()}
    shared = {names[id(p)]: p for p in own if id(p) in names}
    trained = [key for key, parameter in shared.items() if was_trained(parameter)]
    layers = {*network.modules()} if isinstance(network, nn.Module) else set()
    both = {key: layer for key, layer in student.named_modules() if layer in layers}
    for parameter in shared.values():
        unfreeze(parameter)
    for layer in both.values():
        set_training(layer, is_training(layer))
    if network is student or len(own) == len(names) == len(shared) == len(trained) > 0:
        raise InputError(f"{name} and student must be two networks, got the same network twice")
    if trained:
        raise InputError(
            f"{name} and student must have parameters of their own, got {len(trained)} that are in both, such as "
            f"{', '.join(trained[:3])}; give one of them a copy (copy.deepcopy); if the student is a frozen network "
            f"with adapters, {name} must be that network without them, frozen before (requires_grad_(False))"
        )
    for key, layer in both.items():
        if isinstance(layer, _NormBase) and layer.track_running_stats and layer.training:
            raise InputError(
                f"{name} and student must not share a {type(layer).__name__} in training mode, got {key} in both: the "
                "student's passes would change its statistics; give the student a copy (copy.deepcopy), or set it to "
                "eval mode"
            )


def check_different_teachers(ensemble: Ensemble) -> None:
    """Raise InputError if two teachers are equal: same class of network, weights, preprocessing and class map."""
    seen: dict[tuple[str, str], int] = {}
    for number, teacher in enumerate(ensemble):
        if not teacher.network.state_dict():
            continue
        same = seen.setdefault((repr(teacher.network), teacher.fingerprint()), number)
        if same != number:
            raise InputError(
                f"teachers must differ, got the same network, weights, preprocess and classes as teachers[{same}] and "
                f"teachers[{number}]; teacher_weights gives a teacher more weight"
            )


def check_at_least_two(task: Task, classes: int) -> None:
    """Raise InputError for the multiclass task with a single class."""
    if task == "multiclass" and classes < 2:
        raise InputError(f"task: multiclass needs a student of at least 2 outputs, got {classes}; allowed: binary")


def check_number_of_outputs(
    logits: Tensor, task: Task, num_classes: int | None, class_names: Sequence[str] | None
) -> None:
    """Raise InputError unless the student has as many outputs as it must have. Reads the shape alone.

    Args:
        logits: The student's logits.
        task: The module's task.
        num_classes: The number of outputs that the user has set. If None, it is the number of classes in the data.
        class_names: The classes of the data, if they are known. Binary data may name both classes.
    """
    outputs = logits[0].numel() if task == "binary" and len(logits) else logits.shape[-1]
    check_at_least_two(task, outputs)
    classes = len(class_names) if class_names and task != "binary" else None
    if num_classes is not None and outputs != num_classes:
        raise InputError(f"num_classes: the student must have {num_classes} outputs, got {outputs}")
    if classes is not None and outputs < classes:
        raise InputError(f"student: its outputs must be at least {classes}, the classes in the data, got {outputs}")
    if classes is not None and outputs > classes and num_classes is None:
        raise InputError(
            f"student: it must have {classes} outputs, the number of classes in the data, got {outputs}; build it with "
            f"as many, or set num_classes: {outputs} of the module to allow this"
        )
