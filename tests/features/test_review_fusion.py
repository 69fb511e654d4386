import pytest
import torch
from torch.nn import functional as F

from kd_lightning.errors import InputError
from kd_lightning.features.review_fusion import ReviewFusion

STUDENT = [(3, 8, 6), (5, 4, 3), (6, 4, 3), (7,)]
TEACHER = [(4, 8, 6), (9, 4, 3), (8, 2, 2), (11,)]


def built(student=STUDENT, teacher=TEACHER, width=512):
    torch.manual_seed(0)
    fusion = ReviewFusion(width)
    fusion.build(student, teacher)
    for norm in fusion.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):  # as after some training
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(norm.bias)
    return fusion.double()


def features(shapes=STUDENT, rows=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def norm(x, layer):
    mean, var, weight, bias = (
        v.view(-1, 1, 1) for v in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def nearest(x, sides):
    rows, columns = ([int(i * size / side) for i in range(side)] for size, side in zip(x.shape[2:], sides, strict=True))
    return x[:, :, rows][:, :, :, columns]


def by_hand(fusion, maps, shapes):
    """The paper's fusion (figure 4a), stage by stage from the last one."""
    outputs, deeper = [], None
    for stage, x, shape in [*zip(fusion.stages, maps, shapes, strict=True)][::-1]:
        x = x.reshape(*x.shape, 1, 1) if x.ndim == 2 else x
        x = norm(torch.einsum("oi,bihw->bohw", stage.enter[0].weight[:, :, 0, 0], x), stage.enter[1])
        if deeper is not None:
            deeper = nearest(deeper, x.shape[2:])
            both = torch.cat([x, deeper], dim=1)
            weights = torch.einsum("oi,bihw->bohw", stage.attend[0].weight[:, :, 0, 0], both)
            weights = 1 / (1 + (-weights - stage.attend[0].bias.view(-1, 1, 1)).exp())
            x = x * weights[:, :1] + deeper * weights[:, 1:]
        deeper = nearest(x, shape[1:] or (1, 1))
        patches = F.unfold(deeper, 3, padding=1).view(len(x), -1, *deeper.shape[2:])
        output = norm(torch.einsum("oi,bihw->bohw", stage.leave[0].weight.flatten(1), patches), stage.leave[1])
        outputs.append(output if len(shape) == 3 else output[:, :, 0, 0])
    return outputs[::-1]


@pytest.mark.parametrize("width", [512, 2])
def test_by_hand(width):
    fusion = built(width=width).eval()
    assert all(stage.enter[0].out_channels == min(width, 7) for stage in fusion.stages)
    maps = features()
    found = fusion(maps)
    assert [output.shape[1:] for output in found] == TEACHER
    for output, expected in zip(found, by_hand(fusion, maps, TEACHER), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_each_stage_depends_on_itself_and_the_deeper_ones():
    fusion, maps = built().eval(), [x.requires_grad_() for x in features()]
    outputs = fusion(maps)
    for i, output in enumerate(outputs):
        gradients = torch.autograd.grad(output.sum(), maps, retain_graph=True, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [j >= i for j in range(len(maps))]


def test_one_stage_is_not_fused():
    fusion = built(STUDENT[:1], TEACHER[:1]).eval()
    (output,) = fusion(features(STUDENT[:1]))
    assert output.shape == (3, 4, 8, 6) and fusion.stages[0].attend is None


def test_other_sizes_of_inputs_keep_the_ratios():
    fusion = built().eval()
    larger = [shape if len(shape) == 1 else (shape[0], 2 * shape[1], 2 * shape[2]) for shape in STUDENT]
    assert [[*o.shape[1:]] for o in fusion(features(larger))] == [[4, 16, 12], [9, 8, 6], [8, 4, 4], [11]]


def test_half_precision_and_training():
    maps = [x.float() for x in features()]
    half = built().to(torch.bfloat16)
    expected = built()(features())
    for output, goal in zip(half(maps), expected, strict=True):
        assert output.shape == goal.shape and output.isfinite().all()
    whole = built().float()
    with torch.autocast("cpu", torch.bfloat16):
        for output, goal in zip(whole(maps), expected, strict=True):
            torch.testing.assert_close(output.double(), goal, rtol=0.1, atol=0.1)
    sum(output.float().square().sum() for output in whole(maps)).backward()
    assert all(p.grad is not None for p in whole.parameters())


def test_state_dict():
    fusion, other = built().eval(), built().eval()
    torch.nn.init.ones_(other.stages[0].enter[0].weight)
    other.load_state_dict(fusion.state_dict())
    assert all(torch.equal(*pair) for pair in zip(fusion(features()), other(features()), strict=True))


def test_bad_input_is_one_line():
    for call, message in [
        (lambda: ReviewFusion(0), "width must be at least 1, got 0"),
        (lambda: ReviewFusion()(features()), "ReviewFusion is not built; call build(student_shapes, teacher_shapes)"),
        (lambda: built()(features()[:2]), "ReviewFusion is built for 4 stages, got 2 features"),
        (
            lambda: built(STUDENT[::-1], TEACHER[::-1]),
            "from the first stage to the last, whose maps get no larger, got ",
        ),
        (lambda: built([(3, 9)], [(4, 9)]), "joins maps (C, H, W), and vectors (C,), got shapes [3, 9] and [4, 9]"),
        (lambda: built([(3, 9, 9)], [(4,)]), "got shapes [3, 9, 9] and [4] of one sample"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value)
