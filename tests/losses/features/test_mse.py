import numpy as np
import pytest
import torch

from kd_lightning.batch import Batch
from kd_lightning.losses import HintLoss, MSEFeatureLoss


@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 7), (2, 4, 3, 5)])
def test_value_and_the_hint_loss_of_the_same_features(randn, shape):
    student, teacher = randn(*shape), randn(*shape, seed=1)
    value = MSEFeatureLoss()(student, teacher)
    assert value.item() == pytest.approx(np.mean((student.numpy() - teacher.numpy()) ** 2), rel=1e-12)
    entries = student[0].numel()
    assert value.item() == pytest.approx(HintLoss()(student, teacher).item() * 2 / entries, rel=1e-12)
    assert MSEFeatureLoss()(teacher, teacher) == 0


def test_positions_that_do_not_count_are_not_in_the_mean():
    student, teacher = torch.zeros(2, 1, 3), torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    mask = torch.tensor([[True, True, False], [False, False, True]])
    value = MSEFeatureLoss()(student, teacher, Batch(student, mask=mask))
    assert value == ((1 + 4) / 2 + 36) / 2
    other = torch.ones(2, 4, dtype=torch.bool)  # a mask of other positions leaves none out
    assert MSEFeatureLoss()(student, teacher, Batch(student, mask=other)) == MSEFeatureLoss()(student, teacher)
