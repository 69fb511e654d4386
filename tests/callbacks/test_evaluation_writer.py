"""EvaluationWriter: which weights count, the figures, and the predictions row by row."""

import hashlib

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Batch, Digits, EvaluationWriter, HintModule, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.data.identity import Identities
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.runs.results import labeled, read_result
from kd_lightning.runs.weights import save_weights

X = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(5))
FOLDER = "logs/name/version_0"


@pytest.fixture
def folder(tmp_path):
    """Where the trainer's run lies."""
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def trainer(quiet_trainer, tmp_path):
    logger = CSVLogger(tmp_path / "logs", name="name", version=0)
    return quiet_trainer(logger=logger, callbacks=[EvaluationWriter()], max_epochs=1)


def deploy(module, folder):
    save_weights(module.student.state_dict(), folder / "student.safetensors", {})


def linear(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))


def test_figures_and_hash(trainer, folder, student, loader):
    module = SupervisedModule(student)
    deploy(module, folder)
    (logged,) = trainer.test(module, loader(), verbose=False)
    result = read_result(folder, "test")
    assert result.figures == pytest.approx({name.removeprefix("test/"): value for name, value in logged.items()})
    assert result.samples == 12
    assert result.weights == hashlib.sha256((folder / "student.safetensors").read_bytes()).hexdigest()
    rows = result.predictions()
    predicted = student.eval()(torch.cat([x for x, _ in loader()])).argmax(1)
    assert [row.index for row in rows] == list(range(12))
    assert [row.label for row in rows] == [str(k % 10) for k in range(12)]
    assert [row.prediction for row in rows] == [str(int(k)) for k in predicted]
    assert sum(row.correct for row in rows) / 12 == pytest.approx(result.figures["accuracy"])


def test_validate_is_a_part_of_its_own_and_a_fit_writes_nothing(trainer, folder, student, loader):
    module = SupervisedModule(student)
    trainer.fit(module, loader(), loader())
    assert not [*folder.glob("val*")]
    deploy(module, folder)
    trainer.validate(module, loader(count=9), verbose=False)
    assert read_result(folder, "val").samples == len(read_result(folder, "val").predictions()) == 9
    assert read_result(folder, "test") is None


@pytest.mark.parametrize("deployed", [False, True])
def test_other_weights_than_the_deployed_ones_do_not_count(trainer, folder, student, loader, deployed, capsys, caplog):
    module = SupervisedModule(student)
    if deployed:
        deploy(module, folder)
        with torch.no_grad():
            next(student.parameters()).add_(1)
    with caplog.at_level("INFO"):
        trainer.test(module, loader(), verbose=False)
    assert not [*folder.glob("test*")]
    assert "student.safetensors" in caplog.text + capsys.readouterr().err


def test_partly_labeled_binary(trainer, folder):
    """A missing label has an empty text, and counts neither as a sample nor as an error."""
    module = SupervisedModule(linear(1), task="binary")
    deploy(module, folder)
    y = torch.tensor([0.0, 1.0, float("nan")] * 4)
    trainer.test(module, DataLoader(TensorDataset(X, y), 5), verbose=False)
    result = read_result(folder, "test")
    rows = result.predictions()
    assert result.samples == 8 and len(rows) == 12 and labeled(rows).keys() == {0, 1, 3, 4, 6, 7, 9, 10}
    assert [row.label for row in rows] == ["0", "1", ""] * 4
    predicted = (module.student(X).flatten() > 0).long().tolist()
    assert [row.prediction for row in rows] == [str(k) for k in predicted]
    assert [row.correct for row in labeled(rows).values()] == [float(predicted[k] == y[k]) for k in labeled(rows)]


def test_multilabel_is_the_share_of_known_labels(trainer, folder):
    module = SupervisedModule(linear(3), task="multilabel")
    deploy(module, folder)
    y = torch.tensor([[0, 1, 1], [1, 0, -100], [-100, -100, -100]] * 4)
    trainer.test(module, DataLoader(TensorDataset(X, y), 5), verbose=False)
    result = read_result(folder, "test")
    rows = result.predictions()
    assert result.samples == 8
    predicted = (module.student(X) > 0).long()
    for row in rows:
        known = y[row.index] != -100
        assert row.label == ";".join(str(k) for k in range(3) if y[row.index][k] == 1)
        assert row.prediction == ";".join(str(k) for k in range(3) if predicted[row.index][k] == 1)
        if known.any():
            expected = (predicted[row.index] == y[row.index])[known].float().mean()
            assert row.correct == pytest.approx(float(expected), abs=1e-5)
        else:
            assert row.correct != row.correct


