"""Feature terms in whole runs: resuming, accumulation, precisions, compiled networks, averages, processes, files."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from small_networks import layers_of, pictures, small
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    Batch,
    Digits,
    DistillModule,
    FeatureTerm,
    InputError,
    SeedEveryStep,
    SemiSupervisedDataModule,
    StudentWriter,
)
from kd_lightning.features import ReviewFusion
from kd_lightning.features.margin_relu import MarginReLU
from kd_lightning.features.standardization import ChannelStandardization, PHIStandardization
from kd_lightning.losses.features import (
    AttentionTransferLoss,
    CosineLoss,
    CRDLoss,
    MSEFeatureLoss,
    OFDLoss,
    QueueSimilarityLoss,
    ReviewLoss,
    VIDLoss,
)


def stateful():
    """Terms that hold something of their own."""
    flat = {"flat": "flat"}
    stages = {"act": "act", "act2": "act2"}
    return {
        "crd": FeatureTerm(flat, CRDLoss(dim=4, negatives=8), 0.1),
        "queue": FeatureTerm(flat, QueueSimilarityLoss(size=20), standardize=ChannelStandardization()),
        "vid": FeatureTerm(stages, VIDLoss(), 0.1, begin_epoch=1, ramp_epochs=2),
        "review": FeatureTerm(stages, ReviewLoss(), projector=ReviewFusion(4)),
        "ofd": FeatureTerm({"second": "second"}, OFDLoss(), 0.01, standardize=MarginReLU()),
        "phi": FeatureTerm({"second": "second"}, MSEFeatureLoss(), standardize=PHIStandardization()),
    }


class KillError(Exception):
    pass


class KillAfter(Callback):
    """Ends a run after an optimiser step, as if it were killed."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KillError


def fit(quiet_trainer, folder, stop=None, path=None, features=stateful, callbacks=(), **options):
    """Train on 240 digits: four batches and two optimiser steps an epoch."""
    torch.manual_seed(0)
    module = DistillModule(
        small(4, classes=10),
        small(5, 1, 10),
        features=features() if callable(features) else features,
        optimizer=partial(AdamW, lr=0.01),
    )
    data = SemiSupervisedDataModule(Digits(), labeled=5, val_size=0.8, batch_size=64, seed=1)
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [SeedEveryStep(0), saves, *callbacks] + ([] if stop is None else [KillAfter(stop)])
    defaults = {"max_epochs": 3, "limit_val_batches": 1, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    trainer = quiet_trainer(**(defaults | options), callbacks=callbacks)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=path)
    except KillError:
        assert stop is not None
    return module, trainer


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_second_fit_forgets_the_samples_of_the_first(quiet_trainer, tmp_path):
    """They may be others now: CRD's memory and labels go by number, and the queue holds their features."""
    module, _ = fit(quiet_trainer, tmp_path, max_epochs=1)
    crd, queue = (module.features.all[name].loss for name in ("crd", "queue"))
    assert (crd.labels > -2).any() and queue.count > 0
    memory, number = crd.student_memory.clone(), len(crd.labels)
    fewer = SemiSupervisedDataModule(Digits(), labeled=5, unlabeled="none", val_size=0.8, batch_size=16, seed=2)
    quiet_trainer(max_epochs=0).fit(module, datamodule=fewer)
    assert (crd.labels == -2).all() and not crd.has_scale and queue.count == 0 and not queue.queue.any()
    assert len(crd.labels) == number and not torch.equal(crd.student_memory, memory)


