"""PseudoLabelRefresh: sources, side effects, exact resume, processes, and bad input."""

import csv
import json
import random
import shutil
import sys
import warnings
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from epoch_probe import Probe
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    ApprenticeModule,
    Batch,
    DatasetSource,
    Digits,
    DistillModule,
    DistributionAlignment,
    EnsembleDistillModule,
    FixedThreshold,
    FlexMatch,
    GraphPseudoLabels,
    InputError,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SeedEveryStep,
    SemiSupervisedDataModule,
    Sharpen,
    TopKPerClass,
)
from kd_lightning.__main__ import main
from kd_lightning.batch import LabelKind
from kd_lightning.cli.main import DistillCLI
from kd_lightning.models import DigitsCNN
from kd_lightning.pseudo_labels.table import PseudoLabels
from kd_lightning.runs.csv_logger import ResumableCSVLogger

ADAM = partial(torch.optim.AdamW, lr=0.02)
STEPS = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.7)
SOFT = Sharpen(FixedThreshold(0), 1.0)


def data(**kwargs):
    return SemiSupervisedDataModule(Digits(), **({"labeled": 4, "batch_size": 72, "labeled_batch_size": 8} | kwargs))


def make(kind, **kwargs):
    """A module of each kind, the same every time."""
    torch.manual_seed(0)
    student, teachers = DigitsCNN(4, dropout=0.2), [DigitsCNN(8), DigitsCNN(6)]
    kwargs = {"optimizer": ADAM, "lr_scheduler": STEPS} | kwargs
    if kind is PseudoLabelModule:
        return kind(student, **({"pseudo_labels": "refreshed"} | kwargs))
    return kind(student, teachers if kind is EnsembleDistillModule else teachers[0], **kwargs)


def pool(made, network):
    """Indices of the labeled and the unlabeled images, and a network's logits for them in one batch."""
    index = sorted(made.split.labeled + made.unlabeled_indices())
    x = torch.stack([made.image(i) for i in index])  # of the digits, evaluation transforms are none
    with torch.no_grad():
        return torch.tensor(index), deepcopy(network).eval()(x)


@pytest.fixture
def fit(quiet_trainer):
    """Fits for a few short epochs; gives the trainer."""

    def run(module, *callbacks, datamodule=None, ckpt_path=None, **kwargs):
        options = {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 1, "callbacks": [*callbacks]}
        trainer = quiet_trainer(**(options | kwargs))
        trainer.fit(module, datamodule=data() if datamodule is None else datamodule, ckpt_path=ckpt_path)
        return trainer

    return run


def metrics(logger):
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def ledger(folder):
    rounds = {}
    for path in sorted(Path(folder, "pseudo_labels").glob("*")):
        with path.open(newline="") as file:
            rounds[path.name] = [*csv.DictReader(file)]
    return rounds


# Sources.


@pytest.mark.parametrize(("unlabeled", "workers"), [("rest", 0), ("rest", 1), ("test", 0), ("source", 0)])
def test_student_against_a_pass_of_its_own(fit, unlabeled, workers):
    parts = Digits().load()
    images = parts.train.images.tensors[0]
    source = DatasetSource(
        TensorDataset(images[:600], parts.train.targets[:600]),
        TensorDataset(images[600:801], parts.train.targets[600:801]),
        TensorDataset(images[801:1000]),
    )
    seen = []

    def check(trainer, module):
        table = refresh.table
        if trainer.current_epoch == 0:
            assert table is None
            return
        index, logits = pool(trainer.datamodule, module.student)
        hidden = torch.isin(index, torch.tensor(trainer.datamodule.unlabeled_indices()))
        confidence, label = logits.double().softmax(dim=1)[hidden].max(dim=1)
        assert torch.equal(table.index, index[hidden])
        assert torch.equal(table.label, label)
        torch.testing.assert_close(table.confidence.double(), confidence, rtol=1e-5, atol=1e-6)
        assert torch.equal(table.accepted, table.confidence >= 0.12)
        assert (table.epoch, table.round) == (trainer.current_epoch, trainer.current_epoch - 1)
        assert torch.equal(table.changed, label != seen[-1] if seen else torch.zeros(len(label), dtype=torch.bool))
        seen.append(label)
        if unlabeled == "source":
            assert not {"precision", "accepted_precision"} & refresh.report.keys()
        else:
            right = label == parts.train.targets[table.index]
            assert refresh.report["precision"] == pytest.approx(right.double().mean().item())
            if table.accepted.any():
                expected = right[table.accepted].double().mean().item()
                assert refresh.report["accepted_precision"] == pytest.approx(expected)
        assert refresh.report["coverage"] == pytest.approx(table.accepted.double().mean().item())
        assert refresh.report["flips"] == pytest.approx(table.changed.double().mean().item())
        assert refresh.report["confidence"] == pytest.approx(confidence.mean().item(), abs=1e-5)

    refresh = PseudoLabelRefresh(selection=FixedThreshold(0.12))
    made = SemiSupervisedDataModule(source, labeled=4, unlabeled=unlabeled, batch_size=72, num_workers=workers)
    fit(make(PseudoLabelModule), refresh, Probe(check), datamodule=made)
    first = {"rest": 0, "test": 600, "source": 600}[unlabeled]
    assert len(seen) == 2
    assert refresh.table.index.min() >= first


