"""HintModule: what each stage computes, trains and charts, and going on from inside either."""

import copy
import csv
import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_networks import Resumable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kd_lightning import (
    Batch,
    DistillModule,
    HintModule,
    InputError,
    SeedEveryStep,
    SoftWeightAnnealing,
    SupervisedModule,
    Teacher,
)
from kd_lightning.losses import HintLoss, KDLoss
from kd_lightning.models import DigitsCNN, FitNet

HINTS = {"5": "5"}  # of DigitsCNN: the second ReLU, (2 * width, 8, 8)
BELOW = {"0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias"}
SHAPE = [1, 8, 8]


def part(network, layers):
    """The first layers of a copy."""
    return nn.Sequential(*list(copy.deepcopy(network).children())[:layers])


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def projectors(module):
    """The projectors of the hint term."""
    return [pair.projector for pair in module.features["hint"].pairs]


def changed(before, module):
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}


class Watch(Callback):
    """The student and the optimiser at the end of every epoch."""

    def __init__(self):
        self.students, self.optimizers, self.rates, self.states = [], [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.states.append(None)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            (optimizer,) = trainer.optimizers
            self.states[-1] = len(optimizer.state)
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.optimizers.append((type(optimizer), {id(p) for g in optimizer.param_groups for p in g["params"]}))

    def on_train_epoch_end(self, trainer, pl_module):
        self.students.append(snapshot(pl_module.student))


class TestObjective:
    def test_stage_one_by_hand(self, student, teacher):
        torch.manual_seed(3)
        projectors = {"5": nn.Conv2d(8, 16, 1), "2": nn.Conv2d(4, 8, 1)}
        module = HintModule(student, teacher, {"5": "5", "2": "2"}, 1, projectors=projectors).eval()
        x = torch.rand(3, 1, 8, 8)
        loss = module.training_step((x, torch.tensor([0, -100, 3])), 0)  # without a Trainer
        expected = 0.0
        for layer in (5, 2):
            mine = part(student, layer + 1).double()(x.double())
            weight, bias = (t.double() for t in projectors[str(layer)].parameters())
            regressed = torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], mine) + bias[:, None, None]
            hint = part(teacher, layer + 1).double()(x.double())
            expected += ((regressed - hint) ** 2).sum().item() / 2 / 3
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss.backward()
        assert {name for name, p in student.named_parameters() if p.grad is not None} == BELOW

    def test_stage_two_is_distillation(self, student, teacher):
        x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, -100, 3, 1])
        module = HintModule(student, teacher, HINTS, 1, soft_weight=0.31, soft_loss=KDLoss(3.0), input_shape=SHAPE)
        plain = DistillModule(copy.deepcopy(student), teacher, soft_weight=0.31, soft_loss=KDLoss(3.0))
        module.distilling = True
        assert torch.equal(module.training_step((x, y), 0), plain.training_step((x, y), 0))

    def test_joint_adds_the_weighted_hint(self, student, teacher):
        x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, -100, 3, 1])
        module = HintModule(student, teacher, HINTS, 0, hint_weight=0.01, input_shape=SHAPE).eval()
        hint = HintLoss()(projectors(module)[0](part(student, 6)(x)), part(teacher, 6)(x))
        plain = DistillModule(student, teacher).eval().training_step((x, y), 0)
        assert module.training_step((x, y), 0).item() == pytest.approx((plain + 0.01 * hint).item(), rel=1e-5)

    def test_the_teacher_sees_its_own_inputs_and_stays_in_eval_mode(self, student, teacher):
        seen = []

        class Half(nn.Module):
            def forward(self, x):
                seen.append(x.shape)
                return x / 2

        module = HintModule(student, Teacher(teacher, preprocess=Half()), HINTS, 1, input_shape=SHAPE)
        before = snapshot(teacher)
        teacher.train()
        x = torch.rand(3, 1, 8, 8)
        module.eval()
        loss = module.training_step((x, torch.zeros(3, dtype=torch.long)), 0)
        hint = part(teacher, 6).eval()(x / 2)
        assert loss.item() == pytest.approx(
            HintLoss()(projectors(module)[0](part(student, 6)(x)), hint).item(), rel=1e-5
        )
        assert seen == [(4, 1, 8, 8), (3, 1, 8, 8)]
        assert not changed(before, teacher)

    def test_no_stage_one_is_distillation_bit_for_bit(self, quiet_trainer, loader, teacher):
        ends = []
        for kind in (partial(HintModule, hints=HINTS, hint_epochs=0), DistillModule):
            torch.manual_seed(7)
            module = kind(DigitsCNN(4, dropout=0.5), teacher)
            quiet_trainer(max_epochs=2).fit(module, loader())
            ends.append(snapshot(module))
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])