def test_index_names_and_transductive_part_of_the_datamodule(trainer, folder, student):
    class Named(SemiSupervisedDataModule):
        def setup(self, stage):
            super().setup(stage)
            self.class_names = [*"abcdefghij"]

        def test_dataloader(self):
            batch = Batch(X, torch.arange(12) % 10, index=torch.arange(12).flip(0))
            return DataLoader([batch, batch], batch_size=None)  # a sampler may repeat samples

    module = SupervisedModule(student)
    deploy(module, folder)
    trainer.test(module, datamodule=Named(Digits(), labeled=5, unlabeled="test"), verbose=False)
    result = read_result(folder, "transductive/test")
    assert result.samples == 12 and (folder / "transductive_test.json").is_file()
    assert [row.index for row in result.predictions()] == list(range(12))
    assert [row.label for row in result.predictions()] == [*"abcdefghij", "a", "b"][::-1]


@pytest.mark.parametrize("part", ["test", "val"])
def test_paths_and_contents_of_the_datamodule(trainer, folder, student, part):
    """Of the test images, and of training images for the validation part."""
    module = SupervisedModule(student)
    deploy(module, folder)
    data = SemiSupervisedDataModule(Digits(), batch_size=256, val_size=0.05)
    (trainer.test if part == "test" else trainer.validate)(module, datamodule=data, verbose=False)
    rows = read_result(folder, part).predictions()
    names = data.identities("train" if part == "val" else "test")
    assert len(rows) == (600 if part == "test" else len(data.split.val))
    assert all((row.path, row.content) == ("", names.contents[row.index]) for row in rows)
    assert len({row.content for row in rows}) == len(rows)


def test_other_images_than_those_of_the_source_have_no_name(trainer, folder, student, loader):
    class Other(SemiSupervisedDataModule):
        def test_dataloader(self):
            images = [TensorDataset(X)]
            return self._eval_loader(images, torch.arange(12), LabelTable(torch.arange(12) % 10))

    module = SupervisedModule(student)
    deploy(module, folder)
    trainer.test(module, datamodule=Other(Digits()), verbose=False)
    assert {(row.path, row.content) for row in read_result(folder, "test").predictions()} == {("", "")}
    trainer.test(module, loader(), verbose=False)
    assert {row.content for row in read_result(folder, "test").predictions()} == {""}


def test_somebody_elses_datamodule_names_its_samples(trainer, folder, student):
    class Theirs(LightningDataModule):
        def test_dataloader(self):
            return DataLoader([Batch(X, torch.arange(12) % 10, index=torch.arange(12))], batch_size=None)

        def identities(self, part):
            assert part == "test"
            return Identities([f"{k}.png" for k in range(12)], ["ab"] * 12)

    module = SupervisedModule(student)
    deploy(module, folder)
    trainer.test(module, datamodule=Theirs(), verbose=False)
    assert [row.path for row in read_result(folder, "test").predictions()] == [f"{k}.png" for k in range(12)]


def test_only_the_first_of_several_loaders(trainer, folder, student, loader):
    module = SupervisedModule(student)
    deploy(module, folder)
    trainer.test(module, [loader(), loader(count=20)], verbose=False)
    result = read_result(folder, "test")
    assert result.samples == len(result.predictions()) == 12
    names = {name for name in result.figures if not name.startswith("recall_")}
    assert names == {"loss", "accuracy", "balanced_accuracy", "f1", "calibration_error"}


class Foreign(LightningModule):
    """Another library's module: no student, its steps return losses, its batches are mappings."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("test/accuracy", 0.25, batch_size=4)
        self.log("other", 1.0, batch_size=4)
        return torch.tensor(0.5)


def test_foreign_module(trainer, folder):
    data = [{"image": x, "label": 1} for x in X]
    trainer.test(Foreign(), DataLoader(data, 5), verbose=False)
    result = read_result(folder, "test")
    assert (result.samples, result.figures, result.weights) == (12, {"accuracy": 0.25}, None)
    assert result.predictions() == []


class OwnNames(LightningModule):
    """A module of a project whose metrics have names of their own."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log_dict({"test_acc": 0.25, "f1": 0.5 + dataloader_idx}, batch_size=4)


