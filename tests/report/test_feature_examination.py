"""Doctor on modules that learn from features alone."""

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from kd_lightning import Digits, FeatureDistillModule, FeatureTerm, InputError, SemiSupervisedDataModule, Teacher
from kd_lightning.features import PHIStandardization
from kd_lightning.losses import CosineLoss, MSEFeatureLoss
from kd_lightning.models import DigitsCNN
from kd_lightning.report.examination import examine


class Dead(nn.Module):
    """Gives the same for all inputs, but for one channel that is huge."""

    def __init__(self, dead=True):
        super().__init__()
        self.dead = dead
        self.layer = nn.Linear(64, 8)

    def forward(self, x):
        output = self.layer(x.flatten(1))
        return 0 * output if self.dead else output * torch.tensor([100.0, *[1.0] * 7])


def findings(teachers, features=None, student=None):
    data = SemiSupervisedDataModule(Digits(), labeled=0, batch_size=64)
    module = FeatureDistillModule(student or DigitsCNN(4), teachers, features)
    return {finding.name: finding for finding in examine(module, data)}


def test_a_good_teacher(healthy):
    terms = {"one": FeatureTerm({"11": "11"}, CosineLoss(), standardize=PHIStandardization())}
    found = findings(Teacher(healthy), terms)
    assert [*found] == ["teacher", "input size", "normalisation", "features of 11", "eval mode", "gradients"]
    assert {finding.severity for finding in found.values()} == {"info"}
    assert "of 119 validation labels" in found["teacher"].text


def test_dead_channels_and_one_that_rules():
    terms = {f"of_{number}": FeatureTerm({"11": f"{number}."}, MSEFeatureLoss()) for number in range(2)}
    found = findings([Dead(), Dead(dead=False)], terms)
    assert found["teachers[0], features of the output"].severity == "error"
    assert "ChannelStandardization" in found["teachers[1], features of the output"].hint
    terms["of_1"] = FeatureTerm({"11": "1."}, CosineLoss())
    assert findings([Dead(), Dead(dead=False)], terms)["teachers[1], features of the output"].hint is None


def test_layers_have_the_names_of_their_own_network(healthy):
    terms = {f"of_{number}": FeatureTerm({"11": f"{number}.11"}, CosineLoss()) for number in range(2)}
    found = [name for name in findings([healthy, deepcopy(healthy)], terms) if "features" in name]
    assert found == ["teachers[0], features of 11", "teachers[1], features of 11"]


@pytest.mark.parametrize("order", ["scaled first", "scaled last"])
def test_each_term_of_a_layer_counts(order):
    """One channel rules the squared distance, whatever other terms of the same layer are."""
    terms = {"scaled": FeatureTerm({"11": ""}, MSEFeatureLoss()), "cosine": FeatureTerm({"11": ""}, CosineLoss())}
    terms = terms if order == "scaled first" else dict(reversed(terms.items()))
    assert "ChannelStandardization" in findings(Dead(dead=False), terms)["features of the output"].hint
    terms["scaled"] = FeatureTerm({"11": ""}, MSEFeatureLoss(), standardize=PHIStandardization())
    assert findings(Dead(dead=False), terms)["features of the output"].hint is None


def test_size_and_normalisation_that_the_network_declares():
    vit = timm.create_model("test_vit", num_classes=0, in_chans=1, img_size=16)
    teacher = Teacher(vit, preprocess=nn.Upsample(16))
    found = findings(teacher)
    assert found["input size"].hint is None
    assert found["normalisation"].text.startswith("not checked: the inputs are no pictures of 3 channels")
    colours = nn.Sequential(nn.Upsample(32), nn.Conv2d(1, 3, 1, bias=False).requires_grad_(False))
    nn.init.ones_(colours[1].weight)
    found = findings(Teacher(timm.create_model("test_efficientnet", num_classes=0), preprocess=colours))
    assert "v2.Resize([160, 160])" in found["input size"].hint
    assert "v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])" in found["normalisation"].hint


def test_inputs_that_the_network_refuses():
    with pytest.raises(
        InputError, match=r"^features: the networks cannot take inputs of shape \[\d+, 1, 8, 8\]: Input"
    ):
        findings(timm.create_model("test_vit", num_classes=0, in_chans=1))
