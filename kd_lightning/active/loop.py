"""Active learning with networks: what a pool looks like to them, and rounds of it simulated."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure

from kd_lightning.active.pool import PASSES, survey, teacher_of, with_pool
from kd_lightning.active.strategies import check_strategy, pick
from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.modules import SupervisedModule


class ActiveLearningLoop:
    """Simulates active learning where all labels are known: trains, asks for labels, trains anew on more of them.

    Each round begins with new weights, of the same seed. Only the labels that were asked for are revealed.

    Args:
        make_module: Makes the module to train, with a student.
        make_data: Makes the datamodule, whose labeled samples are the first ones; called once.
        make_trainer: Makes the trainer of a round, of one process.
        strategy: A name of :data:`~kd_lightning.active.strategies.STRATEGIES`.
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
        if (data.hidden_truth(pool) == IGNORE_INDEX).any():
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
