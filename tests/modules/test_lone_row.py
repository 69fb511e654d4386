"""Each method fits, tests and predicts with BatchNorm where one row is left for the last batch."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import (
    ABCModule,
    ApprenticeModule,
    CoTeachingModule,
    DatasetSource,
    DistillModule,
    EnsembleDistillModule,
    EvaluationWriter,
    FixedThreshold,
    FlexMatch,
    GraphPseudoLabels,
    HintModule,
    InputError,
    PredictionWriter,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
    SupervisedModule,
)
from kd_lightning.losses import DISTLoss, EarlyLearningLoss, GeneralizedCrossEntropyLoss, LabelKindLoss

CLASSES = 3
SGD = partial(torch.optim.SGD, lr=0.1)


def network(seed=0, outputs=CLASSES):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


class Shift(nn.Module):
    """Training images are moved, and a strong view moves them further."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by * torch.randn(())


def samples(**kwargs):
    """33 samples in training, of which 12 have a label; 9 in validation, 17 in the test part: of each, one is left."""
    x = torch.randn(59, 4, generator=torch.Generator().manual_seed(5))
    y = torch.arange(59) % CLASSES
    x[:, 0] += 3 * y
    parts = TensorDataset(x[:42], y[:42]), TensorDataset(x[42:], y[42:])
    options = {"val_size": 3, "labeled": 4, "batch_size": 8, "train_transform": Shift(0.1)}
    return SemiSupervisedDataModule(DatasetSource(*parts), **(options | kwargs))


class Seen(Callback):
    def __init__(self):
        self.rows, self.val_rows, self.index = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(len(batch))
        self.index.append(batch.index.tolist())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val_rows.append(len(batch))


