"""Numbers of pseudo-labels that count."""

import pytest
import torch
from torch.nn.functional import one_hot

from kd_lightning.modules._shared.accepted_counts import AcceptedCounts

CPU = torch.device("cpu")


def step(counts, generator):
    """Add a step, and return its numbers, counted one by one."""
    weight = torch.rand(7, generator=generator)
    guess = torch.randint(3, (7,), generator=generator)
    labels = torch.tensor([0, 2, -100, 2])
    counts.add(weight, one_hot(guess, 3).float(), labels)
    accepted = [sum(w for w, g in zip(weight.tolist(), guess.tolist(), strict=True) if g == c) for c in range(3)]
    return 7, accepted, [1, 0, 2]


def test_numbers_of_a_run_that_goes_on():
    """They are those of all processes in the checkpoint: the first process takes them, the others none."""
    generator = torch.Generator().manual_seed(0)
    counts, others = AcceptedCounts(), AcceptedCounts()
    first = step(counts, generator)
    stored = counts.of_all_processes(CPU)
    counts.restore(stored, first=True)
    others.restore(stored, first=False)
    for own, shape in zip(others.of_all_processes(CPU), ((), (3,), (3,)), strict=True):
        assert own.shape == shape
        assert not own.any()
    second = step(counts, generator)
    unlabeled, accepted, labels = counts.of_all_processes(CPU)
    assert unlabeled == 14
    assert accepted.tolist() == pytest.approx([a + b for a, b in zip(first[1], second[1], strict=True)], rel=1e-6)
    assert labels.tolist() == [2, 0, 4]
    counts.reset()
    assert not any(part.any() for part in counts.of_all_processes(CPU))


def test_labels_of_mixed_rows():
    counts = AcceptedCounts()
    counts.add(torch.ones(1), torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]]))
    assert [part.tolist() for part in counts.of_all_processes(CPU)] == [1, [0.5, 0.5, 0], [0.25, 1.0, 0.75]]


def test_without_classes():
    counts = AcceptedCounts()
    counts.add(torch.ones(30), None, None)
    counts.add(torch.zeros(10), None, torch.tensor([1]))
    assert [part.tolist() for part in counts.of_all_processes(CPU)] == [40, 30, 0]


def test_without_any_label(recwarn):
    counts = AcceptedCounts()
    counts.add(torch.ones(90), one_hot(torch.zeros(90, dtype=torch.long), 3).float(), None)
    counts.warn(CPU, "All", early=False)
    assert [part.shape for part in counts.of_all_processes(CPU)] == [(), (3,), (3,)]  # as on a process with labels
    assert not recwarn.list
