"""FeatureDistillModule: the objective by hand, what is measured, what stays as it is, and resuming."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Dinov2Config, Dinov2Model

from kd_lightning import (
    Batch,
    Digits,
    FeatureDistillModule,
    InputError,
    SeedEveryStep,
    SemiSupervisedDataModule,
    Teacher,
)
from kd_lightning.data.transforms import MixUp
from kd_lightning.features.representation import knn_accuracy, neighbor_agreement, probe_accuracy, rankme
from kd_lightning.features.standardization import ChannelStandardization
from kd_lightning.features.term import FeatureTerm
from kd_lightning.losses.features import CosineLoss, MSEFeatureLoss
from kd_lightning.losses.features.queue import QueueSimilarityLoss


class Backbone(nn.Module):
    """Maps, their mean, and a classifier that a backbone does not use."""

    def __init__(self, width=6, channels=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.maps = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3))
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, x):
        return self.norm(self.maps(x)).mean(dim=(2, 3))


class Watched(nn.Module):
    """Stores what it is called with."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.network(x)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class InTraining(CosineLoss):
    """Has no value in validation."""

    trains_only = True


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(5, 1, 8, 8, generator=generator), torch.arange(5))


def built(batch, *args, **kwargs):
    module = FeatureDistillModule(*args, **kwargs)
    module.build_features(batch)
    return module


def digits(**kwargs):
    return SemiSupervisedDataModule(Digits(), **{"batch_size": 64, "seed": 0} | kwargs)


class TestObjective:
    def test_by_default_a_cosine_between_the_outputs(self, batch):
        student, teacher = Backbone(), Backbone(9, seed=1)
        module = built(batch, student, teacher)
        module.eval()
        (projector,) = (p for p in module.features["global"].modules() if isinstance(p, nn.Linear))
        loss = module.training_step(batch, 0)
        mine, theirs = (f.double().detach() for f in (projector(student(batch.x)), teacher.eval()(batch.x)))
        expected = (1 - (mine * theirs).sum(1) / mine.norm(dim=1) / theirs.norm(dim=1)).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_terms_add_up_with_their_weights(self, batch):
        terms = {
            "global": FeatureTerm({"": ""}, CosineLoss(), 2.0),
            "dense": FeatureTerm({"maps": "maps"}, MSEFeatureLoss(), 0.5),
        }
        module = built(batch, Backbone(), Backbone(9, seed=1), terms)
        loss, values = module.training_step(batch, 0), module.losses(batch)
        assert [*values] == ["global", "dense"]
        assert loss.item() == pytest.approx(sum(w * float(v) for w, v in values.values()), rel=1e-5)
        assert [term.weight for term in values.values()] == [2.0, 0.5]

    def test_several_teachers(self, batch):
        teachers = [Backbone(9, seed=1), Backbone(4, seed=2)]
        module = built(batch, Backbone(), teachers)
        assert [*module.losses(batch)] == ["global_0", "global_1"]
        alone = [built(batch, Backbone(), teacher) for teacher in teachers]
        for number, other in enumerate(alone):  # the projectors are others
            mine = module.features[f"global_{number}"].features(
                {"": module.student(batch.x)}, {f"{number}.": teachers[number](batch.x)}, 5
            )[""][1]
            theirs = other.features["global"].features({"": other.student(batch.x)}, {"": teachers[number](batch.x)}, 5)
            torch.testing.assert_close(mine, theirs[""][1])

    def test_labels_do_not_matter(self, quiet_trainer):
        ends = []
        for offset in (0, 3):
            data = digits()
            data.setup("fit")
            data._labels.visible.add_(offset).remainder_(10)
            torch.manual_seed(0)
            module = FeatureDistillModule(Backbone(), Backbone(9, seed=1))
            quiet_trainer(limit_train_batches=3, callbacks=[SeedEveryStep()]).fit(module, datamodule=data)
            ends.append(module.student.state_dict())
        for name, value in ends[0].items():
            assert torch.equal(value, ends[1][name]), name

    def test_mixed_pictures_reach_both_networks(self, quiet_trainer):
        student, teacher = Watched(Backbone()), Watched(Backbone(9, seed=1))
        plain, mixed = [], []
        for seen, mix in ((plain, None), (mixed, MixUp(1.0))):
            student.seen, teacher.seen = [], []
            trainer = quiet_trainer(limit_train_batches=2, limit_val_batches=0)
            trainer.fit(FeatureDistillModule(student, teacher), datamodule=digits(mix=mix, num_views=1))
            assert len(student.seen) == len(teacher.seen)
            for one, other in zip(student.seen, teacher.seen, strict=True):
                assert torch.equal(one, other)
            seen += student.seen[-2:]
        assert not any(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))

    def test_a_warm_up_of_all_terms_is_refused(self, batch):
        module = built(batch, Backbone(), Backbone(9), {"global": FeatureTerm({"": ""}, CosineLoss(), begin_epoch=2)})
        with pytest.raises(InputError, match=r"^features: no term has a weight in epoch 0"):
            module.training_step(batch, 0)


