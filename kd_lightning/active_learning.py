"""Active learning with networks: what a pool looks like to them, and rounds of it simulated."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from kd_lightning.acquisition import Pool, check_strategy, pick
from kd_lightning.batch import MISSING, Batch, is_labeled
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.ensembles import Ensemble
from kd_lightning.errors import InputError
from kd_lightning.graph_labels import GraphPseudoLabels
from kd_lightning.layers import dry
from kd_lightning.losses.coarse import within
from kd_lightning.modules import SupervisedModule
from kd_lightning.modules.evaluation import check_outputs
from kd_lightning.outputs import logits_of
from kd_lightning.teachers import Teacher

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
    with dry(student):
        torch.manual_seed(seed)
        for given in with_pool(data).pool_dataloader():
            batch = move_data_to_device(data.on_before_batch_transfer(given, 0), torch.device(device))
            batch = Batch.of(data.on_after_batch_transfer(batch, 0))
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
    return within(logits, None if batch.candidates is None else batch.candidates.cpu()).softmax(dim=1)


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


class ActiveLearningLoop:
    """Simulates active learning where all labels are known: trains, asks for labels, trains anew on more of them.

    Each round begins with new weights, of the same seed. Only the labels that were asked for are revealed.

    Args:
        make_module: Makes the module to train, with a student.
        make_data: Makes the datamodule, whose labeled samples are the first ones; called once.
        make_trainer: Makes the trainer of a round, of one process.
        strategy: A name of :data:`~kd_lightning.acquisition.STRATEGIES`.
        queries: How many labels to ask for in a round.
        rounds: How often to ask.
        seed: Of weights, training and strategy; that of the split is the datamodule's.

    Attributes:
        results: Of the rounds so far, also where one fails.

    Raises:
        InputError: For an unknown strategy, a seed out of range, and less than one query or round.
    """

    def __init__(
        self,
        make_module: Callable[[], SupervisedModule],
        make_data: Callable[[], SemiSupervisedDataModule],
        make_trainer: Callable[[], Trainer],
        strategy: str,
        queries: int,
        rounds: int,
        seed: int = 0,
    ) -> None:
        check_strategy(strategy, seed)
        for name, number in {"queries": queries, "rounds": rounds}.items():
            if number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")
        self.make_module = make_module
        self.make_data = make_data
        self.make_trainer = make_trainer
        self.strategy = strategy
        self.queries = queries
        self.rounds = rounds
        self.seed = seed
        self.results: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Train ``rounds`` + 1 times.

        Returns:
            Of each training the number of ``labels``, the ``accuracy`` on the test images, and the ``queried`` samples'
            indices that it led to: none at the end.

        Raises:
            InputError: For too few samples without a label, a pool whose labels nobody knows, or of test images, and
                several processes.
        """
        data = self.make_data()
        data.prepare_data()
        data.setup("")
        pool = torch.tensor(with_pool(data).unlabeled_indices())
        if self.queries * self.rounds > len(pool):
            asked = f"{self.rounds} rounds of {self.queries}"
            raise InputError(f"queries: {asked} samples asked for, but only {len(pool)} without a label are there")
        if self.queries * self.rounds == len(pool) and data.labeled_batch_size is not None:
            raise InputError("queries: they leave no sample without a label, but labeled_batch_size needs one")
        if (data.hidden_truth(pool) == MISSING).any():
            raise InputError(f"unlabeled: {data.unlabeled}; to simulate answers, all labels must be known")
        results = self.results = []
        for number in range(self.rounds + 1):
            with isolate_rng():
                torch.manual_seed(self.seed)
                module, trainer = self.make_module(), self.make_trainer()
                if trainer.world_size > 1:
                    raise InputError(f"ActiveLearningLoop runs on one process, got {trainer.world_size}")
                trainer.fit(module, datamodule=data)
                accuracy = float(trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"])
                assert data.split is not None
                labels = len(data.split.labeled)
                queried = self._ask(module, data, trainer) if number < self.rounds else []
            truth = data.hidden_truth(torch.tensor(queried, dtype=torch.long)).tolist()
            data.split = data.split.with_answers([[i, y, "clean", 1.0] for i, y in zip(queried, truth, strict=True)])
            results.append({"labels": labels, "accuracy": accuracy, "queried": queried})
        return results

    def _ask(self, module: SupervisedModule, data: SemiSupervisedDataModule, trainer: Trainer) -> list[int]:
        device = trainer.strategy.root_device
        module.to(device)
        teacher = teacher_of(module) if self.strategy == "disagreement" else None
        passes = PASSES if self.strategy == "bald" else 0
        index, pool = survey(
            module.student, data, self.strategy, teacher=teacher, passes=passes, seed=self.seed, device=device
        )
        found: list[int] = index[pick(self.strategy, pool, self.queries).rows].tolist()
        return found


def plot(results: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Accuracy against labels: of each strategy the mean over its runs, and where there are several the sample SD.

    Args:
        results: What :meth:`ActiveLearningLoop.run` gave, a list of runs (such as one for each seed) by strategy.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (strategy, runs) in enumerate(results.items()):
        found: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            for one in run:
                found[one["labels"]].append(100 * one["accuracy"])
        counts = sorted(found)
        means = [statistics.mean(found[count]) for count in counts]
        spread = [statistics.stdev(found[count]) if len(found[count]) > 1 else 0.0 for count in counts]
        axes.plot(counts, means, marker="o", color=f"C{number}", label=strategy)
        low, high = zip(*((mean - sd, mean + sd) for mean, sd in zip(means, spread, strict=True)), strict=True)
        axes.fill_between(counts, low, high, color=f"C{number}", alpha=0.15)
    axes.set(xlabel="labels", ylabel="test accuracy %", title="Active learning")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure
