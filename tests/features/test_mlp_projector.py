import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kd_lightning.errors import InputError
from kd_lightning.features.mlp_projector import MLPProjector


def built(student, teacher, hidden=None):
    torch.manual_seed(0)
    projector = MLPProjector(hidden)
    projector.build(student, teacher)
    return projector.double()


def by_hand(projector, rows):
    first, norm, _, last = projector.layers
    x = rows @ first.weight.T + first.bias
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    x = x * norm.weight + norm.bias
    x = x * (1 + torch.erf(x / 2**0.5)) / 2
    return x @ last.weight.T + last.bias


@pytest.mark.parametrize("sides", [(), (7,), (3, 4), (2, 3, 2)])
def test_each_position_by_hand(sides):
    projector = built((4, *sides), (6, *sides))
    with torch.no_grad():
        projector.layers[1].weight.uniform_()
        projector.layers[1].bias.uniform_()
    feature = torch.randn(5, 4, *sides, dtype=torch.float64)
    found = projector(feature)
    assert found.shape == (5, 6, *sides)
    rows = by_hand(projector, feature.movedim(1, -1).reshape(-1, 4))
    torch.testing.assert_close(found.movedim(1, -1).reshape(-1, 6), rows, rtol=1e-12, atol=1e-12)


def test_maps_are_resized_in_the_ratio_of_the_shapes():
    projector = built((4, 7, 6), (6, 16, 3))
    feature = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    alike = built((4, 7, 6), (6, 7, 6))(feature)
    torch.testing.assert_close(projector(feature), F.interpolate(alike, (16, 3), mode="bilinear"))
    assert projector(torch.zeros(2, 4, 14, 12).double()).shape == (2, 6, 32, 6)
    assert projector(torch.zeros(2, 4, 1, 1).double()).shape == (2, 6, 2, 1)
    assert built((4, 2, 2, 2), (5, 4, 4, 1))(torch.zeros(1, 4, 2, 2, 2).double()).shape == (1, 5, 4, 4, 1)


def test_widths():
    assert built((4,), (6,)).layers[0].out_features == 6
    assert built((8,), (6,)).layers[0].out_features == 8
    assert built((4,), (6,), 3).layers[0].out_features == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    feature = torch.randn(5, 4, 3, dtype=torch.float64)
    expected = built((4, 3), (6, 3))(feature)
    whole, half = built((4, 3), (6, 3)).float(), built((4, 3), (6, 3)).to(dtype)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(whole(feature.float()).double(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half(feature.float()).double(), expected, rtol=0.05, atol=0.05)


def test_state_dict_and_gradients():
    projector, other = built((4, 3), (6, 3)), built((4, 3), (6, 3))
    nn.init.ones_(other.layers[0].weight)
    other.load_state_dict(projector.state_dict())
    feature = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(projector(feature), other(feature))
    projector(feature).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in projector.parameters()) and feature.grad.abs().sum() > 0


def test_bad_input_is_one_line():
    for call, message in [
        (lambda: MLPProjector(0), "hidden must be at least 1, got 0"),
        (lambda: MLPProjector()(torch.zeros(1, 2)), "MLPProjector is not built; call build(student_shape, teacher_sh"),
        (
            lambda: built((4, 7), (6, 8)),
            "tokens of one number, and maps of as many sides, got shapes [4, 7] and [6, 8]",
        ),
        (lambda: built((4,), (6, 8, 8)), "got shapes [4] and [6, 8, 8] of one sample; set pool, or another layer"),
        (lambda: built((4, 7), (6, 7, 1)), "got shapes [4, 7] and [6, 7, 1]"),
        (
            lambda: built((4,), (6,))(torch.zeros(1, 5)),
            "is built for 4 channels and 0 sides, so features must be (B, 4,",
        ),
        (lambda: built((4, 2), (6, 2))(torch.zeros(1, 4)), "is built for 4 channels and 1 sides"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)
