import copy

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.features.crd import CRDLoss

N = 12


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(samples=N, **kwargs):
    torch.manual_seed(0)
    loss = CRDLoss(**({"dim": 4, "negatives": 8} | kwargs))
    loss.build((5,), (3,), samples)
    return loss.double()


def batch_of(index, y=None, **kwargs):
    y = None if y is None else torch.tensor(y)
    return Batch(torch.zeros(len(index), 1), y, index=torch.tensor(index, dtype=torch.long), **kwargs)


STEPS = [  # samples and labels; the last step has one sample twice, and a class that a label was missing of
    ([0, 3, 7], [0, 1, 0]),
    ([1, 2], [1, -100]),
    ([4], [2]),
    ([3, 7, 5, 0], [1, 0, 2, 0]),
    ([2, 9, 2], [1, 1, 1]),
]


class ByHand:
    """The paper's loss as in section 3, one pair at a time, with its constants Z and N."""

    def __init__(self, loss):
        self.weights = [
            (layer.weight.detach().numpy(), layer.bias.detach().numpy())
            for layer in (loss.student_embedding, loss.teacher_embedding)
        ]
        self.memories = [loss.student_memory.numpy().copy(), loss.teacher_memory.numpy().copy()]
        self.tau, self.momentum, self.K = loss.temperature, loss.momentum, loss.negatives
        self.seen, self.labels, self.z = set(), {}, None

    def step(self, features, index, y, drawn):
        embeddings = []
        for feature, (weight, bias) in zip(features, self.weights, strict=True):
            v = feature.detach().numpy() @ weight.T + bias
            embeddings.append(v / np.linalg.norm(v, axis=1, keepdims=True))
        self.seen |= {*index}
        self.labels |= {i: label for i, label in zip(index, y, strict=True) if label >= 0}
        score = lambda v, m: np.exp(v @ m / self.tau)  # noqa: E731
        negatives = [
            [k for k in drawn if k != i and k in self.seen and (label < 0 or self.labels.get(k) != label)]
            for i, label in zip(index, y, strict=True)
        ]
        pairs = [(embeddings[0], self.memories[1]), (embeddings[1], self.memories[0])]
        if self.z is None:
            self.z = []
            for v, memory in pairs:
                sums = [
                    score(v[row], memory[i]) + (self.K * np.mean([score(v[row], memory[k]) for k in ks]) if ks else 0)
                    for row, (i, ks) in enumerate(zip(index, negatives, strict=True))
                ]
                self.z.append(np.mean(sums) / (self.K + 1) * N)
        total, noise = 0.0, self.K / N
        for (v, memory), z in zip(pairs, self.z, strict=True):
            for row, (i, ks) in enumerate(zip(index, negatives, strict=True)):
                p = score(v[row], memory[i]) / z
                total -= np.log(p / (p + noise))
                logs = [np.log(noise / (score(v[row], memory[k]) / z + noise)) for k in ks]
                total -= self.K * np.mean(logs) if logs else 0
        for memory, v in zip(self.memories, embeddings, strict=True):
            old = memory.copy()
            for row, i in enumerate(index):
                moved = self.momentum * old[i] + (1 - self.momentum) * v[row]
                memory[i] = moved / np.linalg.norm(moved)
        return total / len(index)


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize(("temperature", "momentum"), [(0.07, 0.5), (0.5, 0.0), (0.005, 0.9)])
def test_values_and_memories_by_hand(temperature, momentum, labeled):
    loss = built(temperature=temperature, momentum=momentum)
    reference = ByHand(loss)
    for step, (index, y) in enumerate(STEPS):
        y = y if labeled else [-100] * len(y)
        features = randn(len(index), 5, seed=step), randn(len(index), 3, seed=20 + step)
        torch.manual_seed(step)
        drawn = torch.randint(N, (8,)).tolist()
        torch.manual_seed(step)
        found = loss(*features, batch_of(index, y if labeled else None))
        assert found.shape == () and found.dtype == torch.float64
        assert found.item() == pytest.approx(reference.step(features, index, y, drawn), rel=1e-8)
        for memory, expected in zip((loss.student_memory, loss.teacher_memory), reference.memories, strict=True):
            np.testing.assert_allclose(memory.numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(loss.log_scale.exp().numpy() * N, reference.z, rtol=1e-8)
    known = {i: label for i, label in enumerate(loss.labels.tolist()) if label >= 0}
    assert [i for i, label in enumerate(loss.labels.tolist()) if label == -2] == [6, 8, 10, 11]
    assert known == ({0: 0, 3: 1, 7: 0, 1: 1, 4: 2, 5: 2, 2: 1, 9: 1} if labeled else {})


def test_gradient_into_student_and_embeddings_alone():
    loss = built()
    student, teacher = randn(3, 5).requires_grad_(), randn(3, 3).requires_grad_()
    batch = batch_of([0, 3, 7], [0, 1, 0])
    for _ in range(2):
        loss(student, teacher, batch).backward()
    assert teacher.grad is None and student.grad.abs().min() > 0
    assert len([*loss.parameters()]) == 4 and all(p.grad.abs().sum() > 0 for p in loss.parameters())
    assert not loss.student_memory.requires_grad and not loss.log_scale.requires_grad

    def value(s):
        torch.manual_seed(0)
        return copy.deepcopy(loss)(s, teacher, batch)

    assert torch.autograd.gradcheck(value, [student])


def test_it_learns_to_tell_samples_apart():
    torch.manual_seed(0)
    loss = CRDLoss(dim=8, negatives=32)
    loss.build((6,), (6,), 32)
    features = torch.randn(32, 6)
    student = nn.Linear(6, 6)
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], 0.02)
    values = []
    for _ in range(120):
        rows = torch.randperm(32)[:16]
        value = loss(student(features[rows]), features[rows], batch_of(rows.tolist()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert np.mean(values[-10:]) < np.mean(values[:10]) / 2
    nearest = (loss.student_memory @ loss.teacher_memory.T).argmax(dim=1)
    assert (nearest == torch.arange(32)).float().mean() > 0.8


def test_processes_of_other_seeds_start_with_the_same_memories():
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loss = CRDLoss(dim=4, negatives=8)
        loss.build((5,), (3,), N)
        states.append(loss.state_dict())
        loss.reset(N)  # of a further fit
        states.append(loss.state_dict())
    for state in states[1:]:
        for name in ("student_memory", "teacher_memory"):
            assert torch.equal(state[name], states[0][name])
    assert not torch.equal(states[0]["student_embedding.weight"], states[2]["student_embedding.weight"])
    assert not torch.equal(states[0]["student_memory"], states[0]["teacher_memory"])


def test_empty_batches_and_padding_leave_the_memories():
    loss = built()
    before = copy.deepcopy(loss.state_dict())
    for rows, batch in [(0, batch_of([])), (1, batch_of([-1])), (1, batch_of([-1], [-100]))]:
        student = torch.zeros(rows, 5, dtype=torch.float64, requires_grad=True)
        value = loss(student, randn(rows, 3), batch)
        value.backward()
        assert value == 0 and student.grad.abs().sum() == 0
    for name, tensor in loss.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_batch_whose_class_is_all_that_is_known_has_no_negatives():
    loss = built(samples=8)
    every = batch_of([*range(8)], [1] * 8)
    assert loss(randn(8, 5), randn(8, 3), every).isfinite()
    assert loss(randn(8, 5), randn(8, 3), every) >= 0


def test_labels_that_are_no_classes_are_not_used():
    for y in ([[0.5, 0.5]] * 2, [0.1, 0.2], [[0, 1]] * 2):
        loss = built()
        loss(randn(2, 5), randn(2, 3), batch_of([0, 1], y))
        assert loss.labels.tolist() == [-1] * 2 + [-2] * 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    student, teacher, batch = randn(3, 5).to(dtype), randn(3, 3).to(dtype), batch_of([0, 3, 7])

    def value(loss, *features):
        torch.manual_seed(1)
        return loss(*features, batch)

    expected = value(built(), student.double(), teacher.double()).item()
    found = value(built().float(), student, teacher)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        found = value(built().float(), student, teacher)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=0.1)
    found = value(built().to(dtype), student, teacher)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=0.1)


