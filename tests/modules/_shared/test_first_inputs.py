"""The first training inputs."""

import torch

from kd_lightning.batch import Batch
from kd_lightning.modules._shared.first_inputs import first_rows


def test_rows_with_their_mask_and_the_teachers_inputs():
    x, mask = torch.arange(12).view(4, 3), torch.tensor([[1, 1, 0]] * 4)
    rows = first_rows(Batch(x, x, torch.arange(4), mask=mask, teacher_inputs=x * 2), 2)
    assert torch.equal(rows.x, x[:2]) and torch.equal(rows.teacher_inputs, x[:2] * 2)
    assert torch.equal(rows.position_mask, mask[:2])
    assert rows.y is None and rows.index is None
    assert len(first_rows(Batch(x), 9)) == 4
