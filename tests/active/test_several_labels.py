"""Strategies for samples of several labels: against sums over all sets of labels, and on a pool."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, DistillModule, InputError, SemiSupervisedDataModule
from kd_lightning.active import several_labels
from kd_lightning.active.loop import ActiveLearningLoop
from kd_lightning.active.pool import collect_pool_outputs
from kd_lightning.active.strategies import STRATEGIES, PoolOutputs, select_samples
from kd_lightning.modules import SupervisedModule
from kd_lightning.modules.seams import Seams


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def pool():
    """9 samples of 3 labels, 2 features, 4 members."""
    return PoolOutputs(
        probabilities=rand(9, 3),
        features=rand(9, 2, seed=1),
        member_probabilities=rand(4, 9, 3, seed=2),
        teacher_probabilities=rand(9, 3, seed=3),
        multilabel=True,
    )


def sets(p):
    """The probability of each set of labels, if they are independent."""
    return {
        values: math.prod(q if value else 1 - q for q, value in zip(p, values, strict=True))
        for values in product((0, 1), repeat=len(p))
    }


def entropy(p):
    return -sum(q * math.log(q) for q in p if q > 0)


def information(members):
    """Mean KL of the members to their mean, of each label alone."""
    total = 0.0
    for label in zip(*members, strict=True):
        mean = sum(label) / len(label)
        total += sum(entropy([mean, 1 - mean]) - entropy([p, 1 - p]) for p in label) / len(label)
    return total


FORMULAS = {
    "least-confidence": lambda pool, row: 1 - max(sets(pool.probabilities[row].tolist()).values()),
    "margin": lambda pool, row: max(1 - abs(p - (1 - p)) for p in pool.probabilities[row].tolist()),
    "entropy": lambda pool, row: entropy(sets(pool.probabilities[row].tolist()).values()),
    "bald": lambda pool, row: information(pool.member_probabilities[:, row].tolist()),
    "disagreement": lambda pool, row: sum(
        q * math.log(q / sets(pool.probabilities[row].tolist())[values])
        for values, q in sets(pool.teacher_probabilities[row].tolist()).items()
    ),
}


@pytest.mark.parametrize("strategy", FORMULAS)
def test_formula(pool, strategy):
    scores = [FORMULAS[strategy](pool, row) for row in range(9)]
    best = sorted(range(9), key=lambda row: -scores[row])[:5]
    rows, found = select_samples(strategy, pool, 5)
    assert rows.tolist() == best
    assert found.tolist() == pytest.approx([scores[row] for row in best], abs=1e-12)


def test_score_of_badge_is_the_length_of_the_gradient(pool):
    """That of the binary cross-entropy with the likelier labels, at the last layer's weights."""
    last = nn.Linear(2, 3).double()
    logits = last(pool.features)
    pool = PoolOutputs(logits.sigmoid().detach(), features=pool.features, multilabel=True)
    rows, scores = select_samples("badge", pool, 9)
    for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
        y = (logits[row] > 0).double()
        loss = nn.functional.binary_cross_entropy_with_logits(logits[row], y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, last.weight, retain_graph=True)
        assert score == pytest.approx(gradient.norm().item())


def test_limits():
    """Certain labels, one label, and networks that agree."""
    p = torch.tensor([[0.0, 1.0], [0.0, 0.5]]).double()
    for score in (several_labels.least_confidence, several_labels.margin, several_labels.entropy):
        assert score(p)[0] == 0 < score(p)[1]
    assert several_labels.bald(p.expand(3, -1, -1)).tolist() == [0, 0]
    assert several_labels.disagreement(p, p).tolist() == [0, 0]
    one = PoolOutputs(p[:, 1:], multilabel=True)
    assert select_samples("entropy", one, 2).rows.tolist() == [1, 0]


def test_disagreement_on_a_label_that_is_certain():
    """In float64, the sigmoid of 40 is 1; a teacher that is nearly as sure does not differ by infinity."""
    p, teacher = torch.tensor([40.0, 1.0]).double().sigmoid(), torch.tensor([30.0, -1.0]).double().sigmoid()
    scores = several_labels.disagreement(p[:, None], teacher[:, None])
    assert 0 < scores[0] < 1e-10 < scores[1] < 1
    certain = torch.tensor([[1.0], [0.0]]).double()
    assert several_labels.disagreement(certain, certain).tolist() == [0, 0]
    assert 30 < several_labels.disagreement(certain, 1 - certain)[0] < 40


X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, 0] > 0, X[:, 1] > 0.5, X[:, 2] > 1], dim=1).long()


def make_data(labels=Y, **kwargs):
    part = TensorDataset(X, labels)
    return SemiSupervisedDataModule(DatasetSource(part, part), **({"labeled": 0.3, "val_size": 0} | kwargs))


def network(seed=0, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, outputs))


def test_pool():
    data, student = make_data(), network()
    data.setup("")
    index, pool = collect_pool_outputs(student, data, "badge", seams=Seams(task="multilabel"))
    assert index.tolist() == data.split.unlabeled and pool.multilabel
    torch.testing.assert_close(pool.probabilities, student.eval()(X[index]).double().sigmoid())
    assert len(pool.labeled_features) == len(data.split.labeled)


def test_some_labels_of_a_sample_are_missing():
    """It counts as labeled."""
    labels = Y.float()
    labels[:, 2] = torch.nan
    data = make_data(labels)
    data.setup("")
    index, _ = collect_pool_outputs(network(), data, "margin", seams=Seams(task="multilabel"))
    assert index.tolist() == data.split.unlabeled


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loop(strategy, quiet_trainer, tmp_path):
    """The labels of the selected samples are revealed, and nothing else."""
    created = []

    def make():
        created.append(make_data(unlabeled="rest", batch_size=16))
        return created[-1]

    loop = ActiveLearningLoop(
        lambda: DistillModule(network(), network(1), task="multilabel"),
        make,
        partial(quiet_trainer, limit_val_batches=0),
        strategy,
        queries=4,
        rounds=1,
        folder=tmp_path / "loop",
    )
    first, second = loop.run()
    assert second["labels"] == first["labels"] + 4 and len({*first["queried"]}) == 4
    (data,) = created
    labeled = torch.tensor(data.split.labeled)
    visible = data.visible_labels()
    assert torch.equal(visible[labeled], Y[labeled].float()) and {*first["queried"]} <= {*labeled.tolist()}
    assert visible[data.split.unlabeled].isnan().all()


@pytest.mark.parametrize(
    ("task", "labels", "outputs", "message"),
    [
        (
            "multilabel",
            Y.float() / 2,
            3,
            r"needs labels of zeros and ones \(N, L\), got labels torch.float32",
        ),
        ("multilabel", Y[:, 0], 3, r"task: multilabel needs labels of zeros and ones \(N, L\), got labels torch.int64"),
        ("multiclass", Y, 3, r"needs one class label for each sample, got .* of shape \[60, 3\] and task: multiclass"),
        ("multilabel", Y, 4, r"the student must have 3 logits, one for each label, got \[4\]"),
    ],
)
def test_bad_input(task, labels, outputs, message):
    data = make_data(labels)
    data.setup("")
    with pytest.raises(InputError, match=message):
        collect_pool_outputs(network(outputs=outputs), data, "margin", seams=Seams(task=task))


def test_the_task_is_that_of_the_module():
    assert Seams.of(SupervisedModule(network(), task="multilabel")).task == "multilabel"
    assert Seams.of(SupervisedModule(network())).task == "multiclass"
