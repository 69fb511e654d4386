"""Class weights: scikit-learn's numbers, the loss by hand in float64, every method, and what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    Batch,
    CoTeachingModule,
    DatasetSource,
    Digits,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    InputError,
    PseudoLabelModule,
    SemiSupervisedDataModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.models import DigitsCNN
from kd_lightning.modules._shared.class_weights import balanced_weights

NAN = float("nan")
Y = torch.tensor([0] * 6 + [1] * 3 + [2] * 1)
X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
still = partial(torch.optim.SGD, lr=0.0)


def data(labels=Y, x=X, batch_size=4, **arguments):
    source = DatasetSource(TensorDataset(x, labels))
    return SemiSupervisedDataModule(source, val_size=0, batch_size=batch_size, **arguments)


def weighted_by_hand(logits, y, weights):
    """torch's formula: the sum of weighted losses over the sum of weights, in float64."""
    log_p = logits.double().log_softmax(1)
    w = torch.tensor(weights, dtype=torch.float64)[y]
    return float((-log_p[range(len(y)), y] * w).sum() / w.sum())


class TestBalancedWeights:
    def test_multiclass_is_that_of_scikit_learn(self):
        labels = torch.randint(4, (200,), generator=torch.Generator().manual_seed(1)).square() % 4
        expected = compute_class_weight("balanced", classes=labels.unique().numpy(), y=labels.numpy())
        found = balanced_weights(torch.cat([labels, torch.tensor([-100, -100])]), "multiclass")
        assert found[labels.unique()].tolist() == pytest.approx(expected.tolist())

    @pytest.mark.filterwarnings("ignore:class_weights")
    def test_a_class_without_labels(self):
        assert balanced_weights(torch.tensor([0, 0, 2]), "multiclass", 4).tolist() == pytest.approx([0.75, 1, 1.5, 1])

    def test_of_probabilities_each_class_has_the_same_weight_in_sum(self):
        y = torch.tensor([[0.9, 0.1, 0], [0.8, 0.1, 0.1], [1, 0, 0], [NAN, NAN, NAN]])
        found = balanced_weights(y, "multiclass").double()
        assert (found * y[:3].double().sum(dim=0)).tolist() == pytest.approx([1, 1, 1])
        classes = torch.tensor([0, 0, 1])
        one_hot = nn.functional.one_hot(classes).float()
        assert balanced_weights(one_hot, "multiclass").tolist() == balanced_weights(classes, "multiclass").tolist()

    def test_labels_that_cannot_be(self):
        with pytest.raises(InputError, match="balanced needs whole class numbers as labels, got 0.5"):
            balanced_weights(torch.tensor([0, 0.5, NAN]), "multiclass")
        for task in ("multiclass", "binary", "multilabel"):
            with pytest.raises(InputError, match="counts the labels that training may see, but there are none"):
                balanced_weights(torch.full((3,), -100), task)

    def test_binary_and_multilabel(self):
        assert balanced_weights(torch.tensor([1.0, 0, 0, NAN, 0]), "binary").tolist() == [3]
        assert balanced_weights(torch.tensor([1, 0, 0, -100]), "binary").tolist() == [2]
        rows = torch.tensor([[1.0, 1], [0, NAN], [0, 0], [0, 1]])
        assert balanced_weights(rows, "multilabel").tolist() == pytest.approx([3, 0.5])