class Padded(SemiSupervisedDataModule):
    """The pool of a process, with the batch of one that has no sample of its own."""

    def pool_dataloader(self):
        batches = [*super().pool_dataloader()]
        return [*batches, batches[-1].select(torch.tensor([0])).as_padding()]


def test_padding_gets_no_pseudo_label(fit):
    tables = []
    for kind in (SemiSupervisedDataModule, Padded):
        refresh = PseudoLabelRefresh(selection=FixedThreshold(0.12))
        made = kind(Digits(), labeled=4, batch_size=72, labeled_batch_size=8)
        fit(make(PseudoLabelModule), refresh, datamodule=made, max_epochs=2)
        tables.append(refresh.table)
    assert tables[0].hash == tables[1].hash


def test_averaged_student(fit):
    def check(trainer, module):
        if trainer.current_epoch:
            index, logits = pool(trainer.datamodule, module.ema.module)
            hidden = torch.isin(index, refresh.table.index)
            expected = logits[hidden].softmax(dim=1)
            torch.testing.assert_close(refresh.table.confidence, expected.max(dim=1).values)
            plain = pool(trainer.datamodule, module.student)[1][hidden].softmax(dim=1).max(dim=1).values
            assert (plain - refresh.table.confidence).abs().max() > 1e-4

    refresh = PseudoLabelRefresh(source="ema")
    fit(make(PseudoLabelModule, ema_decay=0.9), refresh, Probe(check))