class TestStages:
    def test_what_each_trains(self, quiet_trainer, loader, student, teacher):
        watch, before = Watch(), snapshot(student)
        module = HintModule(
            student,
            teacher,
            HINTS,
            2,
            hint_optimizer=partial(SGD, lr=1e-4, momentum=0.9),
            hint_lr_scheduler=partial(StepLR, step_size=1, gamma=0.5),
            optimizer=partial(Adam, lr=1e-3),
            lr_scheduler=partial(StepLR, step_size=1, gamma=0.1),
        )
        quiet_trainer(max_epochs=4, callbacks=[watch]).fit(module, loader())
        statistics = {f"{layer}.{name}" for layer in (1, 4) for name in ("running_mean", "running_var")}
        counts = {"1.num_batches_tracked", "4.num_batches_tracked"}
        assert {
            key for key, v in watch.students[1].items() if not torch.equal(v, before[key])
        } == BELOW | statistics | counts
        assert changed(watch.students[1], student) == before.keys()
        names = {id(p): name for name, p in module.named_parameters()}
        kinds, trained = zip(*watch.optimizers, strict=True)
        assert kinds == (SGD, SGD, Adam, Adam)
        below = {f"student.{name}" for name in BELOW}
        projectors = {name for name in names.values() if name.startswith("features.hint.")}
        assert {names[p] for p in trained[0]} == below | projectors
        assert {names[p] for p in trained[2]} == set(names.values()) - projectors
        assert watch.rates == pytest.approx([1e-4, 5e-5, 1e-3, 1e-4])
        assert watch.states == [0, len(trained[0]), 0, len(trained[2])]  # an optimiser's state starts empty

    def test_what_lies_above_is_not_computed(self, quiet_trainer, loader, teacher):
        class Above(nn.Module):
            def __init__(self):
                super().__init__()
                self.calls = []

            def forward(self, x):
                self.calls.append(self.training)
                return x

        above = Above()
        first, *rest = DigitsCNN(4).children()
        layers = [first, *rest[:5], above, *rest[5:]]
        student = nn.Sequential(*layers)
        module = HintModule(student, teacher, HINTS, 1)
        quiet_trainer(max_epochs=2, num_sanity_val_steps=0).fit(module, loader(count=12, batch=4))
        # a dry pass for the projectors, one for the number of outputs, and the second epoch's three batches
        assert above.calls == [False] * 2 + [True] * 3

    def test_statistics_of_a_branch_that_must_be_computed_stay(self, quiet_trainer, loader, teacher):
        class Branching(nn.Module):
            """Its head comes first, so stage 1 cannot but run it."""

            def __init__(self):
                super().__init__()
                self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
                self.guided = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
                self.top = nn.Linear(4, 10)

            def forward(self, x):
                head = self.head(x)
                return head + self.top(self.guided(x).mean((2, 3)))

        student, watch = Branching(), Watch()
        before = snapshot(student)
        module = HintModule(student, teacher, {"guided": "5"}, 1)
        quiet_trainer(max_epochs=2, callbacks=[watch]).fit(module, loader(), loader())
        same = {key for key, v in watch.students[0].items() if torch.equal(v, before[key])}
        assert same == {key for key in before if not key.startswith("guided.")}
        assert changed(watch.students[0], student) >= {"head.2.running_mean", "head.1.weight", "top.weight"}
        assert all(layer.training for layer in student.modules())

    def test_frozen_layers_stay_frozen(self, quiet_trainer, loader, student, teacher):
        student[0].requires_grad_(False)
        before = snapshot(student)
        quiet_trainer(max_epochs=2).fit(HintModule(student, teacher, HINTS, 1), loader())
        assert "0.weight" not in changed(before, student)
        student.requires_grad_(False)
        student[13].requires_grad_(True)
        with pytest.raises(InputError, match="hints: no parameter below the guided layers requires a gradient"):
            quiet_trainer(max_epochs=2).fit(HintModule(student, teacher, HINTS, 1), loader())
        student.requires_grad_(False)
        with pytest.raises(InputError, match="student: at least one parameter must require a gradient"):
            quiet_trainer(max_epochs=2).fit(HintModule(student, teacher, HINTS, 1), loader())

    def test_a_fault_in_stage_one_leaves_no_layer_in_eval_mode(self, quiet_trainer, loader, student, teacher):
        class Fault(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                raise ZeroDivisionError

        module = HintModule(student, teacher, HINTS, 1)
        with pytest.raises(ZeroDivisionError):
            quiet_trainer(max_epochs=2, callbacks=[Fault()]).fit(module, loader())
        assert all(layer.training for layer in student.modules())

    def test_going_on_with_the_same_trainer_keeps_the_boundary(self, quiet_trainer, loader, student, teacher):
        module, trainer = HintModule(student, teacher, HINTS, 1), quiet_trainer(max_epochs=2)
        trainer.fit(module, loader())
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, loader())
        assert (module.distilling, module.distill_from_epoch, trainer.current_epoch) == (True, 1, 4)

    def test_frozen_statistics_below_go_on(self, quiet_trainer, loader, student, teacher):
        student[1].requires_grad_(False)
        watch, before = Watch(), snapshot(student)
        quiet_trainer(max_epochs=2, callbacks=[watch]).fit(HintModule(student, teacher, HINTS, 1), loader())
        assert not torch.equal(watch.students[0]["1.running_mean"], before["1.running_mean"])
        assert torch.equal(watch.students[0]["1.weight"], before["1.weight"])
        assert torch.equal(watch.students[0]["8.running_mean"], before["8.running_mean"])

    def test_a_second_fit_starts_over(self, quiet_trainer, loader, student, teacher):
        module = HintModule(student, teacher, HINTS, 1)
        quiet_trainer(max_epochs=2).fit(module, loader())
        watch = Watch()
        quiet_trainer(max_epochs=2, callbacks=[watch]).fit(module, loader())
        assert [len(trained) for _, trained in watch.optimizers] == [len(BELOW) + 2, len([*student.parameters()])]

    def test_annealing_starts_with_stage_two(self, quiet_trainer, loader, student, teacher, tmp_path):
        logger = CSVLogger(tmp_path)
        module = HintModule(student, teacher, HINTS, 2, soft_weight=0.5)
        annealing = SoftWeightAnnealing(0.31, 0.10)
        quiet_trainer(max_epochs=5, callbacks=[annealing], logger=logger, log_every_n_steps=1).fit(module, loader())
        with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["stage"]]
        assert [float(row["stage"]) for row in rows] == [1, 1, 2, 2, 2]
        assert [float(row["soft_weight"]) for row in rows] == pytest.approx([0.31, 0.31, 0.31, 0.205, 0.10])

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_low_precision(self, quiet_trainer, loader, student, teacher, precision, tmp_path):
        module = HintModule(student, teacher, HINTS, 1)
        logger = TensorBoardLogger(tmp_path)
        trainer = quiet_trainer(max_epochs=2, precision=precision, logger=logger)
        trainer.fit(module, loader(), loader())
        assert trainer.callback_metrics["train/hint"].isfinite()
        assert trainer.callback_metrics["train/soft"].isfinite()

    def test_compiled_student(self, quiet_trainer, loader, teacher):
        ends = []
        for compiled in (False, True):
            torch.manual_seed(0)
            student = DigitsCNN(4)
            student = torch.compile(student, backend="eager") if compiled else student
            module = HintModule(student, teacher, HINTS, 1)
            quiet_trainer(max_epochs=2).fit(module, loader())
            ends.append([*student.state_dict().values()])
        assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))

    def test_averaged_weights(self, quiet_trainer, loader, student, teacher):
        module = HintModule(student, teacher, HINTS, 1)
        averages = EMAWeightAveraging(decay=0.5)
        quiet_trainer(max_epochs=3, callbacks=[averages]).fit(module, loader())
        assert not changed(snapshot(averages._average_model.module), module)  # the end takes the averages over
        assert {key for key in snapshot(copy.deepcopy(module)) if key.startswith("features.hint.")}
        assert not any(layer._forward_hooks for layer in [*student.modules(), *teacher.modules()])


