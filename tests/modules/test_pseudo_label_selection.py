"""PseudoLabelModule with selections and teachers: the objective by hand, cached teachers, resume, complaints."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    AdaMatch,
    Batch,
    DatasetSource,
    DistributionAlignment,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    InputError,
    OpenSetFilter,
    PseudoLabelModule,
    SemiSupervisedDataModule,
    Sharpen,
    SoftMatch,
    Teacher,
)

ROWS, FEATURES, CLASSES = 9, 5, 4
Y = torch.tensor([2, -100, -100, 0, -100, 3, -100, -100, 1])
UNLABELED = (Y == -100).nonzero().flatten().tolist()
SGD = partial(torch.optim.SGD, lr=0.5)


def inputs(seed=0, rows=ROWS):
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(seed=0, classes=CLASSES):
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, classes, bias=False).double()


def softmax(z):
    return np.exp(z - z.max(axis=-1, keepdims=True)) / np.exp(z - z.max(axis=-1, keepdims=True)).sum(-1, keepdims=True)


def outputs(net, x):
    return softmax(x.numpy() @ net.weight.detach().numpy().T)


def norm(values):
    return values / values.sum()


def gradient_of(net, x, strong, targets, weight=1.0):
    """Gradient of the hard term, and of the unsupervised one with targets by row (zeros where not accepted)."""
    gradient = np.zeros((CLASSES, FEATURES))
    labeled = [row for row in range(ROWS) if row not in UNLABELED]
    terms = [(x[row], np.eye(CLASSES)[Y[row]], 1 / len(labeled)) for row in labeled]
    terms += [(strong[row], target, weight / len(UNLABELED)) for row, target in targets.items()]
    for sample, target, share in terms:
        gradient += share * np.outer(
            softmax(net.weight.detach().numpy() @ sample.numpy()) * target.sum() - target, sample
        )
    return gradient


SOURCES = {"student": {}, "average": {"ema_decay": 0.9}, "teacher": {"teacher": linear(1)}}


def labeler_of(module, options):
    """The network that labels; the average is another one than the student."""
    if "ema_decay" in options:
        with torch.no_grad():
            module.ema.module.weight.copy_(linear(2).weight)
        return module.ema.module
    return options.get("teacher", module.student)


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("views", [1, 2])
def test_relative_threshold_is_that_of_the_network_that_labels(options, views):
    """AdaMatch, whose means are those of the step alone."""
    module = PseudoLabelModule(linear(), 0.7, selection=AdaMatch(0.95, momentum=0.0), **options)
    module.selection.setup(None, CLASSES)
    x, labeler = inputs(), labeler_of(module, options)
    strong = inputs(3) if views == 2 else x
    p, known = outputs(labeler, x[UNLABELED]), outputs(labeler, x[Y >= 0])
    aligned = p * (known.mean(axis=0) + 1e-6) / (p.mean(axis=0) + 1e-6)
    threshold, targets = 0.95 * known.max(axis=1).mean(), {}
    for row, values in zip(UNLABELED, map(norm, aligned), strict=True):
        targets[row] = np.eye(CLASSES)[values.argmax()] * (values.max() >= threshold)
    assert 0 < sum(target.sum() for target in targets.values()) < len(targets)
    module.training_step(Batch(x, Y, x_strong=strong if views == 2 else None), 0).backward()
    assert module.student.weight.grad.numpy() == pytest.approx(
        gradient_of(module.student, x, strong, targets, 0.7), rel=1e-5, abs=1e-7
    )


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
def test_soft_targets(options):
    """With an average this is Mean Teacher with cross-entropy."""
    module = PseudoLabelModule(linear(), 2.0, selection=Sharpen(FixedThreshold(0), 1.0), **options)
    x, strong, labeler = inputs(), inputs(3), labeler_of(module, options)
    targets = dict(zip(UNLABELED, outputs(labeler, x[UNLABELED]), strict=True))
    module.training_step(Batch(x, Y, x_strong=strong), 0).backward()
    assert module.student.weight.grad.numpy() == pytest.approx(
        gradient_of(module.student, x, strong, targets, 2.0), rel=1e-5, abs=1e-7
    )


def test_the_regularizer_is_a_term():
    """Fairness of FreeMatch: of the strong view of accepted rows."""
    module = PseudoLabelModule(linear(), 0.7, selection=FreeMatch(momentum=0.2, fairness_weight=0.3))
    module.selection.setup(None, CLASSES)
    x, strong = 3 * inputs(2), inputs(3)
    terms = module.losses(Batch(x, Y, x_strong=strong))
    p, q = outputs(module.student, x[UNLABELED]), outputs(module.student, strong[UNLABELED])
    shares = 0.2 / CLASSES + 0.8 * p.mean(axis=0)
    histogram = 0.2 / CLASSES + 0.8 * np.eye(CLASSES)[p.argmax(axis=1)].mean(axis=0)
    threshold = (0.2 / CLASSES + 0.8 * p.max(axis=1).mean()) * shares / shares.max()
    q = q[p.max(axis=1) >= threshold[p.argmax(axis=1)]]
    assert 0 < len(q) < len(p)
    counts = np.eye(CLASSES)[q.argmax(axis=1)].mean(axis=0)
    ratio = np.array([m / c if c else 0.0 for m, c in zip(q.mean(axis=0), counts, strict=True)])
    expected = (norm(shares / histogram) * np.log(norm(ratio) + 1e-12)).sum()
    assert terms["regularizer"].weight == 0.3
    assert terms["regularizer"].value.item() == pytest.approx(expected, rel=1e-5)
    terms["regularizer"].value.backward()
    assert module.student.weight.grad.abs().sum() > 0
    off = PseudoLabelModule(linear(), selection=FreeMatch(fairness_weight=0))
    off.selection.setup(None, CLASSES)
    assert {*off.losses(Batch(x, Y, x_strong=strong))} == {"hard", "unsupervised"}


def digits(**kwargs):
    """4 classes, 8 labeled and 24 unlabeled samples."""
    part = TensorDataset(inputs(5, 32).float(), torch.arange(32) % CLASSES)
    options = {"labeled": 2, "val_size": 0, "batch_size": 8, "labeled_batch_size": 2, "seed": 0}
    return SemiSupervisedDataModule(DatasetSource(part), **(options | kwargs))


TAUGHT = {
    "all": lambda: None,
    "FixedThreshold": lambda: FixedThreshold(0.4),
    "FlexMatch": lambda: FlexMatch(0.4),
    "FreeMatch": lambda: FreeMatch(0.5, 0.1),
    "SoftMatch": lambda: SoftMatch(momentum=0.5),
    "AdaMatch": lambda: AdaMatch(momentum=0.5),
    "aligned": lambda: DistributionAlignment(Sharpen(FixedThreshold(0.4)), "labeled", 0.5),
}


@pytest.mark.parametrize("make", TAUGHT.values(), ids=TAUGHT)
def test_a_cached_teacher_is_the_teacher(quiet_trainer, tmp_path, make):
    """Where its outputs are stored, it runs for a check alone. Then a resume is exact."""
    calls = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear(1).float()

        def forward(self, x):
            calls.append(len(x))
            return self.inner(x)

    def fit(path=None, **cache):
        torch.manual_seed(0)
        teacher = Teacher(Counted(), **cache)
        module = PseudoLabelModule(linear(3).float(), selection=make(), teacher=teacher, optimizer=SGD)
        saves = ModelCheckpoint(tmp_path / str(len(cache)), "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = quiet_trainer(max_epochs=2, callbacks=[saves], enable_checkpointing=True)
        calls.clear()
        trainer.fit(module, digits(num_views=2, train_transform=nn.Dropout(0.3)), ckpt_path=path)
        return [*module.state_dict().values()], module

    whole, module = fit()
    computed = sum(calls)
    assert not any(name.startswith("teacher") for name in module.state_dict())
    cached = {"cache": tmp_path / "cache", "cache_dtype": "float32"}
    first, _ = fit(**cached)
    stored, _ = fit(**cached)  # the second one reads what the first one has written
    assert sum(calls) == 16 < computed  # a check of the stored outputs
    resumed, _ = fit(tmp_path / "2" / "step=3.ckpt", **cached)
    for states in (stored, resumed):
        assert all(torch.equal(one, other) for one, other in zip(first, states, strict=True))
    for one, other in zip(whole, first, strict=True):  # computed in other batches
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Stored(nn.Module):
    """Returns stored outputs of the samples whose numbers it gets."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs.clone())

    def forward(self, x):
        return self.outputs[x.flatten().long()]


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"teacher": True}], ids=SOURCES)
@pytest.mark.parametrize(
    "make", [AdaMatch, FreeMatch, lambda: DistributionAlignment(SoftMatch(align=False), "labeled")]
)
def test_positions_of_dense_outputs_are_rows(make, options):
    """Of two labeled and two unlabeled maps."""
    maps, other = torch.randn(2, 4, CLASSES, 2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = torch.randint(CLASSES, (4, 2, 3), generator=torch.Generator().manual_seed(5))
    y[2:] = -100
    found = []
    for dense in (True, False):
        flat = lambda part, dense=dense: part if dense else part.movedim(1, -1).flatten(0, -2)  # noqa: E731
        chosen = {"teacher": Stored(flat(other))} if "teacher" in options else options
        student = Stored(flat(maps))
        module = PseudoLabelModule(student, 0.7, selection=make(), class_dim=1 if dense else None, **chosen)
        module.selection.setup(None, CLASSES)
        labels = y if dense else y.flatten()
        x = torch.arange(len(labels), dtype=torch.float64).unsqueeze(1)
        loss = module.training_step(Batch(x, labels), 0)
        loss.backward()
        found.append((loss, flat(student.outputs.grad) if dense else student.outputs.grad, module.selection))
    rows = found[0][1].movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(rows, found[1][1], rtol=1e-6, atol=1e-9)
    for one, two in zip(found[0][2].buffers(), found[1][2].buffers(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("make", [FreeMatch, FlexMatch])
def test_weight_averaging_of_lightning(quiet_trainer, tmp_path, make):
    """It copies the module before its own setup; the state of the selection must be there by then."""

    def fit(path=None):
        torch.manual_seed(0)
        saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        averaging = EMAWeightAveraging(decay=0.5)
        trainer = quiet_trainer(max_epochs=2, callbacks=[averaging, saves], enable_checkpointing=True)
        module = PseudoLabelModule(linear().float(), selection=make(), optimizer=SGD, num_classes=CLASSES)
        trainer.fit(module, digits(), ckpt_path=path)
        return module.state_dict()

    whole = fit()
    for key, value in fit(tmp_path / "step=3.ckpt").items():
        assert torch.equal(value, whole[key]), key


class TestTeacher:
    def test_labels_a_class_without_a_label(self, quiet_trainer):
        part = TensorDataset(inputs(5, 12).float(), torch.arange(12) % 2)  # never class 2 and 3
        data = SemiSupervisedDataModule(DatasetSource(part), labeled=2, val_size=0, batch_size=6, seed=0)
        module = PseudoLabelModule(linear().float(), teacher=linear(1).float(), num_classes=CLASSES, optimizer=SGD)
        trainer = quiet_trainer()
        trainer.fit(module, data)
        assert trainer.callback_metrics["train/coverage"] == 1

    def test_another_one_is_refused(self, quiet_trainer, tmp_path):
        trainer = quiet_trainer()
        trainer.fit(PseudoLabelModule(linear().float(), teacher=linear(1).float()), digits())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        module = PseudoLabelModule(linear().float(), teacher=linear(2).float())
        with pytest.raises(InputError, match="teacher"):
            quiet_trainer(max_epochs=2).fit(module, digits(), ckpt_path=tmp_path / "c.ckpt")

    def test_other_outputs_are_refused(self):
        module = PseudoLabelModule(linear(), teacher=linear(1, 7))
        with pytest.raises(InputError, match="teacher and student must have the same number of outputs, got .*7.*4"):
            module.training_step((inputs(), Y), 0)

    def test_the_student_cannot_teach_itself(self):
        net = linear()
        with pytest.raises(InputError, match="teacher and student must be two networks"):
            PseudoLabelModule(net, teacher=net)


class TestComplaints:
    @pytest.mark.parametrize("make", [FreeMatch, SoftMatch, AdaMatch, lambda: DistributionAlignment(FixedThreshold())])
    def test_unknown_number_of_classes(self, quiet_trainer, make):
        loader = DataLoader(TensorDataset(inputs().float(), Y), 3)
        with pytest.raises(InputError, match=r"^\w+ needs the number of classes; set num_classes, or a datamodule"):
            quiet_trainer().fit(PseudoLabelModule(linear().float(), selection=make()), loader)
        module = PseudoLabelModule(linear().float(), selection=make(), num_classes=CLASSES)
        quiet_trainer().fit(module, loader)

    def test_other_number_of_classes(self):
        module = PseudoLabelModule(linear(), selection=FreeMatch())
        with pytest.raises(InputError, match="a selection is set up for 0 classes, got probabilities of"):
            module.training_step((inputs(), Y), 0)
        module.selection.setup(None, 3)
        with pytest.raises(InputError, match="a selection is set up for 3 classes, got probabilities of 4; call setup"):
            module.training_step((inputs(), Y), 0)

    def test_no_index_and_no_pool(self, quiet_trainer):
        loader = DataLoader(TensorDataset(inputs().float(), Y), 3)
        for selection in (FlexMatch(), DistributionAlignment(Sharpen(FlexMatch()))):
            module = PseudoLabelModule(linear().float(), selection=selection, num_classes=CLASSES)
            with pytest.raises(InputError, match=r"^FlexMatch needs a datamodule with unlabeled_indices\(\)"):
                quiet_trainer().fit(module, loader)

    @pytest.mark.parametrize("make", [AdaMatch, lambda: DistributionAlignment(FlexMatch(), "labeled")])
    def test_no_labeled_samples(self, quiet_trainer, make):
        """A teacher may label without any label, but not for these selections."""
        data = digits(labeled=0, labeled_batch_size=None)
        module = PseudoLabelModule(
            linear().float(), teacher=linear(1).float(), selection=make(), num_classes=CLASSES, optimizer=SGD
        )
        with pytest.raises(InputError, match=r"^\w+ needs labeled samples, but there are none$"):
            quiet_trainer().fit(module, data)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: FixedThreshold(-0.1), r"threshold must lie in \[0, 1\], got -0.1"),
            (lambda: FixedThreshold(1.01), r"threshold must lie in \[0, 1\], got 1.01"),
            (lambda: FlexMatch(float("nan")), r"threshold must lie in \[0, 1\], got nan"),
            (lambda: FreeMatch(momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
            (lambda: FreeMatch(fairness_weight=-1), "fairness_weight must be finite and at least 0, got -1"),
            (lambda: SoftMatch(n_sigma=0), "n_sigma must be finite and above 0, got 0"),
            (lambda: SoftMatch(momentum=-0.1), r"momentum must lie in \[0, 1\), got -0.1"),
            (lambda: AdaMatch(1.5), r"relative_threshold must lie in \[0, 1\], got 1.5"),
            (lambda: Sharpen(FixedThreshold(), 0.0), r"temperature must lie in \(0, 1\], got 0.0"),
            (lambda: Sharpen(FixedThreshold(), 1.5), r"temperature must lie in \(0, 1\], got 1.5"),
            (lambda: DistributionAlignment(FixedThreshold(), "given"), "target must be one of uniform, labeled, got"),
        ],
    )
    def test_values_out_of_range(self, make, message):
        with pytest.raises(InputError, match=message):
            make()

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Sharpen(DistributionAlignment(FixedThreshold())), "Sharpen must be inside"),
            (lambda: Sharpen(OpenSetFilter(DistributionAlignment(FixedThreshold()))), "Sharpen must be inside"),
            (lambda: Sharpen(AdaMatch()), "Sharpen would replace the aligned targets of AdaMatch by"),
            (lambda: Sharpen(OpenSetFilter(AdaMatch())), "Sharpen would replace the aligned targets of AdaMatch by"),
            (lambda: Sharpen(Sharpen(FixedThreshold())), "Sharpen in Sharpen: the inner one would have no effect"),
            (lambda: DistributionAlignment(AdaMatch()), "AdaMatch inside aligns the probabilities, too"),
            (lambda: DistributionAlignment(SoftMatch()), "SoftMatch inside aligns"),
            (lambda: DistributionAlignment(Sharpen(SoftMatch())), "inside aligns"),
            (lambda: DistributionAlignment(DistributionAlignment(FixedThreshold())), "DistributionAlignment inside al"),
            (lambda: DistributionAlignment(OpenSetFilter(FixedThreshold())), "OpenSetFilter must be outside"),
            (lambda: DistributionAlignment(Sharpen(OpenSetFilter(FixedThreshold()))), "OpenSetFilter must be outside"),
        ],
    )
    def test_the_wrong_order(self, make, message):
        """Probabilities that one selection changes would not reach the other, or would reach it changed."""
        with pytest.raises(InputError, match=message):
            make()
