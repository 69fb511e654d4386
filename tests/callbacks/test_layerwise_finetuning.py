"""LayerwiseFinetuning: rates and freezing against loops by hand, exact resume, processes, stages, bad input."""

import copy
import itertools
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS, SGD, Adam, AdamW, lr_scheduler

from kd_lightning import (
    ApprenticeModule,
    CoTeachingModule,
    Digits,
    DistillModule,
    HintModule,
    InputError,
    LayerwiseFinetuning,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SeedEveryStep,
    SemiSupervisedDataModule,
    SupervisedModule,
)
from kd_lightning.models import DigitsCNN

DEPTHS = {"0": 3, "1": 3, "3": 2, "4": 2, "7": 1, "8": 1, "13": 0}  # of DigitsCNN, by the layer's name
DECAY = 0.5
MOMENTUM = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1)


def depths(network):
    return {p: DEPTHS[name.split(".")[0]] for name, p in network.named_parameters()}


def snapshot(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def changed(before, network):
    """The layers of which something has changed, statistics aside."""
    parameters = [
        (name, value) for name, value in network.state_dict().items() if name in dict(network.named_parameters())
    ]
    return {name.split(".")[0] for name, value in parameters if not torch.equal(value, before[name])}


def by_hand(network, loader, grouped, epochs, frozen=0, schedule=None, clip=None, accumulate=1):
    """The same training in plain torch; BatchNorm in training mode once the layers are thawed."""
    optimizer = grouped([{"params": [p], "depth": depth} for p, depth in depths(network).items()])
    scheduler = schedule(optimizer) if schedule else None
    below = [p for p, depth in depths(network).items() if depth]
    for epoch in range(epochs):
        network.train()
        for norm in network.modules():
            if isinstance(norm, _BatchNorm):
                norm.train(epoch >= frozen)
        for number, (x, y) in enumerate(loader, 1):
            (cross_entropy(network(x), y) / accumulate).backward()
            if number % accumulate and number < len(loader):
                continue
            if epoch < frozen:
                for p in below:
                    p.grad = None
            if clip:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return network


def decayed(optimizer):
    """An optimiser whose groups know their depth."""
    rate = optimizer.keywords["lr"]
    return lambda groups: optimizer([group | {"lr": rate * DECAY ** group["depth"]} for group in groups])


def assert_same(one, other, **tolerance):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


class RecordingSGD(SGD):
    """Records the rate of each parameter at each step; calls its parent's step, which runs the hooks once more."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rates = []

    def step(self, closure=None):
        loss = super().step(closure)
        rates = [(p, group["lr"]) for group in self.param_groups for p in group["params"]]
        assert len(dict(rates)) == len(rates)
        self.rates.append(dict(rates))
        return loss


class OnHook(Callback):
    """Calls a function at a hook."""

    def __init__(self, **hooks):
        for name, function in hooks.items():
            setattr(self, name, lambda trainer, pl_module, *_, call=function: call(trainer, pl_module))


def recording(built, lr=0.1, **options):
    """Makes such optimisers, and puts them into a list."""

    def optimizer(parameters):
        built.append(RecordingSGD(parameters, lr=lr, **options))
        return built[-1]

    return optimizer


# Rates.

SCHEDULES = {
    "none": lambda o: lr_scheduler.ConstantLR(o, 1.0),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=4),
    "cosine_floor": partial(lr_scheduler.CosineAnnealingLR, T_max=4, eta_min=0.06),
    "warm_restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2, eta_min=0.01),
    "step": partial(lr_scheduler.StepLR, step_size=2, gamma=0.3),
    "multiplicative": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda epoch: 0.9),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 1 / (1 + epoch)),
    "one_cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=13),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.3, step_size_up=2),
    "linear": partial(lr_scheduler.LinearLR, total_iters=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 3)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)]),
    # of a threshold that nothing reaches: lower in each epoch, down to the least
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=10.0, min_lr=0.02),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_the_schedule_scaled_by_depth(quiet_trainer, loader, student, schedule):
    make, interval = SCHEDULES[schedule], "step" if "cycl" in schedule else "epoch"
    optimizers = []
    optimizer = recording(optimizers, momentum=0.9)
    module = SupervisedModule(student, optimizer=optimizer, lr_scheduler=make, lr_interval=interval)
    callbacks = [LayerwiseFinetuning(frozen_epochs=1, lr_decay=DECAY)]
    quiet_trainer(max_epochs=6, callbacks=callbacks).fit(module, loader(8), loader(4))

    alone = SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    scheduler, wanted = make(alone), []
    for step in range(12):
        wanted.append(alone.param_groups[0]["lr"])
        alone.step()
        if interval == "step" or step % 2:
            scheduler.step(*[1.0] * (schedule == "plateau"))
    assert len({*wanted}) > 1 or schedule == "none"
    depth = depths(student)
    for rates, rate in zip(optimizers[0].rates, wanted, strict=True):
        assert rates.keys() == depth.keys()
        assert rates == {p: pytest.approx(rate * DECAY ** depth[p], rel=1e-9) for p in depth}
    assert len(optimizers[0].param_groups) == 1  # as it was
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert not optimizers[0]._optimizer_step_post_hooks
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(alone.param_groups[0]["lr"])


@pytest.mark.parametrize("optimizer", [MOMENTUM, partial(AdamW, lr=0.02, weight_decay=0.1)], ids=["sgd", "adamw"])
def test_weights_are_those_of_groups_by_hand(quiet_trainer, loader, student, optimizer):
    schedule = partial(lr_scheduler.StepLR, step_size=1, gamma=0.7)
    wanted = by_hand(copy.deepcopy(student), loader(), decayed(optimizer), epochs=3, frozen=1, schedule=schedule)
    module = SupervisedModule(student, optimizer=optimizer, lr_scheduler=schedule)
    quiet_trainer(max_epochs=3, callbacks=[LayerwiseFinetuning(1, DECAY)]).fit(module, loader())
    assert_same(student, wanted, rtol=1e-5, atol=1e-6)


def test_groups_of_the_user(quiet_trainer, loader, student):
    """Those without weight decay, and another rate for the head."""
    built = []

    def optimizer(parameters):
        plain = [p for p in parameters if p.ndim == 1]
        rest = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1}
        built.append(RecordingSGD([rest, {"params": plain, "weight_decay": 0.0, "lr": 0.4}, {"params": []}], lr=0.1))
        return built[0]

    module = SupervisedModule(student, optimizer=optimizer)
    quiet_trainer(callbacks=[LayerwiseFinetuning(0, DECAY)]).fit(module, loader(4))
    (rates,) = built[0].rates
    assert rates == {p: (0.4 if p.ndim == 1 else 0.1) * DECAY**depth for p, depth in depths(student).items()}
    assert [(len(group["params"]), group["weight_decay"]) for group in built[0].param_groups] == [
        (4, 0.1),
        (7, 0.0),
        (0, 0),
    ]


def test_values_that_an_optimizer_stores_in_its_groups_stay(quiet_trainer, loader, student):
    """Some count their steps there, as timm's Lamb."""
    built = []

    class Counting(SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            return loss

    def optimizer(parameters):
        built.append(Counting(parameters, lr=torch.tensor(0.1)))
        return built[0]

    module = SupervisedModule(student, optimizer=optimizer)
    quiet_trainer(max_epochs=2, callbacks=[LayerwiseFinetuning(0, DECAY)]).fit(module, loader())
    (group,) = built[0].param_groups
    assert (group["count"], group["lr"]) == (6, 0.1)


def test_decay_of_one_is_plain_training(quiet_trainer, loader, student):
    plain, both = copy.deepcopy(student), []
    for network, callbacks in ((plain, []), (student, [LayerwiseFinetuning(0)])):
        quiet_trainer(max_epochs=2, callbacks=callbacks).fit(SupervisedModule(network, optimizer=MOMENTUM), loader())
        both.append(network)
    assert_same(*both, rtol=0, atol=0)


# Freezing.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"strategy": "ddp", "devices": 1},  # where gradients are thrown away
        {"strategy": "ddp", "devices": 1, "gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_below_the_head_nothing_moves_until_the_thaw(quiet_trainer, loader, student, options, alone):
    before, at_thaw = snapshot(student), []

    def hook(trainer, module):
        if trainer.current_epoch == 2:
            at_thaw.append(snapshot(student))

    wanted = copy.deepcopy(student)
    hand = {"clip": options.get("gradient_clip_val"), "accumulate": options.get("accumulate_grad_batches", 1)}
    optimizer = decayed(partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1))
    module = SupervisedModule(student, optimizer=MOMENTUM)
    callbacks = [LayerwiseFinetuning(2, DECAY), OnHook(on_train_epoch_start=hook)]
    quiet_trainer(max_epochs=3, callbacks=callbacks, use_distributed_sampler=False, **options).fit(module, loader())
    (at_thaw,) = at_thaw
    for name, value in at_thaw.items():
        assert torch.equal(value, before[name]) == (not name.startswith("13.")), name
    assert changed(at_thaw, student) == DEPTHS.keys()
    tolerance = {"rtol": 0.1, "atol": 0.05} if "precision" in options else {"rtol": 1e-5, "atol": 1e-6}
    assert_same(student, by_hand(wanted, loader(), optimizer, 3, frozen=2, **hand), **tolerance)


def test_gradients_left_from_before_are_forgotten(quiet_trainer, loader, student):
    cross_entropy(student(torch.rand(2, 1, 8, 8)), torch.tensor([1, 2])).backward()
    before = snapshot(student)
    quiet_trainer(callbacks=[LayerwiseFinetuning()]).fit(SupervisedModule(student, optimizer=MOMENTUM), loader())
    assert changed(before, student) == {"13"}


def test_frozen_layers_have_no_backward_pass(quiet_trainer, loader, student):
    seen = []

    class Recording(SupervisedModule):
        def losses(self, batch):
            seen.append([p.requires_grad for p in self.parameters()])
            return super().losses(batch)

    student[3].weight.requires_grad_(False)  # the user's own
    before = snapshot(student)
    quiet_trainer(max_epochs=2, callbacks=[LayerwiseFinetuning()]).fit(Recording(student), loader(4))
    number = [name for name, _ in student.named_parameters()].index("3.weight")
    assert seen == [[False] * 9 + [True] * 2, [n != number for n in range(11)]]
    assert not student[3].weight.requires_grad
    assert torch.equal(student[3].weight, before["3.weight"])


def test_charts_and_messages(quiet_trainer, loader, student, tmp_path, caplog):
    callbacks = [LayerwiseFinetuning(2, DECAY), LearningRateMonitor()]
    trainer = quiet_trainer(max_epochs=3, logger=CSVLogger(tmp_path, "", ""), callbacks=callbacks, log_every_n_steps=1)
    with caplog.at_level("INFO"):
        trainer.fit(SupervisedModule(student, optimizer=MOMENTUM), loader())
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert [float(row[header.index("frozen")]) for row in rows if row[header.index("frozen")]] == [1.0, 1.0, 0.0]
    assert {row[header.index("lr-SGD")] for row in rows} - {""} == {"0.1"}
    messages = [record.message for record in caplog.records if "learn" in record.message]
    assert messages == ["epoch 0: the head alone learns", "epoch 2: all layers learn"]


def test_two_networks_of_one_optimizer(quiet_trainer, loader):
    """Each has its rates, and the optimiser its one group."""
    rates, networks = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(DigitsCNN(4))

    class Watched(SGD):
        def step(self, closure=None):
            found = super().step(closure)
            rates.append({p: g["lr"] for g in self.param_groups for p in g["params"]})
            return found

    module = CoTeachingModule(*networks, 0.2, optimizer=partial(Watched, lr=0.1))
    callbacks = [LayerwiseFinetuning(0, DECAY), LayerwiseFinetuning(0, 0.25, network="peer")]
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks)
    trainer.fit(module, loader())
    (group,) = trainer.optimizers[0].param_groups
    assert (len(group["params"]), group["lr"]) == (22, 0.1)
    wanted = {p: 0.1 * DECAY**depth for p, depth in depths(networks[0]).items()}
    wanted |= {p: 0.1 * 0.25**depth for p, depth in depths(networks[1]).items()}
    assert rates == [{p: pytest.approx(rate) for p, rate in wanted.items()}] * 6


def test_instance_norm_with_statistics(quiet_trainer, loader):
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 10))
    module, seen = SupervisedModule(network, optimizer=MOMENTUM), []
    hook = OnHook(on_train_epoch_end=lambda *_: seen.append(norm.running_mean.clone()))
    quiet_trainer(max_epochs=2, callbacks=[LayerwiseFinetuning(1), hook]).fit(module, loader())
    assert not seen[0].any() and seen[1].all()


