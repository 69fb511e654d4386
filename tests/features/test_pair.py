"""Pairs of layers: what joins them, by hand, for maps, tokens and vectors; pooling, masks and other sizes."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.features.arrange import to_map
from kd_lightning.features.mlp_projector import MLPProjector
from kd_lightning.features.pair import FeaturePair
from kd_lightning.features.pooling import Pool
from tests.features.conftest import random_tensor

CPU = torch.device("cpu")
LAST, FIRST = ("last", "last"), ("first", "first")


def built(student, teacher, layouts, own=None, pool=None, needs=True):
    pair = FeaturePair("a", "b", own, needs, pool)
    torch.manual_seed(0)
    pair.build(([*student], [*teacher]), layouts, CPU, torch.float64)
    return pair


def features(student, teacher, rows=3):
    return random_tensor(rows, *student), random_tensor(rows, *teacher, seed=1)


def layer_of(pair):
    (layer,) = pair.projector
    return layer


class TestMapsAndTokens:
    @pytest.mark.parametrize(("side", "other"), [(3, 2), (2, 3), (4, 2)])
    @pytest.mark.parametrize("classes", [(0, 0), (1, 0), (0, 1), (1, 1)])
    def test_other_tokens_are_joined_as_maps(self, side, other, classes):
        shapes = (side**2 + classes[0], 4), (other**2 + classes[1], 5)
        (x, y), pair = features(*shapes), built(*shapes, LAST)
        kernel = max(side - other + 1, 1)
        assert layer_of(pair).weight.shape == (5, 4, kernel, kernel)
        expected = F.conv2d(to_map(x), layer_of(pair).weight, layer_of(pair).bias)
        expected = F.interpolate(expected, (other, other), mode="bilinear") if side < other else expected
        projected, target = pair(x, y)
        torch.testing.assert_close(projected, expected)
        assert torch.equal(target, to_map(y))

    def test_as_many_places_with_and_without_class_token_are_maps(self):
        (x, y), pair = features((10, 3), (9, 5)), built((10, 3), (9, 5), LAST)
        projected, target = pair(x, y)
        torch.testing.assert_close(projected, F.conv2d(to_map(x), layer_of(pair).weight, layer_of(pair).bias))
        assert torch.equal(target, to_map(y))

    @pytest.mark.parametrize("number", [7, 9, 10])
    def test_as_many_tokens_are_linear_at_each_one(self, number):
        (x, y), pair = features((number, 3), (number, 5)), built((number, 3), (number, 5), LAST)
        projected, target = pair(x, y)
        linear = F.linear(x, layer_of(pair).weight[..., 0], layer_of(pair).bias)
        torch.testing.assert_close(projected, linear.mT)
        assert torch.equal(target, y.mT)

    @pytest.mark.parametrize("tokens", [9, 10])
    @pytest.mark.parametrize(("size", "kernel"), [((3, 3), (1, 1)), ((2, 3), (2, 1)), ((4, 2), None)])
    @pytest.mark.parametrize("layout", ["first", "last"])
    def test_tokens_to_a_map(self, tokens, size, kernel, layout):
        shape = (5, *size) if layout == "first" else (*size, 5)
        (x, y), pair = features((tokens, 4), shape), built((tokens, 4), shape, ("last", layout))
        assert layer_of(pair).weight.shape == (5, 4, *(kernel or (1, 1)))
        expected = F.conv2d(to_map(x), layer_of(pair).weight, layer_of(pair).bias)
        expected = expected if kernel else F.interpolate(expected, size, mode="bilinear")
        projected, target = pair(x, y)
        torch.testing.assert_close(projected, expected)
        assert torch.equal(target, y if layout == "first" else y.permute(0, 3, 1, 2))

    @pytest.mark.parametrize("tokens", [9, 10])
    @pytest.mark.parametrize(("size", "kernel"), [((3, 3), (1, 1)), ((5, 4), (3, 2)), ((4, 2), None)])
    @pytest.mark.parametrize("layout", ["first", "last"])
    def test_a_map_to_tokens(self, tokens, size, kernel, layout):
        shape = (4, *size) if layout == "first" else (*size, 4)
        (x, y), pair = features(shape, (tokens, 5)), built(shape, (tokens, 5), (layout, "last"))
        assert layer_of(pair).weight.shape == (5, 4, *(kernel or (1, 1)))
        maps = x if layout == "first" else x.permute(0, 3, 1, 2)
        expected = F.conv2d(maps, layer_of(pair).weight, layer_of(pair).bias)
        expected = expected if kernel else F.interpolate(expected, (3, 3), mode="bilinear")
        projected, target = pair(x, y)
        torch.testing.assert_close(projected, expected)
        assert torch.equal(target, to_map(y))

    @pytest.mark.parametrize(("size", "kernel"), [(7, 1), (5, 3), (9, None)])
    def test_tokens_and_a_sequence(self, size, kernel):
        """Seven tokens, which are no square: as the map (C, 7)."""
        (x, y), pair = features((7, 4), (5, size)), built((7, 4), (5, size), ("last", "first"))
        expected = F.conv1d(x.mT, layer_of(pair).weight, layer_of(pair).bias)
        assert layer_of(pair).weight.shape == (5, 4, kernel or 1)
        expected = expected if kernel else F.interpolate(expected, size, mode="linear")
        projected, target = pair(x, y)
        torch.testing.assert_close(projected, expected)
        assert torch.equal(target, y)

    def test_equal_sides_do_not_decide(self):
        """(8, 8) as tokens is linear over the last dimension, as a map over the first."""
        x, y = features((8, 8), (8, 8))
        tokens, maps = built((8, 8), (8, 8), LAST), built((8, 8), (8, 8), FIRST)
        weight, bias = layer_of(tokens).weight[..., 0], layer_of(tokens).bias
        torch.testing.assert_close(tokens(x, y)[0], torch.einsum("bnc,oc->bon", x, weight) + bias[:, None])
        torch.testing.assert_close(maps(x, y)[0], torch.einsum("bcl,oc->bol", x, weight) + bias[:, None])
        assert torch.equal(tokens(x, y)[1], y.mT) and torch.equal(maps(x, y)[1], y)

    @pytest.mark.parametrize("layouts", [("first", "last"), ("last", "first"), ("last", "last")], ids=str)
    @pytest.mark.parametrize(("student", "teacher"), [((4, 8, 9), (5, 5, 7)), ((3, 5, 6, 7), (2, 3, 6, 4))])
    def test_channels_last(self, student, teacher, layouts):
        """The same as with the channels first, of what is moved there."""
        (x, y), plain = features(student, teacher), built(student, teacher, FIRST)
        moved = [f.movedim(1, -1) if layout == "last" else f for f, layout in zip((x, y), layouts, strict=True)]
        pair = built(*(f.shape[1:] for f in moved), layouts)
        assert pair.state_dict().keys() == plain.state_dict().keys()
        for one, other in zip(pair(*moved), plain(x, y), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("teacher", ["body", "positive", "negative"])
    def test_linear_whatever_the_sign_of_the_teachers(self, teacher):
        pair = built((5, 4, 4), (7, 4, 4), FIRST)
        x, y = features((5, 4, 4), (7, 4, 4))
        y = {"body": y, "positive": y.abs(), "negative": -y.abs()}[teacher]
        one, two, both, none = (pair(factor * x, y)[0] for factor in (1, 2, 3, 0))
        torch.testing.assert_close(one + two, both + none)
        assert one.min() < 0 < one.max()


class TestRefused:
    @pytest.mark.parametrize(
        ("student", "teacher", "layouts", "message"),
        [
            ((7, 4), (4, 3, 3), ("last", "first"), "a -> b: the grid of 7 tokens is not square"),
            ((9, 4), (12, 4), LAST, "a -> b: no built-in projector maps 9 tokens to 12, which are no square grids"),
            ((12, 4), (9, 4), LAST, "a -> b: no built-in projector maps 12 tokens to 9, which are no square grids"),
            (
                (5,),
                (7, 8, 8),
                FIRST,
                "no built-in projector maps a [5] to b [7, 8, 8] (for one sample): [5] is no map (C, ...); pool: mean "
                "makes vectors of both; set other layers, or your own projector",
            ),
        ],
    )
    def test_pairs_that_do_not_join(self, student, teacher, layouts, message):
        with pytest.raises(InputError, match="^" + re.escape(message)):
            built(student, teacher, layouts)(*features(student, teacher))
        own = nn.Sequential(nn.Flatten(), nn.LazyLinear(7 * 64), nn.Unflatten(1, (7, 8, 8)))
        if len(student) == 1:
            assert built(student, teacher, layouts, own)(*features(student, teacher))[0].shape[1:] == teacher

    @pytest.mark.parametrize("of", ["student", "teacher"])
    def test_unknown_channels(self, of):
        layouts = (None, "first") if of == "student" else ("first", None)
        name = {"student": "a", "teacher": "b"}[of]
        message = (
            f"no layer around the {of}'s {name} [3, 8] (for one sample) shows which dimension holds the channels; set "
            "another layer, or your own projector for this pair (nn.Identity() for none)"
        )
        for needs in (True, False):
            with pytest.raises(InputError, match="^" + re.escape(message)):
                built((3, 8), (3, 8), layouts, needs=needs)
        message = f"features: no layer around the {of}'s {name} [3, 8] (for one sample) shows which .* the last one is"
        with pytest.warns(
            UserWarning, match=message.replace("[3, 8] (for one sample)", re.escape("[3, 8] (for one sample)"))
        ):
            pair = built((3, 8), (3, 8), layouts, nn.Identity(), needs=False)
        x, y = features((3, 8), (3, 8))
        expected = (x.mT, y) if of == "student" else (x, y.mT)
        assert all(torch.equal(one, other) for one, other in zip(pair(x, y), expected, strict=True))

    def test_unknown_channels_of_vectors(self):
        built((3,), (4,), (None, None))

    @pytest.mark.parametrize(
        ("own", "shape"),
        [
            (nn.Conv2d(5, 9, 1), "[9, 4, 4]"),
            (nn.Conv2d(5, 1, 1), "[1, 4, 4]"),  # would broadcast
            (nn.Conv2d(5, 8, 3), "[8, 2, 2]"),
            (nn.Flatten(), "[80]"),
        ],
    )
    def test_own_projector_of_another_output_shape(self, own, shape):
        pair = built((5, 4, 4), (8, 4, 4), FIRST, own)
        message = (
            f"the projector of a gives {shape} for one sample, but the teacher's b is [8, 4, 4], with the channels"
        )
        with pytest.raises(InputError, match="^" + re.escape(message)):
            pair(*features((5, 4, 4), (8, 4, 4)))
        relation = built((5, 4, 4), (8, 4, 4), FIRST, own, needs=False)
        x, y = features((5, 4, 4), (8, 4, 4))
        assert torch.equal(relation(x, y)[0], own(x))

    def test_a_map_is_no_tokens_for_an_own_projector(self):
        """A map (C, 9) is not arranged as a grid of nine tokens."""
        own = nn.Sequential(nn.Flatten(), nn.Linear(64, 4 * 9), nn.Unflatten(1, (9, 2, 2)))
        with pytest.raises(
            InputError, match=re.escape("gives [9, 2, 2] for one sample, but the teacher's b is [4, 9]")
        ):
            built((8, 8), (4, 9), FIRST, own)(*features((8, 8), (4, 9)))


class TestProjector:
    def test_none_where_the_loss_needs_none(self):
        pair = built((5, 4, 4), (8, 2, 2), FIRST, needs=False)
        x, y = features((5, 4, 4), (8, 2, 2))
        assert pair.projector is None and pair(x, y)[0] is x and pair(x, y)[1] is y

    def test_own_ones_stay(self):
        own = nn.Conv1d(4, 6, 1)
        pair = built((9, 4), (9, 6), LAST, own)
        x, y = features((9, 4), (9, 6))
        assert pair.projector is own and {*pair.state_dict()} == {"projector.weight", "projector.bias"}
        assert torch.equal(pair(x, y)[0], own(x.mT))

    @pytest.mark.parametrize(
        ("student", "teacher", "layouts", "arranged"),
        [
            ((9, 4), (9, 6), LAST, ((4, 9), (6, 9))),
            ((3, 3, 4), (10, 6), LAST, ((4, 3, 3), (6, 3, 3))),
            ((5,), (6,), FIRST, ((5,), (6,))),
        ],
    )
    def test_build_of_own_ones_gets_shapes_with_the_channels_first(self, student, teacher, layouts, arranged):
        seen = []

        class Noted(MLPProjector):
            def build(self, student, teacher):
                seen.append((tuple(student), tuple(teacher)))
                super().build(student, teacher)

        pair = built(student, teacher, layouts, Noted(7))
        assert seen == [arranged]
        projected, target = pair(*features(student, teacher))
        assert projected.shape == target.shape == (3, *arranged[1])
        assert {p.dtype for p in pair.parameters()} == {torch.float64}

    @pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64)])
    def test_device_and_dtype(self, device, dtype):
        pair = FeaturePair("a", "b", None, True, None)
        pair.build(([4, 3, 3], [2, 2, 2]), FIRST, torch.device(device), dtype)
        assert {(p.device.type, p.dtype) for p in pair.parameters()} == {(device, dtype)}

    def test_described(self):
        assert built((9, 4), (5, 3, 3), ("last", "first")).describe() == "a [9, 4] -> b [5, 3, 3]"
        pair = FeaturePair("", "", None, True, None)
        pair.build(([5], [6]), FIRST, CPU, torch.float32)
        assert pair.describe() == "output [5] -> output [6]"


class TestPool:
    @pytest.mark.parametrize(
        ("shape", "layout", "dims"),
        [
            ((4, 3, 2), "first", (2, 3)),
            ((3, 2, 4), "last", (1, 2)),
            ((9, 4), "last", 1),
            ((4, 9), "first", 2),
            ((4,), "first", ()),
        ],
    )
    @pytest.mark.parametrize("of", ["student", "teacher"])
    def test_mean(self, shape, layout, dims, of):
        other = (6, 5)  # tokens
        shapes, layouts = ((shape, other), (layout, "last")) if of == "student" else ((other, shape), ("last", layout))
        pair = built(*shapes, layouts, pool="mean", needs=False)
        x, y = features(*shapes)
        found, tested, tokens = (pair(x, y), x, y) if of == "student" else (pair(x, y)[::-1], y, x)
        torch.testing.assert_close(found[0], tested.mean(dims) if dims else tested)
        torch.testing.assert_close(found[1], tokens.mean(1))

    def test_first_token_and_its_projector(self):
        pair = built((10, 4), (7, 6), LAST, pool="first")
        x, y = features((10, 4), (7, 6))
        projected, target = pair(x, y)
        torch.testing.assert_close(projected, F.linear(x[:, 0], layer_of(pair).weight, layer_of(pair).bias))
        assert torch.equal(target, y[:, 0])

    def test_first_of_a_map(self):
        with pytest.raises(InputError, match="^a -> b: pool: first needs tokens, such as .*, got a map"):
            built((10, 4), (6, 3, 3), ("last", "first"), pool="first")

    def test_mean_of_the_positions_that_exist(self):
        pair = built((5, 4), (5, 6), LAST, pool="mean", needs=False)
        x, y = features((5, 4), (5, 6), rows=2)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        mine, theirs = pair(x, y, mask)
        for found, feature in ((mine, x), (theirs, y)):
            torch.testing.assert_close(found, torch.stack([feature[0].mean(0), feature[1, :2].mean(0)]))

    @pytest.mark.parametrize("own", [nn.Linear(4, 6), None])
    def test_in_half_precision(self, own):
        """Means are float32, which weights in half precision do not take."""
        pair = FeaturePair("a", "b", own, True, "mean")
        pair.build(([4, 3, 3], [6, 3, 3]), FIRST, CPU, torch.bfloat16)
        x, y = (f.bfloat16() for f in features((4, 3, 3), (6, 3, 3)))
        projected, target = pair(x, y)
        expected = pair.projector(x.float().mean((2, 3)).bfloat16())
        assert torch.equal(projected, expected) and torch.equal(target, y.float().mean((2, 3)))
        relation = FeaturePair("a", "b", None, False, "mean")
        relation.build(([4, 3, 3], [6, 3, 3]), FIRST, CPU, torch.bfloat16)
        assert torch.equal(relation(x, y)[0], x.float().mean((2, 3)))

    def test_a_teachers_feature_that_is_pooled_already(self):
        """As a cache stores it."""
        pair = built((5, 4), (5, 6), LAST, pool="mean", needs=False)
        x, y = features((5, 4), (5, 6), rows=2)
        pool = pair.teacher_pool()
        assert pool == Pool("mean", "last")
        assert torch.equal(pair(x, pool(y))[1], pair(x, y)[1])

    def test_teachers_pool(self):
        assert built((4, 3, 3), (5, 3, 3), FIRST, pool="mean").teacher_pool() == Pool("mean", "first")
        assert built((4, 3, 3), (5, 3, 3), FIRST).teacher_pool() is None


class TestOtherSizes:
    """Features of other sizes than those that the pair was built from."""

    def test_maps_are_resized_to_the_teachers(self):
        pair = built((4, 8, 8), (5, 4, 4), FIRST)
        for size, goal in ((8, 4), (12, 6), (9, 4)):
            projected, target = pair(*features((4, size, size), (5, goal, goal)))
            assert projected.shape == target.shape
        with pytest.raises(InputError, match=r"^a -> b: a map of \[4, 4\] is smaller than the projector's kernel"):
            pair(*features((4, 4, 4), (5, 2, 2)))

    def test_tokens_of_another_number(self):
        pair = built((8, 3), (8, 6), LAST)
        assert pair(*features((11, 3), (11, 6)))[0].shape == (3, 6, 11)
        with pytest.raises(InputError, match="^a -> b: no built-in projector maps 8 tokens to 9"):
            pair(*features((8, 3), (9, 6)))
        with pytest.raises(InputError, match="^a -> b: the projector was built for 1 sides, got a feature"):
            pair(*features((16, 3), (9, 6)))  # two grids
        relation = built((8, 3), (8, 6), LAST, needs=False)
        assert [f.shape[1:] for f in relation(*features((8, 3), (9, 6)))] == [(3, 8), (6, 9)]

    def test_tokens_that_are_no_square_then(self):
        pair = built((9, 4), (5, 3, 3), ("last", "first"))
        assert pair(*features((16, 4), (5, 6, 6)))[0].shape == (3, 5, 6, 6)
        with pytest.raises(InputError, match="^a -> b: the grid of 12 tokens is not square"):
            pair(*features((12, 4), (5, 6, 6)))

    def test_no_samples(self):
        for student, teacher, layouts, pool in (
            ((9, 4), (5, 2, 2), ("last", "first"), None),
            ((9, 4), (9, 5), LAST, None),
            ((9, 4), (5, 2, 2), ("last", "first"), "mean"),
            ((4,), (5,), FIRST, None),
        ):
            pair = built(student, teacher, layouts, pool=pool)
            x = torch.zeros(0, *student, dtype=torch.float64, requires_grad=True)
            projected, target = pair(x, torch.zeros(0, *teacher, dtype=torch.float64))
            assert projected.shape == target.shape and len(projected) == 0
            projected.sum().backward()
            assert x.grad.shape == x.shape


class TestMask:
    MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
    def test_tokens(self, dtype):
        pair = built((4, 3), (4, 5), LAST)
        x, y = features((4, 3), (4, 5))
        plain, masked = pair(x, y), pair(x, y, self.MASK.to(dtype))
        for before, after in zip(plain, masked, strict=True):
            assert torch.equal(after, before * self.MASK[:, None])

    def test_maps_with_channels_last(self):
        pair = built((2, 2, 3), (5, 2, 2), ("last", "first"))
        x, y = features((2, 2, 3), (5, 2, 2))
        mask = self.MASK.view(3, 2, 2)
        for before, after in zip(pair(x, y), pair(x, y, mask), strict=True):
            assert torch.equal(after, before * mask[:, None])

    @pytest.mark.parametrize("pool", [None, "mean"])
    @pytest.mark.parametrize(("student", "teacher", "name", "number"), [(6, 6, "a", 6), (4, 6, "b", 6), (6, 4, "a", 6)])
    def test_other_positions_are_reported_once(self, pool, student, teacher, name, number):
        pair = built((student, 3), (teacher, 3), LAST, pool=pool, needs=False)
        x, y = features((student, 3), (teacher, 3))
        with pytest.warns(
            UserWarning, match=rf"padded positions count in that of {name}, .* positions \[{number}\], .* mask \[4\]"
        ):
            found = pair(x, y, self.MASK)
        plain = pair(x, y)
        for part, before, tokens in zip(found, plain, (student, teacher), strict=True):
            assert torch.equal(part, before) == (tokens != 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pair(x, y, self.MASK)

    @pytest.mark.parametrize("pool", [None, "mean"])
    def test_tokens_beside_a_mask_of_maps_and_the_reverse(self, pool):
        for shape, mask in (((4, 3), self.MASK.view(3, 2, 2)), ((2, 2, 3), self.MASK)):
            pair = built(shape, shape, LAST, pool=pool)
            x, y = features(shape, shape)
            with pytest.warns(UserWarning, match=r"padded positions count in that of a, .* and the mask"):
                pair(x, y, mask)

    def test_vectors_and_full_masks_are_not_reported(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            built((3,), (3,), FIRST)(*features((3,), (3,)), self.MASK)
            built((6, 3), (6, 3), LAST)(*features((6, 3), (6, 3)), torch.ones(3, 4))
            built((6, 3), (6, 3), LAST, pool="first")(*features((6, 3), (6, 3)), self.MASK)

    def test_the_teachers_alone(self):
        """As a standardization is fitted: what the loss gets is arranged beside the student's."""
        for student, teacher, layouts in (
            ((5, 3, 3), (10, 4), ("first", "last")),
            ((17, 3), (10, 4), LAST),
            ((10, 3), (10, 4), LAST),
            ((5,), (10, 4), ("first", "last")),
        ):
            pair = built(student, teacher, layouts, needs=False)
            x, y = features(student, teacher)
            assert torch.equal(pair.arrange_teacher(y), pair(x, y)[1])
        pair = built((4, 3), (4, 5), LAST, pool="mean", needs=False)
        x, y = features((4, 3), (4, 5))
        assert torch.equal(pair.arrange_teacher(y, self.MASK), pair(x, y, self.MASK)[1])