class TestNetworks:
    @pytest.mark.parametrize("pool", ["mean", "first"])
    def test_a_vision_transformer_of_transformers_teaches(self, pool, quiet_trainer):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_channels": 1}
        teacher = Dinov2Model(Dinov2Config(**sizes, image_size=8, patch_size=4))
        terms = {
            "global": FeatureTerm({"": ""}, CosineLoss()),  # its pooler_output
            "tokens": FeatureTerm({"norm": "encoder.layer.0"}, CosineLoss(), standardize=ChannelStandardization()),
            "vector": FeatureTerm({"norm": "layernorm"}, CosineLoss(), pool=pool) if pool == "mean" else None,
        }
        terms = {name: term for name, term in terms.items() if term is not None}
        module = FeatureDistillModule(Backbone(), teacher, terms)
        trainer = quiet_trainer(limit_train_batches=2)
        trainer.fit(module, datamodule=digits())
        assert {"val/tokens", "val/global", "val/neighbor_agreement"} <= trainer.callback_metrics.keys()

    def test_a_student_of_maps(self, quiet_trainer):
        student = Backbone().maps
        module = FeatureDistillModule(student, Backbone(9, seed=1).maps)
        trainer = quiet_trainer(limit_train_batches=2)
        trainer.fit(module, datamodule=digits())
        assert "val/knn_accuracy" in trainer.callback_metrics
        (first, *_) = quiet_trainer().predict(module, datamodule=digits())
        assert first.shape == (64, 6)
        x = next(iter(digits().test_dataloader())).x
        torch.testing.assert_close(first, student.eval()(x).mean(dim=(2, 3)))

    def test_what_no_term_reaches_stays_and_is_named(self, quiet_trainer, caplog):
        student = Backbone()
        before = copy.deepcopy(student.state_dict())
        decay = lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.5)  # noqa: E731
        with caplog.at_level(logging.INFO):
            trainer = quiet_trainer(limit_train_batches=2, limit_val_batches=0)
            trainer.fit(FeatureDistillModule(student, Backbone(9), optimizer=decay), datamodule=digits())
        assert (
            "student: no term reaches classifier.weight, classifier.bias, so that they stay as they are" in caplog.text
        )
        for name, value in student.state_dict().items():
            assert torch.equal(value, before[name]) == name.startswith("classifier"), name

    @pytest.mark.usefixtures("alone")
    def test_ddp_does_not_wait_for_what_no_term_reaches(self, quiet_trainer):
        """Of the unused classifier there is no gradient."""
        student = Backbone()
        trainer = quiet_trainer(limit_train_batches=2, limit_val_batches=2, devices=1, strategy="ddp")
        trainer.fit(FeatureDistillModule(student, Backbone(9)), datamodule=digits())
        assert trainer.global_step == 2