class TestEndOfStageOne:
    class Loss(Callback):
        """Puts a validation hint loss in place of the true one."""

        def __init__(self, values):
            self.values = iter(values)

        def on_validation_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                value = next(self.values, 0.0)
                pl_module.features.pair_values = lambda *_: {"5": torch.tensor(value)}

        def on_validation_end(self, trainer, pl_module):
            pl_module.features.__dict__.pop("pair_values", None)

    @pytest.mark.parametrize(
        ("losses", "patience", "begin"),
        [([5, 4, 4, 3, 2], 1, 3), ([5, 4, 4, 4, 2], 2, 4), ([5, 4, 3, 2, 1], 1, 5), ([5, math.nan, 1], 1, 2)],
    )
    def test_patience(self, quiet_trainer, loader, student, teacher, losses, patience, begin):
        watch = Watch()
        module = HintModule(student, teacher, HINTS, 5, hint_patience=patience, optimizer=partial(SGD, lr=1e-4))
        trainer = quiet_trainer(max_epochs=7, callbacks=[watch, self.Loss(losses), SoftWeightAnnealing(0.5, 0.1)])
        trainer.fit(module, loader(), loader())
        stages = [len(trained) == len(BELOW) + 2 for _, trained in watch.optimizers]
        assert stages == [True] * begin + [False] * (7 - begin)
        assert module.distill_from_epoch == begin
        assert module.soft_weight == pytest.approx(0.1)

    @pytest.mark.parametrize(
        ("options", "end"),
        [
            ({"monitor": "val/loss", "patience": 1, "min_delta": 5.0}, 5),  # stage 2's first is the best, its next not
            ({"monitor": "val/accuracy", "mode": "max", "patience": 1, "min_delta": 5.0}, 5),
            ({"monitor": "val/loss", "divergence_threshold": 0.5}, 4),
            ({"monitor": "train/loss", "stopping_threshold": 1e9}, 4),
            ({"monitor": "train/soft", "stopping_threshold": 1e9}, 4),  # not there in stage 1
        ],
        ids=str,
    )
    def test_early_stopping_is_paused_in_stage_one(self, quiet_trainer, loader, student, teacher, options, end):
        """Accuracy does not rise before the head learns."""
        module = HintModule(student, teacher, HINTS, 3)
        trainer = quiet_trainer(max_epochs=9, callbacks=[EarlyStopping(**options)])
        trainer.fit(module, loader(), loader())
        assert trainer.current_epoch == end

    @pytest.mark.parametrize("when", ["setup", "on_train_start", "on_train_epoch_end", "on_validation_start", None])
    @pytest.mark.parametrize("own", [False, True])
    def test_early_stopping_is_as_found(self, quiet_trainer, loader, student, teacher, when, own):
        """After a stage 1 that ends by an exception, and after a fit that ends well."""

        class Fault(Callback):
            pass

        def fail(self, trainer, *args, **kwargs):
            raise ZeroDivisionError

        if when is not None:
            setattr(Fault, when, fail)
        stopping = EarlyStopping("val/accuracy", mode="max", patience=1, min_delta=5.0)
        if own:
            stopping._should_skip_check = lambda trainer: trainer.sanity_checking
        found = dict(vars(stopping))
        trainer = quiet_trainer(max_epochs=3, callbacks=[Fault(), stopping], num_sanity_val_steps=0)
        with nullcontext() if when is None else pytest.raises(ZeroDivisionError):
            trainer.fit(HintModule(student, teacher, HINTS, 2), loader(), loader())
        assert vars(stopping).keys() - found.keys() <= {"log", "log_dict"}  # Lightning's
        assert all(vars(stopping)[name] is value for name, value in found.items() if callable(value))
        trainer = quiet_trainer(max_epochs=9, callbacks=[stopping])
        trainer.fit(SupervisedModule(student), loader(), loader())
        assert trainer.current_epoch == (1 if when is None else 2)  # after stage 2 it has a best score

    def test_early_stopping_that_could_not_be_restored_stops_others(self, quiet_trainer, loader, student, teacher):
        """A callback before it fails while it handles the exception, so Lightning calls no later one."""

        class Fault(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                raise ZeroDivisionError

            def on_exception(self, trainer, pl_module, exception):
                raise OSError

        stopping = EarlyStopping("val/accuracy", mode="max", patience=1, min_delta=5.0)
        module = HintModule(student, teacher, HINTS, 2)
        with pytest.raises(OSError):
            quiet_trainer(max_epochs=3, callbacks=[Fault(), stopping]).fit(module, loader(), loader())
        trainer = quiet_trainer(max_epochs=9, callbacks=[stopping])
        trainer.fit(SupervisedModule(student), loader(), loader())
        assert trainer.current_epoch == 2
        assert "_should_skip_check" not in vars(stopping)

    def test_early_stopping_by_hints_is_refused(self, quiet_trainer, loader, student, teacher):
        trainer = quiet_trainer(max_epochs=9, callbacks=[EarlyStopping("val/hint")])
        with pytest.raises(InputError, match="EarlyStopping on val/hint would end the run; use hint_patience"):
            trainer.fit(HintModule(student, teacher, HINTS, 3), loader(), loader())

    def test_patience_needs_validation(self, quiet_trainer, loader, student, teacher):
        module = HintModule(student, teacher, HINTS, 1, hint_patience=1)
        with pytest.raises(InputError, match="hint_patience needs validation data"):
            quiet_trainer(max_epochs=2).fit(module, loader())

    def test_best_checkpoint_is_of_stage_two(self, quiet_trainer, loader, teacher, tmp_path):
        """The hint loss may be far below what comes after."""
        best = ModelCheckpoint(tmp_path, "{epoch}", monitor="train/loss")
        projector = nn.Conv2d(8, 16, 1)
        nn.init.zeros_(projector.weight), nn.init.zeros_(projector.bias)
        dim = copy.deepcopy(teacher)
        nn.init.zeros_(dim[4].weight), nn.init.zeros_(dim[4].bias)  # its hints are zeros, and the loss at once, too
        module = HintModule(DigitsCNN(4), dim, HINTS, 2, projectors={"5": projector}, optimizer=partial(SGD, lr=1e-3))
        trainer = quiet_trainer(max_epochs=4, enable_checkpointing=True, callbacks=[best])
        trainer.fit(module, loader(), loader())
        assert Path(best.best_model_path).name in ("epoch=2.ckpt", "epoch=3.ckpt")
        assert best.best_model_score > 0.01  # stage 1 had zeros

    def test_plateau_follows_the_hints(self, quiet_trainer, loader, student, teacher):
        watch, plateau = Watch(), partial(ReduceLROnPlateau, patience=0, factor=0.1)
        options = {"optimizer": partial(SGD, lr=1e-4), "hint_lr_scheduler": plateau}
        losses = TestEndOfStageOne.Loss([5, 4, 3, 3])
        module = HintModule(student, teacher, HINTS, 5, **options)
        quiet_trainer(max_epochs=6, callbacks=[watch, losses]).fit(module, loader(), loader())
        assert watch.rates == pytest.approx([1e-4, 1e-4, 1e-4, 1e-4, 1e-5, 1e-4])

    def test_run_that_ends_in_stage_one(self, quiet_trainer, loader, student, teacher):
        module = HintModule(student, teacher, HINTS, 1)
        with pytest.warns(UserWarning, match="the run ended in stage 1: the student above"):
            quiet_trainer(max_epochs=2, max_steps=2).fit(module, loader())

    def test_fast_dev_run(self, quiet_trainer, loader, student, teacher):
        module = HintModule(student, teacher, HINTS, 5)
        trainer = quiet_trainer(fast_dev_run=2)
        trainer.fit(module, loader(), loader())
        assert trainer.global_step == 2
        assert not module.distilling


class TestCharts:
    def test_names_and_figures(self, quiet_trainer, loader, student, teacher, tmp_path):
        board = TensorBoardLogger(tmp_path)
        module = HintModule(student, teacher, {"5": "5", "2": "8"}, 1)
        callbacks = [LearningRateMonitor()]
        quiet_trainer(max_epochs=2, logger=board, callbacks=callbacks, log_every_n_steps=1).fit(
            module, loader(), loader()
        )
        found = EventAccumulator(board.log_dir).Reload()
        tags = set(found.Tags()["scalars"])
        hints = {f"{stage}/hint{pair}" for stage in ("train", "val") for pair in ("", "/5", "/2")}
        assert hints | {"stage", "projector_parameters", "soft_weight", "train/hard", "train/soft"} <= tags
        total, first, second = (found.Scalars(f"train/hint{pair}")[0].value for pair in ("", "/5", "/2"))
        assert total == pytest.approx(first + second, rel=1e-5)
        (count,) = {event.value for event in found.Scalars("projector_parameters")}
        assert count == (8 * 16 + 16) + (4 * 32 * 5 * 5 + 32)
        images = {f"hints/{pair}/stage_{stage}" for pair in ("5", "2") for stage in (1, 2)}
        assert images == set(found.Tags()["images"])

    @pytest.mark.parametrize("dimensions", [1, 3])
    def test_figures_of_sequences_and_volumes(self, quiet_trainer, tmp_path, dimensions):
        """Also after a resume, which enters stage 2 again."""
        conv = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]

        def net(width):
            return nn.Sequential(conv(1, width, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))

        x = torch.randn(8, 1, *(5,) * dimensions, generator=torch.Generator().manual_seed(0))
        student, teacher = net(2), net(3)
        student(x), teacher(x)
        data = DataLoader(TensorDataset(x, torch.arange(8)), 4)
        path = None
        for epochs in (1, 2):
            board = TensorBoardLogger(tmp_path, version=epochs)
            module = HintModule(student, teacher, {"1": "1"}, 1, projectors={"1": conv(2, 3, 1)})
            trainer = quiet_trainer(max_epochs=2, max_steps=2 * epochs, logger=board)
            trainer.fit(module, data, ckpt_path=path)
            path = tmp_path / "last.ckpt"
            trainer.save_checkpoint(path)
            found = set(EventAccumulator(board.log_dir).Reload().Tags()["images"])
            assert found >= {f"hints/1/stage_{epochs}"}
        assert module.distilling

    def test_figure_that_fails_does_not_end_the_training(self, quiet_trainer, loader, student, teacher, monkeypatch):
        def fail(*args, **kwargs):
            raise ValueError("odd shape")

        monkeypatch.setattr("kd_lightning.modules.hint.hint_figure", fail)
        module = HintModule(student, teacher, HINTS, 1)
        with pytest.warns(UserWarning, match="figure hints/5/stage_1 is left out.*ValueError: odd shape"):
            quiet_trainer(max_epochs=2, logger=True).fit(module, loader())
        assert module.distilling
        assert not any(layer._forward_hooks for layer in [*student.modules(), *teacher.modules()])

    def test_validation_by_hand(self, quiet_trainer, loader, student, teacher):
        """A mean over all samples, where the last batch is smaller."""
        module = HintModule(student, teacher, HINTS, 1, optimizer=partial(SGD, lr=0.0))
        trainer = quiet_trainer(max_epochs=2, limit_train_batches=1)
        trainer.fit(module, loader(), loader(count=10))
        x = loader(count=10).dataset.tensors[0]
        student.eval()
        # with the statistics as they were at the end of stage 1, which saw one batch
        module.eval()
        assert "val/hint" in trainer.callback_metrics
        student[1].reset_running_stats(), student[4].reset_running_stats()
        mine = part(student, 6).train()
        mine(loader().dataset.tensors[0][:4])
        expected = HintLoss()(projectors(module)[0](mine.eval()(x)), part(teacher, 6)(x))
        assert trainer.callback_metrics["val/hint"].item() == pytest.approx(expected.item(), rel=1e-4)


