"""Labels and rows of an optimiser step of dense batches, compared with counts by hand."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, SemiSupervisedDataModule, SupervisedModule

COUNT, SIDE, CLASSES = 23, 4, 3
MASKS = torch.randint(-1, CLASSES, (COUNT, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
MASKS[
    torch.rand(COUNT, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    < torch.arange(COUNT).view(-1, 1, 1) / COUNT
] = -1
IMAGES = torch.randn(COUNT, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def make(**kwargs):
    source = DatasetSource(TensorDataset(IMAGES, MASKS), dense=True)
    return SemiSupervisedDataModule(source, **({"labeled": 14, "val_size": 0, "batch_size": 3} | kwargs))


def module():
    torch.manual_seed(0)
    return SupervisedModule(nn.Conv2d(2, CLASSES, 1), class_dim=1)


def count(index, labeled):
    """Labels and rows of samples: of an unlabeled one, all positions are rows."""
    known = [int((MASKS[n] >= 0).sum()) if n in labeled else 0 for n in index]
    return sum(known), sum(k if n in labeled and k else SIDE * SIDE for k, n in zip(known, index, strict=True))


class Seen(Callback):
    def __init__(self, stop=None):
        self.stop, self.batches = stop, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append([trainer.current_epoch, batch_idx, batch.index.tolist(), [*batch.dense_means[:2]]])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(self.batches) == self.stop:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stop.ckpt")
            raise KeyboardInterrupt


def check(ranks, window, labeled, steps):
    """Compare the means with those of the batches of each optimiser step on all ranks."""
    for epoch in {entry[0] for entry in ranks[0]}:
        parts = [[entry for entry in seen if entry[0] == epoch] for seen in ranks]
        assert {len(part) for part in parts} == {steps}
        for first in range(0, steps, window):
            step = [entry for part in parts for entry in part[first : first + window]]
            counts = torch.tensor([count(entry[2], labeled) for entry in step], dtype=torch.float64)
            for entry in step:
                assert entry[3] == pytest.approx(counts.mean(0).tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("window", "limit", "workers"),
    [*((window, limit, 0) for window in (1, 2, 3) for limit in (1.0, 5, 0.6)), (3, 5, 2)],
)
def test_each_step_of_an_epoch(window, limit, workers, quiet_trainer):
    """With a last step of fewer batches, and with fewer batches than there are."""
    seen, data = Seen(), make(num_workers=workers)
    trainer = quiet_trainer(callbacks=[seen], accumulate_grad_batches=window, limit_train_batches=limit, max_epochs=2)
    trainer.fit(module(), data)
    steps = {1.0: 8, 5: 5, 0.6: 4}[limit]
    check([seen.batches], window, {*data.split.labeled}, steps)
    assert trainer.global_step == 2 * -(-steps // window)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 8, 9])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_after_a_resume(stop, window, quiet_trainer):
    """In mid-epoch, within an optimiser step, and at an epoch's end: weights and means are those of an unbroken run."""

    def fit(seen, **kwargs):
        trainer = quiet_trainer(callbacks=[seen], accumulate_grad_batches=window, max_epochs=2)
        student = module()
        with suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(student, make(), **kwargs)
        return student

    whole, before, after = Seen(), Seen(stop), Seen()
    expected = fit(whole)
    fit(before)
    path = Path(quiet_trainer().default_root_dir) / "stop.ckpt"
    student = fit(after, ckpt_path=path, weights_only=False)
    assert before.batches == whole.batches[:stop]
    assert after.batches == whole.batches[stop:]
    assert all(map(torch.equal, student.state_dict().values(), expected.state_dict().values()))


def test_other_modules_and_loaders_without_a_trainer(quiet_trainer):
    class Own(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(2, CLASSES, 1)

        def training_step(self, batch, batch_idx):
            assert batch.dense_means is None
            assert batch.mean_rows is not None
            return nn.functional.cross_entropy(self.net(batch.x), batch.y.clamp_min(0))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet_trainer().fit(Own(), make())
    assert all(batch.dense_means is None for batch in make().train_dataloader())


def test_two_streams(quiet_trainer):
    seen, data = Seen(), make(batch_size=4, labeled_batch_size=3)
    quiet_trainer(callbacks=[seen], accumulate_grad_batches=2).fit(module(), data)
    check([seen.batches], 2, {*data.split.labeled}, len(seen.batches))


SCRIPT = """
import json, sys
import torch
from lightning.pytorch import Trainer
import test_dense_means as t

if __name__ == "__main__":
    torch.set_num_threads(1)
    seen, window = t.Seen(), int(sys.argv[1])
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[seen], max_epochs=2,
                      accumulate_grad_batches=window, limit_train_batches=int(sys.argv[2]), **quiet)
    module, data = t.module(), t.make(batch_size=3)
    trainer.fit(module, data)
    weights = torch.cat([p.flatten() for p in module.student.parameters()]).tolist()
    found = {"seen": seen.batches, "weights": weights, "labeled": data.split.labeled}
    open(f"{trainer.global_rank}.json", "w").write(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("window", "limit"), [(1, 4), (3, 4), (2, 3)])
def test_two_processes(tmp_path, window, limit, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT)
    processes.run_ranks(["script.py", str(window), str(limit)], PYTHONPATH=str(Path(__file__).parent))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    check([rank["seen"] for rank in ranks], window, {*ranks[0]["labeled"]}, limit)
