"""PseudoLabelRefresh in the binary and multilabel task: tables, sources, partial labels, resume, and bad input."""

import csv
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from epoch_probe import Probe
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import (
    DatasetSource,
    DistillModule,
    EnsembleDistillModule,
    FixedThreshold,
    GraphPseudoLabels,
    InputError,
    LabelThresholds,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
    SupervisedModule,
)

NAN = float("nan")
SOME = LabelThresholds(0.6, 0.42)
ADAM = partial(torch.optim.AdamW, lr=0.02)


def truth(task, samples=48):
    x = torch.randn(samples, 5, generator=torch.Generator().manual_seed(5))
    y = (x[:, :3] + 0.2 * x[:, 1:4] > 0).long()
    return x, y[:, 0] if task == "binary" else y


def data(task="multilabel", in_part=True, names=None, **kwargs):
    """A third of the labels of two thirds of the samples is missing."""
    x, y = truth(task)
    if in_part and task == "multilabel":
        gone = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        gone[::3] = False
        y = torch.where(gone, NAN, y.float())
    source = DatasetSource(TensorDataset(x, y))
    source.class_names = names
    options = {"labeled": 0.5, "val_size": 0, "batch_size": 8, "seed": 0}
    return SemiSupervisedDataModule(source, **(options | kwargs))


def net(task, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1 if task == "binary" else 3))


def learner(task, **kwargs):
    return PseudoLabelModule(net(task), pseudo_labels="refreshed", task=task, optimizer=ADAM, **kwargs)


def expected_rows(made, networks, task):
    """{(sample, label): (p of a 1)} of the labels that training may not see."""
    x, y = truth(task)[0], made.visible_labels()
    with torch.no_grad():
        p = torch.stack([deepcopy(one).eval()(x).double().sigmoid() for one in networks]).mean(dim=0)
    known = (~y.isnan() if y.is_floating_point() else y != -100).reshape(len(y), -1)
    return {(row, label): p[row, label].item() for row, label in (~known).nonzero().tolist()}


SOURCES = {
    "student": (learner, "student", lambda module: [module.student]),
    "average": (partial(learner, ema_decay=0.5), "ema", lambda module: [module.ema.module]),
    "teacher": (
        lambda task: DistillModule(net(task), net(task, 1), task=task, optimizer=ADAM),
        "teacher",
        lambda module: [module.teacher.network],
    ),
    "ensemble": (
        lambda task: EnsembleDistillModule(net(task), [net(task, 1), net(task, 2)], task=task, optimizer=ADAM),
        "teacher",
        lambda module: [teacher.network for teacher in module.ensemble],
    ),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_against_a_pass_of_its_own(fit, task, name, tmp_path):
    build, source, networks = SOURCES[name]
    made, seen = data(task), []
    refresh = PseudoLabelRefresh(selection=SOME, source=source)

    def check(trainer, module):
        table, rows = refresh.table, expected_rows(made, networks(module), task)
        numbers = [0] * len(table.index) if table.output is None else table.output.tolist()
        assert [*zip(table.index.tolist(), numbers, strict=True)] == sorted(rows)
        p = torch.tensor([rows[key] for key in sorted(rows)], dtype=torch.float64)
        assert table.label.tolist() == (p >= 0.5).long().tolist()  # also of those that are not accepted
        assert table.accepted.tolist() == ((p >= 0.6) | (p <= 0.42)).tolist()
        torch.testing.assert_close(table.confidence.double(), torch.maximum(p, 1 - p), rtol=1e-5, atol=1e-6)
        right = []
        for (sample, label), found in zip(sorted(rows), table.label.tolist(), strict=True):
            value = made.hidden_truth(torch.tensor([sample])).reshape(-1)[label].item()
            right += [] if value != value else [value == found]
        assert refresh.report["precision"] == pytest.approx(sum(right) / len(right))
        assert refresh.report["coverage"] == pytest.approx(table.accepted.double().mean().item())
        # what training gets: given labels, accepted pseudo-labels, and nothing else
        labels = made._labels
        known = ~labels.y.isnan() if labels.y.is_floating_point() else labels.y != -100
        count = int(known.sum()) - int(table.accepted.sum())
        visible = made.visible_labels()
        assert count == int((~visible.isnan() if visible.is_floating_point() else visible != -100).sum())
        seen.append(0 < table.accepted.double().mean() < 1)

    fit(build(task), refresh, Probe(check, first_epoch=1), datamodule=made)
    assert len(seen) == 2
    assert any(seen) or name != "student"


def test_the_ledger_names_labels(fit, tmp_path):
    made = data(names=["ant", "bee", "cat"])
    trainer = fit(learner("multilabel"), PseudoLabelRefresh(), datamodule=made, enable_checkpointing=True)
    with Path(trainer.default_root_dir, "pseudo_labels", "round_0001.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert {row["label"] for row in rows} <= {f"{no}{name}" for no in ("", "not ") for name in ("ant", "bee", "cat")}
    assert len({(row["index"], row["label"].removeprefix("not ")) for row in rows}) == len(rows)
    made = data("binary", names=["no", "yes"])
    trainer = fit(learner("binary"), PseudoLabelRefresh(), datamodule=made, enable_checkpointing=True)
    with Path(trainer.default_root_dir, "pseudo_labels", "round_0001.csv").open(newline="") as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"no", "yes"}


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_other_modules_learn_from_them(fit, task):
    """SupervisedModule counts the accepted ones as labels."""
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            counts.append(float(batch.mean_labels))

    module = SupervisedModule(net(task), task=task)
    fit(module, PseudoLabelRefresh(), Count(), datamodule=data(task), max_epochs=2)
    assert sum(counts[:6]) < sum(counts[6:]) == pytest.approx(48 * (1 if task == "binary" else 3))


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_exact_resume(fit, tmp_path, task):
    def run(root, *callbacks, **kwargs):
        refresh, module = PseudoLabelRefresh(selection=SOME), learner(task)
        options = {"default_root_dir": root, "enable_checkpointing": True} | kwargs
        fit(module, refresh, *callbacks, datamodule=data(task), **options)
        return module.state_dict(), refresh.table.hash

    saves = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=4)
    whole, table = run(tmp_path / "whole", saves)
    paths = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(paths) == 4
    for path in paths:
        state, again = run(tmp_path / path.stem, ckpt_path=path)
        assert all(torch.equal(value, state[name]) for name, value in whole.items())
        assert again == table


def test_what_is_refused(fit):
    made = data()
    cases = [
        ({"selection": FixedThreshold(0.9)}, r"selection: FixedThreshold is for probabilities .* got task: multilabel"),
        ({"source": GraphPseudoLabels()}, "GraphPseudoLabels is for the multiclass task, got task: multilabel"),
        ({"selection": LabelThresholds([0.9, 0.8])}, "positive must be one number, or one for each of 3 labels, got 2"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            fit(learner("multilabel"), PseudoLabelRefresh(**arguments), datamodule=made)
    with pytest.raises(InputError, match="LabelThresholds is for labels of 0 or 1"):
        fit(SupervisedModule(net("multilabel")), PseudoLabelRefresh(selection=SOME), datamodule=made)
    with pytest.raises(InputError, match="there are no unlabeled samples"):
        fit(learner("multilabel"), PseudoLabelRefresh(), datamodule=data(in_part=False, labeled=None))
    fit(learner("multilabel"), PseudoLabelRefresh(), datamodule=data(labeled=None))  # labels in part


def test_a_label_that_is_nowhere_known(fit):
    made = data(in_part=False, names=["ant", "bee", "cat"])
    made.source.load().train.targets[:, 2] = 0
    with pytest.raises(InputError, match="PseudoLabelRefresh: label 'cat' is 1 in no labeled sample, so no"):
        fit(learner("multilabel"), PseudoLabelRefresh(), datamodule=made)
    made = data(in_part=False)
    made.source.load().train.targets[:, 2] = 0
    module = DistillModule(net("multilabel"), net("multilabel", 1), task="multilabel")
    fit(module, PseudoLabelRefresh(source="teacher"), datamodule=made)  # it knows all labels