class TestResume:
    @pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7])  # 3 batches an epoch: the boundary is at 6
    @pytest.mark.parametrize("options", [{}, {"hint_weight": 0.01}], ids=str)
    def test_anywhere(self, quiet_trainer, loader, teacher, tmp_path, step, options):
        def run(**kwargs):
            torch.manual_seed(0)
            module = HintModule(
                DigitsCNN(4),
                teacher,
                HINTS,
                2,
                hint_optimizer=partial(Adam, lr=0.01),
                lr_scheduler=partial(LambdaLR, lr_lambda=lambda epoch: 0.5**epoch),
                **options,
            )
            checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
            trainer = quiet_trainer(
                max_epochs=4, enable_checkpointing=True, callbacks=[checkpoints, SoftWeightAnnealing(0.9, 0.1)]
            )
            trainer.fit(module, Rows(), loader(), **kwargs)
            return module

        whole = run()
        torch.manual_seed(99)
        again = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), weights_only=True)
        assert again.distill_from_epoch == whole.distill_from_epoch
        assert not changed(snapshot(whole), again)

    @pytest.mark.parametrize("epoch", [0, 1, 2, 3])
    def test_with_patience(self, quiet_trainer, loader, teacher, tmp_path, epoch):
        """Checkpoints of the ends of epochs, where the validations have been counted."""

        def run(losses, **kwargs):
            torch.manual_seed(0)
            module = HintModule(DigitsCNN(4), teacher, HINTS, 5, hint_patience=2, optimizer=partial(Adam, lr=0.01))
            checkpoints = ModelCheckpoint(
                tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
            )
            callbacks = [TestEndOfStageOne.Loss(losses), checkpoints]
            trainer = quiet_trainer(
                max_epochs=6, enable_checkpointing=True, callbacks=callbacks, num_sanity_val_steps=0
            )
            trainer.fit(module, Rows(), loader(), **kwargs)
            return module

        losses = [5, 6, 6, 1, 1, 1]
        whole = run(losses)
        assert whole.distill_from_epoch == 3
        again = run(losses[epoch + 1 :], ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert again.distill_from_epoch == 3
        assert not changed(snapshot(whole), again)

    def test_file_alone_builds_the_regressors(self, quiet_trainer, loader, student, teacher, tmp_path):
        module = HintModule(student, teacher, HINTS, 1)
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        for other in (teacher, None):
            loaded = HintModule.load_from_checkpoint(tmp_path / "end.ckpt", student=DigitsCNN(4), teacher=other)
            assert not changed(snapshot(module), loaded)
            assert loaded.hparams["hints"] == HINTS
        fresh = HintModule(DigitsCNN(4), None, HINTS, 1)
        quiet_trainer().test(fresh, loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
        assert not changed(snapshot(student), fresh.student)

    def test_with_other_hints(self, quiet_trainer, loader, student, teacher, tmp_path):
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(HintModule(student, teacher, HINTS, 1), loader())
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        other = HintModule(student, teacher, {"2": "2"}, 1)
        message = r"features: the checkpoint was trained with \{'hint': \{'5': '5'\}\}, got \{'hint': \{'2': '2'\}\}"
        with pytest.raises(InputError, match=message):
            quiet_trainer(max_epochs=3).fit(other, loader(), ckpt_path=tmp_path / "end.ckpt")


class Rows(Resumable):
    """Twelve rows in batches of four that go on where a run stopped in mid-epoch."""

    def __init__(self, rows=None):
        x = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        super().__init__(TensorDataset(x, torch.arange(12) % 10) if rows is None else rows, 4)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"hints": {}}, "hints: layers must name at least one pair"),
            ({"hint_epochs": -1}, "hint_epochs must be at least 0, got -1"),
            ({"hint_patience": 0}, "hint_patience must be at least 1, got 0"),
            ({"hint_weight": -0.5}, "hint_weight must be finite and at least 0, got -0.5"),
            ({"hint_weight": math.nan}, "hint_weight must be finite and at least 0, got nan"),
            ({"hints": {"55": "5"}}, "hints: layer '55': DigitsCNN has none of that name; nearest: 5"),
            ({"hints": {"5": "x"}}, "hints: layer 'x': DigitsCNN has none of that name"),
            ({"projectors": {"2": nn.Identity()}}, "hints: projector: '2' is no layer of the student; layers has 5"),
            (
                {"projectors": {"5": nn.Conv2d(8, 15, 1)}},
                r"hints: the projector of 5 gives \[15, 8, 8\] .* 5 is \[16, 8, 8\]",
            ),
            ({"projectors": {"5": nn.Conv2d(9, 16, 1)}}, "hints: projector: one does not fit its layer"),
            ({"hints": {"5": "11"}}, r"no built-in projector maps 5 \[8, 8, 8\] to 11 \[32\] \(for one sample\)"),
            ({"input_shape": [3, 8, 8]}, r"cannot take inputs of shape|expected input"),
        ],
        ids=str,
    )
    def test_refused_when_built(self, student, teacher, arguments, message):
        with pytest.raises(InputError, match=message):
            HintModule(student, teacher, **({"hints": HINTS, "hint_epochs": 1, "input_shape": SHAPE} | arguments))

    def test_layer_that_is_never_reached(self, quiet_trainer, loader, student, teacher):
        student.spare = nn.Linear(2, 2)
        student.forward = lambda x: part(student, 14)(x)
        with pytest.raises(InputError, match="hints: the student's layer spare is never called in its forward pass"):
            quiet_trainer(max_epochs=2).fit(HintModule(student, teacher, {"spare": "5"}, 1), loader())

    @pytest.mark.parametrize("epochs", [2, 3])
    def test_no_time_for_stage_two(self, quiet_trainer, loader, student, teacher, epochs):
        module = HintModule(student, teacher, HINTS, epochs)
        with pytest.raises(InputError, match=f"hint_epochs must be below max_epochs, 2, .* got {epochs}"):
            quiet_trainer(max_epochs=2).fit(module, loader())

    def test_training_without_a_teacher(self, quiet_trainer, loader, student):
        module = HintModule(student, None, HINTS, 1)
        quiet_trainer().test(module, loader(), verbose=False)
        with pytest.raises(InputError, match="training needs the teacher; teacher=None is for test and predict alone"):
            quiet_trainer(max_epochs=2).fit(module, loader())

    def test_optimiser_before_the_regressors(self, student, teacher):
        with pytest.raises(InputError, match="hints: the projectors are not built yet; set input_shape"):
            HintModule(student, teacher, HINTS, 1).configure_optimizers()