STRONG = {"strong_transform": Shift(0.3)}
CASES = {
    "supervised": (lambda: SupervisedModule(network(), optimizer=SGD), {}),
    "stateful loss": (lambda: SupervisedModule(network(), hard_loss=EarlyLearningLoss()), {"labeled": None}),
    "noisy labels": (
        lambda: SupervisedModule(network(), hard_loss=LabelKindLoss(GeneralizedCrossEntropyLoss())),
        {"noisy": True},
    ),
    "distill": (lambda: DistillModule(network(), network(1)), {}),
    "distill by DIST": (lambda: DistillModule(network(), network(1), soft_loss=DISTLoss()), {}),
    "hint": (lambda: HintModule(network(), network(1), {"2": "2"}, 1), {}),
    "hint, joint": (lambda: HintModule(network(), network(1), {"2": "2"}, 0, hint_weight=0.1), {}),
    "ensemble": (lambda: EnsembleDistillModule(network(), [network(1), network(2)]), {}),
    "ensemble, random": (
        lambda: EnsembleDistillModule(network(), [network(1), network(2)], "random", draw_per="sample"),
        {},
    ),
    "ensemble, relabel": (
        lambda: EnsembleDistillModule(network(), [network(1), network(2)], "relabel"),
        {"views_per_epoch": 2, "batch_size": 65},  # 66 rows
    ),
    "apprentice": (lambda: ApprenticeModule(network(), network(1)), {}),
    "pseudo-labels": (lambda: PseudoLabelModule(network()), {}),
    "ABC": (lambda: ABCModule(network(), threshold=0.4), STRONG),
    "pseudo-labels, FixMatch": (lambda: PseudoLabelModule(network(), selection=FixedThreshold(0.4)), STRONG),
    "pseudo-labels, FlexMatch and average": (
        lambda: PseudoLabelModule(network(), selection=FlexMatch(0.4), ema_decay=0.9),
        STRONG,
    ),
    "pseudo-labels, refreshed": (lambda: PseudoLabelModule(network(), pseudo_labels="refreshed"), {}),
    "pseudo-labels, refreshed and strong": (lambda: PseudoLabelModule(network(), pseudo_labels="refreshed"), STRONG),
    "co-teaching": (lambda: CoTeachingModule(network(), network(1), 0.3), {"noisy": True, "labeled": None}),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_method(kind, quiet_trainer, tmp_path):
    make, options = CASES[kind]
    seen = Seen()
    refresh = (
        [PseudoLabelRefresh(every_n_epochs=1, warmup_epochs=1, selection=FixedThreshold(0.4))]
        if "refreshed" in kind
        else []
    )
    trainer = quiet_trainer(callbacks=[seen, *refresh], max_epochs=2, num_sanity_val_steps=0)
    module = make()
    data = samples(**options)
    trainer.fit(module, data)
    whole = [66] if "relabel" in kind else [8, 8, 8, 9]
    assert seen.rows == whole * 2
    assert seen.val_rows == ([9] if "relabel" in kind else [8, 1]) * 2
    values = trainer.callback_metrics
    assert values["val/accuracy"] <= 1 and all(value.isfinite() for value in values.values())
    (tested,) = trainer.test(module, data, verbose=False)
    x, y = data.source.test.tensors
    with torch.no_grad():
        logits = module.student.eval()(x)
    assert tested["test/accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    predicted = trainer.predict(module, data)
    assert [len(rows) for rows in predicted] == ([17] if "relabel" in kind else [8, 8, 1])
    assert torch.allclose(torch.cat(predicted), logits.softmax(1), atol=1e-6)


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_other_tasks(task, quiet_trainer):
    outputs = CLASSES if task == "multilabel" else 1
    y = torch.randint(2, (37, CLASSES)).float() if task == "multilabel" else torch.arange(37) % 2
    part = TensorDataset(torch.randn(37, 4), y)
    data = SemiSupervisedDataModule(DatasetSource(part, part), val_size=0, batch_size=9)
    module = DistillModule(network(outputs=outputs), network(1, outputs), task=task)
    trainer = quiet_trainer()
    trainer.fit(module, data)
    assert trainer.global_step == 4
    assert trainer.test(module, data, verbose=False)[0]["test/loss"] > 0
    shape = (37, CLASSES) if task == "multilabel" else (37,)
    assert torch.cat(trainer.predict(module, data)).shape == shape


def test_two_streams_with_one_unlabeled_row_left(quiet_trainer):
    """12 labeled samples, and 21 in the pool: four batches of 5, and one row of the pool beside 3 labeled ones."""
    seen = Seen()
    trainer = quiet_trainer(callbacks=[seen])
    trainer.fit(PseudoLabelModule(network(), selection=FixedThreshold(0.4)), samples(labeled_batch_size=3, **STRONG))
    assert seen.rows == [8, 8, 8, 8, 4]
    assert trainer.callback_metrics["train/unsupervised"].isfinite()


def test_graph_labels_and_the_other_callbacks(quiet_trainer, tmp_path):
    """The pool loader reads 33 samples in batches of 8: features, neighbours and tables of one row."""
    options = {"every_n_epochs": 1, "warmup_epochs": 1, "selection": FixedThreshold(0.4)}
    refresh = PseudoLabelRefresh(source=GraphPseudoLabels(neighbors=5, layer="2"), **options)
    trainer = quiet_trainer(callbacks=[refresh, EvaluationWriter(), PredictionWriter()], max_epochs=2)
    module, data = PseudoLabelModule(network(), pseudo_labels="refreshed"), samples()
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert len(data.unlabeled_indices()) == 21
    assert 0 < trainer.callback_metrics["test/accuracy"] <= 1


@pytest.mark.parametrize(("count", "size"), [(5, 1), (1, 9)])
def test_batches_of_one_row(count, size, quiet_trainer):
    """With ``batch_size: 1``, and with one sample: a network without BatchNorm trains, one with it ends in one line."""
    part = TensorDataset(torch.randn(count, 4), torch.arange(count) % 2)
    data = SemiSupervisedDataModule(DatasetSource(part), val_size=0, batch_size=size)
    trainer = quiet_trainer()
    trainer.fit(SupervisedModule(nn.Linear(4, 2)), data)
    assert trainer.global_step == count
    trainer = quiet_trainer()
    with pytest.raises(InputError, match="batch_size: BatchNorm needs training batches of at least 2 rows") as caught:
        trainer.fit(SupervisedModule(network(outputs=2)), data)
    assert trainer.global_step == 0 and "\n" not in str(caught.value)


SCRIPT = """
import json, os, sys
import torch
from lightning.pytorch import Trainer
import test_lone_row as t

if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = t.Seen()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[seen], max_epochs=2, **quiet)
    module = t.PseudoLabelModule(t.network(), selection=t.FixedThreshold(0.4))
    data = t.samples()
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    weights = torch.cat([p.flatten() for p in module.student.parameters()]).tolist()
    figures = {"rows": seen.rows, "index": seen.index, "weights": weights, "steps": trainer.global_step}
    figures["accuracy"] = float(trainer.callback_metrics["test/accuracy"])
    open(f"{trainer.global_rank}.json", "w").write(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes(tmp_path, monkeypatch, processes):
    """33 samples are 17 on each process: two batches of 8 and one row. Both join it, and end with the same weights."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT)
    processes.run_ranks(["script.py"], PYTHONPATH=str(Path(__file__).parent))
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["rows"] == two["rows"] == [8, 9] * 2
    assert one["steps"] == two["steps"] == 4
    for epoch in (slice(0, 2), slice(2, 4)):
        index = [i for rank in (one, two) for batch in rank["index"][epoch] for i in batch]
        assert len(index) == 34 and len(set(index)) == 33
    assert one["weights"] == two["weights"]
    assert one["accuracy"] == two["accuracy"]