def test_lightnings_average(fit):
    """Computed again here: a copy of the first step's weights, then 0.6 of itself and 0.4 of each next."""
    mine, compared = [], []

    class Mine(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            now = {name: value.clone() for name, value in pl_module.student.state_dict().items()}
            if mine:
                before = mine[0]
                for name, value in now.items():
                    now[name] = 0.6 * before[name] + 0.4 * value if value.is_floating_point() else value
            mine[:] = [now]

    def check(trainer, module):
        if trainer.current_epoch:
            averaged = DigitsCNN(4)
            averaged.load_state_dict(mine[0])
            index, logits = pool(trainer.datamodule, averaged)
            expected = logits[torch.isin(index, refresh.table.index)].softmax(dim=1).max(dim=1).values
            torch.testing.assert_close(refresh.table.confidence, expected, rtol=1e-4, atol=1e-5)
            compared.append(trainer.current_epoch)

    refresh = PseudoLabelRefresh(source="ema")
    fit(make(PseudoLabelModule), refresh, EMAWeightAveraging(decay=0.6), Mine(), Probe(check))
    assert compared == [1, 2]


@pytest.mark.parametrize("kind", [DistillModule, EnsembleDistillModule, ApprenticeModule])
def test_teachers_label(fit, kind):
    rounds = []

    def check(trainer, module):
        if trainer.current_epoch == 0:
            return
        if kind is EnsembleDistillModule:
            networks = [teacher.network for teacher in module.ensemble]
        else:
            networks = [module.teacher.network if kind is DistillModule else module.teacher]
        outputs = [pool(trainer.datamodule, network) for network in networks]
        hidden = torch.isin(outputs[0][0], refresh.table.index)
        expected = torch.stack([logits.double().softmax(dim=1) for _, logits in outputs]).mean(dim=0)[hidden]
        torch.testing.assert_close(refresh.table.soft.double(), expected, rtol=1e-4, atol=1e-6)
        rounds.append(refresh.table.round)

    module, refresh = make(kind), PseudoLabelRefresh(source="teacher", selection=Sharpen(TopKPerClass(20), 1.0))
    trainer = fit(module, refresh, Probe(check), enable_checkpointing=True)
    assert rounds == [0, 1]
    assert refresh.table.label[refresh.table.accepted].bincount().max() == 20
    assert len(ledger(trainer.default_root_dir)) == 3  # and the labels of the trained student


def test_class_that_the_teacher_alone_knows(fit, tmp_path, healthy):
    """No label is a 9, and none but the teacher's reach the hard term."""
    made = data()
    made.setup("fit")
    truth, split = made.source.load().train.targets, made.split
    nines = [i for i in split.labeled if truth[i] == 9]
    others = [i for i in split.labeled if i not in nines]
    replace(split, labeled=others, unlabeled=sorted(split.unlabeled + nines)).save(tmp_path / "split.json")
    hard, counts = [], []

    def check(trainer, module, batch):
        clean = batch.y if batch.kind is None else batch.y[batch.kind == LabelKind.CLEAN]
        assert not (clean == 9).any()
        if trainer.current_epoch:
            hard.append(truth[batch.index[batch.y == 9]])
            counts.append(module.compute_hard_loss(torch.zeros(len(batch), 10), batch)[1])

    few = data(labeled=tmp_path / "split.json", labeled_batch_size=None)
    module = DistillModule(DigitsCNN(4), deepcopy(healthy))
    fit(
        module,
        PseudoLabelRefresh(source="teacher", selection=FixedThreshold(0.9)),
        Probe(check, batch=True),
        datamodule=few,
    )
    assert sum(map(len, hard)) > 5
    assert (torch.cat(hard) == 9).float().mean() > 0.9
    assert min(counts) > 30  # a few labels before

    for source in ("student", GraphPseudoLabels()):
        few = data(labeled=tmp_path / "split.json", labeled_batch_size=None)
        with pytest.raises(InputError, match=r"no labeled sample of class '9', so no pseudo-label can .*source: teach"):
            fit(DistillModule(DigitsCNN(4), healthy), PseudoLabelRefresh(source=source), datamodule=few)
        few.class_names = None  # found out at the first refresh then
        with pytest.raises(InputError, match=r"no labeled sample of class '9', so no"):
            fit(DistillModule(DigitsCNN(4), healthy), PseudoLabelRefresh(source=source), datamodule=few)


def test_graph(fit):
    compared = []

    def check(trainer, module):
        if trainer.current_epoch:
            index, features = pool(trainer.datamodule, nn.Sequential(*[*module.student][:-1]))
            y = trainer.datamodule.visible_labels()[index]
            expected = GraphPseudoLabels(5)(features, y, 10)[y == -100]
            assert torch.equal(refresh.table.index, index[y == -100])
            torch.testing.assert_close(refresh.table.soft, expected, rtol=1e-3, atol=1e-4)
            compared.append((refresh.table.label == expected.argmax(dim=1)).float().mean())

    refresh = PseudoLabelRefresh(source=GraphPseudoLabels(5), selection=SOFT)
    fit(make(PseudoLabelModule), refresh, Probe(check))
    assert len(compared) == 2
    assert min(compared) > 0.99


# Side effects.


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("source", ["student", "ema", GraphPseudoLabels()])
def test_leaves_everything_as_it_was(fit, source, workers):
    before, compared = [], []

    def state(trainer, module):
        numbers = np.random.get_state()
        return (
            {name: value.clone() for name, value in module.state_dict().items()},
            {name: layer.training for name, layer in module.named_modules()},
            torch.get_rng_state().tolist(),
            (numbers[1].tolist(), numbers[2]),
            random.getstate(),
            trainer.training,
            torch.is_grad_enabled(),
        )

    def first(trainer, module):
        module.student[1].eval()  # somebody froze a BatchNorm
        random.random(), np.random.rand(), torch.rand(1)
        before[:] = state(trainer, module)

    def then(trainer, module):
        after = state(trainer, module)
        assert before[0].keys() == after[0].keys()
        assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
        assert before[1:] == [*after[1:]]
        compared.append(refresh.table is not None)

    refresh = PseudoLabelRefresh(source=source)
    module = make(PseudoLabelModule, ema_decay=0.5 if source == "ema" else None)
    fit(module, Probe(first), refresh, Probe(then), datamodule=data(num_workers=workers), max_epochs=2)
    assert compared == [False, True]


def test_labels_that_nobody_uses_change_nothing(fit):
    def train(*callbacks):
        module = make(PseudoLabelModule, pseudo_labels="online", selection=FixedThreshold(0.2))
        torch.manual_seed(3)  # of the dropout
        fit(module, *callbacks)
        return module.state_dict()

    plain = train()
    shown = train(PseudoLabelRefresh(warmup_epochs=0, selection=SOFT, source=GraphPseudoLabels()))
    assert all(torch.equal(value, shown[name]) for name, value in plain.items())


# Resume.


learner = partial(make, PseudoLabelModule)
RESUMES = {
    "student": (learner, {"selection": FixedThreshold(0.13)}, []),
    "soft": (learner, {"selection": Sharpen(FixedThreshold(0)), "warmup_epochs": 0, "every_n_epochs": 2}, []),
    "restart": (learner, {"restart_student": True, "selection": TopKPerClass(9)}, []),
    "ema": (partial(learner, ema_decay=0.8), {"source": "ema", "restart_student": True}, []),
    "average": (learner, {"source": "ema", "restart_student": True}, [partial(EMAWeightAveraging, decay=0.8)]),
    "stateful": (learner, {"selection": DistributionAlignment(FlexMatch(0.13), "labeled", 0.5)}, []),
    "graph": (learner, {"source": GraphPseudoLabels(5)}, []),
    "teacher": (partial(make, DistillModule), {"source": "teacher"}, []),
    "ensemble": (partial(make, EnsembleDistillModule), {"source": "teacher", "selection": SOFT}, []),
    "joint": (partial(make, ApprenticeModule), {"source": "teacher", "restart_student": True}, []),
}


FAST = {"student", "soft", "graph", "ensemble", "joint"}  # the others average weights, or have one of these sources


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in RESUMES]
)
def test_exact_resume(fit, tmp_path, name):
    build, options, others = RESUMES[name]

    def run(root, *callbacks, **kwargs):
        torch.manual_seed(0)
        module = build()
        refresh = PseudoLabelRefresh(**options)
        made = [other() for other in others]
        # a resumed run draws the same dropout
        fit(
            module,
            refresh,
            *made,
            SeedEveryStep(0),
            *callbacks,
            default_root_dir=root,
            enable_checkpointing=True,
            **kwargs,
        )
        return module.state_dict(), refresh

    class Saves(ModelCheckpoint):
        def __init__(self, when, **kwargs):
            super().__init__(tmp_path / when, "{step}", save_top_k=-1, **kwargs)

    class EpochSaves(Saves):
        """A class of its own, since Lightning takes one of each kind."""

    steps, ends = (
        Saves("steps", every_n_train_steps=1),
        EpochSaves("ends", every_n_epochs=1, save_on_train_epoch_end=False),
    )
    whole, refresh = run(tmp_path / "whole", steps, ends)
    paths = sorted(tmp_path.glob("*/*.ckpt"))
    assert len(paths) == 9
    # all moments for one source of labels; for the others each other one, in mid-epoch and at an end
    for number, path in enumerate(paths if name == "student" else paths[1::2]):
        torch.load(path, weights_only=True)
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", root)
        resumed, mine = run(root, ckpt_path=path)
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items()), path
        assert mine.table.hash == refresh.table.hash, path
        assert ledger(root) == ledger(tmp_path / "whole"), path
    assert len(ledger(tmp_path / "whole")) > 1


