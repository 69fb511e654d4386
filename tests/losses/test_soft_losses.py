"""What all soft losses share: rows and their mean, gradients, precision, extreme logits, no rows, refused shapes."""

import copy
import math

import pytest
import torch

from kd_lightning.errors import InputError
from kd_lightning.losses import (
    ConditionalLoss,
    DISTLoss,
    DKDLoss,
    HardDistillationLoss,
    JSDLoss,
    KDLoss,
    MLKDLoss,
    NKDLoss,
    ReverseKLLoss,
    RLDLoss,
    TTMLoss,
    WTTMLoss,
)

LOSSES = {
    "KD": lambda **o: KDLoss(2.0, **o),
    "KD, standardized": lambda **o: KDLoss(2.0, standardize=True, **o),
    "KD, multilabel": lambda **o: KDLoss(2.0, "multilabel", **o),
    "DKD": lambda **o: DKDLoss(0.5, 2.0, 2.0, **o),
    "DKD, standardized": lambda **o: DKDLoss(0.5, 2.0, 2.0, standardize=True, **o),
    "DIST": lambda **o: DISTLoss(1.5, 0.5, 2.0, **o),
    "TTM": lambda **o: TTMLoss(0.3, **o),
    "WTTM": lambda **o: WTTMLoss(0.3, **o),
    "NKD": lambda **o: NKDLoss(0.7, 2.0, **o),
    "RLD": lambda **o: RLDLoss(0.5, 2.0, 2.0, 1.5, **o),
    "MLKD": lambda **o: MLKDLoss([1.0, 3.0], 0.5, 2.0, 0.7, **o),
    "JS": lambda **o: JSDLoss(2.0, **o),
    "JS, multilabel": lambda **o: JSDLoss(2.0, "multilabel", **o),
    "reverse KL": lambda **o: ReverseKLLoss(2.0, **o),
    "reverse KL, multilabel": lambda **o: ReverseKLLoss(2.0, "multilabel", **o),
    "hard": lambda **o: HardDistillationLoss(**o),
    "conditional": lambda **o: ConditionalLoss(KDLoss(2.0), 0.3, **o),
    "hard, multilabel": lambda **o: HardDistillationLoss("multilabel", **o),
}
OF_BATCH = {"DIST", "MLKD"}  # a row's value depends on the other rows
NOT_ZERO = {"NKD", "hard", "hard, multilabel", "TTM", "WTTM"}  # cross-entropies; a teacher softened alone
TARGET = torch.tensor([0, 2, 1, -100, 0, 1, 3])
every_loss = pytest.mark.parametrize("name", LOSSES)


def randn(seed=0, rows=7, classes=4, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, classes, generator=generator, dtype=torch.float64).mul(scale).unbind()


@every_loss
def test_rows_and_their_mean(name):
    student, teacher = randn()
    loss = LOSSES[name](reduction="none")
    rows = loss(student, teacher, TARGET)
    assert rows.shape == (7,) and rows.dtype == torch.float64
    torch.testing.assert_close(LOSSES[name]()(student, teacher, TARGET), rows.mean())
    if name not in OF_BATCH:
        alone = [LOSSES[name]()(student[i : i + 1], teacher[i : i + 1], TARGET[i : i + 1]) for i in range(7)]
        torch.testing.assert_close(torch.stack(alone), rows)
    assert "reduction='none'" in loss.extra_repr()


@every_loss
def test_order_of_samples_and_classes_does_not_matter(name):
    student, teacher = randn()
    rows, classes = torch.tensor([3, 0, 6, 2, 1, 5, 4]), torch.tensor([2, 0, 3, 1])
    moved = [logits[rows][:, classes] for logits in (student, teacher)]
    target = torch.where(TARGET < 0, TARGET, classes.argsort()[TARGET.clamp(min=0)])[rows]
    loss = LOSSES[name](reduction="none")
    torch.testing.assert_close(loss(*moved, target), loss(student, teacher, TARGET)[rows])


@every_loss
def test_equal_logits_give_0_and_no_gradient(name):
    _, teacher = randn(1)
    student, target = teacher.float().requires_grad_(), torch.where(TARGET < 0, TARGET, teacher.argmax(dim=1))
    value = LOSSES[name]()(student, teacher.float(), target)
    assert value > 0 if name in NOT_ZERO else value.abs() < 1e-6
    value.backward()
    assert name in NOT_ZERO or student.grad.abs().max() < 1e-3


