"""What losses declare: row fields, state, and soft losses' options."""

import inspect

import pytest
import torch
from torch import nn

from kd_lightning import Batch, InputError, SupervisedModule
from kd_lightning.losses import (
    CoarseLoss,
    ConditionalLoss,
    DISTLoss,
    DKDLoss,
    EarlyLearningLoss,
    ForwardCorrectionLoss,
    GeneralizedCrossEntropyLoss,
    HardDistillationLoss,
    JSDLoss,
    KDLoss,
    LabelKindLoss,
    LogitAdjustmentLoss,
    MLKDLoss,
    NKDLoss,
    ReverseKLLoss,
    RLDLoss,
    SymmetricCrossEntropyLoss,
    TTMLoss,
    WTTMLoss,
)
from kd_lightning.losses.protocols import (
    RowLoss,
    SoftLoss,
    StatefulLoss,
    check_row_fields,
    is_stateful,
    reset_state,
    row_fields_of,
    row_values,
    standardizes,
    supports_top_k,
    temperature_of,
)

HARD = [
    CoarseLoss([[0], [1]]),
    EarlyLearningLoss(),
    ForwardCorrectionLoss([[1.0, 0.0], [0.0, 1.0]]),
    GeneralizedCrossEntropyLoss(),
    LabelKindLoss(nn.CrossEntropyLoss()),
    LabelKindLoss(EarlyLearningLoss()),
    LabelKindLoss(nn.CrossEntropyLoss(), clean=EarlyLearningLoss()),
    LogitAdjustmentLoss(priors=[3, 1]),
    SymmetricCrossEntropyLoss(),
    nn.CrossEntropyLoss(),
    nn.BCEWithLogitsLoss(),
]


class Loss(nn.Module):
    """A user's loss, of which the tests change the declarations."""

    reduction = "mean"

    def rows(self, logits):
        return logits.sum(dim=1) if self.reduction == "none" else logits.sum()

    def forward(self, logits, target, index=None):
        return self.rows(logits)


class Kind(Loss):
    def forward(self, logits, target, kind=None):
        return self.rows(logits)


class Both(Loss):
    def forward(self, logits, target, index=None, kind=None):
        return self.rows(logits)


class Anything(Loss):
    def forward(self, logits, target, **fields):
        return self.rows(logits)


class Declared(Loss):
    row_fields = ("index",)
    is_stateful = False


class Stateful(Declared):
    is_stateful = True

    def __init__(self):
        super().__init__()
        self.resets = 0

    def reset(self):
        self.resets += 1


def declaring(base, **declarations):
    return type(base.__name__, (base,), declarations)()


@pytest.mark.parametrize("loss", HARD, ids=lambda loss: type(loss).__name__)
def test_our_losses_declare_what_they_take(loss):
    check_row_fields("hard_loss", loss)
    SupervisedModule(nn.Identity(), hard_loss=loss)
    assert isinstance(loss, RowLoss) == bool(row_fields_of(loss))


@pytest.mark.parametrize(
    ("loss", "fields"),
    [
        (EarlyLearningLoss(), ("index",)),
        (nn.CrossEntropyLoss(), ()),
        (LabelKindLoss(nn.CrossEntropyLoss()), ("kind",)),
        (LabelKindLoss(EarlyLearningLoss()), ("kind", "index")),
        (LabelKindLoss(nn.CrossEntropyLoss(), clean=Declared()), ("kind", "index")),
        (LabelKindLoss(declaring(Kind, row_fields=("kind",))), ("kind",)),
    ],
)
def test_row_fields(loss, fields):
    assert row_fields_of(loss) == fields
    x, index, kind = torch.zeros(2, 3), torch.arange(2), torch.zeros(2)
    whole = {"index": index, "kind": kind}
    assert row_values(loss, Batch(x, **whole)) == {name: whole[name] for name in fields}
    assert row_values(loss, Batch(x)) == {}


class TestState:
    @pytest.mark.parametrize(
        ("loss", "stateful"),
        [
            (EarlyLearningLoss(), True),
            (LabelKindLoss(EarlyLearningLoss()), True),
            (LabelKindLoss(nn.CrossEntropyLoss(), clean=LabelKindLoss(EarlyLearningLoss())), True),
            (LabelKindLoss(nn.CrossEntropyLoss()), False),
            (LabelKindLoss(Declared()), False),
            (nn.CrossEntropyLoss(), False),
            (Declared(), False),
            (Stateful(), True),
        ],
    )
    def test_is_stateful(self, loss, stateful):
        assert is_stateful(loss) == stateful

    def test_early_learning(self):
        loss = EarlyLearningLoss()
        assert isinstance(loss, StatefulLoss)
        loss(torch.zeros(2, 3), torch.tensor([0, 1]), torch.arange(2))
        assert loss.averages.numel()
        reset_state(LabelKindLoss(loss))
        assert loss.averages.numel() == 0

    def test_a_fit_resets_each_stateful_part_once(self, quiet_trainer, loader):
        inner, other = Stateful(), Stateful()
        other.is_stateful = False
        module = SupervisedModule(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), hard_loss=LabelKindLoss(inner, clean=other)
        )
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(module, loader())
        assert (inner.resets, other.resets) == (1, 0)
        trainer.test(module, loader(), verbose=False)
        assert inner.resets == 1

    @pytest.mark.parametrize(("make", "calls"), [(Stateful, 1), (Declared, 0)])
    def test_only_stateful_losses_run_without_rows(self, monkeypatch, make, calls):
        seen = []
        monkeypatch.setattr(make, "forward", lambda self, z, y, index=None: seen.append(index.tolist()) or z.sum())
        batch = Batch(torch.zeros(2, 4), torch.tensor([-100, -100]), torch.arange(2))
        SupervisedModule(nn.Identity(), hard_loss=make()).losses(batch)
        assert seen == [[]] * calls