def test_restart(fit):
    first, starts = {}, {}

    def check(trainer, module, batch):
        if trainer.global_step % 2 == 0:
            weights = {name: value.clone() for name, value in module.student.state_dict().items()}
            optimizer = trainer.optimizers[0]
            averages = [int(module.ema.n_averaged), int(average._average_model.n_averaged)]
            rate = optimizer.param_groups[0]["lr"]
            starts[trainer.current_epoch] = weights, len(optimizer.state), rate, averages, len(trainer.optimizers)

    module = make(PseudoLabelModule, ema_decay=0.9)
    first.update({name: value.clone() for name, value in module.student.state_dict().items()})
    average = EMAWeightAveraging(decay=0.9)
    refresh = PseudoLabelRefresh(every_n_epochs=2, restart_student=True, source="ema")
    fit(module, refresh, average, Probe(check, batch=True), max_epochs=5)
    for epoch, (weights, states, rate, averages, count) in starts.items():
        fresh = epoch in (0, 3)  # refreshed at 1 and 3
        assert all(torch.equal(value, first[name]) for name, value in weights.items()) == fresh
        assert (states == 0) == fresh
        assert rate == pytest.approx(0.02 * 0.7 ** (epoch % 3))
        assert (max(averages) == 0) == fresh
        assert count == 1
    assert len(starts) == 5


def test_pool_that_changed(fit, tmp_path):
    saves = ModelCheckpoint(tmp_path / "saved", "last")
    fit(make(PseudoLabelModule), PseudoLabelRefresh(), saves, enable_checkpointing=True, max_epochs=2)
    made = data()
    made.unlabeled_indices = lambda: SemiSupervisedDataModule.unlabeled_indices(made)[:-1]
    made.load_state_dict = lambda state: None  # our own datamodule sees it first
    with pytest.raises(InputError, match="has changed since its last labels: then 1038 samples, now 1037; resume"):
        fit(make(PseudoLabelModule), PseudoLabelRefresh(), datamodule=made, ckpt_path=saves.best_model_path)


# Anybody's parts.


