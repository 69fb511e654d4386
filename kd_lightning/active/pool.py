"""The outputs of networks for the unlabeled pool, which strategies score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import copy

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from kd_lightning.active.strategies import Pool
from kd_lightning.batch import Batch, is_labeled
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.features.capture import evaluating
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses.coarse import mask_candidates
from kd_lightning.pseudo_labels.graph_labels import GraphPseudoLabels
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.teacher import Teacher, check_outputs

PASSES = 20
"""Passes with dropout for BALD."""
_ON_FEATURES = ("k-centre", "badge")


@torch.no_grad()
def survey(
    student: nn.Module,
    data: SemiSupervisedDataModule,
    strategy: str,
    *,
    teacher: Callable[[Batch], Tensor] | None = None,
    passes: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Pool]:
    """What a student says of the samples without a label; of those with a coarse one, within their superclass.

    Args:
        student: Gives logits; evaluated in eval mode, and moved to the device.
        data: Set up. Its samples count as unlabeled even where it has ``unlabeled: none``.
        strategy: For which one; features are computed only where it looks at some.
        teacher: Gives logits of a batch, where the strategy compares with them; on the device.
        passes: How many passes with dropout to add as ``answers``.
        seed: Of these, and of the strategy.
        device: Where to compute.

    Returns:
        The samples' indices (N,), in order, and what is known of them.

    Raises:
        InputError: If all samples are labeled, have many labels each, or are test images, if the student has no dropout
            to pass through, or an answer is no number.
    """
    labels = data.visible_labels()
    if labels.ndim > 1 or labels.is_floating_point():
        raise InputError("active learning is for samples of one class each; these have many labels, or floats")
    dropout = [layer for layer in student.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]
    if passes and not dropout:
        raise InputError("bald needs several runs, or a student with dropout (p above 0); this one has none")
    found: dict[str, list[Tensor]] = defaultdict(list)
    student.to(device)
    with evaluating(student):
        torch.manual_seed(seed)
        for given in with_pool(data).pool_dataloader():
            batch = move_data_to_device(data.on_before_batch_transfer(given, 0), torch.device(device))
            batch = Batch.from_any(data.on_after_batch_transfer(batch, 0))
            assert batch.index is not None
            assert batch.y is not None
            logits = logits_of(student(batch.x), "the student")
            found["index"].append(batch.index.cpu())
            found["unlabeled"].append(~is_labeled(batch.y).cpu())
            found["probabilities"].append(_probabilities(logits, batch))
            if strategy in _ON_FEATURES:
                found["features"].append(GraphPseudoLabels().features_of(student, batch.x).cpu().double())
            if teacher is not None:
                check_outputs(logits, said := teacher(batch))
                found["teacher"].append(_probabilities(said, batch))
            for layer in dropout if passes else ():
                layer.train()
            if passes:
                found["answers"].append(_pass(student, batch, passes))
            student.eval()
    known = {name: torch.cat(parts) for name, parts in found.items()}
    if passes and torch.equal(known["answers"], known["answers"][:, :1].expand_as(known["answers"])):
        raise InputError("bald: all passes through the student give the same answers; is its dropout never called?")
    index, unlabeled = known.pop("index"), known.pop("unlabeled")
    if not unlabeled.any():
        raise InputError("no sample without a label is left: there is nothing to ask for")
    for name, values in known.items():
        if not (finite := values.flatten(1).isfinite().all(dim=1)).all():
            raise InputError(f"the {name} of sample {int(index[~finite][0])} are no numbers: has training failed?")
    labeled = known["features"][~unlabeled] if "features" in known and not unlabeled.all() else None
    known = {name: values[unlabeled] for name, values in known.items()}
    if "answers" in known:
        known["answers"] = known["answers"].transpose(0, 1)
    return index[unlabeled], Pool(**known, labeled_features=labeled, seed=seed)


def _pass(student: nn.Module, batch: Batch, passes: int) -> Tensor:
    """The probabilities of several passes, (B, K, C)."""
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # attention's fused kernels leave dropout out
        answers = [_probabilities(logits_of(student(batch.x), "the student"), batch) for _ in range(passes)]
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return torch.stack(answers, dim=1)


def _probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """(B, C) float64 on the CPU; of the binary task for both classes."""
    logits = logits.cpu().double()
    if logits.ndim == 1 or logits.shape[1] == 1:
        logits = torch.stack([torch.zeros(len(logits)).double(), logits.flatten()], dim=1)
    return mask_candidates(logits, None if batch.candidates is None else batch.candidates.cpu()).softmax(dim=1)


def with_pool(data: SemiSupervisedDataModule) -> SemiSupervisedDataModule:
    """The datamodule, with a pool although it may train on labels alone; InputError where the pool is test images."""
    if data.transductive:
        raise InputError("unlabeled: test; test images get no labels, so there is nothing to ask for")
    if data.unlabeled == "none":
        data = copy(data)
        data.unlabeled = "rest"
    return data


def teacher_of(module: LightningModule) -> Callable[[Batch], Tensor]:
    """What gives a module's frozen teacher's logits, or those of its ensemble; InputError if there is none."""
    teacher, ensemble = (getattr(module, name, None) for name in ("teacher", "ensemble"))
    if isinstance(ensemble, Ensemble):
        return lambda batch: ensemble.pool(ensemble(batch))
    if not isinstance(teacher, Teacher):
        raise InputError(f"disagreement needs a module with a frozen teacher, {type(module).__name__} has none")
    return teacher