class TestResume:
    def test_to_the_bit_from_every_step_and_twice(self, quiet_trainer, tmp_path):
        whole, trainer = fit(quiet_trainer, tmp_path)
        assert {"train/queue", "train/crd", "val/queue", "val/vid"} <= trainer.callback_metrics.keys()
        for step in (1, 2, 5):  # within an epoch, at its end, and the last but one
            resumed, after = fit(quiet_trainer, tmp_path / str(step), path=tmp_path / f"step={step}.ckpt")
            assert same(whole, resumed), step
            for name, value in trainer.callback_metrics.items():
                assert torch.equal(value, after.callback_metrics[name]), (step, name)
        fit(quiet_trainer, tmp_path / "twice", stop=3, path=tmp_path / "step=1.ckpt")
        resumed, _ = fit(quiet_trainer, tmp_path / "twice", path=tmp_path / "twice" / "step=3.ckpt")
        assert same(whole, resumed)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda terms: terms.pop("crd"), "features: the checkpoint was trained with .*crd"),
            (lambda terms: terms.update(more=FeatureTerm({"act": "act"}, VIDLoss())), "features: .* got .*more"),
            (lambda terms: terms.update(phi=FeatureTerm({"first": "first"}, MSEFeatureLoss())), "features: .*first"),
            (
                lambda terms: terms.update(vid=FeatureTerm({"act2": "act2", "act": "act"}, VIDLoss())),
                "features: the checkpoint was trained with",
            ),
            (lambda terms: terms.clear(), "features"),
            (lambda terms: terms.update(crd=FeatureTerm({"flat": "flat"}, CRDLoss(5, 8))), "features.crd"),
        ],
    )
    def test_other_terms_are_refused(self, change, message, quiet_trainer, tmp_path):
        path = tmp_path / "step=1.ckpt"
        fit(quiet_trainer, tmp_path, stop=1)
        terms = stateful()
        change(terms)
        with pytest.raises(InputError, match=message) as error:
            fit(quiet_trainer, tmp_path, path=path, features=terms)
        assert "\n" not in str(error.value)

    def test_load_from_checkpoint(self, quiet_trainer, tmp_path):
        module, trainer = fit(quiet_trainer, tmp_path, max_epochs=1)
        loader = DataLoader(TensorDataset(*pictures(classes=10)), 4)
        (before,) = trainer.test(module, loader, verbose=False)
        path = tmp_path / "step=2.ckpt"
        saved = torch.load(path, weights_only=True)
        assert not any(key.startswith("teacher") for key in saved["state_dict"])
        for teacher in (small(5, 1, 10), None):
            again = DistillModule.load_from_checkpoint(
                path, student=small(4, classes=10), teacher=teacher, features=stateful()
            )
            assert same(again, module)
            (found,) = quiet_trainer().test(again, loader, verbose=False)
            assert found.items() <= before.items() if teacher is None else found == before

    def test_a_test_without_terms_in_the_module(self, quiet_trainer, tmp_path):
        module, _ = fit(quiet_trainer, tmp_path, max_epochs=1)
        path = tmp_path / "step=2.ckpt"
        with pytest.raises(InputError, match="features") as error:
            DistillModule.load_from_checkpoint(path, student=small(4, classes=10), teacher=None)
        assert "\n" not in str(error.value)
        again = DistillModule.load_from_checkpoint(path, student=small(4, classes=10), teacher=None, strict=False)
        assert same(again.student, module.student)


class Batches(Callback):
    """Stores the pictures and labels of each step."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, *args):
        self.found.append((batch[0].clone(), batch[1].clone()))


def test_accumulated_batches_by_hand(quiet_trainer):
    """The mean of their gradients."""
    loader = DataLoader(TensorDataset(*pictures(16)), 4)
    features = {
        "mse": FeatureTerm({"second": "second"}, MSEFeatureLoss(), 0.5, projector=nn.Conv2d(6, 10, 1)),
        "at": FeatureTerm({"act": "act"}, AttentionTransferLoss(), 20.0),
    }
    module = DistillModule(small(), small(5, 1), features=features, optimizer=partial(SGD, lr=0.1))
    plain = copy.deepcopy(module)
    quiet_trainer(accumulate_grad_batches=2).fit(module, loader)
    batches = [*loader]
    plain.build_features(Batch(*batches[0]))
    optimizer = plain.configure_optimizers()
    for pair in (batches[:2], batches[2:]):
        optimizer.zero_grad()
        sum(plain.training_step(batch, 0) / 2 for batch in pair).backward()
        optimizer.step()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_half_precision(precision, quiet_trainer, tmp_path):
    """The terms are near those of float32, and a resume is exact."""
    whole, trainer = fit(quiet_trainer, tmp_path, precision=precision, max_epochs=2)
    _, reference = fit(quiet_trainer, tmp_path / "32", max_epochs=2)
    for name in whole.features.all.keys() - {"crd"}:
        value, expected = (of.callback_metrics[f"train/{name}"].item() for of in (trainer, reference))
        assert value == pytest.approx(expected, rel=0.05, abs=0.02), name
    kind = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}[precision]
    for term in whole.features.all.values():
        assert {p.dtype for p in term.parameters()} <= {kind}
        assert {s.mean.dtype for s in term.standardizations if hasattr(s, "mean")} <= {torch.float32}
    path = tmp_path / "step=3.ckpt"
    assert same(whole, fit(quiet_trainer, tmp_path / "again", path=path, precision=precision, max_epochs=2)[0])


class Checkpointed(nn.Module):
    """Computes its layers again in the backward pass."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return checkpoint(self.network, x, use_reentrant=False)


