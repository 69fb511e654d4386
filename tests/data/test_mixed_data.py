"""Mixed training data: pixels and labels by hand, replayed by every worker, process and resume, under every method."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from kd_lightning import (
    ApprenticeModule,
    CoarseLabels,
    CoTeachingModule,
    DatasetSource,
    DistillModule,
    EnsembleDistillModule,
    FixedThreshold,
    FlexMatch,
    HintModule,
    InputError,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
    Sharpen,
    SupervisedModule,
    SymmetricNoise,
    Teacher,
)
from kd_lightning.data.transforms import CutMix, MixUp, OneOf, RandomHorizontalFlip
from kd_lightning.data.transforms.mix import Mix
from kd_lightning.losses import DKDLoss, EarlyLearningLoss, GeneralizedCrossEntropyLoss

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(40, 1, 4, 4, generator=GENERATOR)
Y = torch.arange(40) % 3
TEST = TensorDataset(X[:6], Y[:6])


def module(x=X, y=Y, **arguments):
    defaults = {"labeled": 4, "val_size": 0, "batch_size": 9, "mix": OneOf([MixUp(0.8), CutMix()])}
    source = DatasetSource(TensorDataset(x, y), TEST if y is Y and x is X else None)
    return SemiSupervisedDataModule(source, **(defaults | arguments))


def batches(data, epoch=0):
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [*loader]


class ToBytes(nn.Module):
    def forward(self, x):
        return (x * 255).byte()


class Wrong(Mix):
    def __init__(self, share, single=False):
        self.share = share
        self.single = single

    def plan(self, draws, shape):
        return torch.full(() if self.single else (len(draws),), self.share), torch.tensor(self.share)


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))


class TestBatches:
    @pytest.mark.parametrize("mix", [MixUp(0.5), CutMix()])
    def test_pixels_and_labels_by_hand(self, mix):
        data = module(mix=mix, train_transform=RandomHorizontalFlip())
        found, plain = batches(data), module(mix=None, train_transform=RandomHorizontalFlip())
        plain.setup("fit")
        views = plain._views(plain.samples.images, torch.arange(40), plain._build_labels(), plain.train_transform)
        labeled = {*data.split.labeled}
        for batch in found:
            own = views.__getitems__([*zip(batch.index.tolist(), batch.view.tolist(), strict=True)]).x
            other = views.__getitems__([*zip(batch.partner.tolist(), batch.view.tolist(), strict=True)]).x
            for row, (i, j) in enumerate(zip(batch.index.tolist(), batch.partner.tolist(), strict=True)):
                assert i != j
                assert (i in labeled) == (j in labeled)
                share = batch.share[row].item()
                if isinstance(mix, MixUp):
                    expected = share * own[row].double() + (1 - share) * other[row].double()
                    assert torch.allclose(batch.x[row].double(), expected, atol=1e-6)
                else:
                    from_own = batch.x[row] == own[row]
                    assert (from_own | (batch.x[row] == other[row])).all()
                    assert from_own.double().mean() == pytest.approx(share)
                if i in labeled:
                    expected = torch.zeros(3)
                    expected[Y[i]] += share
                    expected[Y[j]] += 1 - share
                    assert torch.allclose(batch.y[row], expected)
                else:
                    assert batch.y[row].isnan().all()
            assert batch.mean_labels == (~batch.y.isnan().any(dim=1)).sum()

    def test_partners_are_drawn_from_all_others(self):
        data = module(labeled=0.5, mix=MixUp())
        counts = torch.zeros(40, 40)
        for epoch in range(300):
            for batch in batches(data, epoch):
                counts[batch.index, batch.partner] += 1  # no sample is twice in a batch
        own = torch.tensor(data.split.labeled)
        block = counts[own][:, own]
        assert block.diagonal().sum() == 0
        rest = block[~torch.eye(len(own), dtype=torch.bool)]
        expected = rest.mean()
        assert ((rest - expected) ** 2 / expected).sum() < 1.3 * len(rest)  # chi-square, about 3 sigma

    def test_partners_are_drawn_evenly_over_classes(self):
        """With sampler: balanced. A class of one sample is mixed with itself where it draws its own class."""
        y = torch.tensor([0] * 30 + [1] * 6 + [2])
        data = module(x=X[:37], y=y, labeled=None, mix=MixUp(), sampler="balanced")
        counts = torch.zeros(37, 37)
        for epoch in range(300):
            for batch in batches(data, epoch):
                counts.index_put_((batch.index, batch.partner), torch.ones(len(batch)), accumulate=True)
        assert counts[:36, :36].diagonal().sum() == 0
        classes = torch.nn.functional.one_hot(y).float()
        pairs = classes.T @ counts @ classes  # of own class and partner's
        assert ((pairs - 300 * 37 / 9) ** 2 / (300 * 37 / 9)).sum() < 27  # chi-square of 9 cells, p > 0.001
        rare = counts[:, 30:36].sum(dim=0)
        assert ((rare - rare.mean()) ** 2 / rare.mean()).sum() < 21

    def test_strong_views_are_mixed_alike(self):
        data = module(mix=CutMix(), strong_transform=nn.Identity())
        for batch in batches(data):
            assert torch.equal(batch.x, batch.x_strong)

    def test_workers_make_no_difference(self):
        one, two = (batches(module(num_workers=number)) for number in (0, 2))
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y.nan_to_num(7), b.y.nan_to_num(7))

    def test_evaluation_and_pool_stay_unmixed(self):
        data = module()
        data.setup("fit")
        for loader in (data.test_dataloader(), data.pool_dataloader()):
            for batch in loader:
                assert batch.partner is None
                assert torch.equal(batch.x, X[batch.index])

    def test_labels_of_other_tasks(self):
        rows = torch.rand(40, 2, generator=GENERATOR).round()
        for y in (rows, torch.rand(40, generator=GENERATOR)):
            for batch in batches(module(y=y, labeled=None, mix=MixUp(1.0))):
                share = batch.share.view(-1, *[1] * (y.ndim - 1))
                assert torch.allclose(batch.y, share * y[batch.index] + (1 - share) * y[batch.partner])

    def test_noise_and_weights(self, tmp_path):
        (tmp_path / "labels.csv").write_text("index,label,kind,weight\n0,1,clean,3\n1,2,noisy,0.5\n")
        data = module(labeled=None, label_file=tmp_path / "labels.csv", mix=MixUp(1.0))
        weight = torch.ones(40)
        weight[0], weight[1] = 3, 0.5
        for batch in batches(data):
            expected = batch.share * weight[batch.index] + (1 - batch.share) * weight[batch.partner]
            assert torch.allclose(batch.weight, expected)
            share = batch.share * weight[batch.index] / expected  # each label has its sample's weight
            y = torch.zeros(len(batch), 3)
            y[range(len(batch)), torch.where(batch.index < 2, batch.index + 1, Y[batch.index])] += share
            y[range(len(batch)), torch.where(batch.partner < 2, batch.partner + 1, Y[batch.partner])] += 1 - share
            assert torch.allclose(batch.y, y)
            noisy = (batch.index == 1) | (batch.partner == 1)
            assert torch.equal(batch.kind == 4, noisy)
        batches(module(label_noise=SymmetricNoise(0.3)))

    def test_what_cannot_be_mixed(self):
        with pytest.raises(InputError, match="mix: coarse labels cannot be mixed"):
            module(coarse=CoarseLabels({"a": [0, 1], "b": [2]}))
        with pytest.raises(InputError, match=r"mix must be MixUp, .* got torchvision.transforms.v2._augment.MixUp"):
            module(mix=v2.MixUp(num_classes=3))
        with pytest.raises(InputError, match="mix needs images of floats, got torch.uint8"):
            batches(module(mix=MixUp(), strong_transform=ToBytes()))
        with pytest.raises(
            InputError, match=r"mix: Wrong must plan one share in \[0, 1\] for each of 40 rows, got 1.5"
        ):
            batches(module(mix=Wrong(1.5)))
        with pytest.raises(InputError, match=r"mix: Wrong must plan one share .* of 40 rows, got \[\]"):
            batches(module(mix=Wrong(0.5, single=True)))
        with pytest.raises(InputError, match="mix needs images of floats, got torch.int64"):
            batches(module(x=torch.randint(9, (40, 5)), mix=MixUp()))
        tokens = torch.arange(200).view(40, 5)
        for ids in ([*tokens], [*tokens.byte()], [*tokens.numpy()]):  # of texts
            source = DatasetSource([*zip(ids, Y.tolist(), strict=True)])
            with pytest.raises(InputError, match="whole numbers such as token ids cannot be mixed, but embeddings can"):
                batches(SemiSupervisedDataModule(source, val_size=0, mix=MixUp()))
        source = DatasetSource([({"a": x, "b": x}, int(y)) for x, y in zip(X, Y, strict=True)])
        with pytest.raises(InputError, match="mix is for samples of one tensor"):
            batches(SemiSupervisedDataModule(source, val_size=0, mix=MixUp()))
        dense = DatasetSource([(x, torch.zeros(4, 4).long()) for x in X], dense=True)
        with pytest.raises(InputError, match="mix needs one label"):
            batches(SemiSupervisedDataModule(dense, val_size=0, mix=MixUp()))


class TestTraining:
    def fit(self, trainer, make, data, **kwargs):
        torch.manual_seed(0)
        made = make()
        trainer.fit(made, datamodule=data, **kwargs)
        return made

    def test_loss_by_hand(self, quiet_trainer):
        still = partial(torch.optim.SGD, lr=0.0)
        data = module(labeled=None, mix=MixUp(1.0), batch_size=40)
        (batch,) = batches(module(labeled=None, mix=MixUp(1.0), batch_size=40))
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0)
        made = self.fit(trainer, lambda: SupervisedModule(small(), optimizer=still), data)
        log_p = made.student(batch.x).double().log_softmax(1)
        a = batch.share.double()
        rows = range(40)
        expected = -(a * log_p[rows, Y[batch.index]] + (1 - a) * log_p[rows, Y[batch.partner]]).mean()
        assert trainer.callback_metrics["train/hard"].item() == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("weights", [None, [3.0, 0.0, 0.5]])
    def test_loss_with_weights_by_hand(self, quiet_trainer, tmp_path, weights):
        """Each label counts with the weight of its sample, and of its class: a sample of weight 0 teaches nothing."""
        factor = torch.ones(40).double()
        factor[:9] = torch.tensor([0.0, 0.5, 4.0] * 3)
        rows = "".join(f"{n},{Y[n]},{factor[n]}\n" for n in range(9))
        (tmp_path / "labels.csv").write_text(f"index,label,weight\n{rows}")
        options = {"labeled": None, "mix": MixUp(1.0), "batch_size": 40, "label_file": tmp_path / "labels.csv"}
        (batch,) = batches(module(**options))
        still = partial(torch.optim.SGD, lr=0.0)
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0)
        made = self.fit(
            trainer, lambda: SupervisedModule(small(), class_weights=weights, optimizer=still), module(**options)
        )
        log_p = made.student(batch.x).double().log_softmax(1)
        of_class = torch.ones(3).double() if weights is None else torch.tensor(weights).double()
        a, i, j = batch.share.double(), batch.index, batch.partner
        parts = [share * factor[n] * of_class[Y[n]] * log_p[range(40), Y[n]] for share, n in ((a, i), (1 - a, j))]
        expected = -sum(parts).mean()
        assert trainer.callback_metrics["train/hard"].item() == pytest.approx(expected.item(), rel=1e-5)

    def test_two_classes_as_a_binary_task(self, quiet_trainer):
        still, y = partial(torch.optim.SGD, lr=0.0), Y.clamp_max(1)
        options = {"y": y, "labeled": None, "mix": MixUp(1.0), "batch_size": 40}
        (batch,) = batches(module(**options))

        def network(seed=0):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(16, 1))

        a = batch.share
        target = a * y[batch.index] + (1 - a) * y[batch.partner]
        for make in (
            lambda: SupervisedModule(network(), task="binary", optimizer=still),
            lambda: EnsembleDistillModule(
                network(), [network(1), network(2)], teacher_weights="confidence", task="binary", optimizer=still
            ),
        ):
            trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0)
            made = self.fit(trainer, make, module(**options))
            logits = made.student(batch.x).flatten()
            expected = nn.functional.binary_cross_entropy_with_logits(logits, target)
            assert trainer.callback_metrics["train/hard"].item() == pytest.approx(expected.item(), rel=1e-5)
        with pytest.raises(InputError, match=r"binary labels of shape \[40, 2\] do not fit"):  # but not of others
            SupervisedModule(network(), task="binary").training_step((batch.x, batch.y), 0)
        made = SupervisedModule(network(), task="regression")
        with pytest.raises(InputError, match=r"mixed labels \[40, 2\] are probabilities of classes, .* as floats"):
            quiet_trainer(max_epochs=1).fit(made, datamodule=module(**options))

    @pytest.mark.parametrize("soft", [False, True])
    def test_networks_of_more_classes_than_labels(self, quiet_trainer, soft):
        """As without mix: the largest class of the labels may be below that of the network."""

        def network(seed=0):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(16, 5))

        still = partial(torch.optim.SGD, lr=0.0)
        options = {"labeled": None, "mix": MixUp(1.0), "batch_size": 40}
        (batch,) = batches(module(**options))
        log_p = network()(batch.x).double().log_softmax(1)
        expected = -(batch.y.double() * log_p[:, :3]).sum(dim=1).mean()
        for more in ({}, {"teacher": Teacher(network(1)), "soft_loss": DKDLoss()}):
            trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0)
            make = DistillModule if more else SupervisedModule
            self.fit(trainer, lambda make=make, more=more: make(network(), optimizer=still, **more), module(**options))
            assert trainer.callback_metrics["train/hard"].item() == pytest.approx(expected.item(), rel=1e-5)
        selection = Sharpen(FixedThreshold(0.2), 1.0) if soft else FixedThreshold(0.2)
        refresh = PseudoLabelRefresh(selection=selection, warmup_epochs=0, source="teacher")
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0, callbacks=[refresh])
        options = {"mix": MixUp(1.0), "batch_size": 40}
        self.fit(trainer, lambda: DistillModule(network(), Teacher(network(1)), optimizer=still), module(**options))
        data = module(**options)
        data.setup("fit")
        data.set_pseudo_labels(refresh.table)
        (batch,) = data.train_dataloader()
        assert (batch.kind == 2).sum() == 28  # all are accepted
        target = torch.nn.functional.one_hot(Y, 5).double()
        table = refresh.table
        target[table.index] = (table.soft if soft else torch.nn.functional.one_hot(table.label, 5)).double()
        mixed = batch.share[:, None] * target[batch.index] + (1 - batch.share[:, None]) * target[batch.partner]
        expected = -(mixed * network()(batch.x).double().log_softmax(1)).sum(dim=1).mean()
        assert trainer.callback_metrics["train/hard"].item() == pytest.approx(expected.item(), rel=1e-5)

    def test_mixmatch_by_hand(self, quiet_trainer):
        """Labels are guessed for unmixed samples and sharpened; then inputs and labels are mixed. In float64."""
        still = partial(torch.optim.SGD, lr=0.0)
        options = {"mix": MixUp(0.75), "batch_size": 40}
        refresh = PseudoLabelRefresh(selection=Sharpen(FixedThreshold(0), 0.5), warmup_epochs=0)
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0, callbacks=[refresh])
        made = self.fit(
            trainer,
            lambda: PseudoLabelModule(small(), 3.0, pseudo_labels="refreshed", optimizer=still),
            module(**options),
        )
        network = made.student.double()
        (batch,) = batches(module(**options))
        i, j, a = batch.index, batch.partner, batch.share.double()[:, None]
        p = network(X.double()).softmax(dim=1) ** 2
        target = p / p.sum(dim=1, keepdim=True)
        known = torch.isin(torch.arange(40), torch.tensor(module(**options)._parts_and_split()[1].labeled))
        target[known] = nn.functional.one_hot(Y, 3).double()[known]
        images = X.double().view(40, 16)
        x = a * images[i] + (1 - a) * images[j]
        cross_entropy = -((a * target[i] + (1 - a) * target[j]) * network(x).log_softmax(dim=1)).sum(dim=1)
        logged = trainer.callback_metrics
        assert torch.equal(known[i], known[j]) and known.sum() == 12
        assert logged["train/hard"].item() == pytest.approx(cross_entropy[known[i]].mean().item(), rel=1e-5)
        assert logged["train/unsupervised"].item() == pytest.approx(cross_entropy[~known[i]].mean().item(), rel=1e-5)
        assert logged["train/coverage"] == 1
        # the larger share first, as in the paper: the same sample, under the name of the other one
        larger, first, second = (
            torch.maximum(a, 1 - a),
            torch.where(a[:, 0] < 0.5, j, i),
            torch.where(a[:, 0] < 0.5, i, j),
        )
        assert torch.allclose(larger * images[first] + (1 - larger) * images[second], x)
        assert torch.allclose(
            larger * target[first] + (1 - larger) * target[second], a * target[i] + (1 - a) * target[j]
        )

    def test_online_labels_are_those_of_the_mixed_view(self, quiet_trainer):
        """And a selection that stores values of single samples is refused."""
        still = partial(torch.optim.SGD, lr=0.0)
        options = {"mix": MixUp(0.75), "batch_size": 40}
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0)
        made = self.fit(trainer, lambda: PseudoLabelModule(small(), optimizer=still), module(**options))
        (batch,) = batches(module(**options))
        log_p = made.student(batch.x)[batch.y.isnan().any(dim=1)].log_softmax(dim=1)
        assert trainer.callback_metrics["train/unsupervised"].item() == pytest.approx(
            -log_p.amax(dim=1).mean().item(), rel=1e-5
        )
        made = PseudoLabelModule(small(), selection=FlexMatch(0.5), num_classes=3)
        with pytest.raises(InputError, match="FlexMatch stores values of single samples; mixed rows .mix. are of two"):
            quiet_trainer(max_epochs=1).fit(made, datamodule=module())

    METHODS = {
        "supervised": lambda: SupervisedModule(small(), hard_loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
        "weights": lambda: SupervisedModule(small(), class_weights="balanced"),
        "distill": lambda: DistillModule(small(), Teacher(small())),
        "dkd": lambda: DistillModule(small(), Teacher(small()), soft_loss=DKDLoss()),
        "ensemble": lambda: EnsembleDistillModule(small(), [small(), small()]),
        "hint": lambda: HintModule(small(), small(), hints={"2": "2"}, hint_epochs=1),
        "apprentice": lambda: ApprenticeModule(small(), small()),
        "online": lambda: PseudoLabelModule(small(), selection=FixedThreshold(0.4)),
        "refreshed": lambda: PseudoLabelModule(small(), pseudo_labels="refreshed"),
    }

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_trains_and_resumes(self, quiet_trainer, tmp_path, method):
        def run(epochs, **kwargs):
            callbacks = (
                [PseudoLabelRefresh(selection=Sharpen(FixedThreshold(0.34), 1.0))] if method == "refreshed" else []
            )
            trainer = quiet_trainer(max_epochs=epochs, limit_train_batches=1.0, callbacks=callbacks)
            return trainer, self.fit(trainer, self.METHODS[method], module(train_transform=None), **kwargs)

        trainer, _ = run(2)
        assert all(value.isfinite() for value in trainer.callback_metrics.values())
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        _, resumed = run(3, ckpt_path=tmp_path / "x.ckpt")
        _, whole = run(3)
        for one, other in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_refreshed_pseudo_labels_by_hand(self, quiet_trainer):
        """A row has a mixed pseudo-label if both samples have one."""
        data = module(mix=MixUp(1.0))
        refresh = PseudoLabelRefresh(selection=FixedThreshold(0.345), warmup_epochs=0)
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0, callbacks=[refresh])
        self.fit(trainer, self.METHODS["refreshed"], data)
        data.set_pseudo_labels(refresh.table)
        accepted = {*refresh.table.index[refresh.table.accepted].tolist()}
        label = dict(zip(refresh.table.index.tolist(), refresh.table.label.tolist(), strict=True))
        assert 0 < len(accepted) < len(label)
        loader = data.train_dataloader()
        seen = 0
        for batch in loader:
            for row, (i, j) in enumerate(zip(batch.index.tolist(), batch.partner.tolist(), strict=True)):
                if i in label:
                    both = i in accepted and j in accepted
                    assert (batch.kind[row] == 2) == both
                    assert batch.y[row].isnan().any() != both
                    seen += both
                    if both:
                        assert batch.y[row, label[i]] >= batch.share[row] - 1e-6
            assert batch.mean_labels == (~batch.y.isnan().any(dim=1)).sum()
            assert batch.mean_pseudo == (batch.kind == 2).sum()
        assert seen

    def test_teacher_sees_the_mixed_image_and_its_cache_too(self, quiet_trainer, tmp_path):
        calls = []

        class Counting(nn.Sequential):
            def forward(self, x):
                calls.append(len(x))
                return super().forward(x)

        torch.manual_seed(5)
        network = Counting(nn.Flatten(), nn.Linear(16, 3))

        def run(cache, **arguments):
            calls.clear()
            data = module(num_views=2, **arguments)
            trainer = quiet_trainer(max_epochs=2, limit_train_batches=1.0)
            made = self.fit(trainer, lambda: DistillModule(small(), Teacher(network, cache=cache)), data)
            return made.student[1].weight, sum(calls)

        live, _ = run(None)
        cached, computed = run(tmp_path / "outputs")
        assert torch.allclose(live, cached, atol=1e-6)
        assert computed >= 80
        again, computed = run(tmp_path / "outputs")
        assert torch.equal(again, cached)
        assert computed < 80  # no view is computed again
        for other in ({"mix": None}, {"mix": MixUp(0.3)}, {"labeled": 5}, {"sampler": "balanced"}):
            _, computed = run(tmp_path / "outputs", **other)
            assert computed >= 80  # another mix has other outputs

    def test_losses_that_remember_single_samples(self, quiet_trainer):
        made = SupervisedModule(small(), hard_loss=EarlyLearningLoss())
        with pytest.raises(InputError, match="EarlyLearningLoss stores values of single samples"):
            quiet_trainer(max_epochs=1).fit(made, datamodule=module(labeled=None))

    def test_co_teaching_refuses_mixed_labels(self, quiet_trainer):
        made = CoTeachingModule(small(), small(), forget_rate=0.1)
        with pytest.raises(InputError, match="labels must be one class a sample"):
            quiet_trainer(max_epochs=1).fit(made, datamodule=module(labeled=None))

    def test_losses_of_class_indices(self, quiet_trainer):
        made = SupervisedModule(small(), hard_loss=GeneralizedCrossEntropyLoss())
        with pytest.raises(InputError, match="which GeneralizedCrossEntropyLoss does not take; use CrossEntropyLoss"):
            quiet_trainer(max_epochs=1).fit(made, datamodule=module(labeled=None))

    def test_another_mix_does_not_resume(self, quiet_trainer, tmp_path):
        trainer = quiet_trainer(max_epochs=1)
        self.fit(trainer, lambda: SupervisedModule(small()), module())
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        with pytest.raises(InputError, match="mix: the checkpoint was trained with"):
            self.fit(
                quiet_trainer(max_epochs=2),
                lambda: SupervisedModule(small()),
                module(mix=MixUp(0.3)),
                ckpt_path=tmp_path / "x.ckpt",
            )