class TestFigures:
    def test_are_those_of_the_features(self, quiet_trainer):
        torch.manual_seed(0)
        module, data = FeatureDistillModule(Backbone(), Backbone(9, seed=1)), digits()
        trainer = quiet_trainer(limit_train_batches=4)
        trainer.fit(module, datamodule=data)
        found = dict(trainer.callback_metrics)
        x, y = (torch.cat(parts) for parts in zip(*((b.x, b.y) for b in data.val_dataloader()), strict=True))
        with torch.no_grad():
            mine, theirs = module.student.eval()(x), module.teachers[0].network(x)
        expected = {
            "knn_accuracy": knn_accuracy(mine, y),
            "probe_accuracy": probe_accuracy(mine, y),
            "teacher_knn_accuracy": knn_accuracy(theirs, y),
            "rankme": rankme(mine),
            "neighbor_agreement": neighbor_agreement(mine, theirs),
        }
        for name, value in expected.items():
            assert float(found[f"val/{name}"]) == pytest.approx(value, rel=1e-3, abs=1e-3), name
        projected = module.features["global"].features({"": mine}, {"": theirs}, len(x))[""]
        loss = float(1 - F.cosine_similarity(*projected).mean())
        assert float(found["val/global"]) == pytest.approx(loss, rel=1e-4)
        assert float(found["val/loss"]) == pytest.approx(loss, rel=1e-4)

    def test_loss_has_the_whole_weights_in_a_warm_up(self, quiet_trainer):
        terms = {
            "global": FeatureTerm({"": ""}, CosineLoss()),
            "late": FeatureTerm({"maps": "maps"}, MSEFeatureLoss(), 3.0, begin_epoch=5),
        }
        trainer = quiet_trainer(limit_train_batches=2)
        trainer.fit(FeatureDistillModule(Backbone(), Backbone(9), terms), datamodule=digits())
        found = trainer.callback_metrics
        assert float(found["val/loss"]) == pytest.approx(float(found["val/global"] + 3 * found["val/late"]), rel=1e-5)

    def test_a_loss_of_training_alone_has_no_value_in_validation(self, quiet_trainer):
        terms = {"once": FeatureTerm({"": ""}, InTraining())}
        trainer = quiet_trainer(limit_train_batches=2)
        trainer.fit(FeatureDistillModule(Backbone(), Backbone(9), terms), datamodule=digits())
        assert not {"val/loss", "val/once"} & trainer.callback_metrics.keys()
        assert {"train/once", "val/knn_accuracy"} <= trainer.callback_metrics.keys()

    def test_test_without_the_teacher(self, quiet_trainer):
        student = Backbone()
        (alone,) = quiet_trainer().test(FeatureDistillModule(student, None), datamodule=digits(), verbose=False)
        assert {*alone} == {"test/knn_accuracy", "test/probe_accuracy", "test/rankme"}
        module = FeatureDistillModule(student, [Backbone(9), Backbone(5)])
        (both,) = quiet_trainer().test(module, datamodule=digits(), verbose=False)
        assert both["test/knn_accuracy"] == alone["test/knn_accuracy"]
        assert {*both} - {*alone} == {
            f"test/teacher_{number}_{name}" for number in range(2) for name in ("knn_accuracy", "neighbor_agreement")
        }

    def test_an_evaluation_before_the_fit_changes_nothing(self, quiet_trainer):
        ends, figures = [], []
        for evaluates in (False, True):
            terms = {"maps": FeatureTerm({"maps": "maps"}, MSEFeatureLoss(), standardize=ChannelStandardization())}
            module = FeatureDistillModule(Backbone(), Backbone(9), terms)
            if evaluates:
                figures += quiet_trainer().validate(module, datamodule=digits(), verbose=False)
            trainer = quiet_trainer(limit_train_batches=2, limit_val_batches=0)
            trainer.fit(module, datamodule=digits())
            ends.append(module.state_dict())
            figures += quiet_trainer().validate(module, datamodule=digits(), verbose=False)
        for key, value in ends[0].items():
            assert torch.equal(value, ends[1][key])
        assert (
            figures[0] == figures[2]
            and figures[1]["val/teacher_knn_accuracy"] == figures[0]["val/teacher_knn_accuracy"]
        )

    @pytest.mark.parametrize("pool", ["mean", None])
    def test_tokens_of_a_teacher_before_the_fit(self, quiet_trainer, pool):
        teacher = nn.Sequential(nn.Conv2d(1, 6, 4, 4), nn.Flatten(2), Transposed(), nn.Linear(6, 6))
        module = FeatureDistillModule(
            Backbone(), teacher, {"maps": FeatureTerm({"maps": "3"}, CosineLoss(), pool=pool)}
        )
        batch = Batch(torch.rand(5, 1, 8, 8))
        expected = teacher(batch.x).mean(1)
        assert module.teacher_vector(0, {"3": teacher(batch.x)}, batch).shape == expected.shape
        torch.testing.assert_close(module.teacher_vector(0, {"3": teacher(batch.x)}, batch), expected)

    def test_without_labels(self, quiet_trainer):
        x = torch.rand(150, 1, 8, 8)
        loader = DataLoader(TensorDataset(x), 50)
        trainer = quiet_trainer(limit_train_batches=2)
        trainer.fit(FeatureDistillModule(Backbone(), Backbone(9)), DataLoader(TensorDataset(x), 50), loader)
        names = {name.removeprefix("val/") for name in trainer.callback_metrics if name.startswith("val/")}
        assert names == {"loss", "global", "rankme", "neighbor_agreement"}

    def test_the_layer_of_the_first_term_counts(self, quiet_trainer):
        student = Backbone()
        module = FeatureDistillModule(student, None, {"dense": FeatureTerm({"maps": "maps"}, MSEFeatureLoss())})
        (found,) = quiet_trainer().test(module, datamodule=digits(), verbose=False)
        x, y = (torch.cat(parts) for parts in zip(*((b.x, b.y) for b in digits().test_dataloader()), strict=True))
        with torch.no_grad():
            expected = knn_accuracy(student.eval().maps(x).mean(dim=(2, 3)), y)
        assert found["test/knn_accuracy"] == pytest.approx(expected, abs=2e-3)