@pytest.mark.parametrize("loaders", [1, 2])
def test_metrics_of_other_names(trainer, folder, loaders):
    trainer.test(OwnNames(), [DataLoader(X, 5)] * loaders, verbose=False)
    result = read_result(folder, "test")
    assert (result.samples, result.figures) == (12, {"acc": 0.25, "f1": 0.5})


def test_another_checkpoint_of_a_foreign_module_does_not_count(trainer, folder, capsys):
    module, loader = Foreign(), DataLoader(X, 5)
    (folder / "config.yaml").write_text("{model: {class_path: Foreign}}")
    (folder / "checkpoints").mkdir()
    content = {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}
    content |= {"epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.0"}
    for name in ("old", "last"):
        torch.save(content, folder / f"checkpoints/{name}.ckpt")
    trainer.test(module, loader, ckpt_path=folder / "checkpoints/last.ckpt", verbose=False)
    assert read_result(folder, "test") is None
    trainer.test(module, loader, ckpt_path=folder / "checkpoints/old.ckpt", verbose=False)  # all but last.ckpt is best
    assert read_result(folder, "test").figures == {"accuracy": 0.25}


@pytest.mark.parametrize("limit", [1, 0.5])
def test_a_part_of_the_samples_does_not_replace_all(quiet_trainer, trainer, folder, student, loader, limit):
    module = SupervisedModule(student)
    deploy(module, folder)
    limited = quiet_trainer(logger=trainer.logger, callbacks=[EvaluationWriter()], limit_test_batches=limit)
    limited.test(module, loader(), verbose=False)
    assert read_result(folder, "test").samples == 4
    trainer.test(module, loader(), verbose=False)
    limited.test(module, loader(), verbose=False)
    assert read_result(folder, "test").samples == 12
    for parameter in module.student.parameters():
        parameter.data.neg_()
    deploy(module, folder)  # other weights
    limited.test(module, loader(), verbose=False)
    assert read_result(folder, "test").samples == 4


def test_foreign_module_with_two_loaders(trainer, folder):
    trainer.test(Foreign(), [DataLoader(X, 5), DataLoader(X, 4)], verbose=False)
    assert read_result(folder, "test").figures == {"accuracy": 0.25}


def test_hint_module_returns_labels_in_both_stages(quiet_trainer, loader, student, teacher):
    module = HintModule(student, teacher, {"6": "6"}, hint_epochs=1)
    outputs = []

    class Seen(EvaluationWriter):
        def on_validation_batch_end(self, trainer, pl_module, outputs_, *args):
            outputs.append(outputs_)

    quiet_trainer(max_epochs=2, callbacks=[Seen()], num_sanity_val_steps=0).fit(module, loader(), loader())
    assert len(outputs) == 6 and all(one.shape == (4,) and not one.is_floating_point() for one in outputs)


def test_without_loggers_or_in_a_fast_dev_run_nothing_is_written(quiet_trainer, tmp_path, student, loader):
    module = SupervisedModule(student)
    deploy(module, tmp_path)
    for options in ({}, {"fast_dev_run": 2}):
        quiet_trainer(callbacks=[EvaluationWriter()], **options).test(module, loader(), verbose=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["student.safetensors"]


SCRIPT = """
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from kd_lightning import EvaluationWriter, SupervisedModule

if __name__ == "__main__":
    torch.manual_seed(0)
    module = SupervisedModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)))
    data = TensorDataset(torch.randn(11, 4), torch.arange(11) % 3)
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[EvaluationWriter()],
        logger=CSVLogger("logs", name="name", version=0), enable_progress_bar=False, enable_model_summary=False)
    trainer.test(module, DataLoader(data, 2), verbose=False)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_write_each_sample_once(tmp_path, folder, monkeypatch, processes):
    """Lightning's sampler repeats one of the 11 samples."""
    torch.manual_seed(0)
    module = SupervisedModule(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    x = torch.randn(11, 4)
    deploy(module, folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    processes.run_ranks(["script.py"])
    result = read_result(folder, "test")
    rows = result.predictions()
    assert result.samples == 11 and [row.index for row in rows] == list(range(11))
    assert [row.label for row in rows] == [str(k % 3) for k in range(11)]
    assert [row.prediction for row in rows] == [str(int(k)) for k in module.student(x).argmax(1)]