def test_building_projectors_draws_no_random_numbers_of_others(quiet_trainer, student, teacher):
    """A shuffled loader gives the same batches as under plain distillation."""

    class Seen(Callback):
        def __init__(self):
            self.first = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.first.append(batch[1].tolist())

    orders = []
    for kind in (partial(HintModule, hints=HINTS, hint_epochs=1, input_shape=SHAPE), DistillModule):
        module = kind(copy.deepcopy(student), teacher)
        data = TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 10)
        seen = Seen()
        torch.manual_seed(0)
        quiet_trainer(max_epochs=2, callbacks=[seen]).fit(module, DataLoader(data, 4, shuffle=True))
        orders.append(seen.first)
    assert orders[0] == orders[1]


def test_building_projectors_leaves_the_generator_with_a_random_preprocess(student, teacher):
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    module = HintModule(student, Teacher(teacher, preprocess=Noise()), HINTS, 1)
    before = torch.get_rng_state()
    module.build_features(Batch(torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))))
    assert [pair.shapes for pair in module.features["hint"].pairs]
    assert torch.equal(torch.get_rng_state(), before)


class Bytes(LightningDataModule):
    """Dicts of bytes, made into batches on their way."""

    def __init__(self, iterable):
        super().__init__()
        self.iterable = iterable

    def train_dataloader(self):
        x = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        rows = [{"image": image, "label": number % 10} for number, image in enumerate(x)]

        class Stream(IterableDataset):
            def __iter__(self):
                return iter(rows)

            def __len__(self):
                return 12

        return DataLoader(Stream() if self.iterable else rows, 4)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch["image"], batch["label"]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] / 255, batch[1]