class TestLoss:
    @pytest.mark.parametrize("weights", ["balanced", [1.0, 2.0, 5.0]])
    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_of_training_by_hand(self, quiet_trainer, weights, accumulate):
        """Validation stays unweighted: runs with and without weights compare."""
        student = nn.Linear(4, 3)
        module = SupervisedModule(student, class_weights=weights, optimizer=still)
        trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=accumulate, limit_train_batches=1.0)
        made = data(batch_size=10 if accumulate == 1 else 4)
        trainer.fit(module, datamodule=made, val_dataloaders=None)
        used = [10 / 18, 10 / 9, 10 / 3] if weights == "balanced" else weights
        if accumulate == 1:
            expected = weighted_by_hand(student(X), Y, used)
            assert trainer.callback_metrics["train/hard"].item() == pytest.approx(expected, rel=1e-5)
        (found,) = quiet_trainer(limit_val_batches=1.0).validate(
            module, DataLoader(TensorDataset(X, Y), 3), verbose=False
        )
        plain = nn.functional.cross_entropy(student(X).double(), Y).item()
        assert found["val/loss"] == pytest.approx(plain, rel=1e-5)

    @pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
    @pytest.mark.parametrize("own", [False, True])
    def test_of_another_precision(self, quiet_trainer, precision, own):
        weights = [1.0, 2.0, 5.0]
        options = {"hard_loss": nn.CrossEntropyLoss(torch.tensor(weights))} if own else {"class_weights": weights}
        module = SupervisedModule(nn.Linear(4, 3), optimizer=still, **options)
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0, precision=precision)
        trainer.fit(module, datamodule=data(batch_size=10))
        expected = weighted_by_hand(module.student(X.to(module.student.weight)), Y, weights)
        assert trainer.callback_metrics["train/hard"].item() == pytest.approx(expected, rel=1e-2)

    def test_of_a_network_in_float64(self):
        """Without a trainer."""
        for options in ({"class_weights": [1, 2, 5]}, {"hard_loss": nn.CrossEntropyLoss(torch.tensor([1.0, 2, 5]))}):
            module = SupervisedModule(nn.Linear(4, 3).double(), **options)
            expected = weighted_by_hand(module(X.double()), Y, [1.0, 2.0, 5.0])
            assert module.training_step((X.double(), Y), 0).item() == pytest.approx(expected, rel=1e-12)

    def test_pos_weight_of_many_labels(self):
        y = torch.tensor([[1.0, 0], [0, NAN], [0, 1]])
        module = SupervisedModule(nn.Linear(4, 2), task="multilabel", class_weights=[3.0, 0.5])
        logits = module(X[:3])
        loss = module.training_step(Batch(X[:3], y), 0)
        p, w = logits.double().sigmoid(), torch.tensor([3, 0.5]).double()
        terms = -(w * y * p.log() + (1 - y) * (1 - p).log())
        assert loss.item() == pytest.approx(terms[~y.isnan()].mean().item(), rel=1e-5)

    def test_label_smoothing_stays(self):
        loss = nn.CrossEntropyLoss(label_smoothing=0.2)
        module = SupervisedModule(nn.Linear(4, 3), hard_loss=loss, class_weights=[1.0, 2.0, 5.0])
        expected = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]), label_smoothing=0.2)(module(X), Y)
        assert module.training_step((X, Y), 0).item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss.weight is None

    def test_dense_labels_take_a_list(self):
        y = torch.tensor([[[0, 1], [2, -100]]])
        module = SupervisedModule(nn.Conv2d(4, 3, 1), class_dim=1, class_weights=[1.0, 2.0, 5.0])
        x = torch.randn(1, 4, 2, 2)
        logits = module(x).movedim(1, -1).reshape(-1, 3)[:3]
        expected = weighted_by_hand(logits, torch.tensor([0, 1, 2]), [1.0, 2.0, 5.0])
        assert module.training_step((x, y), 0).item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("method", ["distill", "ensemble", "hint", "pseudo", "peer"])
    def test_of_every_method(self, quiet_trainer, method):
        def network():
            return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

        options = {"class_weights": "balanced", "optimizer": still}
        module = {
            "distill": lambda: DistillModule(network(), Teacher(network()), **options),
            "ensemble": lambda: EnsembleDistillModule(network(), [network(), network()], **options),
            "hint": lambda: HintModule(network(), network(), hints={"1": "1"}, hint_epochs=0, **options),
            "pseudo": lambda: PseudoLabelModule(network(), **options),
            "peer": lambda: CoTeachingModule(network(), network(), forget_rate=0.0, **options),
        }[method]()
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0)
        more = (torch.cat([Y, torch.full((2,), -100)]), torch.cat([X, X[:2]])) if method == "pseudo" else (Y, X)
        trainer.fit(module, datamodule=data(*more, batch_size=12))
        expected = weighted_by_hand(module.student(X), Y, [10 / 18, 10 / 9, 10 / 3])
        assert trainer.callback_metrics["train/hard"].item() == pytest.approx(expected, rel=1e-5)

    def test_checkpoints_do_not_hold_them(self, quiet_trainer, tmp_path):
        module = SupervisedModule(nn.Linear(4, 3), class_weights="balanced")
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(module, datamodule=data())
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        assert module.state_dict().keys() == {"student.weight", "student.bias"}
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(
            SupervisedModule(nn.Linear(4, 3), class_weights="balanced"),
            datamodule=data(),
            ckpt_path=tmp_path / "x.ckpt",
        )


