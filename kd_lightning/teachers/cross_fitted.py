"""Teachers that each teach the samples whose labels they have not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.features.pooling import Pool
from kd_lightning.inputs import arguments_of
from kd_lightning.losses.base import Task, at_least_float32
from kd_lightning.runs.run import Run
from kd_lightning.teachers.cross_fit import CrossFit
from kd_lightning.teachers.intervals import share_interval
from kd_lightning.teachers.teacher import Teacher

_ALL = -1
"""Fold of a sample whose label no network has seen: all networks teach it."""


@dataclass
class _Found:
    """The fold of each sample of the data by index, (N,); None if it is not known."""

    folds: Tensor | None = None


class FoldNetworks(nn.ModuleList):
    """The networks of all folds.

    Args:
        networks: The networks, by fold.
        folds: Hash of the folds. As an attribute it is part of the teacher's fingerprint, and of its cache's key.
    """

    def __init__(self, networks: list[nn.Module], folds: str) -> None:
        super().__init__(networks)
        self.folds = folds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise InputError: which network a row is for depends on its sample."""
        raise InputError(_NO_SAMPLES)


_NO_SAMPLES = (
    "CrossFittedTeacher: each sample has a network of its own, so a batch with the index of its samples is needed; use "
    "DistillModule or EnsembleDistillModule without use_vmap, and a SemiSupervisedDataModule"
)


