"""EarlyLearningLoss: averages by hand over steps, eval mode, growth, checkpoints, several processes."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import EarlyLearningLoss, early_learning

CLASSES = 4
STEPS = [[3, 0, 7], [1, 3, 9], [7, 0, 3], [9, 2, 1]]


def randn(seed, rows=3, dtype=torch.float64):
    z = torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return z.to(dtype), (torch.arange(rows) + seed) % CLASSES


def by_hand(memory, logits, target, index, weight=3.0, momentum=0.7):
    """Rows and their gradient, from a dict of averages that this function updates."""
    rows, gradient = [], []
    for z, label, sample in zip(logits.double().numpy(), target.tolist(), index, strict=True):
        whole = softmax(z)
        p = whole.clip(1e-4, 1 - 1e-4)
        memory[sample] = momentum * memory.get(sample, np.zeros(CLASSES)) + (1 - momentum) * p / p.sum()
        agreement = (p * memory[sample]).sum()
        rows.append(-np.log(whole[label]) + weight * np.log(1 - agreement))
        pull = -memory[sample] * (whole == p) / (1 - agreement)  # with respect to p
        gradient.append(whole - np.eye(CLASSES)[label] + weight * whole * (pull - (pull * whole).sum()))
    return np.array(rows), np.array(gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("arguments", [{}, {"weight": 0.5, "momentum": 0.9}, {"weight": 0.0}, {"momentum": 0.0}])
def test_by_hand_over_steps(arguments, dtype):
    loss, memory = EarlyLearningLoss(**arguments, reduction="none"), {}
    close = {"rel": 1e-4, "abs": 1e-5} if dtype == torch.float32 else {"rel": 1e-10, "abs": 1e-12}
    for seed, index in enumerate(STEPS):
        logits, target = randn(seed, dtype=dtype)
        logits.requires_grad_()
        found = loss(logits, target, torch.tensor(index))
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        expected = by_hand(memory, logits.detach(), target, index, **arguments)
        assert found.dtype == loss.averages.dtype == dtype
        assert found.detach().double().numpy() == pytest.approx(expected[0], **close)
        assert gradient.double().numpy() == pytest.approx(expected[1], **close)
    assert loss.averages.shape == (10, CLASSES)
    for sample in range(10):
        expected = memory.get(sample, np.zeros(CLASSES))
        assert loss.averages[sample].double().numpy() == pytest.approx(expected, abs=1e-6)


def test_certain_predictions_stay_finite():
    loss = EarlyLearningLoss(momentum=0.0, reduction="none")
    logits = torch.tensor([[1e4, 0, 0, 0], [-1e4, 1e4, 0, 0]], requires_grad=True)
    for target in (torch.tensor([0, 1]), torch.tensor([3, 0])):
        rows = loss(logits, target, torch.arange(2))
        rows.sum().backward()
        assert rows.isfinite().all() and logits.grad.isfinite().all()


def test_eval_mode_is_cross_entropy_and_stores_nothing():
    loss = EarlyLearningLoss()
    logits, target = randn(0)
    loss(logits, target, torch.arange(3))
    before = loss.averages.clone()
    loss.eval()
    for index in (None, torch.arange(3), torch.tensor([50, 51, 52])):
        torch.testing.assert_close(loss(logits, target, index), F.cross_entropy(logits, target))
    assert torch.equal(loss.averages, before)


def test_half_precision_is_computed_and_stored_in_float():
    loss = EarlyLearningLoss(reduction="none").half()
    for seed, index in enumerate(STEPS):
        logits, target = randn(seed, dtype=torch.float16)
        assert loss(logits, target, torch.tensor(index)).dtype == loss.averages.dtype == torch.float32


def test_averages_grow_with_the_samples():
    loss, alike = EarlyLearningLoss(), EarlyLearningLoss()
    alike.averages = torch.zeros(10, CLASSES, dtype=torch.float64)
    sizes = []
    for seed, index in enumerate([[2, 0, 1], [1, 5, 0], [0, 3, 2], [9, 0, 4]]):
        for one in (loss, alike):
            one(*randn(seed), torch.tensor(index, dtype=torch.int32 if seed else torch.long))
        sizes.append(len(loss.averages))
    assert sizes == [3, 6, 6, 10]
    assert torch.equal(loss.averages, alike.averages)


def test_no_rows():
    loss = EarlyLearningLoss()
    logits = torch.zeros(0, CLASSES, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    for size in (0, 3):
        value = loss(logits, empty, empty)
        value.backward()
        assert value == 0 and len(loss.averages) == size
        loss(*randn(0), torch.arange(3))


def test_a_sample_that_comes_twice():
    """Its last row counts; on a GPU torch alone does not define which."""
    logits, target = randn(0, rows=4)
    loss, expected = EarlyLearningLoss(reduction="none"), {}
    found = loss(logits, target, torch.tensor([1, 1, 0, 1]))
    by_hand(expected, logits[[2, 3]], target[[2, 3]], [0, 1])
    assert loss.averages.numpy() == pytest.approx(np.stack([expected[0], expected[1]]), abs=1e-12)
    p = logits.softmax(dim=1)
    agreement = (p.clamp(1e-4, 1 - 1e-4) * loss.averages[[1, 1, 0, 1]]).sum(dim=1)
    torch.testing.assert_close(found, F.cross_entropy(logits, target, reduction="none") + 3 * (1 - agreement).log())


class TestCheckpoint:
    def test_round_trip(self, tmp_path):
        loss, fresh = EarlyLearningLoss(), EarlyLearningLoss()
        for seed, index in enumerate(STEPS[:2]):
            loss(*randn(seed), torch.tensor(index))
        torch.save(loss.state_dict(), tmp_path / "loss.pt")
        fresh.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
        for seed, index in enumerate(STEPS):
            values = [one(*randn(seed + 5), torch.tensor(index)) for one in (loss, fresh)]
            assert torch.equal(*values)
        assert torch.equal(loss.averages, fresh.averages)

    def test_loading_copies(self):
        """Two losses do not write into one tensor."""
        loss, fresh = EarlyLearningLoss(), EarlyLearningLoss()
        loss(*randn(0), torch.arange(3))
        fresh.load_state_dict(loss.state_dict())
        before = loss.averages.clone()
        fresh(*randn(1), torch.arange(3))
        assert torch.equal(loss.averages, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight must be finite and at least 0, got -1.0"),
        ({"weight": float("inf")}, "weight must be finite and at least 0, got inf"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum must lie in \[0, 1\), got -0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        EarlyLearningLoss(**arguments)


def test_no_index_while_training():
    with pytest.raises(InputError, match="index is required by EarlyLearningLoss in training mode, got None"):
        EarlyLearningLoss()(*randn(0))


def test_processes_share_the_averages(monkeypatch):
    """Two threads exchange tensors as processes do; the shares are uneven, and one, then both, have no rows."""
    barrier, slots = threading.Barrier(2, timeout=60), [None, None]

    def gather(part):
        slots[int(threading.current_thread().name)] = part
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(early_learning, "gather_all_tensors", gather)
    memory, steps, expected = {}, [], []
    for seed, (index, cut) in enumerate([([3, 0, 7], 2), ([1, 3, 9], 0), ([7, 0, 3], 3), ([], 0), ([9, 2, 1], 1)]):
        logits, target = randn(seed, len(index))
        rows = by_hand(memory, logits, target, index)[0].tolist()
        shares = slice(None, cut), slice(cut, None)
        index = torch.tensor(index, dtype=torch.long)
        steps.append([(logits[share], target[share], index[share]) for share in shares])
        expected.append([rows[share] for share in shares])
    losses, found = [EarlyLearningLoss(reduction="none") for _ in range(2)], [[], []]

    def run(rank):
        for shares in steps:
            found[rank].append(losses[rank](*shares[rank]).tolist())

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank, loss in enumerate(losses):
        for rows, shares in zip(found[rank], expected, strict=True):
            assert rows == pytest.approx(shares[rank])
        assert loss.averages[sorted(memory)].numpy() == pytest.approx(np.stack([memory[i] for i in sorted(memory)]))
