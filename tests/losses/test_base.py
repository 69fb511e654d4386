"""What all losses on labels share: checks, precision, rows, huge logits; and the functions that modules call."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.losses import (
    CoarseLoss,
    EarlyLearningLoss,
    ForwardCorrectionLoss,
    GeneralizedCrossEntropyLoss,
    LabelKindLoss,
    LogitAdjustmentLoss,
    SymmetricCrossEntropyLoss,
)
from kd_lightning.losses.base import (
    check_transition,
    class_weights,
    gather_target,
    log_probabilities,
    mean_loss,
    per_row,
)

T = [[0.5, 0.25, 0.125, 0.125], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]]
LOSSES = {
    "generalised": lambda **kw: GeneralizedCrossEntropyLoss(0.7, **kw),
    "generalised, truncated": lambda **kw: GeneralizedCrossEntropyLoss(0.7, 0.3, **kw),
    "symmetric": lambda **kw: SymmetricCrossEntropyLoss(0.5, 2.0, -3.0, **kw),
    "forward": lambda **kw: ForwardCorrectionLoss(T, **kw),
    "early learning": lambda **kw: EarlyLearningLoss(**kw).eval(),
    "coarse": lambda **kw: CoarseLoss([[0], [1, 3], [2]], **kw),
    "logit adjustment": lambda **kw: LogitAdjustmentLoss(1.0, [9, 3, 2, 1], **kw),
    "by kind": lambda **kw: LabelKindLoss(GeneralizedCrossEntropyLoss(), **kw),
}
TARGET = torch.tensor([0, 2, 1, 2, 0, 1])
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


def randn(seed=0, rows=6, classes=4, scale=2.0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@every_loss
def test_rows_and_their_mean(make):
    logits = randn()
    rows = make(reduction="none")(logits, TARGET)
    assert rows.shape == (6,) and rows.dtype == torch.float64
    alone = torch.stack([make()(logits[i : i + 1], TARGET[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(rows, alone)
    torch.testing.assert_close(make()(logits, TARGET), rows.mean())
    torch.testing.assert_close(make()(logits, TARGET.int()), rows.mean())
    assert make(reduction="none").extra_repr().endswith("reduction='none'") or make is LOSSES["by kind"]


@every_loss
def test_gradcheck(make):
    logits = randn(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: make(reduction="none")(z, TARGET), [logits])


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float(make, dtype):
    logits = randn(2).to(dtype).requires_grad_()
    value = make()(logits, TARGET)
    value.backward()
    assert value.dtype == torch.float32 and logits.grad.dtype == dtype
    torch.testing.assert_close(value.double(), make()(logits.detach().double(), TARGET), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype):
        assert make()(logits, TARGET).dtype == torch.float32


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_huge_logits_stay_finite(make, dtype):
    logits = (1e4 * randn(3).sign()).to(dtype)
    logits[0] = torch.tensor([-1e4, 1e4, 1e4, 1e4])  # as wrong as can be
    logits[1] = torch.tensor([-1e4, -1e4, 1e4, -1e4])  # as right
    logits.requires_grad_()
    rows = make(reduction="none")(logits, TARGET)
    rows.sum().backward()
    assert rows.isfinite().all() and (rows >= 0).all()
    assert rows[0] > rows[1] + 0.5
    assert logits.grad.isfinite().all()


@every_loss
def test_no_rows_are_zero_in_the_graph(make):
    logits = torch.zeros(0, 4, requires_grad=True)
    value = make()(logits, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value == 0 and logits.grad.shape == (0, 4)
    assert make(reduction="none")(logits, torch.zeros(0, dtype=torch.long)).shape == (0,)


@every_loss
def test_bad_input(make):
    with pytest.raises(InputError, match=r"reduction must be one of \('mean', 'none'\), got 'sum'"):
        make(reduction="sum")
    loss, target = make(), torch.zeros(6, dtype=torch.long)
    for logits, labels, message in (
        (randn().flatten(), target, r"logits \(B, C\) and class indices \(B,\), got \[24\] and \[6\] of torch.int64"),
        (randn(), target[:5], r"got \[6, 4\] and \[5\]"),
        (randn(), target.unsqueeze(1), r"got \[6, 4\] and \[6, 1\]"),
        (randn(), target.float(), r"\[6\] of torch.float32"),
        (randn(), target - 100, "target must be 0 ... [23], got -100"),
        (randn(), target + 4, "target must be 0 ... [23], got 4"),
    ):
        with pytest.raises(InputError, match=message):
            loss(logits, labels)


def test_log_probabilities_and_gather_target():
    expected = log_softmax(randn().numpy(), axis=1)
    found = log_probabilities(randn(), TARGET)
    assert found.numpy() == pytest.approx(expected, rel=1e-12)
    assert gather_target(found, TARGET).tolist() == pytest.approx(
        [row[c] for row, c in zip(expected, TARGET, strict=True)]
    )


class Own(nn.Module):
    """Records the row fields that it gets."""

    row_fields = ("index",)
    is_stateful = False

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction
        self.seen = []

    def forward(self, logits, target, index=None):
        self.seen.append((self.reduction, index))
        return logits[:, 0]


class Broken(Own):
    row_fields = ()

    def forward(self, logits, target):
        raise RuntimeError("broken")


class TestPerRow:
    def test_whatever_the_reduction(self):
        expected = -log_softmax(randn().numpy(), axis=1)[np.arange(6), TARGET]
        for reduction in ("mean", "none", "sum"):
            loss = nn.CrossEntropyLoss(reduction=reduction)
            assert per_row(loss, randn(), TARGET, kind=1, index=2).numpy() == pytest.approx(expected)
            assert loss.reduction == reduction

    def test_passes_the_declared_fields(self):
        loss = Own()
        per_row(loss, randn(), TARGET, kind="k", index="i")
        per_row(loss, randn(), TARGET)
        assert loss.seen == [("none", "i"), ("none", None)]

    def test_reduction_survives_an_error(self):
        loss = Broken()
        with pytest.raises(RuntimeError, match="broken"):
            per_row(loss, randn(), TARGET)
        assert loss.reduction == "mean"

    def test_no_reduction(self):
        with pytest.raises(InputError, match="hard_loss: Softmax has no reduction, which must be 'none' to weight"):
            per_row(nn.Softmax(dim=1), randn(), TARGET)

    def test_no_value_for_each_row(self):
        """As of a loss that ignores its reduction: weights would multiply the mean of all rows."""

        class Scalar(Own):
            row_fields = ()

            def forward(self, logits, target):
                return logits.mean()

        with pytest.raises(InputError, match=r"Scalar .* must return one value for each row, \[6\], got \[\]"):
            mean_loss(Scalar(), randn(), TARGET, torch.ones(6))


class TestClassWeights:
    WEIGHT = torch.tensor([2.0, 3.0, 5.0])

    @pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
    @pytest.mark.parametrize("ignored", [-100, 1])
    def test_are_what_torch_divides_by(self, kind, ignored):
        y, z = torch.tensor([0, 2, 1, 1]), torch.randn(4, 3).log_softmax(dim=1)
        for weight in (None, self.WEIGHT):
            loss = kind(weight, ignore_index=ignored)
            found = class_weights(loss, y)
            if weight is None and ignored == -100:
                assert found is None
                continue
            rows = kind(weight, ignore_index=ignored, reduction="none")(z, y)
            torch.testing.assert_close(rows.sum() / found.sum(), loss(z, y))
            torch.testing.assert_close(mean_loss(loss, z, y), loss(z, y))

    def test_other_losses(self):
        class Focal(nn.CrossEntropyLoss):
            def forward(self, logits, target):
                return logits.mean()

        y = torch.tensor([0, 2])
        assert class_weights(Focal(self.WEIGHT), y) is None
        assert mean_loss(Focal(self.WEIGHT), torch.ones(2, 3), y) == 1
        assert class_weights(nn.BCEWithLogitsLoss(self.WEIGHT), y) is None


class TestMean:
    """As a module takes it: the same whatever the reduction, and with weights of 1."""

    WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    LOSSES = (
        lambda **o: nn.CrossEntropyLoss(**o),
        lambda **o: nn.CrossEntropyLoss(weight=torch.arange(1.0, randn().shape[1] + 1).double(), **o),
    )

    @pytest.mark.parametrize("make", LOSSES, ids=["plain", "class weights"])
    def test_against_the_formula(self, make):
        by_class = make().weight if make().weight is not None else torch.ones(randn().shape[1], dtype=torch.float64)
        rows = -log_softmax(randn().numpy(), axis=1)[np.arange(6), TARGET] * by_class[TARGET].numpy()
        total = float(by_class[TARGET].sum())
        for reduction in ("mean", "none"):
            loss = make(reduction=reduction)
            assert float(mean_loss(loss, randn(), TARGET)) == pytest.approx(rows.sum() / total)
            assert float(mean_loss(loss, randn(), TARGET, torch.ones(6))) == pytest.approx(rows.sum() / total)
            weighted = (rows * self.WEIGHT.numpy()).sum() / total
            assert float(mean_loss(loss, randn(), TARGET, self.WEIGHT)) == pytest.approx(weighted)
            assert loss.reduction == reduction

    @pytest.mark.parametrize("make", LOSSES, ids=["plain", "class weights"])
    def test_no_rows(self, make):
        logits = randn()[:0].requires_grad_()
        mean_loss(make(), logits, TARGET[:0], self.WEIGHT[:0]).backward()
        assert float(mean_loss(make(), logits, TARGET[:0], self.WEIGHT[:0])) == 0

    def test_without_a_reduction(self):
        assert mean_loss(lambda logits, target: logits.sum(), randn(), TARGET) == randn().sum()


class TestTransition:
    def test_exact(self):
        found = check_transition(T)
        assert found.dtype == torch.float64 and found.tolist() == T
        assert check_transition(np.array(T)).tolist() == check_transition(torch.tensor(T)).tolist() == T
        check_transition([[1 / 3, 1 / 3, 1 / 3]] * 3)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ([0.2, 0.5, 0.2], "matrix: row 1 must sum to 1, got 0.9"),
            ([0.2, 0.5, 0.301], "matrix: row 1 must sum to 1, got 1.001"),
            ([0.2, 1.2, -0.4], r"matrix: row 1 must hold probabilities in \[0, 1\], got \[0.2, 1.2, -0.4\]"),
            ([float("nan"), 0.5, 0.5], "matrix: row 1 must hold probabilities"),
            ([0.5, 0.5], "matrix must be square, but row 1 of 3 has 2 entries"),
            ([0.25] * 4, "matrix must be square, but row 1 of 3 has 4 entries"),
        ],
    )
    def test_names_the_row(self, row, message):
        eye = torch.eye(3).tolist()
        with pytest.raises(InputError, match=message):
            check_transition([eye[0], row, eye[2]])
        with pytest.raises(InputError, match=message.replace("matrix", "transition")):
            check_transition([eye[0], row, eye[2]], "transition")

    @pytest.mark.parametrize("matrix", [[], [[1.0]]])
    def test_too_small(self, matrix):
        with pytest.raises(InputError, match=f"matrix must have at least 2 classes, got {len(matrix)}"):
            check_transition(matrix)


@every_loss
def test_copies_and_moves(make):
    """A loss is a module like others: double, deep copy, state dict."""
    loss = make()
    expected = loss(randn(), TARGET)
    torch.testing.assert_close(copy.deepcopy(loss).double()(randn(), TARGET), expected)
    fresh = make()
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh(randn(), TARGET), expected)
