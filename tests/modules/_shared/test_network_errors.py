"""Errors of networks in one line."""

import pytest
import torch
from torch import nn

from kd_lightning import InputError, SupervisedModule


@pytest.mark.parametrize(
    ("student", "x", "reason"),
    [
        (nn.Linear(4, 3), torch.randn(2, 5), "mat1 and mat2 shapes"),
        (nn.Linear(4, 3), torch.ones(2, 4, dtype=torch.long), "same dtype"),  # as of a batch whose numbers come first
        (nn.Conv2d(1, 3, 8), torch.ones(2, 1, 8, 8, dtype=torch.uint8), "Input type"),
        (nn.Embedding(9, 3), torch.ones(2, 4), "scalar type"),
    ],
)
def test_inputs_that_do_not_fit(student, x, reason):
    with pytest.raises(InputError, match=f"the student cannot take inputs of shape .*{reason}") as caught:
        SupervisedModule(student).training_step((x, torch.zeros(2, dtype=torch.long)), 0)
    assert "\n" not in str(caught.value)


def test_other_errors_stay():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="^a bug$"):
        SupervisedModule(Broken())(torch.zeros(1))
