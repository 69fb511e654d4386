"""Feature terms of DistillModule: values and gradients by hand, charts, passes, warm-up, and what is refused."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from small_networks import Counting, Resumable, layers_of, pictures, small
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    Batch,
    Digits,
    DistillModule,
    FeatureTerm,
    InputError,
    SemiSupervisedDataModule,
    SoftWeightAnnealing,
    Teacher,
)
from kd_lightning.losses import DKDLoss, KDLoss
from kd_lightning.losses.features import AttentionTransferLoss, CosineLoss, CRDLoss, MSEFeatureLoss, VIDLoss


class Difference(nn.Module):
    """The mean of all differences; it does not detach the teacher's feature."""

    def forward(self, student, teacher, batch):
        return (student - teacher).mean()


def terms(**more):
    """Three terms: one with a projector of its own, one of maps of other widths, one of two pairs."""
    torch.manual_seed(7)
    return {
        "mse": FeatureTerm({"second": "second"}, MSEFeatureLoss(), 0.7, projector=nn.Conv2d(6, 10, 1)),
        "at": FeatureTerm({"act": "act"}, AttentionTransferLoss(), 30.0),
        "cosine": FeatureTerm({"flat": "flat", "": ""}, CosineLoss(), 2.0),
        **more,
    }


def by_hand(student, teacher, projectors, x):
    """The values of these terms, and of each pair of the last."""
    mine, theirs = layers_of(student, x), {name: part.detach() for name, part in layers_of(teacher, x).items()}
    mse = F.mse_loss(projectors["mse"](mine["second"]), theirs["second"])
    maps = [F.normalize(part["act"].square().mean(1).flatten(1)) for part in (mine, theirs)]
    cosines = [
        1 - F.cosine_similarity(projector(mine[layer]), theirs[layer]).mean()
        for layer, projector in zip(("flat", ""), projectors["cosine"], strict=True)
    ]
    return {"mse": mse, "at": (maps[0] - maps[1]).square().mean(), "cosine": sum(cosines)}, cosines


def doubles(module):
    """Copies of the student, the teacher and the projectors in float64."""
    mse, _, cosine = module.features.all.values()
    own = nn.ModuleList(pair.projector for pair in cosine.pairs)
    parts = module.student, module.teacher.network, mse.pairs[0].projector, own
    return [part.double() for part in copy.deepcopy(parts)]


class TestObjective:
    def module(self, **kwargs):
        module = DistillModule(small(), small(5, seed=1), soft_weight=0.4, features=terms(), **kwargs)
        x, y = pictures(6)
        module.build_features(Batch(x, y))
        return module, x, y

    def reference(self, module, x, y):
        student, teacher, mse, cosine = doubles(module)
        x = x.double()
        values, _ = by_hand(student, teacher, {"mse": mse, "cosine": cosine}, x)
        logits, target = student(x), teacher(x).detach()
        values["hard"] = F.cross_entropy(logits, y)
        q, p = (logits / 4).log_softmax(1), (target / 4).softmax(1)
        values["soft"] = 16 * (p * (p.log() - q)).sum(1).mean()
        loss = 0.6 * values["hard"] + 0.4 * values["soft"] + 0.7 * values["mse"] + 30 * values["at"]
        return loss + 2 * values["cosine"], values, (student, mse, *cosine)

    def test_values_and_their_sum(self):
        module, x, y = self.module()
        loss, values, _ = self.reference(module, x, y)
        found = module.losses(Batch(x, y))
        assert {name: term.value.item() for name, term in found.items()} == pytest.approx(
            {name: value.item() for name, value in values.items()}, rel=1e-4
        )
        assert {name: term.weight for name, term in found.items()} == {
            "hard": 0.6,
            "soft": 0.4,
            "mse": 0.7,
            "at": 30.0,
            "cosine": 2.0,
        }
        assert module.training_step((x, y), 0).item() == pytest.approx(loss.item(), rel=1e-5)

    def test_gradients(self):
        module, x, y = self.module()
        loss, _, networks = self.reference(module, x, y)
        loss.backward()
        module.training_step((x, y), 0).backward()
        parts = module.features.all
        own = [module.student, parts["mse"].pairs[0].projector, *[pair.projector for pair in parts["cosine"].pairs]]
        for network, reference in zip(own, networks, strict=True):
            for parameter, expected in zip(network.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)
        assert all(p.grad is None and not p.requires_grad for p in module.teacher.network.parameters())

    def test_parameters_of_a_loss_learn(self):
        term = FeatureTerm({"second": "second"}, VIDLoss())
        module = DistillModule(small(), small(5, seed=1), features={"vid": term})
        x, y = pictures(6)
        module.build_features(Batch(x, y))
        module.training_step((x, y), 0).backward()
        assert term.loss.alpha.grad.abs().min() > 0
        optimized = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
        assert {id(p) for p in (*module.student.parameters(), *term.loss.parameters())} == optimized

    def test_a_plain_loop(self):
        module, x, y = self.module(optimizer=partial(SGD, lr=0.05))
        optimizer = module.configure_optimizers()
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = module.training_step((x, y), 0)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]

    def test_the_step_builds_what_is_missing(self):
        """Without a Trainer; the optimiser would lack the projectors, so it is refused."""
        module = DistillModule(small(), small(5, seed=1), features=terms())
        with pytest.raises(InputError, match=r"features: not built yet; use Trainer.fit, or call build_features"):
            module.configure_optimizers()
        assert module.training_step(pictures(6), 0).isfinite()
        assert module.features.is_built

    def test_no_state_of_generators_changes(self):
        states = []
        for features in (None, terms()):
            module = DistillModule(small(), small(5, seed=1), features=features)
            torch.manual_seed(3)
            module.build_features(Batch(*pictures(6)))
            states.append(torch.get_rng_state())
        assert torch.equal(*states)