# BatchNorm.


@pytest.mark.parametrize(("mode", "updates"), {"thaw": [0, 0, 1], "freeze": [0, 0, 0], "adapt": [1, 1, 1]}.items())
def test_batch_norm(quiet_trainer, loader, student, mode, updates):
    """Statistics and modes in each epoch, with validation between; a mode of the user's own stays."""
    student[4].eval()
    counts, modes, weights = [], [], []

    def hook(trainer, module):
        counts.append([int(student[n].num_batches_tracked) for n in (1, 4, 8)])
        weights.append(snapshot(student))

    batch = OnHook(on_before_optimizer_step=lambda *_: modes.append([student[n].training for n in (1, 4, 8)]))
    module = SupervisedModule(student, optimizer=MOMENTUM)
    hook(None, None)
    callbacks = [LayerwiseFinetuning(2, batch_norm=mode), OnHook(on_train_epoch_end=hook), batch]
    quiet_trainer(max_epochs=3, callbacks=callbacks, val_check_interval=1).fit(module, loader(), loader(4))
    tracked = [0]
    for update in updates:
        tracked.append(tracked[-1] + 3 * update)
    assert counts == [[count, 0, count] for count in tracked]
    assert modes == [[bool(update), False, bool(update)] for update in updates for _ in range(3)]
    for epoch, update in enumerate(updates):
        for name in ("1.running_mean", "8.running_var"):
            assert torch.equal(weights[epoch][name], weights[epoch + 1][name]) == (not update)
        for name in ("1.weight", "8.bias"):  # whatever becomes of the statistics
            assert torch.equal(weights[epoch][name], weights[epoch + 1][name]) == (epoch < 2)
    assert [student[n].training for n in (1, 4, 8)] == [True, False, True]