def test_no_signature_is_inspected_in_a_step(monkeypatch):
    module = SupervisedModule(nn.Linear(4, 4), hard_loss=LabelKindLoss(EarlyLearningLoss()))
    monkeypatch.setattr(inspect, "signature", lambda *_: pytest.fail("signature inspected"))
    module.training_step(Batch(torch.zeros(2, 4), torch.tensor([0, 1]), torch.arange(2)), 0)


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        (Loss(), ("forward takes index", "add row_fields = ('index',)")),
        (Kind(), ("forward takes kind", "add row_fields = ('kind',)")),
        (Both(), ("forward takes kind and index", "add row_fields = ('kind', 'index')")),
        (declaring(Loss, row_fields=("index",)), ("is_stateful = True", "reset()", "is_stateful = False")),
        (declaring(Anything, row_fields=("index",)), ("is_stateful = True", "reset()", "is_stateful = False")),
        (declaring(Loss, row_fields="index"), ("row_fields must be a tuple of names", "got 'index'")),
        (declaring(Loss, row_fields=["index"]), ("row_fields must be a tuple of names", "got ['index']")),
        (declaring(Loss, row_fields=("view",)), ("out of ('kind', 'index')", "got ('view',)")),
        (declaring(Declared, row_fields=("kind",)), ("row_fields is ('kind',)", "forward takes ('index',)")),
        (declaring(Loss, row_fields=("index",), is_stateful=True), ("is stateful", "method reset()")),
    ],
)
def test_a_wrong_declaration_is_refused_once(loss, parts):
    for make, name in (
        (lambda: SupervisedModule(nn.Identity(), hard_loss=loss), "hard_loss"),
        (lambda: LabelKindLoss(loss), "noisy"),
        (lambda: LabelKindLoss(nn.CrossEntropyLoss(), clean=loss), "clean"),
    ):
        with pytest.raises(InputError) as caught:
            make()
        assert all(part in str(caught.value) for part in (f"{name}: {type(loss).__name__}", *parts))


@pytest.mark.parametrize(
    "loss",
    [
        Declared(),
        Stateful(),
        declaring(Anything, row_fields=("kind",)),
        declaring(Kind, row_fields=()),  # its kind is another thing
        declaring(Anything, row_fields=("index", "kind"), is_stateful=False),
    ],
)
def test_a_right_declaration_is_accepted(loss):
    SupervisedModule(nn.Identity(), hard_loss=loss)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (KDLoss(2.0), (2.0, False, True)),
        (KDLoss(3.0, standardize=True), (3.0, True, False)),
        (KDLoss(3.0, task="binary"), (3.0, False, False)),
        (DKDLoss(temperature=5.0), (5.0, False, True)),
        (DKDLoss(temperature=5.0, standardize=True), (5.0, True, False)),
        (DISTLoss(temperature=1.5), (1.5, False, False)),
        (TTMLoss(exponent=0.25), (4.0, False, True)),
        (WTTMLoss(exponent=0.25), (4.0, False, False)),
        (NKDLoss(temperature=2.0), (2.0, False, True)),
        (RLDLoss(temperature=2.0), (2.0, False, False)),
        (MLKDLoss([1.0, 3.0, 9.0]), (3.0, False, False)),
        (JSDLoss(2.0), (2.0, False, False)),
        (ReverseKLLoss(2.0), (2.0, False, False)),
        (HardDistillationLoss(), (1.0, False, True)),
        (HardDistillationLoss("binary"), (1.0, False, False)),
        (ConditionalLoss(KDLoss(3.0)), (3.0, False, True)),
        (ConditionalLoss(KDLoss(3.0, standardize=True)), (3.0, True, False)),
        (nn.MSELoss(), (1.0, False, False)),
    ],
)
def test_soft_losses(loss, found):
    assert (temperature_of(loss), standardizes(loss), supports_top_k(loss)) == found
    assert isinstance(loss, SoftLoss) == (not isinstance(loss, nn.MSELoss))
