"""PseudoLabelRefresh in the regression task: tables, sources, views, resume, several processes, and bad input."""

import csv
import json
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
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
    Teacher,
    UncertaintyThreshold,
)
from kd_lightning.data.transforms import GaussianNoise

NAN = float("nan")
VIEWS = 4
LIMIT = 0.15
SOME = UncertaintyThreshold(LIMIT)
ADAM = partial(torch.optim.AdamW, lr=0.02)


def truth(kind="several", samples=48):
    x = torch.randn(samples, 5, generator=torch.Generator().manual_seed(5))
    y = torch.stack([x[:, :2].sum(dim=1), 100 + 30 * x[:, 2:].sum(dim=1)], dim=1)
    return x, y if kind == "several" else y[:, 0]


def data(kind="several", transform=None, y=None, **kwargs):
    """A third of the values of two thirds of the samples is missing."""
    x, own = truth(kind)
    if kind == "several":
        gone = torch.rand(own.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        gone[::3] = False
        own = torch.where(gone, NAN, own)
    source = DatasetSource(TensorDataset(x, own if y is None else y))
    options = {"labeled": 0.5, "val_size": 0, "batch_size": 10, "seed": 0}
    noise = GaussianNoise(0.4) if transform is None else transform
    return SemiSupervisedDataModule(source, train_transform=noise, **(options | kwargs))


def net(kind="several", seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2 if kind == "several" else 1))


def learner(kind="several", **kwargs):
    return PseudoLabelModule(net(kind), pseudo_labels="refreshed", task="regression", optimizer=ADAM, **kwargs)


def refresh_of(**kwargs):
    return PseudoLabelRefresh(**({"selection": SOME, "num_views": VIEWS} | kwargs))


def views_of_training(kind):
    """{(index, view): x}, as the training loader of another datamodule gives them in one epoch."""
    made = data(kind, num_views=VIEWS, views_per_epoch=VIEWS)
    found = {}
    for batch in made.train_dataloader():
        found |= {(int(i), int(v)): x for i, v, x in zip(batch.index, batch.view, batch.x, strict=True)}
    assert len(found) == 48 * VIEWS
    return found


def expected_rows(made, networks, views):
    """{(sample, output): (mean, spread)} of the values that training may not see, by numpy in float64."""
    y = made.visible_labels().double().numpy().reshape(48, -1)
    rows = {}
    for sample, output in zip(*np.nonzero(np.isnan(y)), strict=True):
        x = torch.stack([views[int(sample), view] for view in range(VIEWS)])
        with torch.no_grad():
            outputs = [deepcopy(one).eval().double()(x.double()) for one in networks]
        found = torch.stack(outputs).mean(dim=0).numpy()[:, output]
        given = y[~np.isnan(y[:, output]), output]
        rows[int(sample), int(output)] = found.mean(), found.std(ddof=1) / given.std(ddof=1)
    return rows


SOURCES = {
    "student": (learner, "student", lambda module: [module.student]),
    "average": (partial(learner, ema_decay=0.5), "ema", lambda module: [module.ema.module]),
    "teacher": (
        lambda kind: DistillModule(net(kind), net(kind, 1), task="regression", optimizer=ADAM),
        "teacher",
        lambda module: [module.teacher.network],
    ),
    "cached": (
        lambda kind: learner(kind, teacher=Teacher(net(kind, 1), cache="outputs", cache_dtype="float32")),
        "teacher",
        lambda module: [module.teacher.network],
    ),
    "ensemble": (
        lambda kind: EnsembleDistillModule(net(kind), [net(kind, 1), net(kind, 2)], task="regression", optimizer=ADAM),
        "teacher",
        lambda module: [teacher.network for teacher in module.ensemble],
    ),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("kind", ["several", "one"])
def test_against_views_of_the_training_loader(fit, kind, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build, source, networks = SOURCES[name]
    made, seen, refresh, views = data(kind), [], refresh_of(source=source), views_of_training(kind)
    module, computed = build(kind), []
    if name == "cached":
        module.teacher.network.register_forward_hook(lambda *_: computed.append(1))

    def check(trainer, module):
        assert not computed  # a cached teacher's outputs are read
        table, rows = refresh.table, expected_rows(made, networks(module), views)
        numbers = [0] * len(table.index) if table.output is None else table.output.tolist()
        assert [*zip(table.index.tolist(), numbers, strict=True)] == sorted(rows)
        means, spreads = (np.array([rows[key][n] for key in sorted(rows)]) for n in (0, 1))
        assert table.label.numpy() == pytest.approx(means, rel=1e-4, abs=1e-4)
        assert table.spread.numpy() == pytest.approx(spreads, rel=1e-3, abs=1e-5)
        assert np.abs(spreads - LIMIT).min() > 1e-5
        assert table.accepted.tolist() == (spreads <= LIMIT).tolist()
        errors = []
        for (sample, output), found in zip(sorted(rows), table.label.tolist(), strict=True):
            value = made.hidden_truth(torch.tensor([sample])).reshape(-1)[output].item()
            errors += [] if value != value else [found - value]
        assert refresh.report["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
        # what training gets: given labels, accepted pseudo-labels, and nothing else
        known = ~made._labels.y.isnan()
        given = ~made.visible_labels().isnan()
        assert int(known.sum()) == int(given.sum()) + int(table.accepted.sum())
        assert torch.equal(made._labels.y[given], made.visible_labels()[given])
        seen.append(0 < table.accepted.double().mean() < 1)
        computed.clear()  # by the copies of the network above

    class Filled(Callback):
        def on_train_start(self, trainer, module):
            computed.clear()

    fit(module, refresh, Filled(), Probe(check, first_epoch=1), datamodule=made)
    assert len(seen) == 2
    assert any(seen) or source == "teacher"


def test_the_ledger(fit):
    trainer = fit(learner(), refresh_of(selection=None), datamodule=data(), enable_checkpointing=True)
    with Path(trainer.default_root_dir, "pseudo_labels", "round_0002.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert {row["output"] for row in rows} == {"0", "1"}
    assert {row["accepted"] for row in rows} == {"1"}
    assert all(float(row["spread"]) > 0 for row in rows)


def test_other_modules_learn_from_them(fit):
    """SupervisedModule counts the accepted ones as labels."""
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            counts.append(float(batch.mean_labels) * trainer.num_training_batches)

    module = SupervisedModule(net(), task="regression")
    fit(module, refresh_of(selection=None), Count(), datamodule=data(batch_size=12), max_epochs=2)
    assert sum(counts[:4]) < sum(counts[4:]) == pytest.approx(4 * 48 * 2)


def test_views_do_not_depend_on_batches_and_rounds(fit):
    """Of a teacher, which does not change: the same values in each round, whatever the size of a batch."""
    hashes = []
    for size in (10, 3, 48):
        tables = []
        module = DistillModule(net(), net(seed=1), task="regression", optimizer=ADAM)
        refresh = refresh_of(source="teacher")
        probe = Probe(lambda *_, r=refresh, t=tables: t.append(r.table), first_epoch=1)
        fit(module, refresh, probe, datamodule=data(batch_size=size))
        assert torch.equal(tables[0].label, tables[1].label)
        assert not tables[1].change.any()
        hashes.append(tables[0])
    for other in hashes[1:]:
        torch.testing.assert_close(other.label, hashes[0].label)
        torch.testing.assert_close(other.spread, hashes[0].spread)


def test_hidden_truth_changes_nothing(fit):
    states, hidden = [], None
    for permuted in (False, True):
        _, y = truth()
        if permuted:
            y[hidden] = y[hidden].flip(0)
        made, module = data(y=y), learner()
        refresh = refresh_of()
        fit(module, refresh, datamodule=made)
        hidden = made.split.unlabeled
        states.append((module.state_dict(), refresh.table.label, refresh.report["rmse"], made.split.labeled))
    assert states[0][3] == states[1][3]
    assert states[0][2] != states[1][2]
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())


@pytest.mark.parametrize("kind", ["several", "one"])
def test_exact_resume(fit, tmp_path, kind):
    def run(root, *callbacks, **kwargs):
        refresh, module = refresh_of(), learner(kind)
        options = {"default_root_dir": root, "enable_checkpointing": True} | kwargs
        fit(module, refresh, *callbacks, datamodule=data(kind), **options)
        return module.state_dict(), refresh.table.hash

    saves = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=4)
    whole, table = run(tmp_path / "whole", saves)
    paths = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(paths) == 3
    for path in paths:
        state, again = run(tmp_path / path.stem, ckpt_path=path)
        assert all(torch.equal(value, state[name]) for name, value in whole.items())
        assert again == table


class Half(nn.Module):
    """Noise for samples whose first number is positive alone."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) * (x[..., :1] > 0)


def test_equal_views_say_nothing(fit):
    """All of a sample: it is never accepted. All of all samples: refused."""
    refresh, x = refresh_of(selection=None), truth()[0]
    fit(learner(), refresh, datamodule=data(transform=Half()))
    assert refresh.table.accepted.tolist() == (x[refresh.table.index, 0] > 0).tolist()
    assert (refresh.table.spread[~refresh.table.accepted] < 1e-6).all()
    for transform in (nn.Identity(), GaussianNoise(0.0)):
        with pytest.raises(InputError, match="the 4 views of each sample are equal, .* set a train_transform"):
            fit(learner(), refresh_of(), datamodule=data(transform=transform))


def test_what_is_refused(fit):
    for number in (1, 0, -3, 2.5, True):
        with pytest.raises(InputError, match=f"num_views must be an integer of at least 2, got {number}"):
            PseudoLabelRefresh(num_views=number)
    cases = [
        ({"selection": FixedThreshold(0.9)}, r"selection: FixedThreshold is for .* got task: regression; use Uncert"),
        ({"selection": LabelThresholds()}, r"selection: LabelThresholds is for labels of 0 or 1 .* use Uncert"),
        ({"source": GraphPseudoLabels()}, "GraphPseudoLabels is for the multiclass task, got task: regression"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            fit(learner(), refresh_of(**arguments), datamodule=data())
    for arguments, message in (
        ({"selection": SOME}, "UncertaintyThreshold is for values of several views"),
        ({"num_views": 3}, "num_views: 3 is for task: regression, got task: multilabel"),
    ):
        with pytest.raises(InputError, match=message):
            fit(SupervisedModule(net(), task="multilabel"), PseudoLabelRefresh(**arguments), datamodule=data())
    with pytest.raises(InputError, match="there are no unlabeled samples"):
        fit(learner(), refresh_of(), datamodule=data(y=truth()[1], labeled=None))
    fit(learner(), refresh_of(), datamodule=data(labeled=None))  # values in part

    class Own(SemiSupervisedDataModule):
        def pool_dataloader(self):
            return super().pool_dataloader()

    made = data()
    made.__class__ = Own
    with pytest.raises(InputError, match=r"needs a datamodule whose pool_dataloader\(num_views\) gives .*, got Own"):
        fit(learner(), refresh_of(), datamodule=made)


def test_labels_without_a_standard_deviation(fit):
    teacher = lambda: DistillModule(net(), net(seed=1), task="regression")  # noqa: E731
    for make, source in ((learner, "student"), (teacher, "teacher")):
        _, y = truth()
        y[:, 1] = 3.0
        with pytest.raises(InputError, match="PseudoLabelRefresh: output 1 has the label 3 alone, so its standard"):
            fit(make(), refresh_of(source=source), datamodule=data(y=y))
    with pytest.raises(InputError, match="pseudo-labels of task: regression are floats, but the labels are"):
        fit(learner("one"), refresh_of(), datamodule=data("one", y=torch.arange(48) % 10))


def test_outputs_that_are_not_finite(fit):
    class Broken(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            return out if self.training else out / 0

    module = PseudoLabelModule(Broken(5, 2), pseudo_labels="refreshed", task="regression")
    with pytest.raises(InputError, match=r"the output of the student for sample \d+ is not finite"):
        fit(module, refresh_of(), datamodule=data())


def test_none_accepted_is_named(fit, recwarn):
    fit(learner(), refresh_of(selection=UncertaintyThreshold(1e-9)), datamodule=data(), max_epochs=2)
    texts = [str(one.message) for one in recwarn if "pseudo-labels was accepted" in str(one.message)]
    assert "the lowest spread is" in texts[0]
    assert "UncertaintyThreshold(limit=1e-09)" in texts[0]
    assert "raise the limit, or raise warmup_epochs" in texts[0]


# Several processes.

SCRIPT = """
import json, sys, torch
from functools import partial
from torch import nn
from lightning.pytorch import Trainer
from torch.utils.data import TensorDataset
from kd_lightning import DatasetSource, PseudoLabelModule, PseudoLabelRefresh, SemiSupervisedDataModule
from kd_lightning import UncertaintyThreshold
from kd_lightning.data.transforms import GaussianNoise

def run(devices, name, count, batch):
    torch.manual_seed(0)
    x = torch.randn(count, 5)
    y = torch.stack([x[:, :2].sum(dim=1), 9 + 3 * x[:, 2:].sum(dim=1)], dim=1)
    data = SemiSupervisedDataModule(DatasetSource(TensorDataset(x, y)), labeled=0.5, val_size=0,
                                    batch_size=batch // devices, train_transform=GaussianNoise(0.4))
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    module = PseudoLabelModule(net, 1.0, "refreshed", task="regression", optimizer=partial(torch.optim.SGD, lr=0.01))
    refresh = PseudoLabelRefresh(selection=UncertaintyThreshold(0.05), num_views=3)
    trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=3,
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                      default_root_dir=f"{name}_{devices}", logger=False, callbacks=[refresh])
    trainer.fit(module, datamodule=data)
    table = {key: value.tolist() if hasattr(value, "tolist") else value
             for key, value in refresh.table.state_dict().items()}
    weights = [parameter.tolist() for parameter in net.parameters()]
    found = {"hash": refresh.table.hash, "table": table, "report": refresh.report, "weights": weights}
    open(f"{name}_{trainer.global_rank}_of_{devices}.json", "w").write(json.dumps(found))
    if trainer.world_size > 1:
        torch.distributed.barrier()

if __name__ == "__main__":
    torch.set_num_threads(1)
    run(int(sys.argv[1]), "many", 48, 16)
    run(int(sys.argv[1]), "odd", 33, 8)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_label_and_train_as_one(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["train.py", "1"])
    exec(SCRIPT, {"__name__": "__main__"})
    processes.run_ranks(["train.py", "2"])
    for name in ("many", "odd"):
        one, first, second = (
            json.loads(Path(f"{name}_{place}.json").read_text()) for place in ("0_of_1", "0_of_2", "1_of_2")
        )
        assert first["hash"] == second["hash"]
        assert first["report"] == second["report"]
        if name == "odd":  # the last batch of two processes has a sample more
            continue
        assert first["report"] == pytest.approx(one["report"], rel=1e-4)
        for key in ("index", "output", "weight", "round", "epoch"):
            assert first["table"][key] == one["table"][key], key
        for key in ("label", "spread", "change"):
            assert first["table"][key] == pytest.approx(one["table"][key], rel=1e-4, abs=1e-5)
        for mine, theirs in zip(first["weights"], one["weights"], strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
        assert 0 < one["report"]["coverage"] < 1