def test_synchronised_batch_norm(quiet_trainer, loader, student):
    """Lightning puts other modules in the place of BatchNorm, once setup is over."""
    modes = []
    hook = OnHook(on_before_optimizer_step=lambda *_: modes.append([norm.training for norm in norms(student)]))
    trainer = quiet_trainer(max_epochs=2, callbacks=[LayerwiseFinetuning(), hook])
    move = trainer.strategy.model_to_device

    def exchange():  # SyncBatchNorm itself is for GPUs alone
        move()
        for number in (1, 4, 8):
            student[number] = copy.copy(student[number])

    trainer.strategy.model_to_device = exchange
    trainer.fit(SupervisedModule(student, optimizer=MOMENTUM), loader(4))
    assert modes == [[False] * 3, [True] * 3]


def norms(network):
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


# Going on.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of two frozen epochs and two others, a checkpoint after each step, each validation and each epoch."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, go_on(folder, save=True)


def go_on(folder, path=None, save=False):
    torch.manual_seed(3 if path is None else 4)
    student = DigitsCNN(4, dropout=0.2)
    schedule = partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=40)
    optimizer = partial(AdamW, lr=0.01, weight_decay=0.1)
    module = SupervisedModule(student, optimizer=optimizer, lr_scheduler=schedule, lr_interval="step")
    callbacks = [LayerwiseFinetuning(2, DECAY), SeedEveryStep(1)]
    if save:
        callbacks += [
            ModelCheckpoint(folder, "step-{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
            ModelCheckpoint(folder, "val-{epoch}", save_top_k=-1, auto_insert_metric_name=False),
            ModelCheckpoint(
                folder,
                "end-{epoch}",
                monitor="train/loss",
                save_top_k=-1,
                save_on_train_epoch_end=True,
                auto_insert_metric_name=False,
            ),
        ]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        limit_train_batches=3,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=save,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    data = SemiSupervisedDataModule(Digits(), labeled=20, batch_size=32)
    trainer.fit(module, datamodule=data, ckpt_path=path)
    return student.state_dict(), trainer.optimizers[0].state_dict()


@pytest.mark.parametrize("name", ["step-2", "step-5", "step-6", "val-1", "end-1", "step-7", "step-9", "end-2"])
def test_resume_is_exact(uninterrupted, tmp_path, name):
    """Before, at and after the thaw, which is after step 6; Lightning's BackboneFinetuning fails here, issue 21901."""
    folder, (weights, state) = uninterrupted
    mine, theirs = go_on(tmp_path, folder / f"{name}.ckpt")
    assert all(torch.equal(mine[key], value) for key, value in weights.items())
    assert theirs["param_groups"] == state["param_groups"]
    for number, values in state["state"].items():
        assert all(torch.equal(theirs["state"][number][key], value) for key, value in values.items())


def test_checkpoints_fit_runs_without_the_callback(uninterrupted):
    checkpoint = torch.load(uninterrupted[0] / "step-7.ckpt", weights_only=True)
    module = SupervisedModule(DigitsCNN(4), optimizer=AdamW)
    module.configure_optimizers().load_state_dict(checkpoint["optimizer_states"][0])
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert len(group["params"]) == 11


def test_second_fit_begins_again(quiet_trainer, loader, student):
    callback = LayerwiseFinetuning(1, DECAY)
    for _ in range(2):
        before = snapshot(student)
        quiet_trainer(callbacks=[callback]).fit(SupervisedModule(student, optimizer=MOMENTUM), loader())
        assert changed(before, student) == {"13"}
        assert all(p.requires_grad for p in student.parameters())
    other = DigitsCNN(4)
    before = snapshot(other)
    quiet_trainer(max_epochs=2, callbacks=[callback]).fit(SupervisedModule(other, optimizer=MOMENTUM), loader())
    assert changed(before, other) == DEPTHS.keys()


class StoppedError(Exception):
    """Stands for a fault."""


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_fault_leaves_all_as_it_was(quiet_trainer, loader, student, tmp_path, hook):
    """Also inside a step; what is then saved is a checkpoint like others."""

    def stop(trainer, module):
        if trainer.global_step == 1:
            raise StoppedError

    callback = LayerwiseFinetuning(1, DECAY)
    saves = ModelCheckpoint(tmp_path, "fault", save_on_exception=True)
    trainer = quiet_trainer(enable_checkpointing=True, callbacks=[callback, OnHook(**{hook: stop}), saves])
    with pytest.raises(StoppedError):
        trainer.fit(SupervisedModule(student, optimizer=MOMENTUM), loader())
    assert all(p.requires_grad for p in student.parameters())
    assert all(module.training for module in student.modules())
    (path,) = tmp_path.glob("*.ckpt")
    (group,) = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["lr"], len(group["params"])) == (0.1, 11)
    before = snapshot(student)
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(SupervisedModule(student, optimizer=MOMENTUM), loader())
    assert changed(before, student) == DEPTHS.keys()


