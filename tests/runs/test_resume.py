"""A resumed fit writes the same checkpoints as an unbroken one, so that it may be killed any number of times."""

import shutil
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loops.fit_loop import _FitLoop
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import TensorDataset

from kd_lightning import DistillModule, HintModule, InputError, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.callbacks import ExactResume, SeedEveryStep
from kd_lightning.data import DatasetSource
from kd_lightning.runs.resume import correct_counters

EPOCHS, STEPS = 4, 5


class Student(nn.Sequential):
    """With what a resume may get wrong: dropout and batch statistics."""

    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


class Foreign(LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self, lr_scheduler=None, interval="epoch"):
        super().__init__()
        self.net = Student()
        self.lr_scheduler = lr_scheduler
        self.interval = interval

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch.x), batch.y)
        self.log("train/loss", loss, on_epoch=True)
        self.log("train/most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("train/rows", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def on_train_epoch_start(self):
        self.log("train/epoch", float(self.current_epoch))

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch.x), batch.y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.05)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": self.interval, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler | {"strict": False}}


class WithBackbone(Foreign):
    """As BackboneFinetuning needs it."""

    def __init__(self):
        super().__init__()
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)


def own(**kwargs):
    return SupervisedModule(Student(), optimizer=partial(torch.optim.AdamW, lr=0.05), **kwargs)


def distill(**kwargs):
    return DistillModule(Student(), Student(), soft_weight=0.5, optimizer=partial(torch.optim.AdamW, lr=0.05), **kwargs)


def hint(**kwargs):
    networks = Student(), Student()
    return HintModule(
        *networks, {"0": "0"}, 3, hint_patience=1, input_shape=[6], optimizer=partial(torch.optim.Adam, lr=0.5)
    )


