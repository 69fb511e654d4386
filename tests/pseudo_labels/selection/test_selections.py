"""All selections: by the papers' formulas over many steps, on one and two processes, and after a resume."""

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from selection_steps import CLASSES, POOL, SAMPLES, SELECTIONS, SHARES, make, run, steps

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from selection_steps import save
save(".")
"""
every = pytest.mark.parametrize("name", SELECTIONS)


def reference(name):
    """Targets, weights, regularizer and its gradient of each step."""
    rule, found = SELECTIONS[name][1](), []
    for p, labeled, index, strong in steps():
        targets, weights = rule.step(p.numpy(), labeled.numpy(), index.tolist())
        value, gradient = None, None
        if hasattr(rule, "regularizer") and "fairness off" not in name and hasattr(getattr(rule, "inner", rule), "w"):
            value, gradient = rule.regularizer(softmax(strong.numpy()), weights), np.zeros(strong.shape)
            for place in np.ndindex(*strong.shape):  # central differences
                ends = []
                for sign in (1, -1):
                    moved = strong.numpy().copy()
                    moved[place] += sign * 1e-5
                    ends.append(rule.regularizer(softmax(moved), weights))
                gradient[place] = (ends[0] - ends[1]) / 2e-5
        found.append((targets, weights, value, gradient))
    return found


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)


def check(found, expected, share=1.0):
    """Compare the steps of a selection with those of a reference; ``share`` is the gradient's under DDP."""
    for (target, weight, value, gradient), (targets, weights, by_hand, slope) in zip(found, expected, strict=True):
        assert target.shape == (len(targets), CLASSES)
        if len(targets):
            assert target.numpy() == pytest.approx(np.array(targets), rel=1e-9, abs=1e-12)
        assert weight.tolist() == pytest.approx(weights, rel=1e-9)
        assert (value is None) == (by_hand is None)
        if value is not None:
            assert value == pytest.approx(by_hand, rel=1e-9, abs=1e-15)
            assert share * gradient.numpy() == pytest.approx(slope, rel=1e-4, abs=1e-8)


@every
def test_by_the_formulas(name):
    found, _ = run(name)
    check(found, reference(name))
    weights = torch.cat([weight for _, weight, _, _ in found])
    if name not in ("all", "as it is"):
        assert min((weights > 0.1).sum(), (weights < 0.9).sum()) > 5


@every
def test_a_resumed_selection_goes_on_to_the_bit(name):
    whole, end = run(name)
    for before in (1, 6, 17):
        first = make(name)
        for number, (p, labeled, index, _) in enumerate(steps()):
            if number < before:
                first(p, labeled, index)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        stored = torch.load(file, weights_only=True)
        fresh = SELECTIONS[name][0]().double()  # one that a test builds, without data
        for again in (make(name), fresh):
            again.load_state_dict(stored)
            rest, again = run(name, selection=again, first=before)
            for one, other in zip(rest, whole[before:], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))
                assert one[2] == other[2]
            for key, value in end.state_dict().items():
                assert torch.equal(again.state_dict()[key], value)


@every
def test_setup_forgets_an_earlier_fit(name):
    whole, selection = run(name)
    selection.setup(SAMPLES, CLASSES, POOL)
    for one, other in zip(run(name, selection=selection)[0], whole, strict=True):
        assert torch.equal(one[1], other[1])


@every
def test_state_is_in_no_gradient_and_never_in_half_precision(name):
    selection = make(name).float()
    before = {key: value.clone() for key, value in selection.state_dict().items()}
    for dtype in (torch.float16, torch.bfloat16):
        moved = copy.deepcopy(selection).to(dtype)
        for key, value in moved.state_dict().items():
            assert value.dtype == before[key].dtype
            assert torch.equal(value, before[key])
    assert not [*selection.parameters()]
    p = torch.randn(3, CLASSES).softmax(1).requires_grad_()
    assert not any(part.requires_grad for part in selection(p, p, torch.tensor([10, 11, 12])))


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_are_one(tmp_path, monkeypatch, processes):
    """All rules in one start: processes cost seconds."""
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(SCRIPT)
    processes.run_ranks(["run.py", str(Path(__file__).parent)])
    both = [torch.load(f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in SELECTIONS:
        joined = []
        for one, other in zip(both[0][name][0], both[1][name][0], strict=True):
            gradient = None if one[3] is None else torch.cat([one[3], other[3]])
            assert one[2] == other[2]
            joined.append((torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]), one[2], gradient))
        check(joined, reference(name), share=1 / 2)  # DDP takes the mean
        for key, value in both[0][name][1].items():
            assert torch.equal(both[1][name][1][key], value), (name, key)
    assert {0} < {count for shares in SHARES for count in shares}


@every
def test_no_step_reads_a_value(name):
    """Tensors on the meta device have no values, so reading one fails; on a GPU it would wait."""
    selection = make(name).float().to("meta")
    p, labeled = torch.rand(6, CLASSES, device="meta"), torch.rand(2, CLASSES, device="meta")
    target, weight = selection(p, labeled, torch.zeros(6, dtype=torch.long, device="meta"))
    assert (target.shape, weight.shape) == ((6, CLASSES), (6,))
    term = selection.regularizer(p, weight)
    assert term is None or term[1].shape == ()