@every_loss
def test_gradcheck(name):
    student, teacher = (z.requires_grad_() for z in randn(2))
    loss = LOSSES[name](reduction="none")
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach(), TARGET), [student])


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float(name, dtype):
    student, teacher = (z.to(dtype) for z in randn(3))
    student.requires_grad_()
    value = LOSSES[name]()(student, teacher, TARGET)
    value.backward()
    assert value.dtype == torch.float32 and student.grad.dtype == dtype
    expected = LOSSES[name]()(student.detach().double(), teacher.double(), TARGET)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype):  # whose products of matrices would be of half precision
        inside = LOSSES[name]()(student.detach().float(), teacher.float(), TARGET)
    torch.testing.assert_close(inside.double(), expected, rtol=1e-5, atol=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_and_constant_logits_stay_finite(name, dtype):
    student, teacher = (1e4 * z.sign() for z in randn(4))
    student[0], teacher[1], student[2], teacher[2] = 0.1, 0.1, 1e4, -1e4
    student = student.to(dtype).requires_grad_()
    rows = LOSSES[name](reduction="none")(student, teacher.to(dtype), TARGET)
    rows.sum().backward()
    assert rows.isfinite().all() and (rows >= 0).all() and rows.sum() > 0
    assert student.grad.isfinite().all()


@every_loss
def test_no_rows_are_zero_in_the_graph(name):
    student = torch.zeros(0, 4, requires_grad=True)
    value = LOSSES[name]()(student, torch.zeros(0, 4), TARGET[:0])
    value.backward()
    assert value == 0 and student.grad.shape == (0, 4)
    assert LOSSES[name](reduction="none")(student, torch.zeros(0, 4), TARGET[:0]).shape == (0,)


@every_loss
def test_teacher_and_target_stay_as_they_are(name):
    student, teacher = randn(5)
    before = teacher.clone(), TARGET.clone(), student.clone()
    loss = LOSSES[name]()
    value = loss(student, teacher, TARGET)
    assert teacher.equal(before[0]) and TARGET.equal(before[1]) and student.equal(before[2])
    assert copy.deepcopy(loss)(student, teacher, TARGET) == value
    assert not loss.state_dict() and not [*loss.parameters()]


@every_loss
def test_bad_input(name):
    with pytest.raises(InputError, match=r"reduction must be one of \('mean', 'none'\), got 'sum'"):
        LOSSES[name](reduction="sum")
    for student, teacher, message in (
        ((7, 4), (7, 3), r"got \(7, 4\) and \(7, 3\)"),
        ((7, 4), (6, 4), r"got \(7, 4\) and \(6, 4\)"),
        ((7,), (7,), r"must have 2 dimensions"),
    ):
        with pytest.raises(InputError, match=message):
            LOSSES[name]()(torch.zeros(student), torch.zeros(teacher), TARGET)
    if "multilabel" not in name:
        with pytest.raises(InputError, match="at least 2 classes"):
            LOSSES[name]()(torch.zeros(7, 1), torch.zeros(7, 1), TARGET)


@pytest.mark.parametrize("make", [KDLoss, JSDLoss, ReverseKLLoss, HardDistillationLoss])
def test_losses_of_every_task(make):
    """Binary is multiclass with a logit of 0; multilabel is the mean of binary ones."""
    student, teacher = randn(6)
    rows = make(task="multilabel", reduction="none")(student, teacher)
    columns = [make(task="binary", reduction="none")(s, t) for s, t in zip(student.T, teacher.T, strict=True)]
    torch.testing.assert_close(torch.stack(columns).mean(dim=0), rows)
    s, t = student[:, 0], teacher[:, :1]
    torch.testing.assert_close(make(task="binary", reduction="none")(s, t), columns[0])
    padded = [torch.stack([z.flatten(), torch.zeros(7)], dim=1) for z in (s, t)]
    torch.testing.assert_close(make(reduction="none")(*padded), columns[0])
    with pytest.raises(InputError, match=r"task must be one of .*'binary'.* got 'regression'"):
        make(task="regression")


@pytest.mark.parametrize("make", [KDLoss, DKDLoss, DISTLoss, NKDLoss, RLDLoss, JSDLoss, ReverseKLLoss])
def test_temperature_is_checked_and_may_be_annealed(make):
    student, teacher = randn(7)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match=rf"temperature must be finite and above 0, got {bad}"):
            make(temperature=bad)
    loss = make()
    loss.temperature = 3.0
    assert loss(student, teacher, TARGET) == make(temperature=3.0)(student, teacher, TARGET)
    loss.temperature = 0.0
    with pytest.raises(InputError, match="temperature must be finite and above 0"):
        loss(student, teacher, TARGET)


@pytest.mark.parametrize("make", [DKDLoss, NKDLoss, RLDLoss])
class TestTargetClass:
    def test_unlabeled_rows_take_the_teachers_class(self, make):
        student, teacher = randn(8)
        filled = torch.where(TARGET < 0, teacher.argmax(dim=1), TARGET)
        assert make()(student, teacher, TARGET) == make()(student, teacher, filled)
        assert make()(student, teacher, torch.full((7,), -100)) == make()(student, teacher, teacher.argmax(dim=1))

    def test_probabilities_mean_the_most_likely_class(self, make):
        """As of mixed samples; a row of NaN has no label."""
        student, teacher = (logits[:4] for logits in randn(9))
        soft = torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 1, 0], [0.2, 0.5, 0, 0.3], [torch.nan] * 4])
        assert torch.equal(make()(student, teacher, soft), make()(student, teacher, TARGET[:4]))

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (None, "target must be given to {}, got None"),
            (torch.zeros(3).long(), r"target must be long of shape \(7,\), got torch.int64 of shape \(3,\)"),
            (torch.zeros(7, 2), r"got torch.float32 of shape \(7, 2\)"),
            (torch.zeros(7), r"got torch.float32 of shape \(7,\)"),
        ],
    )
    def test_bad_targets(self, make, target, message):
        with pytest.raises(InputError, match=message.format(make.__name__)):
            make()(*randn(), target)
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            make()(*randn(), TARGET + 1)