PLATEAU = partial(ReduceLROnPlateau, patience=0, factor=0.5, threshold=0.5)
STOPS_EARLY = {"monitor": "val/loss", "patience": 2, "min_delta": 5.0}
SOME = {"every_n_train_steps": 1}
ON_VALIDATION = {"save_on_train_epoch_end": False}
ON_EPOCH_END = {"save_on_train_epoch_end": True}
CASES = {  # module, arguments of the checkpoint, of the trainer, callbacks
    "each step": (own, SOME, {}, []),
    "each step, foreign module": (Foreign, SOME, {}, []),
    "each step, without validation": (own, SOME, {"limit_val_batches": 0}, []),
    "each step, validation in every second epoch": (own, SOME, {"check_val_every_n_epoch": 2}, []),
    "each step, validation within the epoch": (own, SOME, {"val_check_interval": 2}, []),
    "each step, max_steps within an epoch": (own, SOME, {"max_steps": 17}, []),
    "each step, max_steps at an epoch's end": (own, SOME, {"max_steps": 15}, []),
    "each step, max_steps without validation": (own, SOME, {"max_steps": 13, "limit_val_batches": 0}, []),
    "accumulation": (own, SOME, {"accumulate_grad_batches": 2}, []),
    "clipping": (own, SOME, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, []),
    "validation within a window of batches": (
        own,
        ON_VALIDATION,
        {"accumulate_grad_batches": 4, "val_check_interval": 2},
        [],
    ),
    "validation end": (own, ON_VALIDATION, {}, []),
    "validation end, foreign module": (Foreign, ON_VALIDATION, {}, []),
    "validation end, within the epoch": (own, ON_VALIDATION, {"val_check_interval": 2}, []),
    "validation end, max_steps": (own, ON_VALIDATION, {"max_steps": 12}, []),
    "epoch end": (own, ON_EPOCH_END, {}, []),
    "epoch end, foreign module": (Foreign, ON_EPOCH_END, {}, []),
    "epoch end, max_steps": (own, ON_EPOCH_END, {"max_steps": 18}, []),
    "epoch end, max_steps without validation": (own, ON_EPOCH_END, {"max_steps": 18, "limit_val_batches": 0}, []),
    "each step, scheduler": (partial(Foreign, partial(StepLR, step_size=1)), SOME, {}, []),
    "each step, scheduler by step": (partial(Foreign, partial(StepLR, step_size=3), "step"), SOME, {}, []),
    "each step, plateau": (partial(own, lr_scheduler=PLATEAU), SOME, {}, []),
    "validation end, plateau": (partial(own, lr_scheduler=PLATEAU), ON_VALIDATION, {}, []),
    "epoch end, plateau": (partial(own, lr_scheduler=PLATEAU), ON_EPOCH_END, {}, []),
    "each step, plateau, foreign module": (partial(Foreign, PLATEAU), SOME, {}, []),
    "epoch end, plateau, foreign module": (partial(Foreign, PLATEAU), ON_EPOCH_END, {}, []),
    "each step, plateau by step": (partial(Foreign, PLATEAU, "step"), SOME, {"val_check_interval": 2}, []),
    "each step, early stopping": (own, SOME, {}, [partial(EarlyStopping, **STOPS_EARLY)]),
    "validation end, early stopping": (own, ON_VALIDATION, {}, [partial(EarlyStopping, **STOPS_EARLY)]),
    "epoch end, early stopping": (own, ON_EPOCH_END, {}, [partial(EarlyStopping, **STOPS_EARLY)]),
    "early stopping within the epoch": (
        own,
        ON_VALIDATION,
        {"val_check_interval": 2},
        [partial(EarlyStopping, **STOPS_EARLY)],
    ),
    "early stopping by a training metric": (
        own,
        SOME,
        {},
        [partial(EarlyStopping, monitor="train/loss", patience=2, min_delta=5.0)],
    ),
    "early stopping by a training metric, foreign module": (
        Foreign,
        SOME,
        {},
        [partial(EarlyStopping, monitor="train/loss_epoch", patience=2, min_delta=5.0)],
    ),
    "each step, averaged weights": (own, SOME, {}, [partial(EMAWeightAveraging, decay=0.5)]),
    "epoch end, averaged weights": (own, ON_EPOCH_END, {}, [partial(EMAWeightAveraging, decay=0.5)]),
    "averaged weights, foreign module": (Foreign, ON_VALIDATION, {}, [partial(EMAWeightAveraging, decay=0.5)]),
    "accumulation by epoch": (own, SOME, {}, [partial(GradientAccumulationScheduler, {0: 1, 1: 2, 3: 3})]),
    "double precision": (distill, SOME, {"precision": "64-true"}, []),
    "double precision, foreign module": (Foreign, SOME, {"precision": "64-true"}, []),
    "double precision, averaged weights": (
        Foreign,
        ON_EPOCH_END,
        {"precision": "64-true"},
        [partial(EMAWeightAveraging, decay=0.5)],
    ),
    "each step, patience of hints": (hint, SOME, {}, []),
    "validation end, patience of hints": (hint, ON_VALIDATION, {}, []),
    "bfloat16": (own, SOME, {"precision": "bf16-true"}, []),
}


def data(**kwargs):
    generator = torch.Generator().manual_seed(0)
    source = DatasetSource(TensorDataset(torch.randn(60, 6, generator=generator), torch.arange(60) % 3))
    return SemiSupervisedDataModule(source, **({"batch_size": 8, "val_size": 20 / 60} | kwargs))


@pytest.fixture
def fit(quiet_trainer):
    """Fits a new module, which writes ``step=K.ckpt`` to a folder, also the best ones by the validation loss."""

    def run(folder, make=own, checkpoint=SOME, trainer=None, callbacks=(), path=None, settings=None, exact=True):
        torch.manual_seed(0)
        module = make()
        options = {"max_epochs": EPOCHS, "limit_train_batches": STEPS, "enable_checkpointing": True} | (trainer or {})
        monitor = "train/loss" if options.get("limit_val_batches") == 0 else "val/loss"
        saver = partial(ModelCheckpoint, folder, auto_insert_metric_name=False)
        callbacks = [callback() for callback in callbacks]
        callbacks += [SeedEveryStep(1)]
        callbacks += [saver(filename="best", monitor=monitor, every_n_epochs=1, enable_version_counter=False)]
        callbacks += [saver(filename="step={step}", save_top_k=-1, **checkpoint)]  # the last one has the whole state
        if exact and isinstance(module, Foreign):
            callbacks.insert(0, ExactResume())
        trainer = quiet_trainer(callbacks=callbacks, **options)
        trainer.fit(module, datamodule=data(**(settings or {})), ckpt_path=path, weights_only=True)
        return trainer

    return run


