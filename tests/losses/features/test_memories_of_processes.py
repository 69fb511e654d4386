"""Losses with a memory of earlier samples: processes share it, and have the memory of one process."""

from pathlib import Path

import pytest
import torch

from kd_lightning.batch import Batch
from kd_lightning.losses.features.crd import CRDLoss
from kd_lightning.losses.features.queue import QueueSimilarityLoss

SCRIPT = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_memories_of_processes import run
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.save(run(rank), f"{rank}.pt")
"""
STEPS = [  # samples of the first and the second process
    ([0, 3], [7]),
    ([1], [2, 3, 5]),
    ([], [4, 6]),
    ([9, 2, 8], [2, 10]),
    ([11], [-1]),  # padding
]


def run(rank=None):
    """Return the values of each step and the states at the end, of one of two processes, or of one alone."""
    torch.manual_seed(0)
    losses = CRDLoss(dim=4, negatives=8), QueueSimilarityLoss(size=7)
    for loss in losses:
        loss.build((5,), (5,), 12)
    student, teacher = torch.randn(2, 12, 5)
    values = []
    for step, shares in enumerate(STEPS):
        every = [i for share in shares for i in share if i >= 0]
        index = torch.tensor(every if rank is None else shares[rank], dtype=torch.long)
        batch = Batch(torch.zeros(len(index), 1), index % 3, index=index)
        for loss in losses:
            torch.manual_seed(step)  # both processes draw the same negatives
            values.append((len(index), loss(student[index], teacher[index], batch).item()))
    return values, *[loss.state_dict() for loss in losses]


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_have_the_memories_of_one(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(SCRIPT)
    processes.run_ranks(["run.py", str(Path(__file__).parent)])
    values, *states = run()
    found = [torch.load(f"{rank}.pt") for rank in range(2)]
    for _, *of_rank in found:
        for state, expected in zip(of_rank, states, strict=True):
            assert state.keys() == expected.keys()
            for name, tensor in state.items():
                torch.testing.assert_close(tensor, expected[name], msg=name)
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name]), name
    for (rows, value), *shares in zip(values[:-2], *[of_rank[0][:-2] for of_rank in found], strict=True):
        assert sum(n * v for n, v in shares) / rows == pytest.approx(value, rel=1e-4)
