"""Groups of parameters with and without weight decay: timm's rule, every module, callbacks, exact resume."""

import copy
from functools import partial

import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Rprop

from kd_lightning import (
    ApprenticeModule,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    InputError,
    LayerwiseFinetuning,
    PseudoLabelModule,
    SupervisedModule,
)
from kd_lightning.models import DigitsCNN
from kd_lightning.modules._shared.parameter_groups import group_parameters

DECAY = partial(AdamW, lr=0.01, weight_decay=0.3)


def names_of(optimizer):
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_as_timm(name):
    """Networks of timm name position embeddings and class tokens that do not decay."""
    network = timm.create_model(name)
    exempt = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    expected = param_groups_weight_decay(network, 0.3, no_weight_decay_list=exempt)
    module = SupervisedModule(network, optimizer=DECAY, weight_decay_exclude_1d=True)
    decay, no_decay = module.configure_optimizers().param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.3, 0.0)
    for found, group in ((no_decay, expected[0]), (decay, expected[1])):
        assert {id(p) for p in found["params"]} == {id(p) for p in group["params"]}
    by_name = dict(module.named_parameters())
    for group in (decay, no_decay):
        assert all(by_name[key] is p for key, p in zip(group["param_names"], group["params"], strict=True))


def test_names():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 2)
            self.norm = nn.LayerNorm([2, 2])  # of two dimensions, but its bias has the name of one
            self.frozen = nn.Linear(2, 2).requires_grad_(False)
            self.scale = nn.Parameter(torch.tensor(1.0))

    network = Network()
    groups = group_parameters(network, [p for p in network.parameters() if p.requires_grad])
    named = {group["name"]: [name for name, _ in group["params"]] for group in groups}
    assert named == {"decay": ["table.weight", "norm.weight"], "no_decay": ["scale", "norm.bias"]}
    assert [group["name"] for group in group_parameters(network, [network.scale], "teacher_")] == ["teacher_no_decay"]


def test_a_compiled_network_has_the_same_names():
    network = timm.create_model("vit_tiny_patch16_224", depth=1)
    plain = names_of(SupervisedModule(network, optimizer=DECAY, weight_decay_exclude_1d=True).configure_optimizers())
    module = SupervisedModule(torch.compile(network), optimizer=DECAY, weight_decay_exclude_1d=True)
    assert names_of(module.configure_optimizers()) == plain
    assert "student.pos_embed" in plain["no_decay"]


def net(width=4):
    return DigitsCNN(width)


MAKE = {
    "supervised": lambda **k: SupervisedModule(net(), **k),
    "distill": lambda **k: DistillModule(net(), net(8), **k),
    "hint": lambda **k: HintModule(net(), net(8), {"5": "5"}, 1, **k),
    "ensemble": lambda **k: EnsembleDistillModule(net(), [net(8), net(8)], **k),
    "apprentice": lambda **k: ApprenticeModule(net(), net(8), **k),
    "pair": lambda **k: ApprenticeModule(net(), net(8), teacher_optimizer=partial(SGD, weight_decay=0.1), **k),
    "pseudo": lambda **k: PseudoLabelModule(net(), **k),
    "co-teaching": lambda **k: CoTeachingModule(net(), net(), 0.2, **k),
}


def run(make_trainer, kind, data, path=None, callbacks=(), grouped=True, save=None, **options):
    torch.manual_seed(0)
    module = MAKE[kind](optimizer=DECAY, weight_decay_exclude_1d=grouped)
    trainer = make_trainer(callbacks=[*callbacks], **{"max_epochs": 2, **options})
    trainer.fit(module, data, ckpt_path=path, **({} if path is None else {"weights_only": True}))
    if save is not None:
        trainer.save_checkpoint(save)
    return module, trainer