def content(path):
    """A checkpoint, with the names of files for their paths."""
    return plain(torch.load(path, weights_only=True))


def plain(value):
    if isinstance(value, dict):
        # Lightning saves the current score and does not load it; the next save sets it
        return {plain(key): plain(part) for key, part in value.items() if key != "current_score"}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return Path(value).name if isinstance(value, str) and "/" in value and value.endswith(".ckpt") else value


def differences(one, other, place=""):
    """Where two checkpoints differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            found for n, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{place}/{n}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if same else [f"{place}: {one} and {other}"]
    return [] if one == other else [f"{place}: {one} and {other}"]


def assert_same_end(one, other):
    """Like that, without the counters: nothing is left to resume."""
    one, other = content(one), content(other)
    del one["loops"], other["loops"]
    assert not differences(one, other)


def files(folder):
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def resumed(fit, folder, saved, number, *case):
    """Resume a run in its own folder from one of its checkpoints; gives what it writes from there on."""
    for path in saved:
        path.unlink(missing_ok=True)
    trainer = fit(folder, *case, path=folder / "whole" / saved[number].name)
    found = files(folder)
    trainer.save_checkpoint(folder / "end.ckpt")
    return found


def unbroken(fit, folder, *case):
    """Fit in a folder; gives the checkpoints in order, which lie in ``whole``, too."""
    fit(folder, *case).save_checkpoint(folder / "end.ckpt")
    shutil.copytree(folder, folder / "whole")
    return files(folder)


REPRESENTATIVES = {  # of each counter, state and kind of module that a resume restores; the other cases are slow
    "each step, foreign module",
    "each step, validation within the epoch",
    "each step, max_steps within an epoch",
    "clipping",
    "validation within a window of batches",
    "validation end",
    "epoch end, foreign module",
    "epoch end, max_steps",
    "each step, scheduler by step",
    "validation end, plateau",
    "epoch end, plateau, foreign module",
    "validation end, early stopping",
    "early stopping by a training metric",
    "averaged weights, foreign module",
    "accumulation by epoch",
    "double precision, averaged weights",
    "validation end, patience of hints",
}
FIRSTS = [
    pytest.param(
        case,
        slice(0, None, 2 if case[1] is SOME else 1),
        id=name,
        marks=[] if name in REPRESENTATIVES else pytest.mark.slow,
    )
    for name, case in CASES.items()
]
OTHERS = [  # of those with a checkpoint after each step; FIRSTS have each step of an epoch, since their number is odd
    pytest.param(case, slice(1, None, 2), id=f"{name}, the others", marks=pytest.mark.slow)
    for name, case in CASES.items()
    if case[1] is SOME
]


@pytest.mark.parametrize(("case", "numbers"), FIRSTS + OTHERS)
def test_all_later_checkpoints_are_those_of_an_unbroken_run(fit, tmp_path, case, numbers):
    saved = unbroken(fit, tmp_path, *case)
    assert len(saved) > 1
    for number in range(len(saved))[numbers]:
        later = resumed(fit, tmp_path, saved, number, *case)
        assert later == saved[number + 1 :], saved[number].name
        for path in later[:3]:
            assert not differences(content(path), content(tmp_path / "whole" / path.name)), saved[number].name
        assert_same_end(tmp_path / "end.ckpt", tmp_path / "whole" / "end.ckpt")


@pytest.mark.parametrize("checkpoint", [SOME, ON_VALIDATION, ON_EPOCH_END], ids=str)
def test_wrong_counters_of_lightning_are_corrected(fit, tmp_path, checkpoint):
    """A resume of Lightning from an epoch's last batch writes them."""
    whole = fit(tmp_path / "whole", Foreign)
    fit(tmp_path / "wrong", Foreign, checkpoint, path=tmp_path / "whole" / "step=5.ckpt", exact=False)
    wrong = [path for path in files(tmp_path / "wrong") if int(path.stem[5:]) < EPOCHS * STEPS]
    assert len(wrong) > 1
    for path in wrong:
        again = fit(tmp_path / path.stem, Foreign, path=path)
        assert again.global_step == EPOCHS * STEPS
        assert again.current_epoch == EPOCHS
        state = again.lightning_module.state_dict()
        assert all(torch.equal(state[key], value) for key, value in whole.lightning_module.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"max_steps": 13}, {"max_steps": 15}], ids=str)
