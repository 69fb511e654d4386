"""SimKD's student: its parts, its modes, and what it refuses."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from kd_lightning import InputError, Teacher, models
from kd_lightning.features.layers import count_macs, list_layers
from kd_lightning.features.simkd import SimKDStudent

X = torch.randn(4, 3, 16, 16)


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    network = models.resnet8x4(7)
    network.train()(torch.randn(16, 3, 16, 16))  # statistics that are not those of a new network
    return network


@pytest.fixture
def student(teacher):
    return SimKDStudent(models.resnet8(5), teacher, "layer3", "layer3")


def test_computes_backbone_projector_and_the_teachers_classifier(student, teacher):
    """Against the same written by hand."""
    student.eval(), teacher.eval()
    maps = student.backbone.layer3(student.backbone.layer2(student.backbone.layer1(
        F.relu(student.backbone.bn1(student.backbone.conv1(X))))))  # fmt: skip
    state = {key.replace("projector.", ""): value for key, value in student.state_dict().items()}
    for conv, norm, padding in ((0, 1, 0), (3, 4, 1), (6, 7, 0)):
        maps = F.conv2d(maps, state[f"{conv}.weight"], padding=padding)
        names = ("running_mean", "running_var", "weight", "bias")
        maps = F.relu(F.batch_norm(maps, *(state[f"{norm}.{name}"] for name in names)))
    expected = maps.mean((2, 3)) @ teacher.fc.weight.T + teacher.fc.bias
    assert torch.allclose(student(X), expected, atol=1e-5)
    assert student(X).shape == (4, 7)


def test_projector_has_the_papers_shapes(student):
    shapes = [[*layer.weight.shape] for layer in student.projector if isinstance(layer, nn.Conv2d)]
    assert shapes == [[128, 64, 1, 1], [128, 128, 3, 3], [256, 128, 1, 1]]
    assert all(layer.bias is None for layer in student.projector if isinstance(layer, nn.Conv2d))
    quarter = SimKDStudent(models.resnet8(5), models.resnet8x4(7), "layer3", "layer3", factor=4)
    assert quarter.projector[3].weight.shape == (64, 64, 3, 3)


def test_holds_what_it_needs_alone(student, teacher):
    names = [*student.state_dict()]
    assert "head.fc.weight" in names
    assert not [name for name in names if name.startswith("head.") and not name.startswith("head.fc.")]
    assert not [name for name in names if name.startswith("backbone.fc.")]
    assert {name for name, p in student.named_parameters() if not p.requires_grad} == {"head.fc.weight", "head.fc.bias"}
    layers = {layer.name: layer for layer in list_layers(student, X)}
    assert layers["head.fc"].macs == 256 * 7
    parts = [layers[name].macs for name in ("projector", "head.fc")]
    below = count_macs(models.resnet8(5), X) - 64 * 5
    assert count_macs(student, X) == sum(parts) + below
    student.head.fc.weight.data.zero_()  # a copy
    assert teacher.fc.weight.abs().sum() > 0
    assert all(p.requires_grad for p in teacher.parameters())


class NormedHead(nn.Module):
    """A teacher with BatchNorm and dropout above its last map."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.norm, self.dropout, self.fc = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 7)

    def forward(self, x):
        x = F.dropout(self.features(x).mean((2, 3)), 0.5, training=self.training)
        return self.fc(self.dropout(self.norm(x)))


def test_the_teachers_part_never_trains():
    teacher = NormedHead()
    student = SimKDStudent(models.resnet8(5), teacher, "layer3", "features").train()
    before = deepcopy(student.head.state_dict())
    for module in (student, nn.ModuleList([student]), student.eval()):
        module.train()
        assert student.backbone.bn1.training
        assert student.projector[1].training
        assert not any(layer.training for layer in student.head.modules())
    maps = torch.rand(5, 8, 4, 4)
    student(X).sum().backward()
    after = student.head.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    teacher.eval()
    expected = teacher.fc(teacher.norm(maps.mean((2, 3))))
    assert torch.equal(student.head(maps), expected)
    assert all(p.grad is not None for p in [*student.backbone.parameters(), *student.projector.parameters()])
    assert teacher.features[0].weight.requires_grad