class TestNetworks:
    def end(self, quiet_trainer, student, teacher, prefix=""):
        name = f"{prefix}flat"
        torch.manual_seed(0)
        features = {
            "cosine": FeatureTerm({name: "flat"}, CosineLoss(), 2.0),
            "at": FeatureTerm({f"{prefix}act": "act"}, AttentionTransferLoss(), 20.0),
        }
        module = DistillModule(student, teacher, features=features, optimizer=partial(SGD, lr=0.1))
        loader = DataLoader(TensorDataset(*pictures(8)), 4)
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(module, loader, loader)
        return [p.detach() for p in module.parameters()], trainer.callback_metrics

    def test_gradient_checkpointing(self, quiet_trainer):
        one, metrics = self.end(quiet_trainer, small(), small(5, 1))
        other, again = self.end(quiet_trainer, Checkpointed(small()), small(5, 1), "network.")
        for mine, expected in zip(other, one, strict=True):
            assert torch.equal(mine, expected)
        assert again["val/cosine"] == metrics["val/cosine"]

    @pytest.mark.parametrize("which", ["student", "teacher", "both in place"])
    def test_compiled(self, which, quiet_trainer):
        one, metrics = self.end(quiet_trainer, small(), small(5, 1))
        student, teacher = small(), small(5, 1)
        if which == "student":
            student = torch.compile(student, backend="eager")
        elif which == "teacher":
            teacher = torch.compile(teacher, backend="eager")
        else:
            student.compile(backend="eager")
            teacher.compile(backend="eager")
        other, again = self.end(quiet_trainer, student, teacher)
        for mine, expected in zip(other, one, strict=True):
            torch.testing.assert_close(mine, expected)
        assert again["val/cosine"].item() == pytest.approx(metrics["val/cosine"].item())

    def test_layers_of_a_finetuning_callback(self, quiet_trainer):
        """Frozen layers learn from the term when the callback unfreezes them."""

        student = small()
        module = DistillModule(
            student, small(5, 1), features={"at": FeatureTerm({"first": "first"}, AttentionTransferLoss())}
        )
        module.backbone = student.first
        callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        before = student.first.weight.clone()
        quiet_trainer(max_epochs=2, callbacks=[callback]).fit(module, DataLoader(TensorDataset(*pictures(8)), 4))
        assert not torch.equal(before, student.first.weight)


class TestAverages:
    def test_by_hand(self, quiet_trainer, tmp_path):
        """The student's average is that of its weights after each step; the terms see the averages in validation."""
        seen = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, pl_module, *args):
                seen.append({k: v.clone() for k, v in pl_module.student.state_dict().items()})

        loader = DataLoader(TensorDataset(*pictures(16)), 4)
        features = {"mse": FeatureTerm({"second": "second"}, MSEFeatureLoss(), 0.5)}
        module = DistillModule(small(), small(5, 1), features=features, optimizer=partial(SGD, lr=0.1))
        callbacks = [Watch(), EMAWeightAveraging(decay=0.5), StudentWriter()]
        trainer = quiet_trainer(callbacks=callbacks, default_root_dir=tmp_path)
        trainer.fit(module, loader, loader)
        expected = seen[0]
        for after in seen[1:]:
            expected = {k: 0.5 * expected[k] + 0.5 * after[k] for k in expected}
        for key, value in module.student.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
        x = loader.dataset.tensors[0]
        projected = module.features.mse.pairs[0].projector(layers_of(module.student, x)["second"])
        value = nn.functional.mse_loss(projected, layers_of(module.teacher.network, x)["second"])
        assert trainer.callback_metrics["val/mse"].item() == pytest.approx(value.item(), rel=1e-4)

    def test_with_states_and_a_resume(self, quiet_trainer, tmp_path):
        average = lambda: [EMAWeightAveraging(decay=0.5)]  # noqa: E731
        whole, _ = fit(quiet_trainer, tmp_path, callbacks=average())
        resumed, _ = fit(quiet_trainer, tmp_path / "again", path=tmp_path / "step=3.ckpt", callbacks=average())
        assert same(whole, resumed)
        plain, _ = fit(quiet_trainer, tmp_path / "plain")
        for one, other in zip(whole.features.all.values(), plain.features.all.values(), strict=True):
            for mine, theirs in zip(one.standardizations, other.standardizations, strict=True):
                for key, value in theirs.state_dict().items():
                    torch.testing.assert_close(mine.state_dict()[key], value)