class Foreign(LightningModule):
    """Reads (x, y) of a batch, and augments on the device while training."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))

    def forward(self, x):
        return {"logits": self.network(x)}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            batch.x = batch.x + 100
        return batch

    def training_step(self, batch, batch_idx):
        known = batch.y != -100
        return nn.functional.cross_entropy(self(batch.x)["logits"][known], batch.y[known])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Theirs(LightningDataModule):
    """The two methods, and attributes that have the names of ours."""

    path = "images"
    unlabeled_indices = (1, 2, 3)
    class_names = np.array([f"digit {n}" for n in range(10)])

    def __init__(self, count=100, batch=30):
        super().__init__()
        part = Digits().load().train
        self.x, self.y = part.images.tensors[0][:count].float(), part.targets[:count].clone()
        self.y[50:] = -100
        self.batch = batch
        self.filled = self.y.clone()

    def loader(self, y):
        order = torch.arange(len(y)).flip(0).repeat(2)  # each sample comes twice
        rows = [Batch(self.x[i], y[i], index=i) for i in order.split(self.batch)]
        return DataLoader(rows, None)

    def train_dataloader(self):
        return DataLoader([Batch(self.x, self.filled)] * 2, None)

    def pool_dataloader(self):
        return self.loader(self.y)

    def set_pseudo_labels(self, labels):
        self.filled.copy_(self.y)
        self.filled[labels.index[labels.accepted]] = labels.label[labels.accepted]


def test_somebody_elses_module_and_data(fit, tmp_path):
    made, module, compared = Theirs(), Foreign(), []

    def check(trainer, pl_module):
        if trainer.current_epoch:
            with torch.no_grad():
                expected = deepcopy(module.network).eval()(made.x[50:]).softmax(dim=1).max(dim=1)
            torch.testing.assert_close(refresh.table.confidence, expected.values)
            assert torch.equal(refresh.table.label, expected.indices)
            assert refresh.table.index.tolist() == [*range(50, 100)]
            assert torch.equal(made.filled[50:], torch.where(refresh.table.accepted, expected.indices, -100))
            compared.append(refresh.report["coverage"])

    refresh = PseudoLabelRefresh(selection=TopKPerClass(3))
    fit(module, refresh, Probe(check), datamodule=made, enable_checkpointing=True)
    assert len(compared) == 2
    assert 0 < min(compared) <= max(compared) <= 0.6
    row = ledger(tmp_path)["round_0001.csv"][0]
    assert row["path"] == ""
    assert row["label"] == f"digit {refresh.table.label[0]}"


def test_data_without_a_pool(fit, loader, quiet_trainer):
    trainer = quiet_trainer(callbacks=[PseudoLabelRefresh()])
    with pytest.raises(InputError, match="as SemiSupervisedDataModule has them, got no datamodule"):
        trainer.fit(make(PseudoLabelModule, pseudo_labels="online"), loader())

    class Bare(LightningDataModule):
        def set_pseudo_labels(self, labels):
            pass

    with pytest.raises(InputError, match="got Bare without pool_dataloader"):
        fit(Foreign(), PseudoLabelRefresh(), datamodule=Bare())
    made = Theirs()
    made.pool_dataloader = lambda: DataLoader(TensorDataset(made.x, made.y), 9)
    with pytest.raises(InputError, match="pool_dataloader must return Batches with index and y"):
        fit(Foreign(), PseudoLabelRefresh(warmup_epochs=0), datamodule=made)
    made = Theirs(count=50)
    with pytest.raises(InputError, match="there are no unlabeled samples; set labeled to a part"):
        fit(Foreign(), PseudoLabelRefresh(), datamodule=made)
    made.pool_dataloader = list
    with pytest.raises(InputError, match="there are no unlabeled samples"):
        fit(Foreign(), PseudoLabelRefresh(), datamodule=made)


# What a run leaves.


def test_a_report_that_cannot_be_written_does_not_end_a_training(fit, tmp_path, monkeypatch):
    board = TensorBoardLogger(tmp_path, "run", "v")
    (tmp_path / "run" / "v").mkdir(parents=True)
    (tmp_path / "run" / "v" / "pseudo_labels").write_text("in the way")
    monkeypatch.setattr("kd_lightning.pseudo_labels.tasks.base.class_figure", lambda *_: 1 / 0)
    refresh = PseudoLabelRefresh(selection=FixedThreshold(0.12))
    with pytest.warns(UserWarning, match="is left out, and the run goes on") as found:
        fit(make(PseudoLabelModule), refresh, datamodule=data(), logger=board)
    texts = {str(one.message).split(" is left out")[0] for one in found if "is left out" in str(one.message)}
    assert texts == {*(f"pseudo-labels of round {n}" for n in range(3)), "figure pseudo_labels/classes"}
    assert refresh.report["coverage"] >= 0
    assert {*EventAccumulator(board.log_dir).Reload().Tags()["images"]} == {"pseudo_labels/confidence"}


def test_charts_figures_and_ledger(fit, tmp_path):
    board, table = TensorBoardLogger(tmp_path, "run", "v"), ResumableCSVLogger(str(tmp_path), "run", "v")
    made, module = data(), make(PseudoLabelModule)
    refresh, values, tables = PseudoLabelRefresh(selection=FixedThreshold(0.12)), [], []

    def check(trainer, pl_module):
        if trainer.current_epoch:
            values.append(refresh.report)
            tables.append(refresh.table)

    fit(module, refresh, Probe(check), datamodule=made, logger=[board, table])
    values.append(refresh.report)  # when training has ended
    events = EventAccumulator(board.log_dir).Reload()
    rows = metrics(table)
    names = {"coverage", "confidence", "flips", "class_distance", "precision", "accepted_precision"}
    for name in names:
        expected = [value[name] for value in values]
        assert [e.value for e in events.Scalars(f"pseudo_labels/{name}")] == pytest.approx(expected)
        logged = [float(row[f"pseudo_labels/{name}"]) for row in rows if row[f"pseudo_labels/{name}"]]
        assert logged == pytest.approx(expected)
    assert values[0].keys() == names
    assert {*events.Tags()["images"]} >= {"pseudo_labels/confidence", "pseudo_labels/classes"}
    found = ledger(tmp_path / "run" / "v")
    assert [*found] == [f"round_000{n}.csv" for n in range(3)]
    for number, expected in enumerate(tables):
        written = found[f"round_000{number}.csv"]
        for name in ("index", "label", "accepted", "changed"):
            assert [int(row[name]) for row in written] == getattr(expected, name).int().tolist()
        assert [float(row["confidence"]) for row in written] == pytest.approx(expected.confidence.tolist(), abs=1e-6)
        assert {(row["round"], row["epoch"]) for row in written} == {(str(number), str(number + 1))}
    assert {(row["round"], row["epoch"]) for row in found["round_0002.csv"]} == {("2", "3")}
    index, logits = pool(made, module.student)
    expected = logits[torch.isin(index, refresh.table.index)].argmax(dim=1)
    assert [int(row["label"]) for row in found["round_0002.csv"]] == expected.tolist()


def test_first_refresh_of_all_is_charted(fit, tmp_path):
    table = ResumableCSVLogger(str(tmp_path), "run", "v")
    fit(make(PseudoLabelModule), PseudoLabelRefresh(warmup_epochs=0), logger=table, max_epochs=1)
    rows = metrics(table)
    assert sum(bool(row["pseudo_labels/coverage"]) for row in rows) == 2  # and the last


@pytest.mark.parametrize("kwargs", [{}, {"fast_dev_run": True, "enable_checkpointing": True}])
def test_runs_that_leave_nothing(fit, tmp_path, kwargs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refresh = PseudoLabelRefresh(warmup_epochs=0)
    fit(make(PseudoLabelModule), refresh, **kwargs)
    assert refresh.table is not None
    assert not [*tmp_path.rglob("*")]


@pytest.mark.parametrize(("kwargs", "epochs"), [({"max_steps": 3}, [1, 2]), ({"limit_train_batches": 1}, [1, 2, 3])])
def test_short_runs(fit, tmp_path, kwargs, epochs):
    fit(make(PseudoLabelModule), PseudoLabelRefresh(), enable_checkpointing=True, **kwargs)
    assert [int(rows[0]["epoch"]) for rows in ledger(tmp_path).values()] == epochs


def test_fit_twice(fit):
    """Each fit starts anew, with no labels of the one before."""
    refresh, tables, kinds = PseudoLabelRefresh(), [], []

    def check(trainer, module, batch):
        kinds.append(None if batch.kind is None else bool((batch.kind == LabelKind.PSEUDO).any()))

    made = data()
    for _ in range(2):
        fit(make(PseudoLabelModule), refresh, SeedEveryStep(), Probe(check, batch=True), datamodule=made, max_epochs=2)
        tables.append(refresh.table.hash)
    assert tables[0] == tables[1]
    assert kinds == [None, None, True, True] * 2


def test_nothing_accepted_of_labels_that_do_not_train(fit):
    """The online pseudo-labels of the module train, and it warns of these itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = make(PseudoLabelModule, pseudo_labels="online")
        fit(module, PseudoLabelRefresh(selection=FixedThreshold(1.0)), max_epochs=2)
    assert not [str(w.message) for w in caught if "given labels alone" in str(w.message)]


