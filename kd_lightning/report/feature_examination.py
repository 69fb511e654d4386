"""Doctor's checks of a module that learns from features alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.features.arrange import channels_first, usual_layout
from kd_lightning.features.pair import FeaturePair
from kd_lightning.losses.features import HintLoss, MSEFeatureLoss, SmoothL1FeatureLoss
from kd_lightning.modules import FeatureDistillModule
from kd_lightning.teachers.checks import eval_mode
from kd_lightning.teachers.feature_checks import channels, input_range, input_size, neighbors
from kd_lightning.teachers.findings import Finding, with_teacher_name
from kd_lightning.teachers.teacher import Teacher
from kd_lightning.teachers.training_checks import gradients

_POSITIONS = 16  # of a sample, evenly spaced: its neighbours tell little more
_SCALED = (HintLoss, MSEFeatureLoss, SmoothL1FeatureLoss)  # grow with the scale of a channel


@torch.no_grad()
def _features(module: FeatureDistillModule, number: int, batch: Batch) -> dict[str, Tensor]:
    """Return the outputs of a teacher's layers, by their names in the terms."""
    teacher, paths = module.teachers[number], module.features.teacher_layers(len(module.teachers))[number]
    assert isinstance(teacher, Teacher)
    found = teacher.features(batch)
    return {name: found[path] for path, name in paths.items()}


def examine_features(
    module: FeatureDistillModule, training: Batch, batches: Sequence[Batch], what: str
) -> Iterator[Finding]:
    """Check each teacher's features and inputs, and the gradients of the terms.

    Args:
        module: The module, in eval mode.
        training: A training batch.
        batches: Samples under the evaluation transform, with labels where there are some.
        what: Name of their labels in texts.
    """
    module.build_features(training)
    for number, teacher in enumerate(module.teachers):
        assert isinstance(teacher, Teacher)
        for finding in _check_teacher(module, number, teacher, batches, what):
            yield with_teacher_name(finding, f"teachers[{number}]") if module.features.several else finding
    module.train()
    yield gradients(module.losses(training), module.student)


def _check_teacher(
    module: FeatureDistillModule, number: int, teacher: Teacher, batches: Sequence[Batch], what: str
) -> Iterator[Finding]:
    found = [_features(module, number, batch) for batch in batches]
    vectors = torch.cat(
        [module.teacher_vector(number, part, batch) for part, batch in zip(found, batches, strict=True)]
    )
    ys = [batch.y for batch in batches]
    y = torch.cat([y.cpu() for y in ys if y is not None]) if all(y is not None and y.ndim == 1 for y in ys) else None
    is_classes = y is not None and not y.is_floating_point()
    yield neighbors(vectors.float().cpu(), y if is_classes else None, what)
    with teacher.evaluating(), torch.no_grad():
        x = teacher.prepare(batches[0].teacher_x)
    yield input_size(teacher.network, x)
    yield input_range(teacher.network, x)
    for path, name in module.features.teacher_layers(len(module.teachers))[number].items():
        pairs = [(pair, term) for term in module.features.all.values() for pair in term.pairs if pair.teacher == name]
        rows = torch.cat([_rows(pairs[0][0], part[name]) for part in found])
        scaled = any(isinstance(term.loss, _SCALED) and not len(term.standardizations) for _, term in pairs)
        yield channels(path, rows, scale_matters=scaled)
    yield eval_mode(teacher, batches[0], partial(_joined, module, number), "features")


def _joined(module: FeatureDistillModule, number: int, batch: Batch) -> Tensor:
    return torch.cat([part.flatten(1).float() for part in _features(module, number, batch).values()], dim=1)


def _rows(pair: FeaturePair, feature: Tensor) -> Tensor:
    """Return a feature as rows (M, C) on the CPU: samples, or some positions of each."""
    if feature.ndim < 3:
        return feature.reshape(len(feature), -1).cpu()
    _, layout = pair.layouts or (None, None)
    rows = channels_first(feature, layout or usual_layout(feature.shape[1:])).flatten(2)
    step = max(1, rows.shape[2] // _POSITIONS)
    return rows[:, :, ::step].movedim(1, -1).flatten(0, 1).cpu()