class TestCache:
    def test_equals_a_run_without_it(self, tmp_path, quiet_trainer):
        ends, calls = [], []
        for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
            watched = Watched(Backbone(9, seed=1))
            teacher = Teacher(watched, cache=cache, cache_dtype="float32")
            terms = {
                "global": FeatureTerm({"": ""}, CosineLoss(), pool="mean"),
                "dense": FeatureTerm({"maps": "network.maps"}, MSEFeatureLoss()),
            }
            torch.manual_seed(0)
            module = FeatureDistillModule(Backbone(), teacher, terms)
            trainer = quiet_trainer(limit_val_batches=0, callbacks=[SeedEveryStep()])
            trainer.fit(module, datamodule=digits(num_views=1, mix=MixUp(1.0)))
            ends.append(module.student.state_dict())
            calls.append(len(watched.seen))
        assert calls[2] < calls[0]
        for other in ends[1:]:
            for name, value in ends[0].items():
                torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=name)


class TestResume:
    def test_equals_an_unbroken_run(self, tmp_path, quiet_trainer):
        def fit(epochs, ckpt_path=None):
            torch.manual_seed(0)
            terms = {
                "global": FeatureTerm({"": ""}, CosineLoss(), standardize=ChannelStandardization()),
                "queue": FeatureTerm({"": ""}, QueueSimilarityLoss(64)),
            }
            module = FeatureDistillModule(Backbone(), Backbone(9, seed=1), terms)
            saves = ModelCheckpoint(tmp_path, filename=f"{epochs}", save_last=False)
            options = {"enable_checkpointing": True, "callbacks": [SeedEveryStep(), saves]}
            trainer = quiet_trainer(max_epochs=epochs, limit_train_batches=3, **options)
            trainer.fit(module, datamodule=digits(), ckpt_path=ckpt_path)
            return module.state_dict(), saves.best_model_path

        _, path = fit(1)
        whole, _ = fit(3)
        _, again = fit(2, path)
        resumed, _ = fit(3, again)
        assert whole.keys() == resumed.keys()
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name

    def test_another_teacher_is_refused(self, tmp_path, quiet_trainer):
        for several, name in ((False, "teachers"), (True, r"teachers\[0\]")):
            make = lambda seed, several=several: [Backbone(9, seed=seed)] if several else Backbone(9, seed=seed)  # noqa: E731
            trainer = quiet_trainer(limit_train_batches=1, limit_val_batches=0)
            trainer.fit(FeatureDistillModule(Backbone(), make(1)), datamodule=digits())
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            other = FeatureDistillModule(Backbone(), make(2))
            with pytest.raises(InputError, match=rf"^{name}: the checkpoint was trained with another teacher"):
                quiet_trainer(max_epochs=2).fit(other, datamodule=digits(), ckpt_path=tmp_path / "a.ckpt")
            module = FeatureDistillModule(Backbone(), None)
            quiet_trainer().test(module, datamodule=digits(), ckpt_path=tmp_path / "a.ckpt", verbose=False)

    def test_another_number_of_teachers_is_refused(self, tmp_path, quiet_trainer):
        trainer = quiet_trainer(limit_train_batches=1, limit_val_batches=0)
        trainer.fit(FeatureDistillModule(Backbone(), [Backbone(9)]), datamodule=digits())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        two = FeatureDistillModule(Backbone(), [Backbone(9), Backbone(9)])
        with pytest.raises(InputError, match=r"^(teachers|features): the checkpoint was trained with"):
            quiet_trainer(max_epochs=2).fit(two, datamodule=digits(), ckpt_path=tmp_path / "a.ckpt")


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ([],), r"^teachers must be a network, or a list of at least one, got an empty list$"),
            (lambda: (Backbone(9), {}), r"^features must hold at least one term, got none$"),
            (
                lambda: ([Backbone(9), Backbone(8)], {"one": FeatureTerm({"": "0."}, CosineLoss())}),
                r"^teachers\[1\]: no term of features has a layer of it$",
            ),
            (
                lambda: ([Backbone(9)], {"one": FeatureTerm({"": "maps"}, CosineLoss())}),
                r"^features.one: a teacher's layer must begin with its number",
            ),
            (
                lambda: (Teacher(Backbone(9), classes=[*range(9)]),),
                r"^teachers: classes is for logits, but FeatureDistillModule learns from features$",
            ),
            (
                lambda: ([Teacher(Backbone(9), cache="x", cache_top_k=2)],),
                r"^teachers\[0\]: cache_top_k is for logits, but FeatureDistillModule learns from features$",
            ),
            (lambda: ("resnet18",), r"^teacher must be a network, got str"),
        ],
    )
    def test_of_the_constructor(self, make, message):
        with pytest.raises(InputError, match=message):
            FeatureDistillModule(Backbone(), *make())

    def test_the_same_network_twice(self):
        student = Backbone()
        with pytest.raises(InputError, match=r"^teachers and student must be two networks"):
            FeatureDistillModule(student, student)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ({"map": ""}, r"^features\.one: layer 'map': Backbone has none of that name; nearest: maps"),
            ({"": "blocks"}, r"^features\.one: layer 'blocks': Backbone has none of that name"),
            ({"classifier": ""}, r"^features\.one: the student's layer classifier is never called"),
            ({"maps": ""}, r"^features\.one: no built-in projector maps maps"),
        ],
    )
    def test_layers(self, layers, message, batch):
        with pytest.raises(InputError, match=message):
            built(batch, Backbone(), Backbone(9), {"one": FeatureTerm(layers, CosineLoss())})

    def test_a_frozen_student(self, quiet_trainer):
        with pytest.raises(InputError, match=r"^student: at least one parameter must require a gradient"):
            quiet_trainer().fit(
                FeatureDistillModule(Backbone().requires_grad_(False), Backbone(9)), datamodule=digits()
            )

    def test_a_detached_layer(self, batch):
        class Detached(Backbone):
            def forward(self, x):
                return super().forward(x).detach()

        with pytest.raises(InputError, match="the student's output has no gradient"):
            built(batch, Detached(), Backbone(9))

    def test_outputs_that_are_no_features(self, batch):
        class Two(Backbone):
            def forward(self, x):
                return {"a": super().forward(x), "b": super().forward(x)}

        with pytest.raises(InputError, match=r"^features\.global: Two must return a feature"):
            built(batch, Backbone(), Two())

    def test_training_without_a_teacher(self, quiet_trainer):
        with pytest.raises(InputError, match=r"^training needs the teachers; teachers=None is for test and predict"):
            quiet_trainer().fit(FeatureDistillModule(Backbone(), None), datamodule=digits())
