"""Simulate rounds of active learning on data whose labels are all known."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure

from kd_lightning.active.loop_folder import LoopFolder, data_state, training_settings
from kd_lightning.active.pool import (
    DROPOUT_PASSES,
    check_labels,
    collect_pool_outputs,
    find_dropout,
    find_teacher,
    with_unlabeled_pool,
)
from kd_lightning.active.strategies import check_installed, check_strategy, select_samples
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.labels.several_labels import from_tensor
from kd_lightning.data.sources.targets import has_label
from kd_lightning.errors import InputError
from kd_lightning.modules.seams import Seams
from kd_lightning.runs.student import check_plain_logits, find_network, student_path


class ActiveLearningLoop:
    """Simulate active learning: train, select samples, reveal their labels, and train again on more labels.

    Each round starts with new weights of the same seed. Training sees the first labels and those of selected samples.

    With ``folder``, a loop that was stopped or killed goes on when a loop with the same settings runs in that folder,
    and ends with the same bits as an unbroken one: finished trainings are not repeated, and an interrupted one resumes
    from its last epoch. Torch is seeded before each step then, so that dropout differs from that of a loop without a
    folder.

    Args:
        make_module: Function that makes the module to train. It must have a ``student``, or be changed by
            :class:`~kd_lightning.teach`, and its test must log ``test/accuracy``.
        make_data: Function that makes the datamodule. Its labeled samples are the first ones. It is called once.
        make_trainer: Function that makes the trainer of a round, for one process.
        strategy: A name of :data:`~kd_lightning.active.strategies.STRATEGIES`.
        queries: Number of samples to select in a round, at least 1.
        rounds: Number of selections, at least 1.
        seed: Seed of weights, training and strategy, from 0 to 2**32 - 1. The datamodule has the seed of the split.
        folder: Folder of results, checkpoints and the student of each training (``round_0/student.safetensors``); new,
            empty, or of an earlier loop. Default: None, which means that nothing is stored.

    Attributes:
        results: The results of the finished trainings, also if a later one fails.

    Raises:
        InputError: If the strategy is unknown, or ``seed``, ``queries`` or ``rounds`` is out of range.
    """

    def __init__(
        self,
        make_module: Callable[[], LightningModule],
        make_data: Callable[[], SemiSupervisedDataModule],
        make_trainer: Callable[[], Trainer],
        strategy: str,
        queries: int,
        rounds: int,
        seed: int = 0,
        folder: str | Path | None = None,
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
        self.folder = None if folder is None else LoopFolder(folder)
        self.results: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Train ``rounds`` + 1 times.

        Returns:
            One dictionary for each training: ``labels``, their number; ``accuracy`` on the test images, in [0, 1]; and
            ``queried``, the indices of the samples selected after it, empty for the last one.

        Raises:
            InputError: If there are too few samples without a label, labels of the pool are unknown, the pool is the
                test images, the module has no student or does not log ``test/accuracy``, or the trainer has several
                processes. With a folder, if it is no folder of a loop, another process uses it, or the loop in it has
                other settings or data.
        """
        data = self.make_data()
        data.prepare_data()
        data.setup("")
        pool = torch.tensor(with_unlabeled_pool(data).unlabeled_indices())
        if self.queries * self.rounds > len(pool):
            total = f"{self.rounds} rounds of {self.queries}"
            raise InputError(f"queries: at most {len(pool)} samples without a label can be selected, got {total}")
        if self.queries * self.rounds == len(pool) and data.labeled_batch_size is not None:
            raise InputError(
                "queries: all samples would get a label, but labeled_batch_size needs a sample without one"
            )
        if not has_label(data.hidden_truth(pool)).all():
            raise InputError(f"unlabeled must be a pool whose labels are all known, got {data.unlabeled}")
        with nullcontext() if self.folder is None else self.folder.open(self._settings(), data_state(data, pool)):
            self.results = [] if self.folder is None else [*self.folder.results]
            for result in self.results:
                self._reveal(data, result["queried"])
            for number in range(len(self.results), self.rounds + 1):
                result = self._train(data, select=number < self.rounds)
                self._reveal(data, result["queried"])
                self.results.append(result)
        return self.results

    def _settings(self) -> dict[str, Any]:
        """Return the settings that a loop in a folder goes on with."""
        with isolate_rng():
            torch.manual_seed(self.seed)
            module, trainer = self.make_module(), self.make_trainer()
            numbers = {name: getattr(self, name) for name in ("strategy", "queries", "rounds", "seed")}
            return numbers | training_settings(module, trainer)

    def _train(self, data: SemiSupervisedDataModule, *, select: bool) -> dict[str, Any]:
        """Train with the labels that are known, and return the result of the training."""
        with isolate_rng():
            torch.manual_seed(self.seed)
            module, trainer = self.make_module(), self.make_trainer()
            if trainer.world_size > 1:
                raise InputError(f"ActiveLearningLoop runs on one process, got {trainer.world_size}")
            if student_path(module) is None:
                raise InputError(f"make_module: {type(module).__name__} has no student")
            check_plain_logits(module, "the scoring of samples")
            if select:
                self._check_selection(module, data)
            checkpoint = None if self.folder is None else self.folder.prepare(trainer, self.seed)
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
            figures = trainer.test(module, datamodule=data, verbose=False)[0]
            if "test/accuracy" not in figures:
                raise InputError(f"make_module: its test must log test/accuracy, got {', '.join(figures)}")
            assert data.split is not None
            result: dict[str, Any] = {"labels": len(data.split.labeled), "accuracy": float(figures["test/accuracy"])}
            result["queried"] = self._select(module, data, trainer) if select else []
            if self.folder is not None:
                student = find_network(module, student_path(module) or "", "make_module")
                self.folder.finish(result, student)
        return result

    def _reveal(self, data: SemiSupervisedDataModule, queried: Sequence[int]) -> None:
        """Add the true labels of queried samples to the split."""
        assert data.split is not None
        truth = data.hidden_truth(torch.tensor(queried, dtype=torch.long))
        labels = truth.tolist() if truth.ndim == 1 else [from_tensor(row) for row in truth]
        data.split = data.split.with_label_rows([[i, y, "clean", 1.0] for i, y in zip(queried, labels, strict=True)])

    def _check_selection(self, module: LightningModule, data: SemiSupervisedDataModule) -> None:
        """Raise InputError before a fit that the strategy could not use."""
        task = Seams.of(module).task
        check_labels(data.visible_labels(), task)
        check_installed(self.strategy, multilabel=task == "multilabel")
        if self.strategy == "disagreement":
            find_teacher(module)
        if self.strategy == "bald":
            find_dropout(find_network(module, student_path(module) or "", "make_module"))

    def _select(self, module: LightningModule, data: SemiSupervisedDataModule, trainer: Trainer) -> list[int]:
        """Return the indices of the samples to label next."""
        device = trainer.strategy.root_device
        module.to(device)
        teacher = find_teacher(module, data) if self.strategy == "disagreement" else None
        passes = DROPOUT_PASSES if self.strategy == "bald" else 0
        options: dict[str, Any] = {"teacher": teacher, "passes": passes, "seed": self.seed, "device": device}
        student = find_network(module, student_path(module) or "", "make_module")
        index, pool = collect_pool_outputs(student, data, self.strategy, seams=Seams.of(module), **options)
        selected: list[int] = index[select_samples(self.strategy, pool, self.queries).rows].tolist()
        return selected


def plot(results: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Plot the test accuracy against the number of labels.

    Each strategy has one line, the mean over its runs. The band around it is one sample standard deviation.

    Args:
        results: For each strategy a list of runs, such as one for each seed. A run is the result of
            :meth:`ActiveLearningLoop.run`.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (strategy, runs) in enumerate(results.items()):
        accuracies: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            for training in run:
                accuracies[training["labels"]].append(100 * training["accuracy"])
        counts = sorted(accuracies)
        means = [statistics.mean(accuracies[count]) for count in counts]
        spread = [statistics.stdev(accuracies[count]) if len(accuracies[count]) > 1 else 0.0 for count in counts]
        axes.plot(counts, means, marker="o", color=f"C{number}", label=strategy)
        low, high = zip(*((mean - sd, mean + sd) for mean, sd in zip(means, spread, strict=True)), strict=True)
        axes.fill_between(counts, low, high, color=f"C{number}", alpha=0.15)
    axes.set(xlabel="labels", ylabel="test accuracy %", title="Active learning")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure
