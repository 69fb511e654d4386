"""Projectors: each against a reference, what building them finds and leaves unchanged, and real networks."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kd_lightning.features.projectors import Projectors
from matplotlib import pyplot as plt
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18, swin_t, vit_b_16
from torchvision.models.vision_transformer import VisionTransformer

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture
from kd_lightning.features.regressors import TokensToMap, build_projector, map_shape, target_of, to_map
from kd_lightning.losses import HintLoss
from kd_lightning.modules._shared.hint_figure import hint_figure
from kd_lightning.teachers.teacher import Teacher


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def set_out(tokens, side):
    """Tokens as a map, entry by entry."""
    first = tokens.shape[1] - side * side
    array = np.empty((len(tokens), tokens.shape[2], side, side))
    for row in range(side):
        for column in range(side):
            array[:, :, row, column] = tokens[:, first + row * side + column].detach().numpy()
    return torch.from_numpy(array)


def weights_of(projector, kind):
    (layer,) = [module for module in projector.modules() if isinstance(module, kind)]
    return layer.weight, layer.bias


LARGER = [
    ((4, 6, 6), (5, 6, 6), (1, 1)),
    ((4, 8, 8), (5, 6, 6), (3, 3)),
    ((4, 8, 9), (5, 5, 7), (4, 3)),
    ((4, 6, 9), (2, 6, 2), (1, 8)),
    ((3, 5, 7), (2, 1, 1), (5, 7)),
    ((1, 1, 1), (1, 1, 1), (1, 1)),
]
SMALLER = [
    ((4, 3, 3), (5, 6, 6)),
    ((4, 3, 5), (2, 7, 6)),
    ((4, 6, 5), (2, 6, 9)),  # along one side
    ((4, 8, 3), (2, 5, 7)),  # larger along the other
    ((4, 1, 1), (2, 3, 3)),
]
OTHER_TOKENS = [(9, 4, 3, 2), (10, 4, 3, 2), (9, 5, 3, 2), (17, 5, 4, 2)]


class TestBuild:
    @pytest.mark.parametrize(("guided", "hint", "kernel"), LARGER)
    def test_larger_map_is_a_valid_convolution(self, guided, hint, kernel):
        x, projector = random_tensor(3, *guided), build_projector(guided, hint).double()
        weight, bias = weights_of(projector, nn.Conv2d)
        assert tuple(weight.shape[2:]) == kernel
        assert parameters(projector) == (guided[0] * kernel[0] * kernel[1] + 1) * hint[0]
        windows = x.unfold(2, kernel[0], 1).unfold(3, kernel[1], 1)
        expected = torch.einsum("bchwij,ocij->bohw", windows, weight) + bias.reshape(-1, 1, 1)
        assert expected.shape == (3, *hint)
        torch.testing.assert_close(projector(x), expected)

    @pytest.mark.parametrize(("guided", "hint"), SMALLER)
    def test_smaller_map_is_resized(self, guided, hint):
        x, projector = random_tensor(3, *guided), build_projector(guided, hint).double()
        weight, bias = weights_of(projector, nn.Conv2d)
        assert tuple(weight.shape) == (hint[0], guided[0], 1, 1)
        assert parameters(projector) == (guided[0] + 1) * hint[0]
        mixed = torch.einsum("bchw,oc->bohw", x, weight[:, :, 0, 0]) + bias.reshape(-1, 1, 1)
        expected = F.interpolate(mixed, hint[1:], mode="bilinear", align_corners=False)
        assert expected.shape == (3, *hint)
        torch.testing.assert_close(projector(x), expected)

    @pytest.mark.parametrize(
        ("guided", "hint"), [((4,), (7,)), ((1,), (1,)), ((6, 4), (6, 7)), ((17, 4), (17, 4)), ((1, 3), (1, 2))]
    )
    def test_vectors_and_equally_many_tokens_are_linear(self, guided, hint):
        x, projector = random_tensor(3, *guided), build_projector(guided, hint).double()
        weight, bias = weights_of(projector, nn.Linear)
        assert parameters(projector) == (guided[-1] + 1) * hint[-1]
        expected = torch.einsum("b...c,oc->b...o", x, weight) + bias
        assert expected.shape == (3, *hint)
        torch.testing.assert_close(projector(x), expected)

    @pytest.mark.parametrize(("guided", "hint", "side", "hint_side"), OTHER_TOKENS)
    def test_other_tokens_are_joined_as_maps(self, guided, hint, side, hint_side):
        for (mine, n, k), (theirs, m, j) in (
            ((guided, 3, side), (hint, 5, hint_side)),
            ((hint, 3, hint_side), (guided, 5, side)),
        ):
            x, target = random_tensor(2, mine, n), random_tensor(2, theirs, m, seed=1)
            projector = build_projector((mine, n), (theirs, m)).double()
            kernel = max(k - j + 1, 1)
            assert parameters(projector) == (n * kernel**2 + 1) * m
            expected = F.conv2d(set_out(x, k), *weights_of(projector, nn.Conv2d))
            expected = F.interpolate(expected, (j, j), mode="bilinear") if k < j else expected
            assert expected.shape == (2, m, j, j)
            torch.testing.assert_close(projector(x), expected)
            assert torch.equal(target_of(target, projector(x)), set_out(target, j))

    def test_as_many_places_with_and_without_class_token_are_maps(self):
        x, target = random_tensor(2, 10, 3), random_tensor(2, 9, 5, seed=1)
        projector = build_projector((10, 3), (9, 5)).double()
        expected = F.conv2d(set_out(x, 3), *weights_of(projector, nn.Conv2d))
        assert parameters(projector) == (3 + 1) * 5
        torch.testing.assert_close(projector(x), expected)
        assert torch.equal(target_of(target, projector(x)), set_out(target, 3))

    @pytest.mark.parametrize("tokens", [9, 10])
    @pytest.mark.parametrize(("size", "kernel"), [((3, 3), (1, 1)), ((2, 3), (2, 1)), ((4, 2), None)])
    def test_tokens_to_a_map(self, tokens, size, kernel):
        x, projector = random_tensor(2, tokens, 4), build_projector((tokens, 4), (5, *size)).double()
        weight, bias = weights_of(projector, nn.Conv2d)
        assert tuple(weight.shape) == (5, 4, *(kernel or (1, 1)))
        expected = F.conv2d(set_out(x, 3), weight, bias)
        expected = expected if kernel else F.interpolate(expected, size, mode="bilinear")
        assert expected.shape == (2, 5, *size)
        torch.testing.assert_close(projector(x), expected)

    @pytest.mark.parametrize("tokens", [9, 10])
    @pytest.mark.parametrize(("size", "kernel"), [((3, 3), (1, 1)), ((5, 4), (3, 2)), ((4, 2), None)])
    def test_a_map_to_tokens(self, tokens, size, kernel):
        x, target = random_tensor(2, 4, *size), random_tensor(2, tokens, 5, seed=1)
        projector = build_projector((4, *size), (tokens, 5)).double()
        weight, bias = weights_of(projector, nn.Conv2d)
        assert tuple(weight.shape) == (5, 4, *(kernel or (1, 1)))
        expected = F.conv2d(x, weight, bias)
        expected = expected if kernel else F.interpolate(expected, (3, 3), mode="bilinear")
        torch.testing.assert_close(projector(x), expected)
        assert torch.equal(target_of(target, projector(x)), set_out(target, 3))

    @pytest.mark.parametrize(
        ("guided", "hint", "message"),
        [
            ((4,), (4, 3, 3), "[4] is neither a map (C, ...) nor tokens (N, C)"),
            ((4, 3, 3), (4,), "[4] is neither a map"),
            ((9, 4), (4,), "[4] is neither a map"),
            ((4, 3, 3, 3), (4, 3, 3), "one is a map of 3 sides, the other of 2"),
            ((4, 3, 3), (4, 2, 3, 3), "one is a map of 2 sides, the other of 3"),
            ((9, 4), (4, 2, 3, 3), "one is a map of 2 sides, the other of 3"),
            ((4, 3, 3, 3, 3), (4, 3, 3), "[4, 3, 3, 3, 3] is neither a map"),
            ((), (4,), "[] is neither a map"),
            ((7, 4), (4, 3, 3), "the grid of 7 tokens is not square, with or without a class token"),
            ((9, 4), (12, 4), "the grid of 12 tokens"),
        ],
    )
    def test_shapes_that_do_not_join(self, guided, hint, message):
        with pytest.raises(InputError, match=re.escape(message)):
            build_projector(guided, hint)


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIDES = [
    ((4, 9), (5, 7), (3,)),
    ((4, 6), (5, 6), (1,)),
    ((3, 5, 6, 7), (2, 3, 6, 4), (3, 1, 4)),
    ((2, 4, 4, 4), (3, 4, 4, 4), (1, 1, 1)),
]


class TestSequencesAndVolumes:
    """Maps (C, L) and (C, D, H, W), and maps whose channels come last."""

    @pytest.mark.parametrize(("guided", "hint", "kernel"), SIDES)
    def test_larger_map_is_a_valid_convolution(self, guided, hint, kernel):
        x, projector = random_tensor(3, *guided), build_projector(guided, hint, "first", "first").double()
        weight, bias = weights_of(projector, CONVOLUTIONS[len(kernel)])
        assert tuple(weight.shape) == (hint[0], guided[0], *kernel)
        windows = x
        for side, size in enumerate(kernel):
            windows = windows.unfold(2 + side, size, 1)
        dims = [*range(1, 2 + len(kernel))]
        expected = torch.tensordot(windows, weight, ([1, *range(-len(kernel), 0)], dims)).movedim(-1, 1)
        expected = expected + bias.reshape(-1, *[1] * len(kernel))
        assert expected.shape == (3, *hint)
        torch.testing.assert_close(projector(x), expected)

    @pytest.mark.parametrize(
        ("guided", "hint"), [((4, 3), (5, 7)), ((2, 3, 4, 5), (3, 6, 4, 4)), ((2, 1, 1, 1), (3, 2, 2, 2))]
    )
    def test_smaller_map_is_resized(self, guided, hint):
        """Linear along one side after the other."""
        x, projector = random_tensor(3, *guided), build_projector(guided, hint, "first", "first").double()
        weight, bias = weights_of(projector, CONVOLUTIONS[len(guided) - 1])
        assert parameters(projector) == (guided[0] + 1) * hint[0]
        expected = torch.tensordot(x, weight.reshape(hint[0], guided[0]), ([1], [1])) + bias
        for side, (size, new) in enumerate(zip(guided[1:], hint[1:], strict=True)):
            places = ((torch.arange(new, dtype=torch.float64) + 0.5) * size / new - 0.5).clamp(0, size - 1)
            low = places.floor().long()
            high, part = (low + 1).clamp(max=size - 1), places - low
            line = expected.movedim(1 + side, -1)
            expected = (line[..., low] * (1 - part) + line[..., high] * part).movedim(-1, 1 + side)
        torch.testing.assert_close(projector(x), expected.movedim(-1, 1))

    @pytest.mark.parametrize(("guided", "hint", "kernel"), [*SIDES[2:], ((4, 8, 9), (5, 5, 7), (4, 3))])
    @pytest.mark.parametrize("layouts", [("first", "last"), ("last", "first"), ("last", "last")], ids=str)
    def test_channels_last(self, guided, hint, kernel, layouts):
        """The same as with channels first, of what is moved there."""
        x, target = random_tensor(3, *guided), random_tensor(3, *hint, seed=1)
        plain = build_projector(guided, hint, "first", "first").double()
        shapes = [(*s[1:], s[0]) if layout == "last" else s for s, layout in zip((guided, hint), layouts, strict=True)]
        projector = build_projector(*shapes, *layouts).double()
        assert weights_of(projector, CONVOLUTIONS[len(kernel)])[0].shape[2:] == kernel
        assert parameters(projector) == parameters(plain)
        for one, other in zip(projector.parameters(), plain.parameters(), strict=True):
            other.data = one.data
        moved = x.movedim(1, -1) if layouts[0] == "last" else x
        torch.testing.assert_close(projector(moved), plain(x))
        assert torch.equal(projector.arrange(target.movedim(1, -1) if layouts[1] == "last" else target), target)

    @pytest.mark.parametrize(("size", "kernel"), [(7, (1,)), (5, (3,)), (9, None)])
    def test_tokens_and_a_sequence(self, size, kernel):
        """Seven tokens, which are no square: as the map (C, 7)."""
        tokens, maps = random_tensor(3, 7, 4), random_tensor(3, 5, size, seed=1)
        projector = build_projector((7, 4), (5, size), "last", "first").double()
        weight, bias = weights_of(projector, nn.Conv1d)
        assert tuple(weight.shape[2:]) == (kernel or (1,))
        expected = F.conv1d(tokens.transpose(1, 2), weight, bias)
        expected = expected if kernel else F.interpolate(expected, size, mode="linear")
        torch.testing.assert_close(projector(tokens), expected)
        assert torch.equal(projector.arrange(maps), maps)
        back = build_projector((5, size), (7, 4), "first", "last")
        assert back(maps.float()).shape == (3, 4, 7) and torch.equal(back.arrange(tokens), tokens.transpose(1, 2))

    def test_equal_sides_do_not_decide(self):
        """(8, 8) as tokens is a linear layer over the last dimension, as a map a convolution over the first."""
        x = random_tensor(2, 8, 8)
        tokens, maps = (build_projector((8, 8), (8, 8), layout, layout).double() for layout in ("last", "first"))
        weight, bias = weights_of(tokens, nn.Linear)
        torch.testing.assert_close(tokens(x), torch.einsum("bnc,oc->bno", x, weight) + bias)
        weight, bias = weights_of(maps, nn.Conv1d)
        torch.testing.assert_close(maps(x), torch.einsum("bcl,oc->bol", x, weight[..., 0]) + bias[:, None])


class TestOtherSizes:
    """Inputs of another size than those that the projectors were built from."""

    @pytest.mark.parametrize("dimensions", [1, 2, 3])
    def test_resized_to_the_hint_of_each_batch(self, dimensions):
        conv = CONVOLUTIONS[dimensions]
        larger = build_projector((2, *[6] * dimensions), (3, *[4] * dimensions), "first", "first").double()
        smaller = build_projector((2, *[3] * dimensions), (3, *[6] * dimensions), "first", "first").double()
        mode = ("linear", "bilinear", "trilinear")[dimensions - 1]
        for projector, size, hint in (
            (larger, 9, 6),
            (larger, 4, 3),
            (larger, 6, 4),
            (smaller, 5, 10),
            (smaller, 3, 7),
        ):
            x = random_tensor(2, 2, *[size] * dimensions)
            weight, bias = weights_of(projector, conv)
            expected = getattr(F, f"conv{dimensions}d")(x, weight, bias)
            sizes = (hint,) * dimensions
            expected = F.interpolate(expected, sizes, mode=mode) if expected.shape[2:] != sizes else expected
            torch.testing.assert_close(projector(x, sizes), expected)

    def test_smaller_than_the_kernel(self):
        projector = build_projector((2, 6, 6), (3, 2, 2))
        message = (
            "a map of [4, 6] is smaller than the projector's kernel [5, 5]; give larger inputs, or your own projector"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            projector(torch.zeros(1, 2, 4, 6), (2, 2))


class TestTokens:
    @pytest.mark.parametrize(
        ("tokens", "side"), [(1, 1), (2, 1), (4, 2), (5, 2), (9, 3), (10, 3), (196, 14), (197, 14), (1025, 32)]
    )
    def test_raster_order_without_the_class_token(self, tokens, side):
        x = random_tensor(2, tokens, 3)
        assert map_shape((tokens, 3)) == (3, side, side)
        assert torch.equal(to_map(x), set_out(x, side)) and torch.equal(TokensToMap()(x), to_map(x))

    def test_the_order_of_a_real_transformer(self):
        torch.manual_seed(0)
        vit = VisionTransformer(12, 4, 1, 1, hidden_dim=6, mlp_dim=2, num_classes=2).eval()
        with capture(vit, ["conv_proj", "encoder.dropout"]) as outputs:
            vit(torch.randn(2, 3, 12, 12))
        tokens = outputs["encoder.dropout"] - vit.encoder.pos_embedding
        torch.testing.assert_close(to_map(tokens), outputs["conv_proj"])

    @pytest.mark.parametrize("tokens", [0, 3, 6, 7, 8, 11, 198])
    def test_no_square(self, tokens):
        message = f"the grid of {tokens} tokens is not square, with or without a class token"
        for call in (map_shape, lambda shape: to_map(torch.zeros(2, *shape))):
            with pytest.raises(InputError, match=message):
                call((tokens, 4))

    def test_maps_stay(self):
        assert map_shape([4, 3, 2]) == (4, 3, 2)

    @pytest.mark.parametrize("shape", [(), (4,), (4, 3, 2, 1, 1)])
    def test_neither_map_nor_tokens(self, shape):
        with pytest.raises(InputError, match=re.escape(f"{[*shape]} is neither a map (C, ...) nor tokens (N, C)")):
            map_shape(shape)

    @pytest.mark.parametrize(("hint", "projected"), [((2, 9, 4), (2, 9, 4)), ((2, 4), (2, 4)), ((2, 4, 3, 3),) * 2])
    def test_target_is_the_hint_itself(self, hint, projected):
        hint = torch.zeros(hint)
        assert target_of(hint, torch.zeros(projected)) is hint


class Student(nn.Module):
    """A side branch is computed first, and joins above; one layer is never reached."""

    def __init__(self):
        super().__init__()
        self.side = nn.Conv2d(3, 6, 1)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.drop = nn.Dropout(0.5)
        self.mid = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(5, 6, 1, bias=False)
        self.unused = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        side = self.side(x).mean((2, 3))
        z = self.mid(self.drop(self.stem(x)).relu())
        return self.head(self.deep(z.relu()).mean((2, 3)) + side)


class Network(nn.Module):
    """A teacher."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU())
        self.top = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(7, 8, 1), nn.Sigmoid())
        self.unused = nn.Tanh()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.top(self.body(x)).mean((2, 3)))


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STEM = {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"}
MID = STEM | {"mid.weight", "mid.bias"}
DEEP = MID | {"deep.weight"}


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Student()


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return Teacher(Network())


def run(projectors, student, teacher, x=X):
    with capture(student, [*projectors.hints], stop=True) as guided:
        student(x)
    with capture(teacher.network, [*projectors.hints.values()], stop=True) as hints:
        teacher(Batch(x))
    return projectors.pairs(guided, hints, len(x))


def built(student, teacher, hints, given=None, x=X):
    projectors = Projectors(hints, given)
    projectors.build_from_networks(student, x, teacher.network, teacher.prepare(x))
    return projectors


class TestBuildFromNetworks:
    def test_shapes_and_pairs_by_hand(self, student, teacher):
        projectors = built(student, teacher, {"mid": "top.2", "stem.0": "body.0", "head": "fc"})
        assert projectors.shapes == [
            ([5, 4, 4], [8, 4, 4]),
            ([4, 8, 8], [7, 8, 8]),
            ([5], [5]),
        ]
        assert {key: type(module[0]) for key, module in projectors.items()} == {
            "0": nn.Conv2d,
            "1": nn.Conv2d,
            "2": nn.Linear,
        }
        size = (5 + 1) * 8 + (4 + 1) * 7 + (5 + 1) * 5
        assert projectors.size() == parameters(projectors) == size
        assert projectors.describe() == (
            "hints: mid [5, 4, 4] -> top.2 [8, 4, 4]; stem.0 [4, 8, 8] -> body.0 [7, 8, 8]; head [5] -> fc [5]; "
            f"{size} parameters in projectors"
        )
        student.eval()
        pairs = run(projectors, student, teacher)
        assert [*pairs] == ["mid", "stem.0", "head"]
        network = teacher.network
        z = student.stem[0](X)
        weight, bias = projectors["1"][0].weight, projectors["1"][0].bias
        torch.testing.assert_close(pairs["stem.0"][0], F.conv2d(z, weight, bias))
        weight, bias = projectors["0"][0].weight, projectors["0"][0].bias
        z = student.mid(student.stem[1](z).relu())
        torch.testing.assert_close(pairs["mid"][0], F.conv2d(z, weight, bias))
        torch.testing.assert_close(pairs["mid"][1], network.top(network.body(X)))
        torch.testing.assert_close(pairs["stem.0"][1], network.body[0](X))
        torch.testing.assert_close(pairs["head"][1], network(X))

    @pytest.mark.parametrize("hint", ["body.2", "top.2", "body.0"])
    def test_linear_whatever_the_sign_of_the_hint(self, student, teacher, hint):
        projectors = built(student, teacher, {"mid": hint})
        z = random_tensor(3, 5, 4, 4).float()
        one, two, both, none = (projectors["0"](x) for x in (z, 2 * z, 3 * z, 0 * z))
        torch.testing.assert_close(one + two, both + none)
        assert one.min() < 0

    @pytest.mark.parametrize(
        ("guided", "below"),
        [
            (["stem.0"], {"stem.0.weight", "stem.0.bias"}),
            (["mid"], MID),  # not the side branch, though it runs first
            (["deep"], DEEP),
            (["stem", "deep"], DEEP),
            (["deep", "stem"], DEEP),
            (["side"], {"side.weight", "side.bias"}),
            (["side", "stem"], STEM | {"side.weight", "side.bias"}),
            (["head"], DEEP | {"side.weight", "side.bias", "head.weight", "head.bias"}),
        ],
    )
    @pytest.mark.parametrize("grad", [True, False])
    def test_parameters_below_the_guided_layers(self, student, teacher, guided, below, grad):
        layers = {name: "fc" if name == "head" else f"body.{n}" for n, name in enumerate(guided)}
        with torch.set_grad_enabled(grad):
            projectors = built(student, teacher, layers)
        assert projectors.guided_parameters == below
        assert all(p.grad is None for p in student.parameters())

    def test_frozen_parameters_below_count_and_stay_frozen(self, student, teacher):
        names = built(student, teacher, {"mid": "top"}).guided_parameters
        student.stem.requires_grad_(False)
        student.mid.bias.requires_grad_(False)
        flags = [p.requires_grad for p in student.parameters()]
        assert (
            built(student, teacher, {"mid": "top"}).guided_parameters
            == names
            >= {"mid.weight", "mid.bias", "stem.0.weight"}
        )
        assert [p.requires_grad for p in student.parameters()] == flags
        with pytest.raises(InputError):
            built(student, teacher, {"mid": "nowhere"})
        assert [p.requires_grad for p in student.parameters()] == flags

    @pytest.mark.parametrize("fault", [None, "joined", "given"])
    def test_leaves_everything_as_it_was(self, student, teacher, fault):
        student.stem[0].eval()  # BatchNorm and dropout train
        given = nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 9 if fault == "given" else 8, 1), nn.Dropout(0.5))
        given[2].eval()
        networks = {"student": student, "teacher": teacher.network, "given": given}
        layers = [layer for network in networks.values() for layer in network.modules()]
        modes = [layer.training for layer in layers]
        state = {(n, k): v.clone() for n, network in networks.items() for k, v in network.state_dict().items()}
        generator, images = torch.get_rng_state(), X.clone()
        hints = {"mid": "top", "head" if fault == "joined" else "deep": "body.0"}
        if fault:
            with pytest.raises(InputError):
                built(student, teacher, hints, {"mid": given})
        else:
            built(student, teacher, hints, {"mid": given})
        assert torch.equal(torch.get_rng_state(), generator) and torch.equal(X, images)
        assert [layer.training for layer in layers] == modes
        assert all(torch.equal(state[n, k], v) for n in networks for k, v in networks[n].state_dict().items())
        assert not any(layer._forward_hooks for layer in layers)
        assert not any(p.requires_grad for p in teacher.network.parameters())

    def test_compiled_student(self, student, teacher):
        torch._dynamo.reset()
        plain = built(student, teacher, {"mid": "top"})
        wrapped = torch.compile(student, backend="eager")
        wrapped(X)
        projectors = built(wrapped, teacher, {"mid": "top"})
        assert projectors.shapes == plain.shapes
        assert projectors.guided_parameters == {f"_orig_mod.{name}" for name in MID}  # as its named_parameters has them
        student.compile(backend="eager")
        assert built(student, teacher, {"mid": "top"}).guided_parameters == MID

    def test_built_regressors_train_and_depend_on_the_seed_alone(self, student, teacher):
        hints = {"mid": "top", "deep": "top"}
        torch.manual_seed(5)
        one = built(student, teacher, hints)
        torch.rand(7)  # the generator's state does not matter
        generator = torch.get_rng_state()
        other = built(student, teacher, hints, x=X + 1)
        assert torch.equal(torch.get_rng_state(), generator) and torch.initial_seed() == 5
        assert torch.equal(one["0"][0].weight, other["0"][0].weight)
        assert torch.equal(one["1"][0].weight, other["1"][0].weight)
        assert not torch.equal(one["0"][0].bias, one["1"][0].bias)  # one after the other
        assert all(module.training for module in one.modules())
        assert all(p.requires_grad for p in one.parameters())
        torch.manual_seed(6)
        assert not torch.equal(built(student, teacher, {"mid": "top"})["0"][0].weight, one["0"][0].weight)

    def test_hints_of_preprocessed_images(self, student):
        network = Network()
        teacher = Teacher(network, preprocess=nn.Upsample(scale_factor=2))
        projectors = built(student, teacher, {"mid": "body"})
        assert projectors.shapes == [([5, 4, 4], [7, 16, 16])]
        expected = network.body(F.interpolate(X, scale_factor=2))
        torch.testing.assert_close(run(projectors, student, teacher)["mid"][1], expected)


