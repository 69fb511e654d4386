"""Feature terms of EnsembleDistillModule, ApprenticeModule and HintModule."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from small_networks import Counting, layers_of, pictures, small
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    ApprenticeModule,
    Batch,
    Digits,
    EnsembleDistillModule,
    FeatureTerm,
    HintModule,
    InputError,
    SemiSupervisedDataModule,
    Teacher,
)
from kd_lightning.features.standardization import ChannelStandardization
from kd_lightning.losses.features import AttentionTransferLoss, CosineLoss, MSEFeatureLoss

LOADER = DataLoader(TensorDataset(*pictures(8)), 4)


class Product(nn.Module):
    """A project's own loss, which does not detach the teacher's feature."""

    needs_projector = False

    def forward(self, student, teacher, batch):
        return student.mean() * teacher.square().mean()


def of_two():
    """Terms of two teachers, one of which compares with both."""
    return {
        "first": FeatureTerm({"act": "0.act"}, AttentionTransferLoss(), 20.0),
        "both": FeatureTerm({"act2": "1.act2", "": "0."}, Product(), 0.5),
    }


class TestEnsemble:
    @pytest.mark.parametrize(
        ("strategy", "options"),
        [
            ("average", {}),
            ("average", {"use_vmap": True}),
            ("average", {"teacher_weights": "confidence"}),
            ("random", {}),
            ("random", {"draw_per": "sample"}),
            ("relabel", {}),
        ],
    )
    def test_by_hand(self, strategy, options):
        teachers = [small(5, 1), small(5, 2)]
        module = EnsembleDistillModule(small(), teachers, strategy, features=of_two(), **options)
        x, y = pictures(6)
        terms = module.losses(Batch(x, y, index=torch.arange(6), view=torch.arange(6)))
        mine, *theirs = (layers_of(network.double(), x.double()) for network in (module.student, *teachers))
        maps = [F.normalize(part["act"].square().mean(1).flatten(1)) for part in (mine, theirs[0])]
        both = mine["act2"].mean() * theirs[1]["act2"].square().mean() + mine[""].mean() * theirs[0][""].square().mean()
        assert terms["first"].value.item() == pytest.approx((maps[0] - maps[1]).square().mean().item(), rel=1e-4)
        assert terms["both"].value.item() == pytest.approx(both.item(), rel=1e-4)
        assert (terms["first"].weight, terms["both"].weight) == (20.0, 0.5)

    def test_a_pass_of_each_teacher_for_the_average(self, quiet_trainer):
        teachers = [Counting(small(5, 1)), Counting(small(5, 2))]
        features = {"at": FeatureTerm({"network.act": "1.network.act"}, AttentionTransferLoss())}
        module = EnsembleDistillModule(Counting(small()), teachers, features=features)
        module.build_features(Batch(*pictures(4)))
        for network in (module.student, *teachers):
            network.calls = 0
        module.training_step(pictures(4), 0)
        assert [network.calls for network in (module.student, *teachers)] == [1, 1, 1]

    def test_caches(self, quiet_trainer, tmp_path):
        ends = []
        for cache in ({}, {"cache": tmp_path / "cache", "cache_dtype": "float32"}):
            teachers = [Teacher(Counting(small(5, seed, 10)), **cache) for seed in (1, 2)]
            module = EnsembleDistillModule(
                small(classes=10),
                teachers,
                features={"mse": FeatureTerm({"flat": "0.network.flat", "act": "1.network.act"}, MSEFeatureLoss())},
                optimizer=partial(SGD, lr=0.1),
            )
            data = SemiSupervisedDataModule(Digits(), labeled=5, val_size=0.8, batch_size=64, num_views=1, seed=1)
            trainer = quiet_trainer(limit_val_batches=0)
            calls = []

            class Calls(Callback):
                def on_train_start(self, *args):
                    calls.extend(teacher.network.calls for teacher in teachers)  # noqa: B023

                def on_train_end(self, *args):
                    calls.extend(teacher.network.calls for teacher in teachers)  # noqa: B023

            trainer.callbacks.append(Calls())
            trainer.fit(module, datamodule=data)
            assert (calls[:2] == calls[2:]) == bool(cache)
            ends.append(module.state_dict())
        for key, value in ends[0].items():
            torch.testing.assert_close(value, ends[1][key], rtol=1e-4, atol=1e-6)

    def test_trains_and_validates(self, quiet_trainer):
        module = EnsembleDistillModule(small(), [small(5, 1), small(5, 2)], "random", features=of_two())
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(module, LOADER, LOADER)
        charts = {"train/first", "train/both", "train/both/act2", "val/first", "val/both/output", "first_weight"}
        assert charts <= trainer.callback_metrics.keys()

    @pytest.mark.parametrize("layer", ["act", "2.act", "-1.act", "", "x.act", "0"])
    def test_numbers_of_no_teacher(self, layer):
        features = {"at": FeatureTerm({"act": layer}, AttentionTransferLoss())}
        module = EnsembleDistillModule(small(), [small(5, 1), small(5, 2)], features=features)
        with pytest.raises(InputError, match=r"features.at: .*") as error:
            module.build_features(Batch(*pictures(4)))
        assert "\n" not in str(error.value)

    def test_without_teachers(self, quiet_trainer):
        module = EnsembleDistillModule(small(), None, features=of_two())
        with pytest.raises(InputError, match="training needs the teachers"):
            quiet_trainer().fit(module, LOADER)
        quiet_trainer().test(module, LOADER, verbose=False)


class TestApprentice:
    @pytest.mark.parametrize("mutual", [False, True])
    def test_terms_do_not_reach_a_teacher_that_trains(self, mutual):
        gradients = []
        for weight in (0.0, 5.0):
            torch.manual_seed(0)
            features = {"own": FeatureTerm({"act": "act"}, Product(), weight)}
            module = ApprenticeModule(small(), small(5, 1), mutual=mutual, features=features)
            module.training_step(pictures(6), 0).backward()
            gradients.append([[p.grad.clone() for p in net.parameters()] for net in (module.student, module.teacher)])
        (student, teacher), (with_term, same) = gradients
        assert all(torch.equal(one, other) for one, other in zip(teacher, same, strict=True))
        assert not torch.equal(student[0], with_term[0])

    def test_value_and_passes(self):
        features = {"cosine": FeatureTerm({"network.flat": "network.flat"}, CosineLoss(), 3.0)}
        module = ApprenticeModule(Counting(small()), Counting(small(3, 1)), features=features)
        x, y = pictures(6)
        module.build_features(Batch(x, y))
        module.student.calls = module.teacher.calls = 0
        term = module.losses(Batch(x, y))["cosine"]
        assert (module.student.calls, module.teacher.calls) == (1, 1)
        projector = module.features.cosine.pairs[0].projector
        mine, theirs = (layers_of(net.network, x)["flat"] for net in (module.student, module.teacher))
        expected = 1 - F.cosine_similarity(projector(mine), theirs).mean()
        assert term.value.item() == pytest.approx(expected.item(), rel=1e-4)

    @pytest.mark.parametrize("scheme", ["joint", "fixed_teacher"])
    def test_trains_and_validates(self, scheme, quiet_trainer):
        features = {"mse": FeatureTerm({"act": "act"}, MSEFeatureLoss())}
        module = ApprenticeModule(small(), small(5, 1), scheme, features=features)
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(module, LOADER, LOADER)
        assert {"train/mse", "val/mse"} <= trainer.callback_metrics.keys()
        x = LOADER.dataset.tensors[0]
        teacher = module.teacher if scheme == "joint" else module.teacher.network
        mine, theirs = layers_of(module.student, x)["act"], layers_of(teacher, x)["act"]
        value = F.mse_loss(module.features.mse.pairs[0].projector(mine), theirs)
        assert trainer.callback_metrics["val/mse"].item() == pytest.approx(value.item(), rel=1e-4)

    def test_a_teacher_that_trains_cannot_be_standardized(self):
        features = {"mse": FeatureTerm({"act": "act"}, MSEFeatureLoss(), standardize=ChannelStandardization())}
        with pytest.raises(InputError, match="features.mse: standardize .* scheme joint"):
            ApprenticeModule(small(), small(5, 1), features=features)
        ApprenticeModule(small(), small(5, 1), "fixed_teacher", features=features)


class Weights(Callback):
    """Stores the weights of the terms in each epoch."""

    def __init__(self):
        self.found = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.found.append(pl_module.features.weights(pl_module.term_epoch))


class TestHint:
    def test_other_losses(self):
        """The cosine is in place of the squares, in both stages."""
        module = HintModule(small(), small(5, 1), {"act": "act"}, 1, hint_loss=CosineLoss(), hint_weight=2.0)
        x, y = pictures(6)
        module.build_features(Batch(x, y))
        projector = module.features.hint.pairs[0].projector
        expected = (
            1
            - F.cosine_similarity(
                projector(layers_of(module.student, x)["act"]), layers_of(module.teacher.network, x)["act"]
            ).mean()
        )
        weight, value = module.losses(Batch(x, y))["hint"]
        assert (weight, value.item()) == (1.0, pytest.approx(expected.item(), rel=1e-4))
        module.distilling, module.distill_from_epoch = True, 0
        weight, value = module.losses(Batch(x, y))["hint"]
        assert (weight, value.item()) == (2.0, pytest.approx(expected.item(), rel=1e-4))

    @pytest.mark.parametrize("hint_weight", [0.0, 0.5])
    def test_other_terms_begin_in_stage_two(self, hint_weight, quiet_trainer):
        late = FeatureTerm({"flat": "flat"}, MSEFeatureLoss(), 3.0, begin_epoch=1, ramp_epochs=2)
        now = FeatureTerm({"act2": "act2"}, AttentionTransferLoss(), 7.0)
        module = HintModule(
            small(), small(5, 1), {"act": "act"}, 2, hint_weight=hint_weight, features={"late": late, "now": now}
        )
        weights = Weights()
        trainer = quiet_trainer(max_epochs=5, callbacks=[weights])
        trainer.fit(module, LOADER, LOADER)
        assert [w["late"] for w in weights.found] == [0, 0, 0, 1.5, 3.0]
        assert [w["now"] for w in weights.found] == [0, 0, 7, 7, 7]
        assert [w["hint"] for w in weights.found][2:] == [hint_weight] * 3
        assert {"val/late", "val/now"} <= trainer.callback_metrics.keys()
        assert trainer.callback_metrics["train/hint"].isfinite()

    def test_names(self):
        term = FeatureTerm({"flat": "flat"}, MSEFeatureLoss())
        with pytest.raises(InputError, match="got 'hint'"):
            HintModule(small(), small(5, 1), {"act": "act"}, 1, features={"hint": term})
        with pytest.raises(InputError, match=r"hints: loss must be a module, got str"):
            HintModule(small(), small(5, 1), {"act": "act"}, 1, hint_loss="cosine")