# Several processes.

SCRIPT = """
import os, sys
from functools import partial
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lightning.pytorch import Callback, Trainer
from kd_lightning import LayerwiseFinetuning, SupervisedModule

class SaveWeights(Callback):
    def on_train_epoch_end(self, trainer, module):
        weights = torch.cat([p.detach().flatten() for p in module.student.parameters()])
        name = f"{trainer.current_epoch}_{trainer.global_rank}_of_{trainer.world_size}.pt"
        torch.save(weights, name)

def run(devices):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(),
                            nn.Linear(8, 10))
    optimizer = partial(SGD, lr=0.5, momentum=0.9, weight_decay=0.01)
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    module = SupervisedModule(student, optimizer=optimizer, lr_scheduler=schedule)
    trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=3,
                      accumulate_grad_batches=2, gradient_clip_val=0.2, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False,
                      callbacks=[LayerwiseFinetuning(1, 0.5), SaveWeights()])
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, torch.arange(64) % 10)
    sampler = DistributedSampler(data, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    trainer.fit(module, DataLoader(data, 16 // devices, sampler=sampler))

if __name__ == "__main__":
    torch.set_num_threads(1)
    run(int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_learn_what_one_does(tmp_path, monkeypatch, processes):
    """After the thaw, too, where Lightning's BackboneFinetuning lets the processes drift apart, issue 20340."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    exec(SCRIPT, here := {"__name__": "train"})
    here["run"](1)
    processes.run_ranks(["train.py", "2"])
    one = [torch.load(tmp_path / f"{epoch}_0_of_1.pt") for epoch in range(3)]
    two = [[torch.load(tmp_path / f"{epoch}_{rank}_of_2.pt") for rank in range(2)] for epoch in range(3)]
    head = 8 * 10 + 10
    assert torch.equal(two[0][0][:-head], one[0][:-head])  # still the first weights
    for mine, (first, second) in zip(one, two, strict=True):
        assert torch.equal(first, second)
        assert (mine - first).abs().max() < 1e-5
    for earlier, later in itertools.pairwise(one):
        assert ((earlier - later).abs() > 1e-6).float().mean() > 0.9


