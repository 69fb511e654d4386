"""What the networks of a report return for samples of the test part and of training, computed from the runs' data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.batch import Batch
from kd_lightning.data.batch_transfer import own_hooks, read_by, transfer
from kd_lightning.data.datamodule import SemiSupervisedDataModule
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.errors import InputError
from kd_lightning.inputs import arguments_of
from kd_lightning.losses.base import standardize_logits, to_probabilities
from kd_lightning.losses.protocols import standardizes, temperature_of
from kd_lightning.modules import SupervisedModule
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.report.cast import Cast, Role
from kd_lightning.runs.build import build
from kd_lightning.runs.results import Prediction, labeled
from kd_lightning.runs.run import Run
from kd_lightning.runs.student import example_inputs
from kd_lightning.runs.weights import load_weights
from kd_lightning.teachers.teacher import Teacher

MOST_SAMPLES = 2048
"""Largest number of test samples on which the networks are run; of more a random part of that size."""
_POOL, _SHOWN = 256, 8  # of training samples: those that the soft targets are selected from, and those shown
_LEAST_AGREEMENT = 0.95  # of predictions with those of the test, on another device or in another precision


class Unavailable(InputError):  # noqa: N818  (no fault: a part of the page is left out)
    """Something that a part of the report needs is not there."""


@dataclass(frozen=True)
class TestOutputs:
    """Probabilities of all networks on the same test samples.

    Attributes:
        index: (N,) indices in the test part.
        labels: (N,) classes.
        probabilities: {kind of role: (N, C)}; ``"method"`` may be missing, as where a run is a baseline alone.
        total: Number of labeled samples of the test part.
        network: The main role's module and data.
        seed: The seed of the runs.
    """

    index: Tensor
    labels: Tensor
    probabilities: dict[str, Tensor]
    total: int
    network: Network
    seed: int | None

    @property
    def data(self) -> SemiSupervisedDataModule:
        """The datamodule."""
        found: SemiSupervisedDataModule = self.network.data
        return found

    def accuracy(self, kind: str) -> float:
        """Return the share of right predictions of a role."""
        return float((self.probabilities[kind].argmax(dim=1) == self.labels).double().mean())

    @property
    def what(self) -> str:
        """The number of samples, for captions."""
        if len(self.index) == self.total:
            return f"n = {self.total:,} test samples"
        return f"n = {len(self.index):,} of {self.total:,} test samples, drawn at random"


@dataclass(frozen=True)
class SoftTargets:
    """Soft targets of some training samples, from the most certain to the most ambiguous.

    Attributes:
        index: Indices of the samples.
        targets: (N, C) probabilities.
        labels: (N,) labels that training sees; negative for none.
        temperature: Temperature of the soft loss.
        pool: Number of training samples that they are selected from.
        data: The datamodule.
    """

    index: Tensor
    targets: Tensor
    labels: Tensor
    temperature: float
    pool: int
    data: SemiSupervisedDataModule


class Network:
    """The module of a run with its deployed weights, and its data.

    Raises:
        Unavailable: If they cannot be built, or are of a kind that the report does not run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        try:
            self.module: Any = build(LightningModule, run.config["model"])
            if not isinstance(self.module, SupervisedModule):
                raise InputError(f"{type(self.module).__name__} gives no probabilities of classes")
            load_weights(self.module.student, run.weights)
            self.data: Any = run.datamodule()
        except (InputError, OSError) as error:
            raise Unavailable(str(error)) from error
        if not isinstance(self.data, SemiSupervisedDataModule):
            raise Unavailable(f"{type(self.data).__name__} has no samples by index")
        if self.module.task not in ("multiclass", "binary") or self.module.class_dim is not None:
            raise Unavailable("samples have no single class")
        self.module.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.no_grad()
    def run_all(
        self, dataset: ViewDataset, labels: LabelTable, *networks: Callable[[Batch], Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run networks on all samples of a dataset.

        Args:
            dataset: The samples.
            labels: Their labels.
            networks: Functions from a batch to logits (B, C), logits (K, B, C) of several teachers, or None.

        Returns:
            Labels (N,), negative for none; for each network probabilities (N, C), of several teachers their mean, or
            None.
        """
        data, device = self.data, self.module.device
        source = read_by(data, own_hooks(self.module), self.module.unpack)
        loader = ViewLoader(dataset, labels, batch_size=data.batch_size, num_workers=data.num_workers)
        known, found = [], [[] for _ in networks]  # type: tuple[list[Tensor], list[list[Tensor]]]
        for loaded in loader:
            assert loaded.y is not None
            known.append(loaded.y.reshape(len(loaded), -1)[:, 0].long())
            batch = self.module.unpack(transfer(source, loaded, device))
            for network, parts in zip(networks, found, strict=True):
                if (logits := network(batch)) is not None:
                    several = [
                        _two_columns(one, self.module.task) for one in (logits if logits.ndim == 3 else [logits])
                    ]
                    parts.append(torch.stack(several).mean(dim=0).double().cpu())
        return torch.cat(known), [torch.cat(parts) if parts else None for parts in found]

    def student(self, batch: Batch) -> Tensor:
        """Return the student's logits."""
        logits: Tensor = self.module(batch.x)
        return logits

    def find_samples(self, part: Literal["train", "test"]) -> None:
        """Let the module's teachers find the samples of a part; see :meth:`Teacher.find_samples`."""
        ensemble = getattr(self.module, "ensemble", None)
        for teacher in [getattr(self.module, "teacher", None)] if ensemble is None else ensemble:
            if isinstance(teacher, Teacher):
                teacher.find_samples(self.data, part)

    def run_test(
        self, index: Tensor, *networks: Callable[[Batch], Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run networks on test samples, as :meth:`run_all` does."""
        self.find_samples("test")
        loader = self.data.test_dataloader()
        return self.run_all(loader.dataset.of(index, self.data.eval_transform), loader.labels, *networks)


def _two_columns(logits: Tensor, task: Any) -> Tensor:
    found = to_probabilities(logits, task)
    return torch.stack([1 - found, found], dim=1) if task == "binary" else found


def test_outputs(cast: Cast) -> TestOutputs:
    """Run the student alone, the student with the method, and the teacher on the same test samples.

    Raises:
        Unavailable: If there are no predictions, the data are gone, or have changed since the test.
    """
    main = cast.main
    if main.result is None or main.result.part == "val":
        raise Unavailable("there are no test figures of the deployed weights")
    rows = labeled(main.result.predictions())
    index = torch.tensor(sorted(rows), dtype=torch.long)
    if not len(index):
        raise Unavailable(f"{main.run.folder} has no predictions of test samples")
    if len(index) > MOST_SAMPLES:
        chosen = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:MOST_SAMPLES]
        index = index[chosen.sort().values]
    network = Network(main.run)
    test = network.data.samples.parts.test
    if test is None or int(index.max()) >= len(test.images):
        raise Unavailable(f"the test samples of {network.run.folder} have changed since its test")
    labels, (student, teacher) = network.run_test(index, network.student, network.module.teacher_logits)
    assert student is not None
    _check_same(rows, index, labels, student, network)
    found = {main.kind: student} | ({} if teacher is None else {"teacher": teacher})
    for kind in ("alone", "teacher"):
        role = cast.find(kind)
        if kind not in found and role is not None and (other := _other_outputs(role, main, index)) is not None:
            found[kind] = other
    return TestOutputs(index, labels, found, len(rows), network, main.run.seed)


def _other_outputs(role: Role, main: Role, index: Tensor) -> Tensor | None:
    """Return the outputs of a role of the same source; None if they cannot be computed."""
    try:
        if role.run.data_config()["init_args"]["source"] != main.run.data_config()["init_args"]["source"]:
            return None
        network = Network(role.run)
        return network.run_test(index, network.student)[1][0]
    except (InputError, KeyError):
        return None


def _check_same(
    rows: dict[int, Prediction], index: Tensor, labels: Tensor, probabilities: Tensor, network: Network
) -> None:
    """Raise Unavailable if labels or most predictions are not those of the test."""
    names = network.data.class_names
    name = [str(number) if not names else str(names[number]) for number in range(probabilities.shape[1])]
    same, right = 0, 0
    for number, label, row in zip(index.tolist(), labels.tolist(), probabilities.argmax(dim=1).tolist(), strict=True):
        right += 0 <= label < len(name) and rows[number].label in (name[label], str(label))
        same += rows[number].prediction in (name[row], str(row))
    if right < len(index) or same < _LEAST_AGREEMENT * len(index):
        raise Unavailable(f"the test samples of {network.run.folder} have changed since its test")


def soft_targets(cast: Cast) -> SoftTargets:
    """Return soft targets of training samples under the evaluation transform.

    Raises:
        Unavailable: If there is no teacher or no soft term, or the data are gone.
    """
    network = Network(cast.main.run)
    if not getattr(network.module, "has_soft_term", True):
        raise Unavailable(f"{type(network.module).__name__} has no soft term")
    network.find_samples("train")
    loss = getattr(network.module, "soft_loss", None)
    loader = network.data.train_dataloader()
    indices = loader.dataset.indices.unique()
    chosen = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:_POOL]
    indices = indices[chosen.sort().values]
    dataset = loader.dataset.of(indices, network.data.eval_transform)
    temperature = 1.0 if loss is None else temperature_of(loss)

    def soften(batch: Batch) -> Tensor | None:
        logits: Tensor | None = network.module.teacher_logits(batch)
        if logits is not None and loss is not None and standardizes(loss):
            logits = standardize_logits(logits)
        return None if logits is None else logits / temperature

    labels, (targets,) = network.run_all(dataset, LabelTable(loader.labels.visible, dense=False), soften)
    if targets is None or loss is None:
        raise Unavailable("no teacher gives soft targets")
    rank = torch.linspace(0, len(indices) - 1, min(_SHOWN, len(indices))).long()
    shown = torch.special.entr(targets).sum(dim=1).argsort()[rank]
    return SoftTargets(indices[shown], targets[shown], labels[shown], temperature, len(indices), network.data)


def teacher_costs(network: Network) -> dict[str, Any]:
    """Return parameters, KB of weights and MACs of a module's teacher; empty if it has several, or they fail."""
    teacher, x = getattr(network.module, "teacher", None), example_inputs(network.run.metadata)
    if not isinstance(teacher, Teacher):
        return {}
    size = size_of(teacher.network)
    costs = {
        "parameters": sum(parameter.numel() for parameter in teacher.network.parameters()),
        "precision": precision_of(teacher.network),
        "size_kb": size.stored / 1000,
    }
    if x is not None:
        args, kwargs = arguments_of(x)
        args, kwargs = move_data_to_device((args, kwargs), network.module.device)
        try:
            with FlopCounterMode(display=False) as counter:
                teacher.run(*args, **kwargs)
        except Exception:  # of a network that does not run on zeros, or is no plain network, can be anything
            return costs
        costs["macs"] = counter.get_total_flops() / 2
    return costs