def test_a_resumed_fit_goes_on_to_the_bit():
    def run(loss, steps):
        values = []
        for step in steps:
            index, y = STEPS[step]
            torch.manual_seed(step)
            features = randn(len(index), 5, seed=step), randn(len(index), 3, seed=20 + step)
            values.append(loss(*features, batch_of(index, y)).item())
        return values

    unbroken = built()
    values = run(unbroken, range(5))
    for stop in (0, 1, 3):
        first, second = built(), nn.Sequential(built())
        run(first, range(stop))
        run(second[0], range(2, 4))  # what it has seen before does not count
        second.load_state_dict(nn.Sequential(first).state_dict())
        assert run(second[0], range(stop, 5)) == values[stop:]
        assert all(torch.equal(*pair) for pair in zip(second[0].buffers(), unbroken.buffers(), strict=True))


def test_a_step_does_not_wait_for_its_device():
    """Tensors on the meta device have no values, so reading one fails."""
    loss = built()
    for _ in range(2):  # the first ones look whether the scale is set
        loss(randn(3, 5), randn(3, 3), batch_of([0, 3, 7], [0, 1, 0]))
    batch = Batch(torch.zeros(2, 1, device="meta"), *torch.zeros(2, 2, dtype=torch.long, device="meta"))
    student = randn(2, 5).to("meta").requires_grad_()
    loss.to("meta")(student, randn(2, 3).to("meta"), batch).backward()
    assert student.grad.shape == (2, 5)