class Sequences(nn.Module):
    """Convolutions over time, then a transformer; ``cut`` is applied to the maps."""

    def __init__(self, width, length=8, cut=lambda layer, x: layer(x)):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool1d(length)
        self.block = nn.TransformerEncoderLayer(width, 1, 4, batch_first=True)
        self.head = nn.Linear(width, 5)
        self.cut = cut

    def forward(self, x):
        tokens = self.pool(self.cut(self.conv, x)).transpose(1, 2)
        return self.head(self.block(tokens).mean(1))


WAVES = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0))


def sequences(*args, **kwargs):
    torch.manual_seed(0)
    return Sequences(*args, **kwargs)


class TestLayersTell:
    """What a feature is follows from the layers: the shapes (8, 8) here are those of maps and of tokens alike."""

    def test_maps_and_tokens_of_one_shape(self):
        student, teacher = sequences(8), Teacher(sequences(6))
        projectors = built(student, teacher, {"conv": "conv", "conv.2": "block", "block": "block"}, x=WAVES)
        assert projectors.shapes == [([8, 8], [6, 8]), ([8, 8], [8, 6]), ([8, 8], [8, 6])]
        assert projectors.layouts == [("first", "first"), ("first", "last"), ("last", "last")]
        kinds = [type(layer).__name__ for projector in projectors.values() for layer in projector]
        assert kinds == ["Conv1d", "Conv1d", "Linear"]
        with capture(student.eval(), ["conv", "conv.2", "block"]) as guided:
            student(WAVES)
        with capture(teacher.network, ["conv", "block"]) as hints:
            teacher(Batch(WAVES))
        pairs = projectors.pairs(guided, hints, 3)
        weight, bias = projectors["1"][0].weight, projectors["1"][0].bias
        torch.testing.assert_close(pairs["conv.2"][0], F.conv1d(guided["conv.2"], weight, bias))
        assert torch.equal(pairs["conv.2"][1], hints["block"].transpose(1, 2))
        assert torch.equal(pairs["block"][1], hints["block"]) and torch.equal(pairs["conv"][1], hints["conv"])

    def test_swin_teaches_with_its_channels_last(self, student):
        torch.manual_seed(0)
        swin, images = Teacher(swin_t()), torch.randn(2, 3, 32, 32)
        projectors = built(student, swin, {"mid": "features.1"}, x=images)
        assert projectors.shapes == [([5, 16, 16], [8, 8, 96])] and projectors.layouts == [("first", "last")]
        pairs = run(projectors, student, swin, images)
        with torch.no_grad():
            assert torch.equal(pairs["mid"][1], swin.network.features[:2](images).movedim(-1, 1))
        assert pairs["mid"][0].shape == (2, 96, 8, 8)

    @pytest.mark.parametrize("of", ["student", "teacher"])
    def test_refused_where_no_layer_tells(self, of):
        class Opaque(nn.Module):
            def forward(self, x):
                return torch.einsum("bcl,cd->bdl", x.cumsum(1), torch.eye(3))

        class Sums(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))
                self.mix, self.head = Opaque(), nn.Linear(3, 5)

            def forward(self, x):
                return self.head(self.mix(x * self.scale).sum(2))

        pair = (Sums(), sequences(6)) if of == "student" else (sequences(8), Sums())
        hints = {"mix": "conv"} if of == "student" else {"conv": "mix"}
        message = (
            f"hints: no layer around the {of}'s mix [3, 8] (for one sample) shows which dimension holds the channels; "
            "set another layer, or your own projector for this pair"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            built(pair[0], Teacher(pair[1]), hints, x=WAVES)
        own = nn.Conv1d(*((3, 6) if of == "student" else (8, 3)), 1)
        teacher = Teacher(pair[1])
        projectors = built(pair[0], teacher, hints, {next(iter(hints)): own}, x=WAVES)
        assert len(run(projectors, pair[0], teacher, WAVES)) == 1

    def test_a_map_is_no_tokens_for_a_given_projector(self):
        """A map (C, 9) is not arranged as a grid of nine tokens."""
        student, teacher = sequences(8), Teacher(sequences(4, 9))
        own = nn.Sequential(nn.Flatten(), nn.Linear(64, 4 * 9), nn.Unflatten(1, (9, 2, 2)))
        message = "projectors: that of conv gives [9, 2, 2] for one sample, but the hint of pool is [4, 9]"
        with pytest.raises(InputError, match=re.escape(message)):
            built(student, teacher, {"conv": "pool"}, {"conv": own}, x=WAVES)

    def test_a_checkpoint_without_layouts_has_the_usual_ones(self):
        projectors = Projectors({"a": "b", "c": "d"})
        projectors.build([([9, 4], [3, 2, 2]), ([4, 6, 6], [5, 9, 9])], torch.device("cpu"), torch.float32)
        assert projectors.layouts == [("last", "first"), ("first", "first")]

    def test_layouts_survive_a_checkpoint(self, tmp_path):
        projectors = built(sequences(8), Teacher(sequences(6)), {"conv": "conv", "block": "block"}, x=WAVES)
        torch.save([projectors.shapes, projectors.layouts], tmp_path / "p.pt")
        shapes, layouts = torch.load(tmp_path / "p.pt", weights_only=True)
        again = Projectors(projectors.hints)
        again.build(shapes, torch.device("cpu"), torch.float32, layouts)
        again.load_state_dict(projectors.state_dict())
        assert repr(again) == repr(projectors) and again.layouts == projectors.layouts


class TestRows:
    @pytest.mark.parametrize("of", ["student", "teacher"])
    def test_an_output_without_a_row_for_each_sample(self, of):
        class Tokens(nn.Module):
            def __init__(self, batch_first):
                super().__init__()
                self.lstm, self.head = nn.LSTM(3, 4, batch_first=batch_first), nn.Linear(4, 5)
                self.batch_first = batch_first

            def forward(self, x):
                x = x.transpose(1, 2)
                out = self.lstm(x if self.batch_first else x.transpose(0, 1))[0]
                return self.head(out.mean(1 if self.batch_first else 0))

        student, teacher = Tokens(of != "student"), Teacher(Tokens(of != "teacher"))
        message = (
            f"hints: the {of}'s layer lstm must return a row for each of 3 samples, got [8, 3, 4]; use another layer"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            built(student, teacher, {"lstm": "lstm"}, x=WAVES)
        right = built(Tokens(True), Teacher(Tokens(True)), {"lstm": "lstm"}, x=WAVES)
        assert right.layouts == [("last", "last")]

    def test_of_each_batch(self, student, teacher):
        projectors = built(student, teacher, {"mid": "top"})
        guided, hints = {"mid": torch.zeros(4, 5, 4, 4)}, {"top": torch.zeros(4, 8, 4, 4)}
        projectors.pairs(guided, hints, 4)
        with pytest.raises(InputError, match="layer mid must return a row for each of 2 samples, got"):
            projectors.pairs(guided, hints, 2)


class TestOtherSizesOfNetworks:
    """Images of another size than those that the projectors were built from."""

    @pytest.mark.parametrize("size", [4, 8, 12, 9])
    def test_maps_are_resized_to_the_hint(self, student, teacher, size):
        projectors = built(student, teacher, {"mid": "body", "stem": "top"})
        images = torch.randn(2, 3, size, size)
        if size == 4:  # the kernel for stem is 5 x 5
            with pytest.raises(
                InputError, match=r"^hints: stem -> top: a map of \[4, 4\] is smaller than the projector's"
            ):
                run(projectors, student, teacher, images)
            return
        for projected, hint in run(projectors, student, teacher, images).values():
            assert projected.shape == hint.shape

    def test_tokens_of_another_number(self):
        student, teacher = sequences(8, length=8), Teacher(sequences(6, length=8))
        projectors = built(student, teacher, {"block": "block"}, x=WAVES)
        with capture(student, ["block"]) as guided:
            student(WAVES)
        hints = {"block": torch.zeros(3, 9, 6)}
        with pytest.raises(
            InputError, match=r"that of block gives \[8, 6\] for one sample, but the hint of block is \[9, 6"
        ):
            projectors.pairs(guided, hints, 3)

    def test_tokens_that_are_no_square_then(self):
        projectors = Projectors({"a": "b"})
        projectors.build([([9, 4], [5, 3, 3])], torch.device("cpu"), torch.float32)
        assert projectors.pairs({"a": torch.zeros(2, 16, 4)}, {"b": torch.zeros(2, 5, 6, 6)}, 2)["a"][0].shape[2] == 6
        with pytest.raises(InputError, match="hints: a -> b: the grid of 12 tokens is not square"):
            projectors.pairs({"a": torch.zeros(2, 12, 4)}, {"b": torch.zeros(2, 5, 6, 6)}, 2)


class TestGradients:
    MESSAGE = "hints: the output of the student's layer conv has no gradient, so that nothing below it learns"

    def test_inside_gradient_checkpointing(self):
        teacher = Teacher(sequences(6))
        student = sequences(8, cut=lambda layer, x: checkpoint(layer, x.requires_grad_(), use_reentrant=True))
        with pytest.raises(InputError, match=self.MESSAGE.replace("conv", "conv.1")):
            built(student, teacher, {"conv.1": "conv"}, x=WAVES.clone())
        student = sequences(8, cut=lambda layer, x: checkpoint(layer, x, use_reentrant=False))
        projectors = built(student, teacher, {"conv.1": "conv"}, x=WAVES)
        assert projectors.guided_parameters == {"conv.0.weight", "conv.0.bias", "conv.1.weight", "conv.1.bias"}

    def test_detached_above_the_layer(self):
        student = sequences(8, cut=lambda layer, x: layer(x).detach())
        assert "conv.0.weight" in built(student, Teacher(sequences(6)), {"conv": "conv"}, x=WAVES).guided_parameters

    def test_reentrant_below_the_layer(self):
        """As in a network that always checkpoints its blocks; its parameters count."""
        student = sequences(8, cut=lambda layer, x: checkpoint(layer, x.requires_grad_(), use_reentrant=True))
        plain, teacher = sequences(8), Teacher(sequences(6))
        for network in (student, plain):
            for n, parameter in enumerate(network.parameters()):
                parameter.grad = torch.full_like(parameter, n)
        projectors = built(student, teacher, {"block": "block"}, x=WAVES.clone())
        assert projectors.guided_parameters == built(plain, teacher, {"block": "block"}, x=WAVES).guided_parameters
        assert all((p.grad == n).all() for n, p in enumerate(student.parameters()))

    def test_detached_below_or_nothing_to_train(self):
        class Cut(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Identity())
                self.pool, self.head = nn.AdaptiveAvgPool1d(1), nn.Linear(8, 5)

            def forward(self, x):
                return self.head(self.pool(self.conv(x).detach()).flatten(1))

        with pytest.raises(InputError, match=self.MESSAGE.replace("conv", "pool")):
            built(Cut(), Teacher(sequences(6)), {"conv": "conv", "pool": "conv"}, x=WAVES)


class TestProjectors:
    HINTS = {"stem.0": "body.0", "mid": "top.1", "deep": "body.2"}

    def test_given_ones_are_used_and_others_built(self, student, teacher):
        mine = nn.Conv2d(5, 8, 3, padding=1)
        projectors = built(student, teacher, self.HINTS, {"mid": mine})
        assert projectors["1"] is mine and {*projectors} == {"0", "1", "2"}
        assert {key.split(".")[0] for key in projectors.state_dict()} == {"0", "1", "2"}
        pairs = run(projectors, student.eval(), teacher)
        assert [*pairs] == [*self.HINTS]
        torch.testing.assert_close(pairs["mid"][0], mine(student.mid(student.stem(X).relu())))

    def test_a_second_build_leaves_them(self, student, teacher):
        projectors = built(student, teacher, self.HINTS, {"mid": nn.Conv2d(5, 8, 1)})
        modules = dict(projectors.items())
        projectors.build_from_networks(student, X, teacher.network, teacher.prepare(X))
        assert {key: id(module) for key, module in projectors.items()} == {k: id(m) for k, m in modules.items()}

    @pytest.mark.parametrize("own", [True, False])
    def test_state_dict_round_trip_by_their_shapes(self, student, teacher, own, tmp_path):
        def given():
            return {"mid": nn.Conv2d(5, 8, 1)} if own else None

        projectors = built(student, teacher, self.HINTS, given())
        torch.save({"shapes": projectors.shapes, "state": projectors.state_dict()}, tmp_path / "r.pt")
        saved = torch.load(tmp_path / "r.pt", weights_only=True)
        again = Projectors(self.HINTS, given())
        again.build(saved["shapes"], torch.device("cpu"), torch.float32)
        again.load_state_dict(saved["state"])
        assert again.shapes == projectors.shapes and again.describe() == projectors.describe()
        student.eval()
        one, other = run(projectors, student, teacher), run(again, student, teacher)
        assert all(torch.equal(one[name][0], other[name][0]) for name in self.HINTS)

    @pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64)])
    def test_device_and_dtype(self, device, dtype):
        projectors = Projectors({"a.b": "c"})
        generator = torch.get_rng_state()
        with torch.device("meta"):  # whatever the default is
            projectors.build([([4, 3, 3], [2, 2, 2])], torch.device(device), dtype)
        assert torch.equal(torch.get_rng_state(), generator)
        assert {(p.device.type, p.dtype) for p in projectors.parameters()} == {(device, dtype)}

    def test_built_in_the_dtype_of_the_student(self, student, teacher):
        projectors = built(student.double(), teacher.double(), self.HINTS, x=X.double())
        assert {p.dtype for p in projectors.parameters()} == {torch.float64}

    def test_no_pairs(self):
        with pytest.raises(InputError, match="hints must name at least one pair, {guided layer: hint layer}, got none"):
            Projectors({})

    def test_given_one_of_no_guided_layer(self):
        with pytest.raises(InputError, match=r"projectors: 'top\.1' is no guided layer; hints has stem\.0, mid, deep$"):
            Projectors(self.HINTS, {"mid": nn.Identity(), "top.1": nn.Identity()})

    @pytest.mark.parametrize(
        ("hints", "message"),
        [
            ({"stem.9": "body.0"}, r"^hints: layer 'stem\.9': Student has none of that name; nearest: stem"),
            ({"mid": "top", "stem.0": "bodi"}, "^hints: layer 'bodi': Network has none of that name; nearest: body"),
            ({"": "body.0"}, "^hints: layer '': Student has none of that name"),
        ],
    )
    def test_unknown_layers(self, student, teacher, hints, message):
        with pytest.raises(InputError, match=message):
            Projectors(hints).build_from_networks(student, X, teacher.network, teacher.prepare(X))

    def test_pair_that_does_not_join(self, student, teacher):
        message = (
            "hints: no built-in projector maps head [5] to body.0 [7, 8, 8] (for one sample): [5] is neither a map "
            "(C, ...) nor tokens (N, C); set other layers, or your own projectors"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            built(student, teacher, {"mid": "top", "head": "body.0"})
        own = nn.Sequential(nn.Linear(5, 7 * 8 * 8), nn.Unflatten(1, (7, 8, 8)))
        assert built(student, teacher, {"head": "body.0"}, {"head": own}).shapes == [([5], [7, 8, 8])]

    @pytest.mark.parametrize(
        ("hints", "message"),
        [
            ({"mid": "top", "unused": "body"}, "^hints: the student's layer unused is never called in its forward"),
            ({"mid": "unused"}, "^hints: the teacher's layer unused is never called in its forward"),
        ],
    )
    def test_layer_that_is_never_called(self, student, teacher, hints, message):
        with pytest.raises(InputError, match=message):
            built(student, teacher, hints)

    @pytest.mark.parametrize(
        ("own", "shape"),
        [
            (nn.Conv2d(5, 9, 1), "[9, 4, 4]"),
            (nn.Conv2d(5, 1, 1), "[1, 4, 4]"),  # would broadcast
            (nn.Conv2d(5, 8, 3), "[8, 2, 2]"),
            (nn.Flatten(), "[80]"),
        ],
    )
    def test_given_one_of_another_output_shape(self, student, teacher, own, shape):
        message = f"projectors: that of mid gives {shape} for one sample, but the hint of top is [8, 4, 4]"
        with pytest.raises(InputError, match=re.escape(message)):
            built(student, teacher, {"stem": "body", "mid": "top"}, {"mid": own})

    @pytest.mark.parametrize("own", [nn.Conv2d(6, 8, 1), nn.Linear(3, 8), nn.Module()])
    def test_given_one_that_crashes(self, student, teacher, own):
        with pytest.raises(InputError, match=r"^projectors: one does not fit its layer: \S[^\n]+$"):
            built(student, teacher, {"stem": "body", "mid": "top"}, {"mid": own})


@pytest.fixture(scope="module")
def resnets():
    torch.manual_seed(0)
    return resnet18(num_classes=5), Teacher(resnet18(num_classes=5))


@pytest.fixture(scope="module")
def vits():
    torch.manual_seed(0)
    vit = vit_b_16(image_size=64, num_classes=5)
    return vit, Teacher(copy.deepcopy(vit))


LAYER = "encoder.layers.encoder_layer_{}".format
R1, R2, R3, R4 = (("layer1", (64, 16, 16)), ("layer2", (128, 8, 8)), ("layer3", (256, 4, 4)), ("layer4", (512, 2, 2)))
V0, V1, PATCHES = ((LAYER(0), (17, 768)), (LAYER(1), (17, 768)), ("conv_proj", (768, 4, 4)))


class TestRealNetworks:
    """Images of 64 x 64, so 4 x 4 patches."""

    IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def check(self, student, teacher, pairs, first, size):
        student.zero_grad()
        projectors = built(student, teacher, {guided: hint for (guided, _), (hint, _) in pairs}, x=self.IMAGES)
        assert projectors.shapes == [([*g], [*h]) for (_, g), (_, h) in pairs]
        assert projectors.size() == size
        compared = run(projectors, student, teacher, self.IMAGES)
        loss = torch.stack([HintLoss()(*pair) for pair in compared.values()]).sum()
        loss.backward()
        assert loss.isfinite() and loss > 0
        reached = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        assert reached.keys() == projectors.guided_parameters
        assert all(g.isfinite().all() for g in reached.values()) and reached[first].abs().max() > 0
        assert all(p.grad.abs().max() > 0 for p in projectors.parameters())
        return projectors

    @pytest.mark.parametrize(
        ("pairs", "size"),
        [
            ([(R1, R1)], (64 + 1) * 64),
            ([(R2, R3)], (128 * 25 + 1) * 256),
            ([(R3, R2)], (256 + 1) * 128),
            ([(R2, R2), (R4, R3)], (128 + 1) * 128 + (512 + 1) * 256),
            ([(("avgpool", (512, 1, 1)), R4)], (512 + 1) * 512),
            ([(("fc", (5,)), ("fc", (5,)))], 30),
        ],
    )
    def test_resnets(self, resnets, pairs, size):
        projectors = self.check(*resnets, pairs, "conv1.weight", size)
        assert ("fc.weight" in projectors.guided_parameters) == ("fc" in projectors.hints)

    @pytest.mark.parametrize(
        ("pairs", "size"),
        [
            ([(R3, V0)], (256 + 1) * 768),
            ([(R2, V1), (R4, PATCHES)], (128 * 25 + 1) * 768 + (512 + 1) * 768),
        ],
    )
    def test_resnet_learns_from_a_transformer(self, resnets, vits, pairs, size):
        self.check(resnets[0], vits[1], pairs, "conv1.weight", size)

    @pytest.mark.parametrize(
        ("pairs", "size"), [([(V1, R3)], (768 + 1) * 256), ([(V0, R2), (PATCHES, R4)], 769 * 128 + (9 * 768 + 1) * 512)]
    )
    def test_transformer_learns_from_a_resnet(self, resnets, vits, pairs, size):
        projectors = self.check(vits[0], resnets[1], pairs, "conv_proj.weight", size)
        block = {name for name, _ in vits[0].named_parameters() if "encoder_layer_1." in name}
        assert block and (block <= projectors.guided_parameters) == (pairs[0][0] is V1)

    def test_transformers_of_the_same_tokens(self, vits):
        self.check(*vits, [(V0, V1)], "conv_proj.weight", 769 * 768)

    def test_transformers_of_other_tokens(self, vits):
        torch.manual_seed(0)
        fine = VisionTransformer(64, 8, 1, 2, hidden_dim=16, mlp_dim=8, num_classes=5)  # 8 x 8 patches
        self.check(fine, vits[1], [((LAYER(0), (65, 16)), V0)], "conv_proj.weight", (16 * 25 + 1) * 768)
        self.check(vits[0], Teacher(fine), [(V0, (LAYER(0), (65, 16)))], "conv_proj.weight", 769 * 16)


class TestFigure:
    @pytest.fixture(autouse=True)
    def closed(self):
        yield
        plt.close("all")

    @pytest.mark.parametrize(
        ("batch", "samples", "rows", "channels", "most", "columns"),
        [(5, 2, 2, 9, 6, 6), (1, 2, 1, 4, 6, 4), (5, 3, 3, 9, 1, 1), (5, 2, 2, 1, 6, 1)],
    )
    def test_maps(self, batch, samples, rows, channels, most, columns):
        hint, projected = random_tensor(batch, channels, 4, 3), random_tensor(batch, channels, 4, 3, seed=1)
        hint = hint * torch.randperm(channels, generator=torch.Generator().manual_seed(2)).add(1).reshape(-1, 1, 1)
        figure = hint_figure(hint, projected.requires_grad_(), "a -> b", samples, most)
        shown = hint[:rows].numpy()
        largest = np.argsort(-shown.transpose(1, 0, 2, 3).reshape(channels, -1).var(1))[:columns]
        axes = figure.get_axes()
        assert len(axes) == 2 * rows * columns and all(len(axis.get_images()) == 1 for axis in axes)
        assert figure.get_suptitle() == "a -> b"
        for place, axis in enumerate(axes):
            row, column = divmod(place, columns)
            image, channel = axis.get_images()[0], largest[column]
            source = (hint, projected.detach())[row % 2][row // 2, channel]
            np.testing.assert_allclose(image.get_array(), source.numpy(), rtol=1e-6)
            of_hint = hint[row // 2, channel]
            assert image.get_clim() == pytest.approx((of_hint.min().item(), of_hint.max().item()))
            assert axis.get_ylabel() == ("" if column else ("hint", "projected")[row % 2])
            assert axis.get_title() == (f"channel {channel}" if row == 0 and channels > 1 else "")

    @pytest.mark.parametrize("shape", [(3, 7, 4), (3, 9, 4), (1, 10, 4), (3, 6), (1, 1)])
    def test_tokens_and_vectors_are_one_matrix(self, shape):
        hint, projected = random_tensor(*shape), random_tensor(*shape, seed=1)
        figure = hint_figure(hint, projected, "tokens")
        axes = figure.get_axes()
        assert len(axes) == 2 * min(shape[0], 2)
        for row, axis in enumerate(axes):
            source = (hint, projected)[row % 2][row // 2]
            (image,) = axis.get_images()
            np.testing.assert_allclose(image.get_array(), source.reshape(-1, shape[-1]).numpy(), rtol=1e-6)
            assert axis.get_ylabel() == ("hint", "projected")[row % 2] and axis.get_title() == ""

    def test_defaults_half_precision_and_constant_maps(self):
        figure = hint_figure(*(fill((3, 7, 2, 2), dtype=torch.bfloat16) for fill in (torch.zeros, torch.ones)), "")
        figure.canvas.draw()
        assert len(figure.get_axes()) == 2 * 2 * 6

    @pytest.mark.parametrize(
        ("shape", "middle"), [((3, 7, 5, 4, 6), (2,)), ((1, 2, 1, 1, 1), (0,)), ((2, 3, 2, 5, 4, 6), (1, 2))]
    )
    def test_middle_slice_of_volumes(self, shape, middle):
        volumes = random_tensor(*shape), random_tensor(*shape, seed=1)
        slices = (volume[(slice(None), slice(None), *middle)] for volume in volumes)
        pixels = [
            [axis.get_images()[0].get_array().tolist() for axis in hint_figure(*pair, "").get_axes()]
            for pair in (volumes, slices)
        ]
        assert pixels[0] == pixels[1]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0])
    @pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 1, 2, 2), (2, 5), (2,), (2, 3, 1, 1)])
    def test_values_that_are_not_finite_or_constant(self, shape, value):
        hint = torch.full(shape, value)
        hint_figure(hint, torch.zeros(shape), "odd").canvas.draw()
        hint[0] = 1.0
        hint_figure(hint, hint, "odd").canvas.draw()
