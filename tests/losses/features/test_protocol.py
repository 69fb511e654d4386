"""What holds for every exported feature loss, whatever its formula."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses import features

SAMPLES = 16
ARGUMENTS = {"CRDLoss": {"negatives": SAMPLES}}  # those without a default that fits
OF_EQUAL_CHANNELS = {"SimKDLoss"}  # though they need no projector
SIZES = {"vector": (), "tokens": (9,), "map": (4, 6)}
LOSSES = [
    getattr(features, name)
    for name in features.__all__
    if isinstance(getattr(features, name), type) and issubclass(getattr(features, name), nn.Module)
]


def build(of, size, dtype=torch.float32):
    """Return a loss with its parameters, or raise InputError where it refuses features of this size."""
    loss, (student, teacher) = of(**ARGUMENTS.get(of.__name__, {})), pair(of, size, seed=2)
    torch.manual_seed(0)
    if hasattr(loss, "build"):
        loss.build(student.shape[1:], teacher.shape[1:], SAMPLES)
    loss(student, teacher, batch_of(student))  # some losses set a scale at the first batch
    return loss.to(dtype)


def is_allowed(of, size):
    try:
        with torch.random.fork_rng():
            build(of, size)
    except InputError:
        return False
    return True


def pair(of, size, rows=5, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    is_equal = getattr(of, "needs_projector", True) or of.__name__ in OF_EQUAL_CHANNELS
    channels = (6, 6) if is_equal else (4, 7)
    student, teacher = (torch.randn(rows, c, *size, generator=generator, dtype=torch.float64) for c in channels)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def batch_of(student, mask=None):
    return Batch(student.detach(), index=torch.arange(len(student)), mask=mask)


def value_of(loss, student, teacher, mask=None):
    """Call a copy of the loss with seeded random numbers, so that two calls give the same value."""
    torch.manual_seed(3)
    return copy.deepcopy(loss)(student, teacher, batch_of(student, mask))


def gradient_of(value, student):
    (gradient,) = torch.autograd.grad(value, student)
    return gradient


CASES = {f"{of.__name__}-{name}": (of, size) for of in LOSSES for name, size in SIZES.items() if is_allowed(of, size)}
of_each_case = pytest.mark.parametrize(("of", "size"), CASES.values(), ids=CASES)
with_positions = {name: case for name, case in CASES.items() if case[1]}
of_each_case_with_positions = pytest.mark.parametrize(("of", "size"), with_positions.values(), ids=with_positions)


def test_all_exported_losses_are_covered():
    assert len(LOSSES) >= 9 and {of for of, _ in CASES.values()} == {*LOSSES}


@pytest.mark.parametrize("of", LOSSES, ids=lambda of: of.__name__)
def test_features_that_do_not_fit_are_refused_in_one_line(of):
    for size in SIZES.values():
        if (of, size) not in CASES.values():
            with pytest.raises(InputError, match=r"^[^\n]+$"):
                build(of, size)


@of_each_case
def test_scalar_with_a_gradient_for_the_student_alone(of, size):
    loss, (student, teacher) = build(of, size), pair(of, size)
    value = loss(student, teacher, batch_of(student))
    assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    value.backward()
    assert teacher.grad is None
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@of_each_case
def test_gradient_in_float64(of, size):
    loss, (student, teacher) = build(of, size, torch.float64), pair(of, size, rows=3, dtype=torch.float64)
    assert value_of(loss, student, teacher).dtype == torch.float64
    teacher = teacher.detach()
    assert torch.autograd.gradcheck(lambda s: value_of(loss, s, teacher), [student], fast_mode=True)


@of_each_case
def test_no_value_is_read_which_would_wait_for_the_device(of, size, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # "meta" has none
    loss, (student, teacher) = build(of, size), pair(of, size)
    loss(student, teacher, batch_of(student))  # a loss may find out once whether its scale is set
    loss, student, teacher = (part.to("meta") for part in (loss, student, teacher))
    batch = Batch(student, index=torch.zeros(len(student), dtype=torch.long, device="meta"))
    assert loss(student, teacher, batch).device.type == "meta"


@of_each_case
@pytest.mark.parametrize("rows", [0, 1])
def test_empty_batches_and_single_samples_are_finite_and_in_the_graph(of, size, rows):
    loss, (student, teacher) = build(of, size), pair(of, size, rows)
    value = loss(student, teacher, batch_of(student))
    assert value.shape == () and value.isfinite() and value.requires_grad
    value.backward()
    assert student.grad.shape == student.shape and student.grad.isfinite().all()


@of_each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(of, size, dtype):
    loss, (student, teacher) = build(of, size), pair(of, size, dtype=dtype)
    value, exact = value_of(loss, student, teacher), value_of(loss, student.float(), teacher.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-6)
    gradient = gradient_of(value, student)
    assert gradient.dtype == dtype and gradient.isfinite().all()
    large = (student.detach() * 5e3).requires_grad_()  # the squares are beyond float16
    value = value_of(loss, large, teacher)
    assert value.isfinite() and gradient_of(value, large).isfinite().all()


@of_each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_under_autocast(of, size, dtype):
    loss, (student, teacher) = build(of, size), pair(of, size, dtype=dtype)
    plain = value_of(loss, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        value = value_of(loss, student, teacher)
    assert value.dtype == torch.float32
    # an own network of a loss computes in half precision, as a projector does
    torch.testing.assert_close(value, plain, rtol=5e-2 if [*loss.parameters()] else 1e-6, atol=1e-6)
    assert gradient_of(value, student).isfinite().all()


@of_each_case
@pytest.mark.parametrize("kind", ["zero", "one vector", "equal"])
def test_features_without_differences_have_finite_gradients(of, size, kind):
    loss, (student, teacher) = build(of, size), pair(of, size)
    if kind == "zero":
        student = torch.zeros_like(student)
    elif kind == "one vector":
        student = student.detach()[:1].expand_as(student).clone()
    elif student.shape == teacher.shape:
        student = teacher.detach().clone()
    student = student.detach().requires_grad_()
    for target in (teacher, torch.zeros_like(teacher)):
        value = value_of(loss, student, target)
        assert value.isfinite() and gradient_of(value, student).isfinite().all()
        assert gradient_of(value_of(loss, student, target), student).abs().max() < 1e4


@of_each_case_with_positions
def test_positions_that_do_not_count_are_left_out(of, size):
    loss, (student, teacher) = build(of, size), pair(of, size)
    mask = torch.ones(len(student), *size, dtype=torch.bool)
    value = value_of(loss, student, teacher)
    torch.testing.assert_close(value_of(loss, student, teacher, mask), value)  # all count
    mask[:, -1] = mask[0, 0] = False
    mask[1] = False  # a sample without any
    value = value_of(loss, student, teacher, mask)
    assert value.isfinite()
    gradient = gradient_of(value, student)
    assert gradient.isfinite().all()
    left_out = ~mask.unsqueeze(1)
    assert gradient.masked_select(left_out).abs().max() == 0 < gradient.abs().max()
    changed = [feature.detach().masked_fill(left_out, number) for feature, number in ((student, 7.0), (teacher, -9.0))]
    assert value_of(loss, *changed, mask) == value
    changed = [feature.masked_fill(left_out, math.nan).requires_grad_() for feature in changed]
    changed_value = value_of(loss, *changed, mask)
    assert changed_value == value and gradient_of(changed_value, changed[0]).isfinite().all()


@of_each_case
def test_other_shapes_are_refused_in_one_line(of, size):
    loss, (student, teacher) = build(of, size), pair(of, size)
    for one, other in ((student, teacher[:3]), (student[:3], teacher), (student[:, 0, ...], teacher)):
        if one.shape[1:] == student.shape[1:] or one.ndim < 2:
            with pytest.raises(InputError, match=r"^[^\n]+$"):
                loss(one, other, batch_of(one))
    if loss.needs_projector:
        with pytest.raises(InputError, match="must have one shape.*projector"):
            loss(student[:, :-1], teacher, batch_of(student))


@of_each_case
def test_copies_and_checkpoints_give_the_same_value(of, size):
    loss, (student, teacher) = build(of, size), pair(of, size)
    value = value_of(loss, student, teacher)
    twin = copy.deepcopy(loss)
    assert value_of(twin, student, teacher) == value
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert value_of(loss, student, teacher) == value  # copies share nothing
    twin.load_state_dict(loss.state_dict(), strict=True)
    assert value_of(twin, student, teacher) == value