def test_bad_input_is_one_line():
    s, t, batch = randn(2, 5), randn(2, 3), batch_of([0, 1])
    for call, message in [
        (lambda: CRDLoss(dim=0), "dim must be at least 1, got 0"),
        (lambda: CRDLoss(negatives=0), "negatives must be at least 1, got 0"),
        (lambda: CRDLoss(temperature=0), "temperature must be finite and above 0, got 0"),
        (lambda: CRDLoss(momentum=1), "momentum must lie in [0, 1), got 1"),
        (lambda: CRDLoss().build((5,), (3,), 1000), "negatives must be at most the number of samples, 1000, got 16384"),
        (lambda: CRDLoss().build((5,), (3,), None), "needs data of a known number of samples, and no stream"),
        (
            lambda: CRDLoss().build((5, 4, 4), (3,), 9),
            "CRDLoss compares vectors (C,), got [5, 4, 4] and [3] of one sam",
        ),
        (
            lambda: CRDLoss()(s, t, batch),
            "CRDLoss is not built; call build(student_shape, teacher_shape, samples) first",
        ),
        (lambda: built()(s, t), "CRDLoss needs to know which samples a batch has, got no index"),
        (lambda: built()(s, t, Batch(torch.zeros(2, 1))), "got no index; batches of SemiSupervisedDataModule have it"),
        (lambda: built()(s, t, batch_of([0, 1], partner=torch.tensor([1, 0]))), "mixed rows (mix) are of two samples"),
        (lambda: built()(s, t, batch_of([0, 12])), "index must be 0 ... 11, got 0 ... 12"),
        (lambda: built().eval()(s, t, batch), "CRDLoss has no value in eval mode, since validation samples are in no"),
        (lambda: built()(randn(2, 5, 3), t, batch), "CRDLoss compares vectors (B, C), got [2, 5, 3] and [2, 3]; set p"),
        (lambda: built()(s, t[:1], batch), "of the same samples, got [2, 5] and [1, 3]"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)