# Anybody's module, and ours that train in stages.


class Theirs(LightningModule):
    """Somebody's: a network built late, two optimisers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.Module()

    def configure_model(self):
        if not hasattr(self.parts, "model"):
            torch.manual_seed(0)
            self.parts.model = DigitsCNN(4)

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(cross_entropy(self.parts.model(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        *below, weight, bias = self.parts.model.parameters()
        return SGD(below, lr=0.1, momentum=0.9, weight_decay=0.1), Adam([weight, bias], lr=0.02)


def test_somebody_elses_module_with_several_optimizers(quiet_trainer, loader):
    module = Theirs()
    callbacks = [LayerwiseFinetuning(1, DECAY, network="parts.model")]
    quiet_trainer(max_epochs=3, callbacks=callbacks).fit(module, loader())
    torch.manual_seed(0)
    network = DigitsCNN(4)

    def both(groups):
        below = [g | {"lr": 0.1 * DECAY ** g["depth"]} for g in groups if g["depth"]]
        pair = (
            SGD(below, momentum=0.9, weight_decay=0.1),
            Adam([g["params"][0] for g in groups if not g["depth"]], lr=0.02),
        )
        together = type("Both", (), {"step": lambda self: [o.step() for o in pair]})()
        together.zero_grad = network.zero_grad
        return together

    assert_same(module.parts.model, by_hand(network, loader(), both, epochs=3, frozen=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("joint", [False, True], ids=["distill", "joint"])
def test_teaching_modules(quiet_trainer, loader, student, teacher, joint):
    """PairedOptimizer steps two others, which must have the rates as well."""
    built = []
    schedule = partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)
    options = {"optimizer": recording(built), "lr_scheduler": schedule}
    if joint:
        module = ApprenticeModule(student, teacher, teacher_optimizer=recording(built), **options)
    else:
        module = DistillModule(student, teacher, **options)
    learner = snapshot(teacher)
    quiet_trainer(max_epochs=2, callbacks=[LayerwiseFinetuning(1, DECAY)]).fit(module, loader(4))
    assert len(built) == 1 + joint
    wanted = depths(student) | dict.fromkeys(teacher.parameters() if joint else (), 0)
    for epoch in range(2):
        rates = {p: rate for one in built for p, rate in one.rates[epoch].items()}
        assert rates == {p: pytest.approx(0.1 * 0.5**epoch * DECAY**depth) for p, depth in wanted.items()}
    assert bool(changed(learner, teacher)) == joint


@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_hints_first(quiet_trainer, loader, student, teacher, frozen):
    """Stage 2 has another optimiser, made in a frozen epoch or at the thaw: it must know all layers and rates."""
    built, weights = [], []
    module = HintModule(student, teacher, {"5": "5"}, 2, input_shape=[1, 8, 8], optimizer=recording(built, 1e-3))
    hook = OnHook(on_train_epoch_start=lambda *_: weights.append(snapshot(student)))
    quiet_trainer(max_epochs=4, callbacks=[LayerwiseFinetuning(frozen, DECAY), hook]).fit(module, loader(8))
    weights.append(snapshot(student))
    assert len(built) == 2
    wanted = depths(student)
    below = [p for p, depth in wanted.items() if depth > 1]
    assert built[0].rates[0].items() >= {p: 1e-3 * DECAY ** wanted[p] for p in below}.items()
    assert built[1].rates == [{p: 1e-3 * DECAY**depth for p, depth in wanted.items()}] * 4
    for epoch in range(4):
        moved = {
            name.split(".")[0]
            for name, p in student.named_parameters()
            if not torch.equal(weights[epoch][name], weights[epoch + 1][name])
        }
        reached = {"0", "1", "3", "4"} if epoch < 2 else DEPTHS.keys()
        assert moved == reached & (DEPTHS.keys() if epoch >= frozen else {"13"})
    assert all(norm.training for norm in norms(student))


def test_student_that_starts_again(quiet_trainer):
    """Once while it is frozen, once at the thaw."""
    built = []
    torch.manual_seed(0)
    module = PseudoLabelModule(DigitsCNN(4), pseudo_labels="refreshed", optimizer=recording(built))
    first = snapshot(module.student)
    callbacks = [LayerwiseFinetuning(3, DECAY), PseudoLabelRefresh(restart_student=True)]
    trainer = quiet_trainer(max_epochs=4, limit_train_batches=2, callbacks=callbacks)
    trainer.fit(module, datamodule=SemiSupervisedDataModule(Digits(), labeled=4, batch_size=72, labeled_batch_size=8))
    assert len(built) == 3
    rates = {p: 0.1 * DECAY**depth for p, depth in depths(module.student).items()}
    assert [one.rates for one in built] == [[rates] * count for count in (4, 2, 2)]
    assert changed(first, module.student) == DEPTHS.keys()


def test_averaged_weights(quiet_trainer, loader, student):
    alone, averages = copy.deepcopy(student), []
    for network, averaging in ((alone, False), (student, True)):
        steps = [snapshot(network)]
        hook = OnHook(on_before_zero_grad=lambda *_, net=network, to=steps: to.append(snapshot(net)))
        callbacks = [LayerwiseFinetuning(1, DECAY), hook, *[EMAWeightAveraging(decay=0.5)] * averaging]
        module = SupervisedModule(network, optimizer=MOMENTUM)
        quiet_trainer(max_epochs=2, callbacks=callbacks).fit(module, loader())
        averages.append(steps)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*averages, strict=True) for key in a)  # it only looks on
    steps = [*averages[0][2:], alone.state_dict()]
    for name in dict(student.named_parameters()):
        average = steps[0][name]
        for step in steps[1:]:
            average = 0.5 * average + 0.5 * step[name]
        torch.testing.assert_close(student.state_dict()[name], average)


def test_compiled_student(quiet_trainer, loader, student):
    plain = copy.deepcopy(student)
    for network in (plain, torch.compile(student, backend="eager")):
        module = SupervisedModule(network, optimizer=MOMENTUM)
        quiet_trainer(max_epochs=2, callbacks=[LayerwiseFinetuning(1, DECAY)]).fit(module, loader(4))
    assert_same(student, plain, rtol=1e-5, atol=1e-6)


# Bad input.


class HeadFirst(nn.Module):
    """Holds its head before what is below it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 10)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU())

    def forward(self, x):
        return self.fc(self.body(x))