def test_nothing_accepted(fit):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refresh = PseudoLabelRefresh(selection=FixedThreshold(1.0))
        fit(make(PseudoLabelModule), refresh, max_epochs=2)
    messages = [str(w.message) for w in caught if "was accepted" in str(w.message)]
    assert len(messages) == 1
    assert messages[0].startswith("epoch 1: none of 1038 pseudo-labels was accepted (the highest probability is 0.")
    assert "FixedThreshold(threshold=1.0)" in messages[0]
    assert "lower the threshold" in messages[0]
    assert refresh.report["coverage"] == 0


def test_one_class_absorbs_the_others(fit):
    module = make(PseudoLabelModule)
    last = next(part for part in reversed([*module.student.modules()]) if isinstance(part, nn.Linear))
    last.bias.data[7] += 100.0
    with pytest.warns(UserWarning, match=r"epoch 1: 100% of the accepted .* class 7, which has 10% of the labels; unl"):
        fit(module, PseudoLabelRefresh(), max_epochs=2)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs must be an integer of at least 1, got 0"),
        ({"every_n_epochs": None}, "every_n_epochs must be an integer of at least 1, got None"),
        ({"every_n_epochs": 1.5}, "every_n_epochs must be an integer"),
        ({"warmup_epochs": -1}, "warmup_epochs must be an integer of at least 0, got -1"),
        ({"source": "pupil"}, "source must be student, ema, teacher or a GraphPseudoLabels, got 'pupil'"),
        ({"source": None}, "source must be student, ema, teacher or a GraphPseudoLabels, got None"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        PseudoLabelRefresh(**arguments)


def test_modules_that_cannot_be(fit):
    for module, refresh, message in (
        (make(PseudoLabelModule), {"source": "teacher"}, "source: teacher, but PseudoLabelModule has no teacher"),
        (make(PseudoLabelModule), {"source": "ema"}, r"needs PseudoLabelModule\(ema_decay=...\), or Lightning's EMAW"),
        (Foreign(), {"source": GraphPseudoLabels()}, "GraphPseudoLabels needs a module with a student, Foreign has"),
        (Foreign(), {"restart_student": True}, "restart_student needs a module with a student, Foreign has none"),
        (DistillModule(DigitsCNN(4), None), {"source": "teacher"}, "but DistillModule has no teacher"),
        (make(DistillModule, task="regression"), {}, "task: regression are floats, but the labels are"),
        (make(DistillModule, class_dim=1), {}, "gives one pseudo-label a sample, got a module with class_dim: 1"),
    ):
        with pytest.raises(InputError, match=message):
            fit(module, PseudoLabelRefresh(**refresh))
    for unlabeled, labeled in (("none", 4), ("rest", None)):
        made = data(labeled=labeled, unlabeled=unlabeled, labeled_batch_size=None)
        with pytest.raises(InputError, match="there are no unlabeled samples; set labeled"):
            fit(make(DistillModule), PseudoLabelRefresh(), datamodule=made)


def test_student_gone_astray(fit):
    def check(trainer, module):
        if trainer.current_epoch:
            module.student[-1].bias.data[0] = torch.nan

    with pytest.raises(InputError, match=r"the output of the student for sample \d+ is not finite"):
        fit(make(DistillModule), Probe(check), PseudoLabelRefresh())


# The command line.


@pytest.fixture
def story(tmp_path, monkeypatch):
    """Writes a config with these arguments of the callback; gives its path."""
    monkeypatch.chdir(tmp_path)

    def write(**arguments):
        refresh = {"class_path": "PseudoLabelRefresh", "init_args": arguments}
        trainer = {"max_epochs": 2, "limit_train_batches": 2, "accelerator": "cpu", "callbacks": [refresh]}
        trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
        student = {"class_path": "DigitsCNN", "init_args": {"width": 4}}
        model = {"class_path": "PseudoLabelModule", "init_args": {"student": student, "pseudo_labels": "refreshed"}}
        source = {"source": {"class_path": "Digits"}, "labeled": 4, "batch_size": 72}
        config = {"trainer": trainer, "model": model}
        config["data"] = {"class_path": "SemiSupervisedDataModule", "init_args": source}
        Path("story.yaml").write_text(yaml.safe_dump(config))
        return "story.yaml"

    return write


@pytest.mark.parametrize(
    "source",
    [
        "student",
        {"class_path": "GraphPseudoLabels", "init_args": {"neighbors": 5}},
        {"class_path": "kd_lightning.GraphPseudoLabels", "init_args": {"neighbors": 5}},
    ],
)
def test_from_a_config(story, source):
    selection = {"class_path": "FixedThreshold", "init_args": {"threshold": 0.1}}
    cli = DistillCLI(["fit", "--config", story(source=source, selection=selection)])
    refresh = next(c for c in cli.trainer.callbacks if isinstance(c, PseudoLabelRefresh))
    assert refresh.source == source if isinstance(source, str) else refresh.source.neighbors == 5
    assert refresh.table.round == 0
    run = Path("runs/run/version_0")
    assert len(ledger(run)) == 2
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["PseudoLabelRefresh"]
    assert {*state["table"]} == {field.name for field in fields(PseudoLabels)}
    assert len(state["table"]["index"]) == 1038
    last = str(run / "checkpoints/last.ckpt")
    main(["fit", "--config", "story.yaml", "--ckpt_path", last, "--trainer.max_epochs", "3"])
    assert [*ledger("runs/run/version_1")] == ["round_0001.csv", "round_0002.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.8}, "threshold: PseudoLabelRefresh has no such key; did you mean selection?"),
        ({"top_k_per_class": 9}, "top_k_per_class: PseudoLabelRefresh has no such key; did you mean selection?"),
        (
            {"selection": {"class_path": "FixedThreshold", "init_args": {"threshold": 1.5}}},
            "threshold must lie in [0, 1], got 1.5",
        ),
        ({"selection": {"class_path": "TopKPerClass", "init_args": {"k": 0}}}, "k must be an integer of at least 1"),
        ({"warmup_epochs": -1}, "warmup_epochs must be an integer of at least 0, got -1"),
        ({"source": "pupil"}, "source"),
        ({"source": {"class_path": "GraphPseudoLabels", "init_args": {"neighbors": 0}}}, "neighbors must be an"),
        ({"every_n_epochs": "often"}, "every_n_epochs"),
        ({"source": "ema"}, "source: ema needs PseudoLabelModule(ema_decay=...), or Lightning's EMAWeightAveraging"),
    ],
)
def test_configs_that_cannot_be(story, fails, arguments, message):
    assert message in fails("fit", "--config", story(**arguments))