def test_the_deployed_file_holds_the_student_alone(quiet_trainer, tmp_path):
    module, _ = fit(quiet_trainer, tmp_path, max_epochs=1, callbacks=[StudentWriter()], default_root_dir=tmp_path)
    (path,) = tmp_path.rglob("student.safetensors")
    tensors = load_file(path)
    assert tensors.keys() == module.student.state_dict().keys()


SCRIPT = """
import sys
import torch
from lightning.pytorch import Trainer
sys.path.insert(0, sys.argv[1])
import test_feature_terms_runs as runs
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
trainer = Trainer(**options, max_epochs=3, accumulate_grad_batches=2, precision="64-true", **quiet)
found = runs.fit_rows(trainer)
torch.save(found, f"{trainer.global_rank}.pt")
"""


def fit_rows(trainer):
    """Train on terms of single rows, on the rows of this process. Returns the state and the metrics."""
    flat, second = {"flat": "flat"}, {"second": "second"}
    features = {
        "mse": FeatureTerm(second, MSEFeatureLoss(), 0.5),
        "cosine": FeatureTerm(flat, CosineLoss(), standardize=ChannelStandardization()),
        "queue": FeatureTerm(flat, QueueSimilarityLoss(size=6), 0.0),
        "late": FeatureTerm({"act": "act", "act2": "act2"}, VIDLoss(), begin_epoch=1, ramp_epochs=2),
    }
    optimizer = partial(SGD, lr=0.05, weight_decay=0.5)  # Adam would amplify rounding
    module = DistillModule(small(), small(5, 1), features=features, optimizer=optimizer)
    data, world, rank = TensorDataset(*pictures(16)), trainer.world_size, trainer.global_rank
    loader = DataLoader(data, 4 // world, sampler=range(rank, 16, world))
    trainer.fit(module, loader, DataLoader(TensorDataset(*pictures(7, seed=1)), 4))
    return module.state_dict(), {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_equal_one(tmp_path, quiet_trainer, monkeypatch, processes):
    """Also the projectors of terms that have no weight yet: a gradient of 0 would move them by weight decay."""
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(SCRIPT)
    processes.run_ranks(["run.py", str(Path(__file__).parent)])
    first, second = (torch.load(f"{rank}.pt") for rank in range(2))
    state, metrics = fit_rows(quiet_trainer(max_epochs=3, accumulate_grad_batches=2, precision="64-true"))
    for key, value in state.items():
        assert torch.equal(first[0][key], second[0][key]), key
        torch.testing.assert_close(
            first[0][key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )
    metrics = {name: value for name, value in metrics.items() if name != "train/loss_step"}
    assert {name: first[1].get(name) for name in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("way", ["the same terms", "a checkpoint"])
def test_standardizations_of_another_teacher(way, quiet_trainer, tmp_path):
    """Its features have other means and scales."""

    def terms():
        return {"mse": FeatureTerm({"second": "second"}, MSEFeatureLoss(), standardize=ChannelStandardization())}

    loader, first = DataLoader(TensorDataset(*pictures(8)), 4), terms()
    module, trainer = DistillModule(small(), small(5, seed=1), features=first), quiet_trainer()
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for seed in (1, 2):
        if way == "a checkpoint":
            networks = {"student": small(), "teacher": small(5, seed)}
            again = DistillModule.load_from_checkpoint(tmp_path / "a.ckpt", **networks, features=terms())
        else:
            again = DistillModule(small(), small(5, seed), features=first)
        if seed == 1:
            quiet_trainer().fit(again, loader)
            continue
        with pytest.raises(InputError, match="^features.mse: standardize is fitted to another teacher; make a new"):
            quiet_trainer().fit(again, loader)


def test_a_warm_up_is_measured_in_validation(quiet_trainer, tmp_path):
    """A checkpoint may follow a term that begins later."""
    loader = DataLoader(TensorDataset(*pictures(8)), 4)
    features = {
        "late": FeatureTerm({"second": "second"}, MSEFeatureLoss(), begin_epoch=1),
        "off": FeatureTerm({"second": "second"}, MSEFeatureLoss(), 0.0),
    }
    best = ModelCheckpoint(tmp_path, monitor="val/late", mode="min")
    trainer = quiet_trainer(enable_checkpointing=True, callbacks=[best])
    trainer.fit(DistillModule(small(), small(5, seed=1), features=features), loader, loader)
    assert best.best_model_score == trainer.callback_metrics["val/late"] > 0
    assert not {"train/late", "val/off"} & trainer.callback_metrics.keys()
