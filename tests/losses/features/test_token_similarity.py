import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.features.token_similarity import TokenSimilarityLoss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(student, teacher, temperature, mask=None):
    """KL of each token of each sample, one by one."""
    rows = []
    for number in range(len(student)):
        counts = np.ones(teacher[0, 0].numel(), bool) if mask is None else mask[number].numpy().ravel()
        relations = []
        for feature in (student, teacher):
            tokens = feature[number].numpy().reshape(feature.shape[1], -1).T[counts]
            tokens = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
            p = np.exp(tokens @ tokens.T / temperature)
            relations.append(p / p.sum(1, keepdims=True))
        p_s, p_t = relations
        rows.append(np.mean(np.sum(p_t * np.log(p_t / p_s), axis=1)) if counts.any() else 0.0)
    return np.mean(rows)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("sides", [(6,), (3, 4), (2, 2, 3), (1,)])
def test_value_by_hand_and_gradient(sides, temperature):
    student, teacher = randn(3, 5, *sides), randn(3, 7, *sides, seed=1)
    loss = TokenSimilarityLoss(temperature)
    found = loss(student, teacher)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(by_hand(student, teacher, temperature), rel=1e-9, abs=1e-12)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), [student])


def test_the_students_map_is_resized_to_the_teachers():
    student, teacher = randn(2, 5, 3, 2), randn(2, 7, 4, 6, seed=1)
    resized = F.interpolate(student, (4, 6), mode="bilinear")
    found = TokenSimilarityLoss()(student, teacher)
    assert found.item() == pytest.approx(by_hand(resized, teacher, 0.07), rel=1e-9)


@pytest.mark.parametrize("sides", [(6,), (3, 4)])
def test_masked_positions_count_nowhere(sides):
    student, teacher = randn(3, 5, *sides), randn(3, 7, *sides, seed=1)
    mask = torch.rand(3, *sides, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[2] = False
    batch = Batch(torch.zeros(3, 1), mask=mask)
    student.requires_grad_()
    found = TokenSimilarityLoss()(student, teacher, batch)
    assert found.item() == pytest.approx(by_hand(student.detach(), teacher, 0.07, mask), rel=1e-9)
    (gradient,) = torch.autograd.grad(found, student)
    assert gradient.isfinite().all() and gradient.movedim(1, -1)[~mask].abs().max() == 0
    assert gradient.movedim(1, -1)[mask].abs().max() > 0


def test_limits():
    tokens = randn(2, 5, 6)
    loss = TokenSimilarityLoss()
    assert loss(tokens, tokens) == 0
    scaled = tokens * torch.rand(2, 1, 6, dtype=torch.float64).add(0.1)  # lengths do not matter
    rotation = torch.linalg.qr(randn(5, 5))[0]  # nor do rotations of the channels
    assert loss(torch.einsum("dc,bcn->bdn", rotation, scaled), tokens).item() == pytest.approx(0, abs=1e-12)
    assert loss(tokens.flip(2), tokens) > 0.1  # the order of the tokens does
    empty = torch.zeros(0, 5, 6, requires_grad=True)
    value = loss(empty, torch.zeros(0, 5, 6))
    value.backward()
    assert value == 0
    dead = torch.zeros(1, 5, 6, requires_grad=True)
    loss(dead, torch.zeros(1, 5, 6)).backward()
    assert dead.grad.isfinite().all()


def test_no_gradient_into_the_teacher():
    student, teacher = randn(2, 5, 6).requires_grad_(), randn(2, 7, 6).requires_grad_()
    TokenSimilarityLoss()(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = randn(3, 5, 6).to(dtype) * 300, randn(3, 7, 6, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = TokenSimilarityLoss()(student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(by_hand(student.double(), teacher.double(), 0.07), rel=1e-4)


def test_bad_input_is_one_line():
    for call, message in [
        (lambda: TokenSimilarityLoss(0), "temperature must be finite and above 0, got 0"),
        (lambda: TokenSimilarityLoss()(randn(2, 3), randn(2, 3)), "token similarities compare tokens (B, C, N) of one"),
        (
            lambda: TokenSimilarityLoss()(randn(2, 3, 4), randn(2, 3, 5)),
            "or maps of as many sides, got [2, 3, 4] and [",
        ),
        (lambda: TokenSimilarityLoss()(randn(2, 3, 4), randn(2, 3, 2, 2)), "got [2, 3, 4] and [2, 3, 2, 2]"),
        (lambda: TokenSimilarityLoss()(randn(2, 3, 4), randn(3, 3, 4)), "of the same samples, got [2, 3, 4] and [3, "),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)