class Passes(Callback):
    """Stores the numbers of passes of the student and the teacher in each training step and validation batch."""

    def __init__(self):
        self.training, self.validation = [], []

    def count(self, module):
        found = module.student.calls, module.teacher.network.calls
        module.student.calls = module.teacher.network.calls = 0
        return found

    def on_train_start(self, trainer, pl_module):
        self.count(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.training.append(self.count(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.validation.append(self.count(pl_module))


class TestPasses:
    def features(self):
        pairs = {"network.act": "network.act", "network.flat": "network.flat"}
        torch.manual_seed(0)
        return {
            "at": FeatureTerm({"network.act": "network.act"}, AttentionTransferLoss()),
            "mse": FeatureTerm(pairs, MSEFeatureLoss(), begin_epoch=1),
        }

    def test_one_of_each_network(self, quiet_trainer):
        loader = DataLoader(TensorDataset(*pictures()), 4)
        module = DistillModule(Counting(small()), Counting(small(5, seed=1)), features=self.features())
        passes = Passes()
        quiet_trainer(max_epochs=2, callbacks=[passes], num_sanity_val_steps=0).fit(module, loader, loader)
        assert passes.training == [(1, 1)] * 6
        # the teacher's logits of the validation part are stored in the first epoch, its features are not
        assert passes.validation == [(1, 1)] * 6

    def test_none_of_a_cached_teacher(self, quiet_trainer, tmp_path):
        teacher = Teacher(Counting(small(5, seed=1, classes=10)), cache=tmp_path / "cache", cache_dtype="float32")
        plain = Teacher(Counting(small(5, seed=1, classes=10)))
        passes, ends = Passes(), []
        for of in (teacher, plain):
            data = SemiSupervisedDataModule(Digits(), labeled=5, val_size=0.8, batch_size=64, num_views=1, seed=1)
            module = DistillModule(Counting(small(classes=10)), of, features=self.features())
            trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[passes])
            trainer.fit(module, datamodule=data)
            ends.append(module.state_dict())
        steps = len(passes.training) // 2
        assert passes.training[:steps] == [(1, 0)] * steps
        assert passes.training[steps:] == [(1, 1)] * steps
        assert ends[0].keys() == ends[1].keys()
        for key, value in ends[0].items():  # convolutions of other batches round otherwise
            torch.testing.assert_close(value, ends[1][key], rtol=1e-5, atol=1e-7)


def test_charts(quiet_trainer):
    """Means over samples, with smaller last batches and two validation parts."""
    train, val, other = (TensorDataset(*pictures(count, seed)) for count, seed in ((10, 1), (7, 2), (3, 3)))
    module = DistillModule(small(), small(5, seed=1), soft_weight=0.4, features=terms(), optimizer=partial(SGD, lr=0.0))
    trainer = quiet_trainer()
    trainer.fit(module, DataLoader(train, 4), [DataLoader(val, 4), DataLoader(other, 4)])
    student, teacher, mse, cosine = doubles(module)
    expected = {"mse_weight": 0.7, "at_weight": 30.0, "cosine_weight": 2.0}
    both = torch.cat([val.tensors[0], other.tensors[0]])
    for part, x in (("train", train.tensors[0]), ("val", both)):
        values, pairs = by_hand(student, teacher, {"mse": mse, "cosine": cosine}, x.double())
        expected |= {f"{part}/{name}": value.item() for name, value in values.items()}
        expected |= {
            f"{part}/cosine/{name}": value.item() for name, value in zip(("flat", "output"), pairs, strict=True)
        }
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert {name: found.get(name) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert not any("mse/" in name or "at/" in name for name in found)


def test_an_interrupted_validation_leaves_nothing(quiet_trainer):
    class Stop(Callback):
        def on_validation_batch_end(self, *args):
            raise RuntimeError("stop")

    train, val = (DataLoader(TensorDataset(*pictures(8, seed)), 4) for seed in (1, 2))
    means = []
    for interrupt in (False, True):
        module = DistillModule(small(), small(5, seed=1), features=terms(), optimizer=partial(SGD, lr=0.0))
        if interrupt:
            with pytest.raises(RuntimeError, match="stop"):
                quiet_trainer(callbacks=[Stop()]).fit(module, train, DataLoader(TensorDataset(*pictures(4, 9)), 4))
        trainer = quiet_trainer(num_sanity_val_steps=0)
        trainer.fit(module, train, val)
        means.append(trainer.callback_metrics["val/at"])
    assert means[0] == means[1]


class Weights(Callback):
    """Stores the weights in each step."""

    def __init__(self, *names):
        self.names, self.found = names, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.found.append([pl_module.features.weights(pl_module.term_epoch)[name] for name in self.names])


class KillError(Exception):
    pass


class KillAfter(Callback):
    """Ends a run after a step, as if it were killed."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KillError


class TestWeights:
    def fit(self, quiet_trainer, folder, stop=None, path=None):
        loader = Resumable(TensorDataset(*pictures(8)), 4)
        parts = terms(late=FeatureTerm({"act": "act"}, MSEFeatureLoss(), 3.0, begin_epoch=1, ramp_epochs=3))
        losses = {"kd": (1.0, nn.MSELoss()), "l1": (2.0, nn.L1Loss())}
        module = DistillModule(small(), small(5, seed=1), features=parts, soft_loss=losses)
        weights = Weights("late", "at")
        annealed = [
            SoftWeightAnnealing(30.0, 10.0, attribute="features.at.weight"),
            SoftWeightAnnealing(2.0, 0.0, attribute="soft_loss.l1.weight"),
        ]
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [*annealed, weights, saves] + ([] if stop is None else [KillAfter(stop)])
        trainer = quiet_trainer(max_epochs=5, enable_checkpointing=True, callbacks=callbacks)
        try:
            trainer.fit(module, loader, loader, ckpt_path=path)
        except KillError:
            assert stop is not None
        return module, weights.found, trainer

    def test_warm_up_and_annealing_also_after_a_resume(self, quiet_trainer, tmp_path):
        whole, found, trainer = self.fit(quiet_trainer, tmp_path)
        by_epoch = [(0, 30), (1, 25), (2, 20), (3, 15), (3, 10)]
        expected = [list(map(float, pair)) for pair in by_epoch for _ in range(2)]
        assert found == [pytest.approx(pair) for pair in expected]
        assert trainer.callback_metrics["late_weight"] == pytest.approx(3.0)
        assert trainer.callback_metrics["at_weight"] == pytest.approx(10.0)
        assert trainer.callback_metrics["l1_weight"] == pytest.approx(0.0)
        assert trainer.callback_metrics["features.at.weight"] == pytest.approx(10.0)
        for step in (3, 4):  # within the second epoch, and at its end
            folder = tmp_path / str(step)
            self.fit(quiet_trainer, folder, stop=step)
            resumed, found, _ = self.fit(quiet_trainer, folder, path=folder / f"step={step}.ckpt")
            assert found == [pytest.approx(pair) for pair in expected[step:]]
            state = resumed.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())

    def test_without_a_weight_nothing_is_computed_or_trained(self, quiet_trainer):
        class Fails(MSEFeatureLoss):
            def forward(self, *args):
                raise AssertionError

        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(*pictures(8)), 4)
        ends = []
        for features in (None, {"off": FeatureTerm({"flat": "flat"}, Fails(), 0.0)}):
            module = DistillModule(small(), small(5, seed=1), features=features)
            trainer = quiet_trainer(max_epochs=2)
            trainer.fit(module, loader, loader)
            ends.append(module.student.state_dict())
            assert "val/off" not in trainer.callback_metrics
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

    def test_a_loss_of_training_alone(self, quiet_trainer):
        data = SemiSupervisedDataModule(Digits(), labeled=5, val_size=0.8, batch_size=64, seed=1)
        crd = FeatureTerm({"flat": "flat"}, CRDLoss(dim=4, negatives=8))
        at = FeatureTerm({"act": "act"}, AttentionTransferLoss())
        module = DistillModule(small(classes=10), small(5, 1, 10), features={"crd": crd, "at": at})
        trainer = quiet_trainer(limit_val_batches=2)
        trainer.fit(module, datamodule=data)
        assert {"train/crd", "train/at", "val/at"} <= trainer.callback_metrics.keys()
        assert "val/crd" not in trainer.callback_metrics
        assert len(crd.loss.labels) == 1197  # all but those of the test part

    def test_validate_alone_measures_no_term(self, quiet_trainer):
        loader = DataLoader(TensorDataset(*pictures(8)), 4)
        module = DistillModule(small(), small(5, seed=1), features=terms())
        trainer = quiet_trainer()
        trainer.validate(module, loader, verbose=False)
        assert "val/loss" in trainer.callback_metrics
        assert "val/at" not in trainer.callback_metrics


class Pair(nn.Module):
    """Returns a tuple of two tensors."""

    def forward(self, x):
        return x, x.clone()


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Odd(nn.Module):
    """Layers that no term can use: a tuple, a detached output, one that is never called, one of other rows."""

    def __init__(self, width=3):
        super().__init__()
        self.net = small(width)
        self.pair, self.detached, self.never, self.turned = Pair(), Detached(), nn.Identity(), nn.Identity()

    def forward(self, x):
        self.pair(x)
        self.detached(self.net.first(x))
        self.turned(x.flatten(1).T)
        return self.net(x)


AT = AttentionTransferLoss


class TestBadInput:
    @pytest.mark.parametrize(
        ("features", "message"),
        [
            ({"at": {"act": "act"}}, "features.at must be a FeatureTerm, got dict"),
            ({"hard": FeatureTerm({"act": "act"}, AT())}, "features: a term's name must be a word .* got 'hard'"),
            ({"loss": FeatureTerm({"act": "act"}, AT())}, "got 'loss'"),
            ({"soft": FeatureTerm({"act": "act"}, AT())}, "got 'soft'"),
            ({"hint": FeatureTerm({"act": "act"}, AT())}, "got 'hint'"),
            ({"a.b": FeatureTerm({"act": "act"}, AT())}, "got 'a.b'"),
            ({"a/b": FeatureTerm({"act": "act"}, AT())}, "got 'a/b'"),
            ({"": FeatureTerm({"act": "act"}, AT())}, "got ''"),
            ({"items": FeatureTerm({"act": "act"}, AT())}, "got 'items'"),
            ({"teacher_accuracy": FeatureTerm({"act": "act"}, AT())}, "got 'teacher_accuracy'"),
            ({"auxiliary_hard": FeatureTerm({"act": "act"}, AT())}, "got 'auxiliary_hard'"),
            ({"loss_step": FeatureTerm({"act": "act"}, AT())}, "got 'loss_step'"),
            ({"balanced_accuracy": FeatureTerm({"act": "act"}, AT())}, "got 'balanced_accuracy'"),
            ({"calibration_error": FeatureTerm({"act": "act"}, AT())}, "got 'calibration_error'"),
            ({"recall_3": FeatureTerm({"act": "act"}, AT())}, "got 'recall_3'"),
            ({"kd": FeatureTerm({"act": "act"}, AT())}, "features.kd: soft_loss has a loss of that name"),
            (FeatureTerm({"act": "act"}, AT()), "features must be .*, got FeatureTerm"),
            ([FeatureTerm({"act": "act"}, AT())], "features must be .*, got list"),
        ],
    )
    def test_of_the_constructor(self, features, message):
        with pytest.raises(InputError, match=message) as error:
            DistillModule(small(), small(5), features=features, soft_loss={"kd": (1.0, nn.MSELoss())})
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("layers", "loss", "message"),
        [
            ({"net.axt": "net.act"}, AT(), r"features.x: layer 'net.axt': Odd has none of that name; nearest: .*act"),
            ({"net.act": "axt"}, AT(), r"features.x: layer 'axt': Odd has none of that name"),
            ({"never": "net.act"}, AT(), r"features.x: the student's layer never is never called"),
            ({"net.act": "never"}, AT(), r"features.x: the teacher's layer never is never called"),
            ({"pair": "net.act"}, AT(), r"features.x: layer pair must return a tensor"),
            ({"net.act": "pair"}, AT(), r"features.x: layer pair must return a tensor"),
            ({"detached": "net.act"}, AT(), r"features.x: the output of the student's layer detached has no gradient"),
            ({"turned": "net.flat"}, MSEFeatureLoss(), r"features.x: the student's layer turned must return a row"),
            ({"net.flat": "turned"}, MSEFeatureLoss(), r"features.x: the teacher's layer turned must return a row"),
            ({"net.flat": "net.act"}, MSEFeatureLoss(), r"features.x: no built-in projector maps net.flat .* net.act"),
            ({"net.act": "net.act"}, CRDLoss(4, 2), r"features.x: CRDLoss compares vectors .* set pool"),
            ({"net.flat": "net.flat"}, CRDLoss(4, 2), r"features.x: CRDLoss stores each sample, so it needs data"),
        ],
    )
    def test_of_networks(self, layers, loss, message, quiet_trainer):
        loader = DataLoader(TensorDataset(*pictures(4)), 4)
        module = DistillModule(Odd(), Odd(5), features={"x": FeatureTerm(layers, loss)})
        with pytest.raises(InputError, match=message) as error:
            quiet_trainer().fit(module, loader)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_weights(self, weight, quiet_trainer):
        with pytest.raises(InputError, match="weight must be finite and at least 0, got"):
            FeatureTerm({"act": "act"}, AT(), weight)
        module = DistillModule(small(), small(5), features={"at": FeatureTerm({"act": "act"}, AT())})
        module.features.at.weight = weight  # as a callback may
        with pytest.raises(InputError, match="features.at: weight must be finite and at least 0, got"):
            module.training_step(pictures(4), 0)

    def test_losses_of_two_arguments(self):
        with pytest.raises(InputError, match=r"loss must take \(student_feature, teacher_feature, batch\).* MSELoss\("):
            FeatureTerm({"act": "act"}, nn.MSELoss())

    @pytest.mark.parametrize("loss", [KDLoss(), DKDLoss(), nn.CosineEmbeddingLoss()])
    def test_losses_of_logits(self, loss):
        message = f"loss must be one of kd_lightning.losses.features, or your own, got {type(loss).__name__}; "
        with pytest.raises(InputError, match=message):
            FeatureTerm({"": ""}, loss)

    def test_annealing_below_zero(self, quiet_trainer):
        loader = DataLoader(TensorDataset(*pictures(4)), 4)
        module = DistillModule(small(), small(5), features={"at": FeatureTerm({"act": "act"}, AT())})
        annealing = SoftWeightAnnealing(1.0, -1.0, attribute="features.at.weight")
        with pytest.raises(InputError, match="features.at: weight must be finite and at least 0, got -1"):
            quiet_trainer(max_epochs=2, callbacks=[annealing]).fit(module, loader)

    def test_a_frozen_student(self, quiet_trainer):
        student = small()
        student.first.requires_grad_(False)
        module = DistillModule(student, small(5), features={"at": FeatureTerm({"first": "first"}, AT())})
        loader = DataLoader(TensorDataset(*pictures(4)), 4)
        with pytest.raises(
            InputError, match="features.at: no parameter below the student's first requires a gradient"
        ) as error:
            quiet_trainer().fit(module, loader)
        assert "\n" not in str(error.value)

    def test_training_without_a_teacher(self, quiet_trainer):
        loader = DataLoader(TensorDataset(*pictures(4)), 4)
        module = DistillModule(small(), None, features={"at": FeatureTerm({"act": "act"}, AT())})
        for fit in (lambda: quiet_trainer().fit(module, loader), lambda: module.training_step(pictures(4), 0)):
            with pytest.raises(InputError, match="training needs the teacher; teacher=None is for test and predict"):
                fit()
        trainer = quiet_trainer()
        trainer.test(module, loader, verbose=False)
        assert "test/loss" in trainer.callback_metrics

    def test_batches_without_an_index(self):
        module = DistillModule(small(), small(5), features={"crd": FeatureTerm({"flat": "flat"}, CRDLoss(4, 2))})
        module.build_features(Batch(*pictures(4)), samples=12)
        with pytest.raises(InputError, match="features.crd: CRDLoss needs to know which samples a batch has"):
            module.training_step(pictures(4), 0)

    def test_the_same_network_as_student_and_teacher_shares_no_layer(self):
        network = small()
        with pytest.raises(InputError, match="teacher"):
            DistillModule(network, network, features=terms())