def test_right_counters_stay(fit, tmp_path, options):
    fit(tmp_path, trainer=options).save_checkpoint(tmp_path / "step=end.ckpt")
    for path in files(tmp_path):
        state = torch.load(path, weights_only=True)["loops"]["fit_loop"]
        before = deepcopy(state)
        correct_counters(state)
        assert state == before


def test_checkpoints_of_older_versions_resume(fit, tmp_path):
    saved = unbroken(fit, tmp_path, own, ON_VALIDATION, {}, [partial(EarlyStopping, monitor="val/loss")])
    for path in saved:
        checkpoint = torch.load(path, weights_only=True)
        for key in ("exact_resume", "epoch_means"):
            del checkpoint[key]
        del checkpoint["SemiSupervisedDataModule"]["settings"]
        torch.save(checkpoint, path)
        again = fit(
            tmp_path / path.stem, own, ON_VALIDATION, callbacks=[partial(EarlyStopping, monitor="val/loss")], path=path
        )
        assert again.global_step == EPOCHS * STEPS
        again.save_checkpoint(tmp_path / "again.ckpt")
        assert (
            differences(
                torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"],
                content(tmp_path / "end.ckpt")["state_dict"],
            )
            == []
        )


class StoppedError(Exception):
    """Ends a fit."""