@pytest.mark.parametrize("kind", MAKE)
class TestEveryModule:
    def test_what_decays(self, quiet_trainer, loader, kind):
        """With gradients of 0 a step decays the parameters, and does nothing else."""

        class OnlyDecay(Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer):
                self.before = {name: p.detach().clone() for name, p in module.named_parameters()}
                for p in module.parameters():
                    p.grad = None if p.grad is None else torch.zeros_like(p)

        only_decay = OnlyDecay()
        module, trainer = run(quiet_trainer, kind, loader(count=4), callbacks=[only_decay])
        moved = 0
        for name, p in module.named_parameters():
            rates = {"teacher.": 1e-3 * 0.1} if kind == "pair" else {}
            rate = rates.get(name[:8], 0.01 * 0.3) if p.ndim > 1 else 0.0
            if p.grad is None and not any(
                p is q for group in trainer.optimizers[0].param_groups for q in group["params"]
            ):
                continue
            expected = only_decay.before[name] * (1 - rate)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-8)
            moved += p.ndim > 1
        assert moved

    def test_monitor_and_resume(self, quiet_trainer, loader, tmp_path, kind):
        logger = CSVLogger(tmp_path)
        whole, trainer = run(
            quiet_trainer,
            kind,
            loader(),
            callbacks=[LearningRateMonitor()],
            logger=logger,
            log_every_n_steps=1,
            max_epochs=3,
        )
        names = names_of(trainer.optimizers[0])
        assert {*names} >= {"decay", "no_decay"}
        assert kind != "pair" or {*names} == {"decay", "no_decay", "teacher_decay", "teacher_no_decay"}
        logged = {name for name in trainer.callback_metrics if name.startswith("lr-")}
        assert logged >= {f"lr-{type(trainer.optimizers[0]).__name__}/{name}" for name in names}
        first, _ = run(quiet_trainer, kind, loader(), save=tmp_path / "a.ckpt")
        again, resumed = run(quiet_trainer, kind, loader(), path=tmp_path / "a.ckpt", max_epochs=3)
        assert names_of(resumed.optimizers[0]) == names
        for key, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        assert not all(torch.equal(first.state_dict()[key], value) for key, value in whole.state_dict().items())

    def test_layerwise_finetuning(self, quiet_trainer, loader, kind):
        finetuning = LayerwiseFinetuning(frozen_epochs=0, lr_decay=0.5)
        _, trainer = run(quiet_trainer, kind, loader(), callbacks=[finetuning])
        for group in trainer.optimizers[0].param_groups:
            assert len(group["param_names"]) == len(group["params"])
            assert group["weight_decay"] == 0 or not group["name"].endswith("no_decay")

    def test_nothing_changes_without_it(self, quiet_trainer, loader, kind, tmp_path):
        run(quiet_trainer, kind, loader(), grouped=False, save=tmp_path / "a.ckpt")
        for state in torch.load(tmp_path / "a.ckpt", weights_only=True)["optimizer_states"]:
            assert len(state["param_groups"]) == (2 if kind == "pair" else 1)
            assert not any(group.keys() & {"name", "param_names"} for group in state["param_groups"])


def test_layerwise_finetuning_by_hand(quiet_trainer, loader, student):
    """Rates by layer and decay by kind together equal a loop with one group for each parameter."""
    depths = {"0": 3, "1": 3, "3": 2, "4": 2, "7": 1, "8": 1, "13": 0}
    by_hand = copy.deepcopy(student)
    optimizer = AdamW(
        [
            {"params": [p], "lr": 0.01 * 0.5 ** depths[name.split(".")[0]], "weight_decay": 0.3 if p.ndim > 1 else 0.0}
            for name, p in by_hand.named_parameters()
        ]
    )
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(x), y).backward()
            optimizer.step()
    module = SupervisedModule(student, optimizer=DECAY, weight_decay_exclude_1d=True)
    finetuning = LayerwiseFinetuning(frozen_epochs=0, lr_decay=0.5)
    quiet_trainer(max_epochs=2, callbacks=[finetuning]).fit(module, loader())
    for (name, found), expected in zip(student.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_stages_of_hints(quiet_trainer, loader):
    class Groups(Callback):
        def __init__(self):
            self.names = []

        def on_train_epoch_end(self, trainer, module):
            self.names.append(names_of(trainer.optimizers[0]))

    groups = Groups()
    run(quiet_trainer, "hint", loader(), callbacks=[groups])
    first, second = groups.names
    assert any(name.startswith("features.hint.") for name in first["decay"])
    assert not any(name.startswith("features.hint.") for name in second["decay"])
    assert "student.13.weight" in second["decay"]
    assert "student.13.bias" in second["no_decay"]


@pytest.mark.parametrize("before", [False, True])
def test_resume_with_another_value(quiet_trainer, loader, tmp_path, before):
    path = tmp_path / "a.ckpt"
    run(quiet_trainer, "supervised", loader(), grouped=before, save=path)
    message = f"weight_decay_exclude_1d: the checkpoint was trained with {str(before).lower()}, got"
    with pytest.raises(InputError, match=message):
        run(quiet_trainer, "supervised", loader(), grouped=not before, path=path, max_epochs=3)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (Rprop, "weight_decay_exclude_1d must be false, since Rprop has no weight_decay"),
        (LBFGS, "optimizer: LBFGS doesn't support per-parameter options"),
        (partial(AdamW, lr=-1.0), "optimizer: Invalid learning rate"),
    ],
)
def test_refused(optimizer, message, student):
    module = SupervisedModule(student, optimizer=optimizer, weight_decay_exclude_1d=True)
    with pytest.raises(InputError, match=message):
        module.configure_optimizers()


def test_without_any_decay(student):
    module = SupervisedModule(student, optimizer=Adam, weight_decay_exclude_1d=True)
    with pytest.warns(UserWarning, match="weight_decay_exclude_1d changes nothing: Adam of optimizer has weight_decay"):
        module.configure_optimizers()


def test_errors_name_the_key_of_each_stage_and_network(student, teacher):
    bad = partial(SGD, lr=-1.0)
    hints = HintModule(student, teacher, {"5": "5"}, 1, hint_optimizer=bad, input_shape=[1, 8, 8])
    with pytest.raises(InputError, match="^hint_optimizer: Invalid learning rate"):
        hints.configure_optimizers()
    with pytest.raises(InputError, match="^teacher_optimizer: Invalid learning rate"):
        ApprenticeModule(net(), net(8), teacher_optimizer=bad).configure_optimizers()