@pytest.mark.parametrize("iterable", [False, True])
def test_first_inputs_go_through_the_datamodules_hooks(quiet_trainer, student, teacher, iterable):
    module = HintModule(student, teacher, HINTS, 1)
    quiet_trainer(max_epochs=2).fit(module, datamodule=Bytes(iterable))
    assert [pair.shapes for pair in module.features["hint"].pairs] == [([8, 8, 8], [16, 8, 8])]


def test_validation_step_without_a_trainer(student, teacher):
    module = HintModule(student, teacher, HINTS, 1)
    module.validation_step((torch.rand(2, 1, 8, 8), torch.tensor([0, 1])), 0)


def test_thin_and_deep(quiet_trainer, loader, teacher):
    """Maps that grow smaller, guided by larger ones."""
    student = FitNet(((4,) * 2, (4,) * 2, (4,) * 2), hidden=None, in_channels=1)
    module = HintModule(student, teacher, {"stage3": "5", "pool1": "9"}, 1)
    quiet_trainer(max_epochs=2).fit(module, loader())
    assert [layer.kernel_size for layer in projectors(module)[0]] == [(1, 1)]


class Waves(nn.Module):
    """A network for (B, 1, L), (B, 1, H, W) or (B, 1, D, H, W)."""

    def __init__(self, width, dimensions, norm=True):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimensions]
        self.body = nn.Sequential(conv(1, width, 3, padding=1), kind(width) if norm else nn.Identity(), nn.ReLU())
        self.down = conv(width, width, 2, stride=2)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.down(self.body(x)).flatten(2).mean(2))