class HeadNotLast(HeadFirst):
    """Calls another layer after its head."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 6)

    def forward(self, x):
        features = self.body(x)
        logits = self.fc(features)
        self.features = self.project(features)
        return logits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frozen_epochs": -1}, "frozen_epochs must be at least 0, got -1"),
        ({"lr_decay": 0.0}, r"lr_decay must lie in \(0, 1\], got 0.0"),
        ({"lr_decay": 1.5}, r"lr_decay must lie in \(0, 1\], got 1.5"),
        ({"lr_decay": float("nan")}, r"lr_decay must lie in \(0, 1\], got nan"),
        ({"batch_norm": "train"}, "batch_norm must be one of thaw, freeze, adapt, got 'train'"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(InputError, match=message):
        LayerwiseFinetuning(**arguments)


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (DigitsCNN(4), {"network": "model"}, "SupervisedModule has no network 'model'"),
        (DigitsCNN(4), {"network": "task"}, "SupervisedModule has no network 'task'"),
        (DigitsCNN(4), {"head": "fc"}, "head must name a linear or convolutional layer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), {}, "Sequential has nothing below its head"),
        (HeadNotLast(), {}, "head must be named: .* 10 logits, .*'project'.* 6"),
    ],
)
def test_bad_networks(quiet_trainer, loader, network, arguments, message):
    with pytest.raises(InputError, match=message):
        quiet_trainer(callbacks=[LayerwiseFinetuning(**arguments)]).fit(SupervisedModule(network), loader())
    assert not network._forward_hooks


@pytest.mark.parametrize("head", [None, "fc"])
def test_head_registered_first(quiet_trainer, loader, head):
    network = HeadFirst()
    before = snapshot(network)
    quiet_trainer(callbacks=[LayerwiseFinetuning(head=head)]).fit(SupervisedModule(network), loader())
    assert changed(before, network) == {"fc"}
    assert not network._forward_hooks


def test_lbfgs_has_one_rate(quiet_trainer, loader, student):
    def fit(decay):
        module = SupervisedModule(student, optimizer=partial(LBFGS, max_iter=2))
        quiet_trainer(callbacks=[LayerwiseFinetuning(1, decay)]).fit(module, loader())

    with pytest.raises(InputError, match="LBFGS has one rate, lr_decay must be 1, got 0.5"):
        fit(DECAY)
    before = snapshot(student)
    fit(1.0)
    assert changed(before, student) == {"13"}


def test_leaves_other_stages_alone(quiet_trainer, loader, student):
    trainer = quiet_trainer(callbacks=[LayerwiseFinetuning(network="nothing")])
    trainer.validate(SupervisedModule(student), loader(), verbose=False)