class CrossFittedTeacher(Teacher):
    """K frozen networks, each trained without the labels of its fold: none teaches a sample that it was trained on.

    ``kd-lightning crossfit TEACHER_CONFIG`` trains the networks. A sample of fold k is taught by network k alone. Any
    other sample (unlabeled, of validation and test) is taught by all: the mean of their probabilities at temperature 1.
    So the soft targets of labeled samples show how sure a network is of what it has not seen.

    A sample is known by its content: names, order and number of the files do not matter, and a copy of a sample of fold
    k is taught by network k, too. Samples that are similar, but not equal, are told apart; give the data ``group`` if
    they belong together, and cross-fitting holds out whole groups. The labels of the validation part select the
    networks' checkpoints, as in any fit. Rows that a hook of your own mixes after the data loader are not noticed.

    It is a :class:`Teacher` for :class:`~kd_lightning.DistillModule`, for
    :class:`~kd_lightning.EnsembleDistillModule` without ``use_vmap``, and for the other modules that compare logits. It
    has no features, since the features of different networks do not compare.

    Args:
        path: The file ``crossfit.json``. The runs that it names are found from its folder.
        preprocess: See :class:`Teacher`.
        classes: Likewise.
        device: Likewise.
        cache: Likewise. The key of the stored outputs has the folds in it.
        cache_dtype: Likewise. Rows of a batch are computed in parts, so a run with a cache may differ from a run
            without it by rounding.
        cache_top_k: Likewise.

    Shapes:
        Input: a ``Batch`` with an ``index``. Output: log-probabilities (B, C) of the multiclass task, logits of the
        binary and multilabel tasks, values of regression; dense ones in their shape.

    Attributes:
        cross_fit: What the file holds.

    Raises:
        InputError: If the file or a run is missing, was changed, or does not fit; at the start of a fit, if a held-out
            sample is not among the training samples, or samples are mixed (``mix``); if a batch has no index.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        preprocess: nn.Module | Callable[..., Any] | None = None,
        classes: list[int | None] | None = None,
        device: str | None = None,
        cache: str | Path | None = None,
        cache_dtype: Literal["float16", "float32"] = "float16",
        cache_top_k: int | None = None,
    ) -> None:
        file = Path(path)
        cross_fit = CrossFit.load(file)
        networks = FoldNetworks(_networks(cross_fit, file), cross_fit.hash)
        super().__init__(
            networks,
            preprocess=preprocess,
            classes=classes,
            device=device,
            cache=cache,
            cache_dtype=cache_dtype,
            cache_top_k=cache_top_k,
        )
        self.cross_fit = cross_fit
        self._found = _Found()  # copies of the teacher, as of weight averaging, share it

    @property
    def layers(self) -> Mapping[str, Pool | None]:
        """None: see the class."""
        return {}

    @layers.setter
    def layers(self, layers: Mapping[str, Pool | None]) -> None:
        if layers:
            raise InputError(
                f"CrossFittedTeacher has no features, since those of different networks do not compare, got layers "
                f"{', '.join(layers)}; compare logits alone, or use a Teacher"
            )

    def find_samples(self, data: Any, part: Literal["train", "test"]) -> None:
        """Find the fold of each sample of the data by its content.

        Args:
            data: The datamodule; one without ``identities`` leaves all samples unknown.
            part: Which samples the ``index`` of batches counts: "train" (validation included) or "test".

        Raises:
            InputError: If samples are mixed or have no content, if a held-out sample is not among those of "train", or
                if the data have other classes.
        """
        self._found.folds = None
        if not callable(getattr(data, "identities", None)):
            return
        if part == "train" and getattr(data, "mix", None) is not None:
            raise InputError("mix: a mixed row is of two samples, of which a CrossFittedTeacher may have seen one")
        before, now = self.cross_fit.class_names, getattr(data, "class_names", None)
        if self.classes is None and before and now and [*now] != before:
            raise InputError(
                f"CrossFittedTeacher: the teachers' classes are {', '.join(before[:20])}, got data of "
                f"{', '.join(now[:20])}; classes maps them"
            )
        contents = [content.partition("#")[0] for content in data.identities(part).contents]
        if not all(contents):
            raise InputError(
                "CrossFittedTeacher knows samples by their content, but the dataset returns another item each time"
            )
        if part == "train":
            self._check_all_here({*contents})
        fold_of = self.cross_fit.fold_of
        self._found.folds = torch.tensor([fold_of.get(content, _ALL) for content in contents], dtype=torch.long)

    def _check_all_here(self, contents: set[str]) -> None:
        named = [pair for fold in self.cross_fit.folds for pair in zip(fold.paths, fold.contents, strict=True)]
        lost = [path or content for path, content in named if content not in contents]
        if lost:
            raise InputError(
                f"CrossFittedTeacher: {len(lost)} of {len(named)} samples that the teachers were trained on are not "
                f"among the training samples ({lost[0]}), or have another content now; which teacher has seen them is "
                "not known; run kd-lightning crossfit again"
            )

    def describe_samples(self) -> str:
        """Return how many samples a network of their own teaches, and the out-of-fold accuracy, in one line."""
        count, n, right = len(self.cross_fit.folds), self.cross_fit.samples, self.cross_fit.right
        text = f"{count} networks; out-of-fold accuracy "
        if right is None:
            text += f"of {n} labels is not measured"
        else:
            low, high = share_interval(right / n, n)
            text += f"{right / n:.1%} of {n} labels (95% interval {low:.1%} to {high:.1%})"
        if (folds := self._found.folds) is None:
            return text
        alone = int((folds != _ALL).sum())
        return f"{text}; {alone} of {len(folds)} samples have a network of their own, the others the mean of all"

    def folds_of(self, batch: Batch) -> Tensor:
        """Return the number of the network that teaches each row of a batch, (B,) on the CPU; -1 for all networks.

        Raises:
            InputError: If that is not known.
        """
        if batch.partner is not None:
            raise InputError("a mixed row is of two samples, of which a CrossFittedTeacher may have seen one")
        folds = self._found.folds
        if folds is None or batch.index is None:
            raise InputError(_NO_SAMPLES)
        index = batch.index.cpu()
        if len(index) and int(index.max()) >= len(folds):
            raise InputError(
                f"CrossFittedTeacher: a batch has sample {int(index.max())}, but the data have {len(folds)}"
            )
        return torch.where(index < 0, _ALL, folds[index.clamp(min=0)])

    def compute(self, batch: Batch) -> Tensor:
        """Compute the outputs of each row by the network that has not seen its sample; see :meth:`Teacher.compute`."""
        folds = self.folds_of(batch)
        if not len(batch):
            return self._of_network(0, batch)
        together = folds == _ALL
        outputs: Tensor | None = None
        shared = []
        for number in range(len(self.cross_fit.folds)):
            rows = together | (folds == number)
            if not rows.any():
                continue
            found = self._of_network(number, batch if rows.all() else batch.select(rows.to(batch.device)))
            outputs = found.new_empty(len(batch), *found.shape[1:]) if outputs is None else outputs
            outputs[(folds == number).to(batch.device)] = found[(folds[rows] == number).to(batch.device)]
            if together.any():
                shared.append(found[together[rows].to(batch.device)])
        assert outputs is not None
        if shared:
            outputs[together.to(batch.device)] = _mean(torch.stack(shared), self.cross_fit.task)
        return outputs

    def _of_network(self, number: int, batch: Batch) -> Tensor:
        """Return the outputs of a network, in at least float32; of the multiclass task as log-probabilities."""
        args, kwargs = arguments_of(batch.teacher_x)
        output = self.run_network(self.network[number], args, kwargs)  # type: ignore[index]
        logits = at_least_float32(logits_of(output, "the teacher").to(batch.device))
        if self.cross_fit.task != "multiclass":
            return logits
        dense = self.class_dim is not None and logits.ndim > 2
        return logits.log_softmax(dim=self.class_dim if dense and self.class_dim is not None else -1)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Raise InputError: which sample a row is of is not known."""
        raise InputError(_NO_SAMPLES)


def _networks(cross_fit: CrossFit, file: Path) -> list[nn.Module]:
    """Load the network of each fold.

    Raises:
        InputError: If a run is missing, or its weights were changed since.
    """
    networks = []
    for number, fold in enumerate(cross_fit.folds):
        run = Run(file.parent / fold.run)
        if run.weights_hash != fold.weights:
            raise InputError(
                f"path: {file}: the weights of fold {number} ({run.weights}) are missing or were changed since; run "
                "kd-lightning crossfit again"
            )
        networks.append(run.student())
    return networks


def _mean(outputs: Tensor, task: Task) -> Tensor:
    """Return the mean of the networks' probabilities, or values of regression, in the form of their outputs.

    Args:
        outputs: (K, B, ...), of the multiclass task log-probabilities.
        task: Of the networks.
    """
    if task == "regression":
        return outputs.mean(dim=0)
    if task == "multiclass":
        return outputs.logsumexp(dim=0) - math.log(len(outputs))
    yes, no = (F.logsigmoid(sign * outputs).logsumexp(dim=0) for sign in (1, -1))
    return yes - no