def waves(width, dimensions, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Waves(width, dimensions, **kwargs)


class TestMapsOfAnyDimension:
    @pytest.mark.parametrize("dimensions", [1, 3])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
    def test_both_stages_with_figures(self, quiet_trainer, tmp_path, dimensions, precision):
        """A larger, an equal and a smaller map, without projectors of the user."""
        x = torch.randn(8, 1, *(4,) * dimensions, generator=torch.Generator().manual_seed(0))
        board = TensorBoardLogger(tmp_path)
        student = waves(3, dimensions)
        module = HintModule(student, waves(5, dimensions, 1), {"body": "down", "body.2": "body.0", "down": "body"}, 1)
        trainer = quiet_trainer(max_epochs=2, logger=board, precision=precision)
        trainer.fit(
            module, DataLoader(TensorDataset(x, torch.arange(8)), 4), DataLoader(TensorDataset(x, torch.arange(8)))
        )
        sizes = [[*projector[0].kernel_size] for projector in projectors(module)]
        assert sizes == [[3] * dimensions, [1] * dimensions, [1] * dimensions]
        assert trainer.callback_metrics["val/hint"].isfinite()
        found = set(EventAccumulator(board.log_dir).Reload().Tags()["images"])
        assert found >= {f"hints/{name}/stage_{n}" for name in ("body", "body.2", "down") for n in (1, 2)}
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        other = HintModule.load_from_checkpoint(tmp_path / "end.ckpt", student=waves(3, dimensions), teacher=None)
        assert repr(other.features) == repr(module.features)
        assert [pair.layouts for pair in other.features["hint"].pairs] == [("first", "first")] * 3

    def test_stage_one_by_hand(self):
        student, teacher = waves(3, 1, norm=False), waves(5, 1, 1, norm=False)
        module = HintModule(student, teacher, {"body": "body"}, 1, input_shape=[1, 6])
        x = torch.randn(4, 1, 6)
        loss = module.training_step((x, torch.zeros(4, dtype=torch.long)), 0)
        weight, bias = (p.double() for p in projectors(module)[0].parameters())
        projected = torch.einsum("bcl,oc->bol", student.body(x).double(), weight[..., 0]) + bias[:, None]
        expected = ((projected - teacher.body(x)) ** 2).sum() / 2 / 4
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


class TestBatchesOfSeveralSizes:
    def test_each_batch_is_compared_at_the_size_of_its_hint(self, quiet_trainer):
        student, teacher = waves(3, 2, norm=False), waves(5, 2, 1, norm=False)
        batches = [(torch.randn(2, 1, size, size + 2), torch.arange(2)) for size in (8, 12, 6, 9)]
        module = HintModule(student, teacher, {"body": "down", "down": "body"}, 1, hint_optimizer=partial(SGD, lr=0.0))
        module.build_features(Batch(batches[0][0]))
        for x, y in batches:
            loss = module.training_step((x, y), 0)
            expected = 0.0
            for number, (guided, hint) in enumerate([("body", "down"), ("down", "body")]):
                own = {"body": student.body(x), "down": student.down(student.body(x))}[guided]
                target = {"body": teacher.body(x), "down": teacher.down(teacher.body(x))}[hint]
                maps = nn.functional.conv2d(own, *projectors(module)[number][0].parameters())
                if maps.shape[2:] != target.shape[2:]:
                    maps = nn.functional.interpolate(maps, target.shape[2:], mode="bilinear")
                expected += ((maps - target) ** 2).sum().item() / 2 / 2
            assert loss.item() == pytest.approx(expected, rel=1e-5)
        quiet_trainer(max_epochs=2).fit(module, DataLoader(batches, batch_size=None))
        assert module.distilling

    def test_a_map_smaller_than_the_kernel_is_refused(self, quiet_trainer):
        batches = [(torch.randn(2, 1, size, size), torch.arange(2)) for size in (8, 4)]
        module = HintModule(waves(3, 2), waves(5, 2, 1), {"body": "down"}, 1)
        message = r"hints: body -> down: a map of \[4, 4\] is smaller than the projector's kernel \[5, 5\]"
        with pytest.raises(InputError, match=message):
            quiet_trainer(max_epochs=2).fit(module, DataLoader(batches, batch_size=None))


class Blocks(nn.Module):
    """Convolutions in two blocks, which ``run`` calls in training."""

    def __init__(self, width=4, run=lambda block, x: block(x)):
        super().__init__()

        def block(inputs):
            return nn.Sequential(
                nn.Conv2d(inputs, width, 3, padding=1),
                nn.Tanh(),
                nn.Conv2d(width, width, 1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )

        self.first, self.second, self.run = block(1), block(width), run
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        run = self.run if self.training else lambda block, x: block(x)
        return self.head(run(self.second, run(self.first, x)).mean((2, 3)))


def blocks(run=None, width=4, seed=0):
    torch.manual_seed(seed)
    return Blocks(width) if run is None else Blocks(width, run)


def recompute(block, x):
    return checkpoint(block, x, use_reentrant=False)


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def without_gradient(block, x):
    return block(x.detach())


class TestGradientsOfGuidedLayers:
    @pytest.mark.parametrize("early_stop", [True, False])
    @pytest.mark.parametrize("layer", ["second", "second.1", "second.2", "first.2"])
    @pytest.mark.parametrize("joint", [True, False])
    def test_gradient_checkpointing_equals_none(self, quiet_trainer, loader, layer, joint, early_stop):
        """Also BatchNorm above the guided layer, which the recomputation could reach, stays as it is in stage 1."""
        ends = []
        for run in (None, recompute):
            student = blocks(run)
            for norm in (student.first[3], student.second[3]):
                norm.momentum = 1.0  # a recomputation below gives the same statistics
            options = {"hint_epochs": 0, "hint_weight": 0.01} if joint else {"hint_epochs": 2}
            module = HintModule(student, blocks(width=6, seed=1), {layer: "second.2"}, **options)
            watch = Watch()
            with set_checkpoint_early_stop(early_stop):
                quiet_trainer(max_epochs=3, callbacks=[watch]).fit(module, loader())
            ends.append([{k: v for k, v in state.items() if "num_batches" not in k} for state in watch.students])
        for one, other in zip(*ends, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    @pytest.mark.parametrize("joint", [True, False])
    @pytest.mark.parametrize(
        ("run", "layer"), [(reentrant, "second.2"), (without_gradient, "second.1")], ids=["reentrant", "detached"]
    )
    def test_a_layer_without_a_gradient_is_named(self, quiet_trainer, loader, run, layer, joint):
        """In eval mode, in which the projectors are built, there is one."""
        student = blocks(run)
        if run is without_gradient:
            student.second[0].requires_grad_(False)
        options = {"hint_epochs": 0, "hint_weight": 0.01} if joint else {"hint_epochs": 1}
        module = HintModule(student, blocks(width=6, seed=1), {layer: "second.2"}, **options)
        message = f"hints: the output of the student's layer {layer} has no gradient, so that nothing below it learns"
        with pytest.raises(InputError, match=message):
            quiet_trainer(max_epochs=2).fit(module, loader())

    def test_frozen_below_one_of_two_guided_layers(self, quiet_trainer, loader):
        student = blocks()
        student.first.requires_grad_(False)
        module = HintModule(student, blocks(width=6, seed=1), {"first": "first", "second": "second"}, 1)
        with pytest.raises(InputError, match="hints: the output of the student's layer first has no gradient"):
            quiet_trainer(max_epochs=2).fit(module, loader())

    def test_blocks_below_that_get_no_gradient(self, quiet_trainer, loader):
        """Images need no gradient, so reentrant checkpointing gives none to the first block."""

        def first_alone(block, x):
            return reentrant(block, x) if x.shape[1] == 1 else block(x)

        module = HintModule(blocks(first_alone), blocks(width=6, seed=1), {"second.2": "second.2"}, 1)
        message = (
            "hints: 6 of 10 parameters below .* got no gradient in the first step of stage 1, such as first.0.weight"
        )
        with pytest.warns(UserWarning, match=message):
            quiet_trainer(max_epochs=2).fit(module, loader())

    def test_none_of_them(self, quiet_trainer, loader):
        module = HintModule(blocks(), blocks(width=6, seed=1), {"second": "second"}, 1)
        # the projector needs a gradient, so that the backward pass runs
        module.student.second[4].register_forward_hook(
            lambda m, i, out: out.detach().requires_grad_() if m.training else out
        )
        with pytest.raises(
            InputError, match="hints: 12 of 12 parameters below the guided layers got no gradient in the"
        ):
            quiet_trainer(max_epochs=2).fit(module, loader())


class Named(nn.Module):
    """Called with names; returns ``(logits, features)`` or a mapping, of which the first stage computes neither."""

    def __init__(self, width, output, key="image"):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2))
        self.deep, self.head = nn.Conv2d(width, width, 3), nn.Linear(width + 1, 10)
        self.output, self.key = output, key

    def forward(self, *args, **kwargs):
        image, age = args if args else (kwargs[self.key], kwargs["age"])
        features = self.deep(self.body(image)).mean((2, 3))
        logits = self.head(torch.cat([features, age[:, None]], dim=1))
        if self.output == "tuple":
            return logits, features
        return {"features": features, "logits": logits} if self.output == "mapping" else logits


def named(width, output="tensor", seed=0, **kwargs):
    torch.manual_seed(seed)
    return Named(width, output, **kwargs)


class NamedRows(Rows):
    """Twelve samples as mappings or tuples."""

    def __init__(self, form):
        generator = torch.Generator().manual_seed(5)
        rows = []
        for n in range(12):
            image, age = torch.randn(1, 6, 6, generator=generator), torch.rand((), generator=generator)
            if form == "mapping":
                rows.append({"image": image, "age": age, "label": n % 10, "name": "ab"})
            elif form == "tuple":
                rows.append(((image, age), n % 10))
            else:  # the teacher has other inputs
                large = torch.randn(1, 9, 9, generator=generator)
                rows.append(
                    {"image": image, "age": age, "label": n % 10, "teacher_inputs": {"pixels": large, "age": age}}
                )
        super().__init__(rows)


class TestBatchesOfManyTensors:
    @pytest.mark.parametrize(
        ("form", "output"), [("mapping", "tuple"), ("tuple", "mapping"), ("teacher_inputs", "mapping")]
    )
    @pytest.mark.parametrize("joint", [pytest.param(True, marks=pytest.mark.slow), False])
    def test_both_stages_and_a_resume_in_either(self, quiet_trainer, tmp_path, form, output, joint):
        key = "pixels" if form == "teacher_inputs" else "image"
        teacher = named(6, "tensor" if form == "tuple" else "mapping", 1, key=key)
        options = {"hint_epochs": 0, "hint_weight": 0.01} if joint else {"hint_epochs": 2}

        def run(**kwargs):
            torch.manual_seed(0)
            hints = {"body": "deep", "deep": "body.2"}
            module = HintModule(named(4, output), teacher, hints, optimizer=partial(Adam, lr=0.01), **options)
            checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
            board = TensorBoardLogger(tmp_path)
            trainer = quiet_trainer(
                max_epochs=4,
                enable_checkpointing=True,
                logger=False if kwargs else board,
                callbacks=[checkpoints, SeedEveryStep(0)],
            )
            trainer.fit(module, NamedRows(form), NamedRows(form), **kwargs)
            if not kwargs:
                assert all(trainer.callback_metrics[name].isfinite() for name in ("train/hint", "val/loss"))
                figures = set(EventAccumulator(board.log_dir).Reload().Tags()["images"])
                stages = ("stage_2",) if joint else ("stage_1", "stage_2")
                assert figures >= {f"hints/{layer}/{stage}" for layer in hints for stage in stages}
            return module

        whole = run()
        size = 7 if form == "teacher_inputs" else 4
        assert [pair.shapes for pair in whole.features["hint"].pairs] == [
            ([4, 6, 6], [6, size, size]),
            ([4, 4, 4], [6, size + 2, size + 2]),
        ]
        for step in (2, 6, 8):  # the boundary is at 6
            again = run(ckpt_path=str(tmp_path / f"step={step}.ckpt"), weights_only=True)
            assert not changed(snapshot(whole), again), step

    @pytest.mark.parametrize("form", ["mapping", "tuple"])
    def test_stage_one_by_hand(self, form):
        student, teacher = named(4), named(6, seed=1)
        module = HintModule(student, teacher, {"deep": "deep"}, 1).eval()
        batch = next(iter(NamedRows(form)))
        loss = module.training_step(batch, 0)
        image = batch["image"] if form == "mapping" else batch[0][0]
        mine = projectors(module)[0](student.deep(student.body(image)))
        expected = ((mine - teacher.eval().deep(teacher.body(image))) ** 2).sum().item() / 2 / 4
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_a_module_that_calls_its_student_in_another_way(self, quiet_trainer):
        class Own(HintModule):
            def call(self, network, x):
                return network(**{"picture": x["image"], "age": x["age"]})

        student = named(4, key="picture")
        module = Own(student, named(6, seed=1), {"body": "body"}, 1)
        quiet_trainer(max_epochs=2).fit(module, NamedRows("mapping"))
        assert module.distilling

    def test_a_teacher_that_changes_its_inputs_leaves_those_of_the_student(self, quiet_trainer):
        class Greedy(Named):
            def forward(self, image, age):
                return super().forward(image.mul_(0), age.add_(9))

        torch.manual_seed(1)
        module, seen = HintModule(named(4), Greedy(6, "tensor"), {"body": "body"}, 1), []
        module.student.body[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].abs().sum().item()))
        quiet_trainer(max_epochs=2, limit_train_batches=1).fit(module, NamedRows("mapping"))
        assert len(seen) > 3 and min(seen) > 0

    def test_texts_of_hugging_face(self, quiet_trainer):
        """A classifier called with a mapping; its layers return tuples or tensors, by version."""
        transformers = pytest.importorskip("transformers")

        def bert(size, seed):
            torch.manual_seed(seed)
            sizes = {"hidden_size": size, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}
            config = transformers.BertConfig(vocab_size=20, num_hidden_layers=2, **sizes)
            return transformers.BertForSequenceClassification(config)

        student, teacher = bert(8, 0), bert(12, 1)
        student.gradient_checkpointing_enable({"use_reentrant": False})
        generator = torch.Generator().manual_seed(0)
        rows = [
            {
                "input_ids": torch.randint(20, (7,), generator=generator),
                "attention_mask": torch.ones(7).long(),
                "labels": n % 3,
            }
            for n in range(8)
        ]
        hints = {"bert.encoder.layer.0": "bert.encoder.layer.1", "bert.encoder": "bert.embeddings"}
        module = HintModule(student, teacher, hints, 1)
        trainer = quiet_trainer(max_epochs=2, logger=True)
        trainer.fit(module, DataLoader(rows, 4), DataLoader(rows, 4))
        assert [pair.shapes for pair in module.features["hint"].pairs] == [([7, 8], [7, 12])] * 2
        assert [pair.layouts for pair in module.features["hint"].pairs] == [("last", "last")] * 2
        assert trainer.callback_metrics["val/accuracy"].isfinite()


_SIZES_BY_RANK = """
import json, os
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from kd_lightning import HintModule

rank = int(os.environ.get("LOCAL_RANK", 0))

class Images(IterableDataset):
    def __iter__(self):
        for size in ((8, 10), (12, 6))[rank]:
            yield torch.ones(2, 1, size, size), torch.tensor([0, 1])

def net(width, seed):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, width, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(width, 3))

module = HintModule(net(3, 0), net(4, 1), {"0": "1"}, 1)
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, use_distributed_sampler=False, **quiet)
trainer.fit(module, DataLoader(Images(), batch_size=None))
values = [value for p in module.parameters() for value in p.flatten().tolist()]
with open(f"{rank}.json", "w") as file:
    json.dump([[pair.shapes for pair in module.features["hint"].pairs], values], file)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_processes_whose_first_images_have_other_sizes(tmp_path, monkeypatch, processes):
    """All build the projectors of the first process."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(_SIZES_BY_RANK)
    processes.run_ranks(["train.py"])
    first, second = (json.loads(Path(f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first[0] == [[[3, 8, 8], [4, 4, 4]]]