class Fault(Callback):
    """Fails once, before a batch is used."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch and trainer.ckpt_path is None:
            raise StoppedError


@pytest.mark.parametrize("batch", [0, 3, 5, 12])
def test_checkpoint_written_on_an_exception(fit, tmp_path, batch):
    """The batch that was loaded but not used is the next one."""
    case = (own, {"every_n_epochs": 1, "save_on_exception": True})
    whole = fit(tmp_path / "whole", *case)
    with pytest.raises(StoppedError):
        fit(tmp_path / "fault", *case, callbacks=[partial(Fault, batch)])
    if not batch:
        assert not files(tmp_path / "fault")  # no step was taken
        return
    path = tmp_path / "fault" / f"step={batch}.ckpt"
    again = fit(tmp_path / "again", *case, path=path, callbacks=[partial(Fault, batch)])
    state = again.lightning_module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in whole.lightning_module.state_dict().items())
    again = fit(tmp_path / "twice", *case, path=files(tmp_path / "again")[0], callbacks=[partial(Fault, batch)])
    assert again.global_step == EPOCHS * STEPS


class TestEarlyStopping:
    CASE = (own, SOME, {}, [partial(EarlyStopping, **STOPS_EARLY)])

    def test_a_stopped_run_stays_stopped(self, fit, tmp_path):
        """Also from the last checkpoint before it stopped, and without the callback ExactResume."""
        assert fit(tmp_path, *self.CASE).global_step == 15
        for _ in range(2):
            assert fit(tmp_path, *self.CASE, path=tmp_path / "step=15.ckpt").global_step == 15

    def test_a_higher_patience_goes_on(self, fit, tmp_path):
        fit(tmp_path, *self.CASE).save_checkpoint(tmp_path / "end.ckpt")
        patient = partial(EarlyStopping, **(STOPS_EARLY | {"patience": 5}))
        again = fit(tmp_path, own, SOME, {}, [patient], path=tmp_path / "end.ckpt")
        assert again.early_stopping_callback.patience == 5
        assert again.global_step == EPOCHS * STEPS

    def test_a_lower_patience_stops(self, fit, tmp_path):
        fit(tmp_path, *self.CASE)
        again = fit(
            tmp_path,
            own,
            SOME,
            {},
            [partial(EarlyStopping, **(STOPS_EARLY | {"patience": 1}))],
            path=tmp_path / "step=12.ckpt",
        )
        assert again.global_step == 12

    def test_a_threshold_that_was_reached_stops(self, fit, tmp_path):
        reached = partial(EarlyStopping, monitor="val/loss", stopping_threshold=9.0)
        case = (own, ON_EPOCH_END, {}, [reached])
        assert fit(tmp_path, *case).global_step == 5
        again = fit(tmp_path, *case, path=tmp_path / "step=5.ckpt")
        assert again.global_step == 5
        assert again.early_stopping_callback.stopping_reason == EarlyStoppingReason.STOPPING_THRESHOLD


class TestRefusals:
    def test_another_accumulation(self, fit, tmp_path):
        fit(tmp_path, trainer={"accumulate_grad_batches": 2})
        with pytest.raises(InputError, match="^accumulate_grad_batches: .* 2, got 4"):
            fit(tmp_path / "again", trainer={"accumulate_grad_batches": 4}, path=files(tmp_path)[0])

    def test_another_accumulation_by_epoch(self, fit, tmp_path):
        fit(tmp_path, callbacks=[partial(GradientAccumulationScheduler, {0: 1, 1: 2})])
        with pytest.raises(InputError, match="^accumulate_grad_batches: .*{0: 1, 1: 2}, got 1"):
            fit(tmp_path / "again", path=files(tmp_path)[0])

    def test_stochastic_weight_averaging(self, fit, tmp_path):
        averaging = [partial(StochasticWeightAveraging, 0.1)]
        fit(tmp_path, callbacks=averaging)
        with pytest.raises(InputError, match="^trainer.callbacks: StochasticWeightAveraging .* EMAWeightAveraging"):
            fit(tmp_path / "again", callbacks=averaging, path=files(tmp_path)[0])

    def test_finetuning_of_lightning(self, fit, tmp_path):
        """It freezes the backbone again."""
        tuning = [partial(BackboneFinetuning, 1)]
        fit(tmp_path, WithBackbone, callbacks=tuning)
        with pytest.raises(InputError, match="^trainer.callbacks: BackboneFinetuning .* LayerwiseFinetuning"):
            fit(tmp_path / "again", WithBackbone, callbacks=tuning, path=files(tmp_path)[0])

    @pytest.mark.parametrize(
        ("name", "value", "texts"),
        [
            ("batch_size", 4, "8, got 4"),
            ("views_per_epoch", 2, "1, got 2"),
            ("num_views", 3, "None, got 3"),
            ("seed", 5, "0, got 5"),
            ("labeled_batch_size", 2, "None, got 2"),
            ("train_transform", nn.Hardtanh(-2, 2), r"None, got Hardtanh\(min_val=-2, max_val=2\)"),
            ("strong_transform", nn.ReLU(), r"None, got ReLU\(\)"),
        ],
    )
    def test_other_batches(self, fit, tmp_path, name, value, texts):
        usual = {"labeled": 3} if name == "labeled_batch_size" else {}
        fit(tmp_path, settings=usual)
        with pytest.raises(InputError, match=f"^{name}: the checkpoint was trained with {texts}"):
            fit(tmp_path / "again", settings=usual | {name: value}, path=files(tmp_path)[0])


def test_the_next_fit_of_the_trainer_is_lightnings(fit, tmp_path):
    fit(tmp_path)
    again = fit(tmp_path / "again", path=tmp_path / "step=5.ckpt")
    assert again.fit_loop.run.__func__ is _FitLoop.run
