"""Outputs for the pool, and simulated rounds."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning.active.loop import ActiveLearningLoop, plot
from kd_lightning.active.pool import collect_pool_outputs, find_teacher, with_unlabeled_pool
from kd_lightning.active.strategies import STRATEGIES, select_samples
from kd_lightning.batch import Batch, LabelKind
from kd_lightning.data import CoarseLabels, DatasetSource, Digits, SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import DistillModule, EnsembleDistillModule, SupervisedModule
from kd_lightning.teachers.teacher import Teacher

DIGITS = Digits().load()
IMAGES, TARGETS = DIGITS.train.images.tensors[0], DIGITS.train.targets


def digits(**kwargs):
    """The digits, split."""
    data = SemiSupervisedDataModule(Digits(), **({"labeled": 2, "batch_size": 500} | kwargs))
    data.setup("")
    return data


def probabilities(network, index):
    """Probabilities in float64."""
    with torch.no_grad():
        return copy.deepcopy(network).eval()(IMAGES[index]).double().softmax(dim=1)


@pytest.fixture
def dropping():
    """A student with dropout, whose batch normalisation has seen something."""
    torch.manual_seed(0)
    network = DigitsCNN(4, dropout=0.5)
    network(torch.rand(32, 1, 8, 8))
    return network


class TestPoolOutputs:
    def test_of_what_has_no_label(self, student):
        data = digits()
        index, pool = collect_pool_outputs(student, data, "margin", seed=3)
        assert index.tolist() == data.split.unlabeled
        torch.testing.assert_close(pool.probabilities, probabilities(student, index))
        assert pool.probabilities.dtype == torch.float64
        assert (
            pool.features,
            pool.member_probabilities,
            pool.teacher_probabilities,
            pool.labeled_features,
            pool.seed,
        ) == (None,) * 4 + (3,)

    @pytest.mark.parametrize("strategy", ["k-centre", "badge"])
    def test_features(self, student, strategy):
        data = digits()
        index, pool = collect_pool_outputs(student, data, strategy)
        with torch.no_grad():
            body = nn.Sequential(*list(student)[:-1]).eval()
            torch.testing.assert_close(pool.features.float(), body(IMAGES[index]))
            torch.testing.assert_close(pool.labeled_features.float(), body(IMAGES[data.split.labeled]))
        none = collect_pool_outputs(student, digits(labeled=0), strategy)[1]
        assert none.labeled_features is None and len(none.features) == len(index) + 20

    def test_training_on_labels_alone_leaves_a_pool(self, student):
        data = digits(unlabeled="none")
        index, _ = collect_pool_outputs(student, data, "margin")
        assert index.tolist() == data.split.unlabeled
        assert data.unlabeled == "none" and data.unlabeled_indices() == []

    def test_coarse_labels_rule_classes_out(self, student):
        coarse = CoarseLabels({"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}, fraction=0.5)
        data = digits(coarse=coarse)
        index, pool = collect_pool_outputs(student, data, "entropy", teacher=lambda batch: student(batch.x), passes=0)
        assert index.tolist() == data.split.unlabeled
        torch.testing.assert_close(pool.teacher_probabilities, pool.probabilities)
        low = pool.probabilities[:, :5].sum(dim=1)
        known = (low == 0) | (low > 1 - 1e-12)
        assert int(known.sum()) == int((data._build_labels().kind == LabelKind.COARSE).sum()) > 400
        high = TARGETS[index] >= 5
        assert torch.equal(low[known] < 0.5, high[known])
        expected = probabilities(student, index)
        torch.testing.assert_close(pool.probabilities[~known], expected[~known])
        expected = torch.where((TARGETS[index] >= 5)[:, None] == (torch.arange(10) >= 5), expected, 0)
        torch.testing.assert_close(pool.probabilities[known], (expected / expected.sum(dim=1, keepdim=True))[known])

    def test_dropout_passes(self, dropping):
        """Dropout alone is in training mode, and all is left as it was."""
        data, before = digits(), copy.deepcopy(dropping.state_dict())
        dropping[-2].train(False)
        modes, state = [layer.training for layer in dropping.modules()], torch.get_rng_state()
        index, pool = collect_pool_outputs(dropping, data, "bald", passes=3, seed=1)
        assert pool.member_probabilities.shape == (3, len(index), 10)
        assert not torch.allclose(pool.member_probabilities[0], pool.member_probabilities[1])
        torch.testing.assert_close(pool.probabilities, probabilities(dropping, index))
        assert all(torch.equal(value, before[name]) for name, value in dropping.state_dict().items())
        assert [layer.training for layer in dropping.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        # the mean of many passes is that of random halves of the features, scaled by two
        with torch.no_grad():
            features = copy.deepcopy(nn.Sequential(*list(dropping)[:-2])).eval()(IMAGES[index[:1]])
            drawn = dropping[-1](2 * features * (torch.rand(9000, 16) < 0.5)).softmax(dim=1).mean(dim=0)
        many = (
            collect_pool_outputs(dropping, replaced(data, index[:1]), "bald", passes=300)[1]
            .member_probabilities[:, 0]
            .mean(dim=0)
        )
        torch.testing.assert_close(many.float(), drawn, atol=0.03, rtol=0)
        # the seed decides
        assert torch.equal(
            collect_pool_outputs(dropping, data, "bald", passes=3, seed=1)[1].member_probabilities,
            pool.member_probabilities,
        )
        assert not torch.equal(
            collect_pool_outputs(dropping, data, "bald", passes=3, seed=2)[1].member_probabilities,
            pool.member_probabilities,
        )

    def test_dropout_that_fused_attention_leaves_out(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        network = nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(64, 10))
        _, pool = collect_pool_outputs(network, digits(), "bald", passes=2)
        assert not torch.allclose(pool.member_probabilities[0], pool.member_probabilities[1])

    def test_dropout_that_is_never_called(self, student):
        student.unused = nn.Dropout(0.5)
        student.forward = nn.Sequential(*list(student)[:-1]).forward
        with pytest.raises(InputError, match="bald: all passes .* the same outputs; is its dropout never called"):
            collect_pool_outputs(student, digits(), "bald", passes=3)

    def test_of_a_teacher(self, student, teacher):
        module = DistillModule(student, Teacher(teacher, classes=[*range(9, -1, -1)]))
        index, pool = collect_pool_outputs(student, digits(), "disagreement", teacher=find_teacher(module))
        torch.testing.assert_close(pool.teacher_probabilities, probabilities(teacher, index).flip(1))
        ensemble = EnsembleDistillModule(student, [teacher, copy.deepcopy(student)])
        _, pool = collect_pool_outputs(student, digits(), "disagreement", teacher=find_teacher(ensemble))
        torch.testing.assert_close(
            pool.teacher_probabilities, (probabilities(teacher, index) + probabilities(student, index)) / 2
        )
        with pytest.raises(InputError, match="needs a module with a frozen teacher, SupervisedModule has none"):
            find_teacher(SupervisedModule(student))

    def test_binary(self, student):
        one = nn.Sequential(student, nn.Linear(10, 1))
        flat = nn.Sequential(one, nn.Flatten(0))
        for network in (one, flat):
            index, pool = collect_pool_outputs(network, digits(), "margin")
            with torch.no_grad():
                p = copy.deepcopy(flat).eval()(IMAGES[index]).double().sigmoid()
            torch.testing.assert_close(pool.probabilities, torch.stack([1 - p, p], dim=1), check_dtype=False)

    def test_hooks_of_the_datamodule(self, student):
        """Here to bfloat16, which must not reach the strategies."""

        class Half(SemiSupervisedDataModule):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                return replace(batch, x=batch.x.bfloat16())

        data = Half(Digits(), labeled=2, batch_size=500)
        data.setup("")
        index, pool = collect_pool_outputs(copy.deepcopy(student).bfloat16(), data, "badge")
        torch.testing.assert_close(pool.probabilities, probabilities(student, index), atol=0.01, rtol=0)
        assert pool.probabilities.dtype == pool.features.dtype == torch.float64
        assert len(select_samples("badge", pool, 3).rows) == 3

    def test_bad_input(self, student, dropping):
        with pytest.raises(InputError, match="no sample without a label is left"):
            collect_pool_outputs(student, digits(labeled=None), "margin")
        with pytest.raises(InputError, match="bald needs several runs, or a student with dropout"):
            collect_pool_outputs(DigitsCNN(4, dropout=0.0), digits(), "bald", passes=20)
        with pytest.raises(InputError, match="unlabeled: test; test images get no labels"):
            collect_pool_outputs(student, digits(unlabeled="test"), "margin")
        with pytest.raises(InputError, match="teacher and student must have the same number of outputs"):
            collect_pool_outputs(student, digits(), "disagreement", teacher=lambda batch: student(batch.x)[:, :9])
        with torch.no_grad():
            student[-1].bias[3] = torch.nan
        with pytest.raises(InputError, match=r"the probabilities of sample \d+ are not finite"):
            collect_pool_outputs(student, digits(), "margin")
        many = DatasetSource(TensorDataset(IMAGES[:60], torch.nn.functional.one_hot(TARGETS[:60])))
        data = SemiSupervisedDataModule(many, labeled=0.5)
        data.setup("")
        with pytest.raises(
            InputError, match=r"one class label for each sample, got labels torch.float32 of shape \[60, 10\]"
        ):
            collect_pool_outputs(student, data, "margin")


def replaced(data, index):
    """The datamodule with a few samples in its pool."""
    data = copy.copy(data)
    data.split = replace(data.split, unlabeled=index.tolist())
    return data


class Recorder(SupervisedModule):
    """Records the first weights, and the labels that training sees."""

    seen: list

    def on_fit_start(self):
        first = {name: value.clone() for name, value in self.student.state_dict().items()}
        Recorder.seen.append((first, {}))

    def training_step(self, batch, batch_idx):
        batch = Batch.from_any(batch)
        Recorder.seen[-1][1].update(zip(batch.index.tolist(), batch.y.tolist(), strict=True))
        return super().training_step(batch, batch_idx)


@pytest.fixture
def loop(quiet_trainer):
    """Makes a loop of quick rounds on the digits; its module is a Recorder."""

    def make(strategy="margin", queries=5, rounds=2, seed=0, module=None, data=None, trainer=None, **arguments):
        Recorder.seen = []
        created = []

        def make_data():
            plain = {"labeled": 1, "val_size": 0, "batch_size": 400, "train_transform": nn.Identity()}
            created.append((data or digits)(**(plain | arguments)))
            return created[-1]

        found = ActiveLearningLoop(
            module or (lambda: Recorder(DigitsCNN(2))),
            make_data,
            trainer or (lambda: quiet_trainer(limit_val_batches=0)),
            strategy,
            queries=queries,
            rounds=rounds,
            seed=seed,
        )
        return found, created

    return make


class TestLoop:
    def test_two_rounds(self, loop):
        found, created = loop()
        state = torch.get_rng_state()
        results = found.run()
        assert torch.equal(torch.get_rng_state(), state)
        assert [one["labels"] for one in results] == [10, 15, 20]
        assert [len(one["queried"]) for one in results] == [5, 5, 0]
        (data,) = created
        queried = results[0]["queried"] + results[1]["queried"]
        start = digits(labeled=1, val_size=0).split
        assert len({*queried}) == 10 and {*queried} <= {*start.unlabeled}
        assert data.split.labeled == sorted(start.labeled + queried)
        assert data.split.label_rows == [[index, int(TARGETS[index]), "clean", 1.0] for index in sorted(queried)]
        # each training began anew, and saw the truth of the labeled samples alone
        assert len(Recorder.seen) == 3
        labeled = {*start.labeled}
        for (first, seen), result in zip(Recorder.seen, results, strict=True):
            assert all(torch.equal(first[name], value) for name, value in Recorder.seen[0][0].items())
            assert {index: y for index, y in seen.items() if y != -100} == {i: int(TARGETS[i]) for i in labeled}
            assert len(seen) == len(TARGETS)
            labeled |= {*result["queried"]}

    def test_accuracy_and_selection_are_those_of_the_trained_student(self, loop):
        modules = []

        def module():
            modules.append(SupervisedModule(DigitsCNN(2)))
            return modules[-1]

        found, _ = loop("least-confidence", module=module)
        results = found.run()
        test = DIGITS.test
        for module, one in zip(modules, results, strict=True):
            with torch.no_grad():
                right = module.student.eval()(test.images.tensors[0]).argmax(dim=1) == test.targets
            assert one["accuracy"] == pytest.approx(right.double().mean().item())
        pool = torch.tensor(digits(labeled=1, val_size=0).split.unlabeled)
        order = probabilities(modules[0].student, pool).max(dim=1).values.argsort(stable=True)
        assert results[0]["queried"] == pool[order[:5]].tolist()

    def test_repeatable(self, loop):
        found = []
        for seed in (0, 0, 1):
            torch.rand(1)  # earlier random numbers do not matter
            found.append(loop("least-confidence", seed=seed, rounds=1)[0].run())
        assert found[0] == found[1] != found[2]

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_strategies(self, loop, teacher, strategy):
        """On labeled samples alone."""
        found, _ = loop(
            strategy,
            rounds=1,
            module=lambda: DistillModule(DigitsCNN(2, dropout=0.5), teacher),
            unlabeled="none",
        )
        assert [one["labels"] for one in found.run()] == [10, 15]

    def test_bad_input(self, loop, quiet_trainer):
        for arguments, message in (
            ({"strategy": "best"}, "strategy must be one of"),
            ({"queries": 0}, "queries must be at least 1, got 0"),
            ({"rounds": 0}, "rounds must be at least 1, got 0"),
            ({"seed": -1}, "seed must lie in"),
        ):
            with pytest.raises(InputError, match=message):
                loop(**arguments)
        two = {"trainer": lambda: quiet_trainer(devices=2, strategy="ddp")}
        for arguments, message in (
            ({"queries": 600}, "queries: at most 1187 samples without a label .* got 2 rounds of 600"),
            ({"rounds": 1, "queries": 1187, "labeled_batch_size": 8}, "labeled_batch_size needs a sample without one"),
            ({"unlabeled": "test"}, "unlabeled: test; test images get no labels"),
            ({"data": unknown, "unlabeled": "source"}, "unlabeled must be .* all known, got source"),
            (two, "ActiveLearningLoop runs on one process, got 2"),
        ):
            with pytest.raises(InputError, match=message):
                loop(**arguments)[0].run()
            assert not Recorder.seen  # before anything was trained

    @pytest.mark.parametrize(
        ("strategy", "message"),
        [
            ("margin", "this strategy needs scikit-activeml"),
            ("k-centre", "this strategy needs scikit-activeml"),
            ("bald", "bald needs several runs, or a student with dropout"),
            ("disagreement", "needs a module with a frozen teacher, Recorder has none"),
        ],
    )
    def test_what_a_strategy_lacks_is_named_before_a_fit(self, loop, monkeypatch, strategy, message):
        if "activeml" in message:
            monkeypatch.setitem(sys.modules, "skactiveml.pool", None)
        with pytest.raises(InputError, match=message):
            loop(strategy)[0].run()
        assert not Recorder.seen

    def test_a_pool_is_not_read_without_the_package(self, student, monkeypatch):
        """By the command query, for example."""
        data = digits()
        monkeypatch.setitem(sys.modules, "skactiveml.pool", None)
        monkeypatch.setattr(data, "pool_dataloader", None)
        with pytest.raises(InputError, match="this strategy needs scikit-activeml"):
            collect_pool_outputs(student, data, "margin")


def unknown(**kwargs):
    """Digits with images without known labels."""
    part = TensorDataset(IMAGES, TARGETS)
    data = SemiSupervisedDataModule(DatasetSource(part, test=part, unlabeled=TensorDataset(IMAGES)), **kwargs)
    data.setup("")
    return data


def test_with_unlabeled_pool():
    data = digits()
    assert with_unlabeled_pool(data) is data


def test_plot():
    def run(*accuracy):
        return [{"labels": 20 * n, "accuracy": a} for n, a in enumerate(accuracy, 1)]

    axes = plot({"margin": [run(0.5, 0.8), run(0.7, 0.9)], "random": [run(0.4, 0.6)]}).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["margin", "random"]
    lines = [[values.tolist() for values in line.get_data()] for line in axes.lines]
    assert lines == [[[20, 40], pytest.approx([60, 85])], [[20, 40], pytest.approx([40, 60])]]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(60 - 200**0.5), pytest.approx(85 + 50**0.5))
