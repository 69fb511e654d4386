"""Numbers of labels: of classes and of probabilities, and complaints."""

from types import SimpleNamespace

import pytest
import torch

from kd_lightning import InputError
from kd_lightning.modules._shared.label_counts import count_each_class, count_labels


def data(labels, **kwargs):
    return SimpleNamespace(visible_labels=lambda: labels, **kwargs)


def test_numbers():
    assert count_labels(torch.tensor([2, -100, 0, 2]), 4, "X").tolist() == [1, 0, 2, 0]
    assert count_labels(torch.tensor([2.0, float("nan"), 0.0]), 0, "X").tolist() == [1, 0, 1]
    soft = torch.tensor([[0.25, 0.75], [float("nan")] * 2, [1.0, 0.0]])
    assert count_each_class(data(soft), None, "X").tolist() == [1.25, 0.75]
    assert count_each_class(data(torch.tensor([1, 0, 0, -100])), None, "X").tolist() == [2, 1]


@pytest.mark.parametrize(
    ("given", "classes", "message"),
    [
        (None, 2, "X counts labels, so it needs a datamodule with .* got no datamodule"),
        (SimpleNamespace(), 2, "got SimpleNamespace"),
        (data(torch.tensor([-100, -100])), 2, "X counts the labels that training may see, but there are none"),
        (data(torch.tensor([0, 0, 2])), 4, "X needs a label of each class, but there is none of 1, 3"),
        (data(torch.tensor([0, 1]), class_names=["a", "b", "c"]), None, "there is none of c"),
        (data(torch.tensor([0.5, 1.0])), None, "X needs whole class numbers as labels, got 0.5"),
        (data(torch.tensor([0, 1]), sampler="balanced"), None, "X and data.sampler: balanced both correct"),
    ],
)
def test_complaints(given, classes, message):
    with pytest.raises(InputError, match=message):
        count_each_class(given, classes, "X")