@pytest.mark.parametrize(
    ("make", "layer", "relu"),
    [
        (models.resnet8x4, "layer3", True),
        (models.wrn_16_1, "layer3", False),  # before an activation
        (models.wrn_16_1, "relu", True),
        (models.vgg8, "layer5", True),
        (models.vgg8, "pool2", True),  # max-pooling of it
        (torchvision.models.mobilenet_v2, "features", True),  # ReLU6
        (torchvision.models.efficientnet_b0, "features", False),  # SiLU
    ],
)
def test_ends_in_a_relu_where_the_teachers_map_does(make, layer, relu):
    student = SimKDStudent(models.resnet8(5), make(), "layer3", layer)
    assert isinstance(student.projector[-1], nn.ReLU) == relu
    assert len(student.projector) == 8 + relu


def test_larger_map_of_the_student_is_pooled(teacher):
    student = SimKDStudent(models.resnet8(5), teacher, "layer1", "layer3", size=[4, 4]).eval()
    expected = student.head(student.projector(F.avg_pool2d(student.backbone(X), 4)))
    assert torch.allclose(student(X), expected, atol=1e-6)


def test_weights_fit_a_student_that_was_built_without_the_teachers_weights(student):
    other = SimKDStudent(models.resnet8(5), models.resnet8x4(7), "layer3", "layer3").eval()
    student.train()(X)
    other.load_state_dict(student.eval().state_dict())
    assert torch.equal(other(X), student(X))


def test_survives_copies_compilation_export_and_being_a_teacher(student):
    student.eval()
    expected = student(X)
    copied = deepcopy(student)
    assert torch.equal(copied(X), expected)
    copied.train()
    assert not copied.head.training
    assert not any(p.requires_grad for p in copied.head.parameters())
    assert torch.equal(torch.compile(student, backend="eager", fullgraph=True)(X), expected)
    assert torch.allclose(torch.export.export(student, (X,)).module()(X), expected, atol=1e-6)
    assert Teacher(copied).fingerprint() == Teacher(deepcopy(student)).fingerprint()
    assert torch.equal(Teacher(copied)(X), expected)


def sequence(**layers):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3, padding=1), **layers))


FLAT = sequence(flatten=nn.Flatten(), fc=nn.Linear(4 * 16 * 16, 7))
DENSE = sequence(fc=nn.Conv2d(4, 7, 1))
POOLED = sequence(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(4, 7))
REFUSED = {
    "of one size": (FLAT, {"teacher_layer": "conv"}, "teacher_layer: what the teacher has above conv must take maps"),
    "dense": (DENSE, {"teacher_layer": "conv"}, "teacher_layer: what the teacher has above conv must return logits"),
    "vector": (POOLED, {"teacher_layer": "flatten"}, "teacher_layer: flatten must give a map .*, got"),
    "unknown": (POOLED, {"teacher_layer": "convv"}, "teacher_layer: layer 'convv': Sequential has none of that name"),
    "of the student": (POOLED, {"student_layer": "fc"}, "student_layer: fc must give a map"),
    "factor": (POOLED, {"factor": 5}, r"factor must lie in \[1, 4\], the channels of the teacher's map, got 5"),
    "size": (POOLED, {"size": [4]}, r"size must be a height and a width of at least 1, got \[4\]"),
    "channels last": (
        nn.Sequential(nn.Conv2d(3, 4, 3), torchvision.ops.Permute([0, 2, 3, 1]), nn.Linear(4, 7)),
        {"teacher_layer": "2"},
        r"teacher_layer: 2 must give a map \(B, C, H, W\), got \[2, 62, 62, 7\]",
    ),
}


@pytest.mark.parametrize(("teacher", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(teacher, arguments, message):
    layers = {"student_layer": "layer3", "teacher_layer": "conv"} | arguments
    with pytest.raises(InputError, match=message) as caught:
        SimKDStudent(models.resnet8(5), teacher, **layers)
    assert "\n" not in str(caught.value)