# Several processes.

SCRIPT = """
import json, os, sys, torch
from lightning.pytorch import Trainer
from torch.utils.data import TensorDataset
from kd_lightning import DatasetSource, Digits, DistributionAlignment, FixedThreshold, GraphPseudoLabels
from kd_lightning import PseudoLabelRefresh, SemiSupervisedDataModule, Sharpen, SupervisedModule
from kd_lightning.models import DigitsCNN
from kd_lightning.pseudo_labels.table import PseudoLabels

def run(devices, name, count, batch, source):
    torch.manual_seed(0)
    part = Digits().load().train
    # the classes in turn
    order = torch.stack([(part.targets == c).nonzero().flatten()[:99] for c in range(10)], dim=1).flatten()[:count]
    source_of = lambda: DatasetSource(TensorDataset(part.images.tensors[0][order], part.targets[order]))
    data = SemiSupervisedDataModule(source_of(), labeled=1, val_size=0, batch_size=batch // devices)
    if name == "uneven":  # all on rank 0
        alone = SemiSupervisedDataModule(source_of(), labeled=1, val_size=0)
        data.pool_dataloader = list if int(os.environ.get("LOCAL_RANK", 0)) else alone.pool_dataloader
    module = SupervisedModule(DigitsCNN(4))
    selection = Sharpen(FixedThreshold(0.105), 1.0)
    if name == "odd":  # with state
        selection = DistributionAlignment(selection, "labeled", 0.5)
    refresh = PseudoLabelRefresh(warmup_epochs=0, selection=selection, source=source)
    trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1,
                      limit_train_batches=1, enable_progress_bar=False, enable_model_summary=False,
                      default_root_dir=f"{name}_{devices}", logger=False, callbacks=[refresh])
    tables = []
    refresh.on_train_end = lambda *args: tables.append(refresh.table)  # the weights that all began with
    trainer.fit(module, datamodule=data)
    (table,) = tables
    state = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in table.state_dict().items()}
    found = {"hash": table.hash, "table": state, "report": refresh.report}
    open(f"{name}_{trainer.global_rank}_of_{devices}.json", "w").write(json.dumps(found))
    if trainer.world_size > 1:
        torch.distributed.barrier()

if __name__ == "__main__":
    torch.set_num_threads(1)
    devices = int(sys.argv[1])
    run(devices, "odd", 131, 16, "student")
    run(devices, "graph", 130, 16, GraphPseudoLabels(3))
    run(devices, "few", 11, 8, "student")
    run(devices, "uneven", 130, 16, GraphPseudoLabels(3))
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_label_as_one(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["train.py", "1"])
    exec(SCRIPT, {"__name__": "__main__"})
    processes.run_ranks(["train.py", "2"])
    for name, count in (("odd", 121), ("graph", 120), ("few", 1), ("uneven", 120)):
        one, first, second = (
            json.loads((tmp_path / f"{name}_{place}.json").read_text()) for place in ("0_of_1", "0_of_2", "1_of_2")
        )
        assert first["hash"] == second["hash"]
        assert first["report"] == second["report"]
        assert first["report"] == pytest.approx(one["report"], rel=1e-4)
        assert len(one["table"]["index"]) == count
        for key in ("index", "label", "changed", "round", "epoch"):
            assert first["table"][key] == one["table"][key], (name, key)
        for key in ("confidence", "weight", "soft"):
            torch.testing.assert_close(torch.tensor(first["table"][key]), torch.tensor(one["table"][key]))
        assert ledger(tmp_path / f"{name}_2") == ledger(tmp_path / f"{name}_1")


def test_a_momentum_for_steps_is_named(fit, recwarn):
    """A round is one step: averages that hardly move would accept nearly all."""
    for momentum in (0.999, 0.5):
        recwarn.clear()
        refresh = PseudoLabelRefresh(selection=DistributionAlignment(FixedThreshold(0.2), "uniform", momentum))
        fit(make(PseudoLabelModule), refresh, max_epochs=1)
        named = [str(one.message) for one in recwarn if "averages hardly move with a momentum" in str(one.message)]
        assert len(named) == (momentum == 0.999)


class Stopped(DigitsCNN):
    """Stands for a signal that comes at the first batch of a pass in eval mode."""

    def __init__(self):
        super().__init__(4)
        self.calls = 0

    def forward(self, x):
        if not self.training:
            self.calls += 1
            self.trainer._signal_connector.received_sigterm = True
        return super().forward(x)


def test_a_signal_ends_the_pass_over_the_pool(quiet_trainer):
    network = Stopped()
    refresh = PseudoLabelRefresh(source="teacher", selection=SOFT, warmup_epochs=0)
    trainer = quiet_trainer(callbacks=[refresh], num_sanity_val_steps=0)
    network.trainer = trainer
    with pytest.raises(SIGTERMException):
        trainer.fit(DistillModule(DigitsCNN(4), network), datamodule=data())
    assert network.calls == 1