@pytest.mark.filterwarnings("ignore:class_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": "even"}, "class_weights must be balanced or a list of numbers, got 'even'"),
        ({"class_weights": []}, "class_weights must be finite numbers"),
        ({"class_weights": [1.0, -1.0]}, "class_weights must be finite numbers"),
        ({"class_weights": [1.0, NAN]}, "class_weights must be finite numbers"),
        ({"class_weights": [0.0, 0.0]}, "not all of them 0"),
        ({"class_weights": [1.0, 1e39]}, "class_weights must be finite numbers"),
        ({"class_weights": 3.0}, "not all of them 0, got 3.0"),
        ({"class_weights": torch.ones(2, 3)}, "class_weights must be finite numbers"),
        ({"class_weights": "balanced", "task": "regression"}, "got task: regression"),
        ({"class_weights": [1.0], "hard_loss": nn.MultiMarginLoss()}, "got MultiMarginLoss for task: multiclass"),
        ({"class_weights": [1.0], "hard_loss": nn.CrossEntropyLoss(torch.ones(3))}, "hard_loss has weights of its own"),
        ({"class_weights": "balanced", "class_dim": 1}, "balanced counts one label a sample"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        SupervisedModule(nn.Linear(4, 3), **arguments)


def test_fits_that_cannot_be(quiet_trainer):
    module = SupervisedModule(nn.Linear(4, 3), class_weights="balanced")
    with pytest.raises(InputError, match=r"needs a datamodule with visible_labels\(\).*got no datamodule"):
        quiet_trainer().fit(module, DataLoader(TensorDataset(X, Y)))
    with pytest.raises(InputError, match="is computed at the start of a fit"):
        SupervisedModule(nn.Linear(4, 3), class_weights="balanced").training_step((X, Y), 0)
    with pytest.raises(InputError, match="both correct the imbalance"):
        quiet_trainer().fit(module, datamodule=data(sampler="balanced"))
    with pytest.raises(InputError, match=r"class_weights must hold one number for each of the student's 3 outputs"):
        quiet_trainer().fit(SupervisedModule(nn.Linear(4, 3), class_weights=[1.0, 2.0]), datamodule=data())


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda values: [*np.array(values, dtype=np.float32)]])
def test_a_tensor_is_a_list(kind):
    module = SupervisedModule(nn.Linear(4, 3), class_weights=kind([1.0, 2.0, 5.0]))
    assert module.training_loss.weight.tolist() == [1, 2, 5]


def test_names_in_the_log(quiet_trainer, caplog):
    caplog.set_level("INFO")
    made = SemiSupervisedDataModule(Digits(), labeled=2, batch_size=32)
    quiet_trainer().fit(SupervisedModule(DigitsCNN(4), class_weights="balanced"), datamodule=made)
    assert "class_weights: 0 1, 1 1, 2 1" in caplog.text
