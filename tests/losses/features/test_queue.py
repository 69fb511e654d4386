import copy

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.features.queue import QueueSimilarityLoss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(channels=5, samples=None, **kwargs):
    loss = QueueSimilarityLoss(**kwargs)
    loss.build((channels,), (channels,), samples)
    return loss.double()


def by_hand(student, teacher, queue, temperature, own=False):
    rows = []
    for s, t in zip(student.detach().numpy(), teacher.numpy(), strict=True):
        keys = [*queue, t] if own else queue
        p_s, p_t = ([np.exp(f @ k / np.linalg.norm(f) / np.linalg.norm(k) / temperature) for k in keys] for f in (s, t))
        p_s, p_t = (np.array(p) / np.sum(p) for p in (p_s, p_t))
        rows.append(np.sum(p_t * np.log(p_t / p_s)))
    return np.mean(rows)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_values_by_hand_while_the_queue_fills_and_moves_on(temperature):
    loss, stored = built(size=7, temperature=temperature), []
    for step, rows in enumerate([3, 2, 4, 1, 9, 7, 3]):  # the queue is full after the third batch
        student, teacher = randn(rows, 5, seed=step), randn(rows, 5, seed=50 + step)
        stored = [*stored, *teacher.numpy()][-7:]
        assert loss(student, teacher).item() == pytest.approx(by_hand(student, teacher, stored, temperature), rel=1e-9)
        held = loss.queue[: min(7, loss.count)].numpy()
        expected = np.array([row / np.linalg.norm(row) for row in stored])
        np.testing.assert_allclose(np.sort(held, axis=0), np.sort(expected, axis=0), rtol=1e-12)
    assert loss.count == 29 and loss.count.dtype == torch.long


def test_in_eval_mode_the_queue_stays_and_rows_do_not_depend_on_one_another():
    loss = built(size=6)
    student, teacher = randn(4, 5), randn(4, 5, seed=1)
    assert loss.eval()(student, teacher) == 0  # nothing in the queue
    stored = randn(3, 5, seed=2)
    loss.train()(stored, stored)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    found = loss(student, teacher)
    assert found.item() == pytest.approx(by_hand(student, teacher, stored.numpy(), 0.07, own=True), rel=1e-9)
    single = [loss(student[i : i + 1], teacher[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.stack(single).mean(), found)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_gradient():
    loss = built(size=6)
    loss(randn(4, 5, seed=3), randn(4, 5, seed=4))
    student, teacher = randn(4, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    for _ in range(2):  # a second step changes the queue after the first one's backward pass
        loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().min() > 0
    loss.eval()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), [student])


def test_limits():
    loss = built(size=6)
    teacher = randn(4, 5)
    assert loss(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)  # lengths do not matter
    assert loss(-teacher, teacher) > 1
    empty = torch.zeros(0, 5, requires_grad=True)
    value = loss(empty, torch.zeros(0, 5))
    value.backward()
    assert value == 0 and loss.count == 8
    dead = torch.zeros(4, 5, requires_grad=True)
    loss(dead, teacher).backward()
    assert dead.grad.isfinite().all()


def test_padding_is_not_stored():
    loss = built(size=6)
    loss(randn(1, 5), randn(1, 5), Batch(torch.zeros(1, 1), index=torch.tensor([-1])))
    assert loss.count == 0
    loss(randn(1, 5), randn(1, 5), Batch(torch.zeros(1, 1), index=torch.tensor([0])))
    assert loss.count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = randn(4, 5).to(dtype), randn(4, 5, seed=1).to(dtype)
    expected = by_hand(student.double(), teacher.double(), teacher.double().numpy(), 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        found = built(size=6).float()(student, teacher)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-4)
    found = built(size=6).to(dtype)(student, teacher)  # the queue in half precision
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=0.1)


def test_a_resumed_queue_goes_on_to_the_bit():
    batches = [(randn(3, 5, seed=i), randn(3, 5, seed=20 + i)) for i in range(6)]
    unbroken = built(size=7)
    values = [unbroken(*batch) for batch in batches]
    for stop in (1, 4):
        first, second = built(size=7), nn.Sequential(built(size=7))
        for batch in batches[:stop]:
            first(*batch)
        second.load_state_dict(nn.Sequential(first).state_dict())
        assert [second[0](*batch) for batch in batches[stop:]] == values[stop:]
        assert torch.equal(second[0].queue, unbroken.queue)


def test_a_step_does_not_wait_for_its_device():
    """Tensors on the meta device have no values, so reading one fails."""
    loss, student = built(size=7).to("meta"), randn(3, 5).to("meta").requires_grad_()
    loss(student, randn(3, 5).to("meta")).backward()
    assert loss.eval()(student, student).device.type == "meta" and student.grad.shape == (3, 5)


@pytest.mark.parametrize(
    ("size", "samples", "length"), [(None, None, 8192), (None, 10**6, 8192), (None, 100, 50), (None, 1, 1), (9, 9, 9)]
)
def test_length(size, samples, length):
    assert built(size=size, samples=samples).queue.shape == (length, 5)


def test_bad_input_is_one_line():
    for call, message in [
        (lambda: QueueSimilarityLoss(size=0), "size must be at least 1, got 0"),
        (lambda: QueueSimilarityLoss(temperature=0), "temperature must be finite and above 0, got 0"),
        (lambda: built(size=10, samples=9), "size must be at most the number of samples, 9, got 10"),
        (
            lambda: QueueSimilarityLoss().build((5,), (5, 2), 9),
            "compares vectors (C,), got [5, 2] of one sample; set p",
        ),
        (lambda: QueueSimilarityLoss()(randn(2, 5), randn(2, 5)), "QueueSimilarityLoss is not built; call build(stud"),
        (
            lambda: built()(randn(2, 5), randn(2, 4)),
            "must have one shape, got [2, 5] and [2, 4]; a projector joins the",
        ),
        (lambda: built()(randn(2, 4), randn(2, 4)), "compares vectors (B, 5), got [2, 4]; set pool"),
        (lambda: built()(randn(2, 5, 3), randn(2, 5, 3)), "compares vectors (B, 5), got [2, 5, 3]; set pool"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)
