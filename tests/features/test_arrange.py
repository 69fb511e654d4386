"""Features with the channels first, and tokens as maps, entry by entry."""

import numpy as np
import pytest
import torch
from torchvision.models.vision_transformer import VisionTransformer

from kd_lightning.errors import InputError
from kd_lightning.features.arrange import arrange_pair, channels_first, grid_side, is_tokens, to_map, usual_layout
from kd_lightning.features.capture import capture
from tests.features.conftest import random_tensor


def set_out(tokens, side):
    """Tokens as a map, entry by entry."""
    first = tokens.shape[1] - side * side
    array = np.empty((len(tokens), tokens.shape[2], side, side))
    for row in range(side):
        for column in range(side):
            array[:, :, row, column] = tokens[:, first + row * side + column].numpy()
    return torch.from_numpy(array)


class TestTokens:
    @pytest.mark.parametrize(
        ("tokens", "side"),
        # the last four with a distillation token, or with four registers
        [
            *[(1, 1), (2, 1), (4, 2), (5, 2), (9, 3), (10, 3), (197, 14), (1025, 32)],
            (18, 4),
            (198, 14),
            (21, 4),
            (201, 14),
        ],
    )
    def test_raster_order_without_the_class_token(self, tokens, side):
        x = random_tensor(2, tokens, 3)
        assert grid_side(tokens) == side
        assert torch.equal(to_map(x), set_out(x, side))

    def test_the_order_of_a_real_transformer(self):
        torch.manual_seed(0)
        vit = VisionTransformer(12, 4, 1, 1, hidden_dim=6, mlp_dim=2, num_classes=2).eval()
        with capture(vit, ["conv_proj", "encoder.dropout"]) as outputs:
            vit(torch.randn(2, 3, 12, 12))
        tokens = outputs["encoder.dropout"] - vit.encoder.pos_embedding
        torch.testing.assert_close(to_map(tokens), outputs["conv_proj"])

    @pytest.mark.parametrize("tokens", [0, 3, 6, 7, 8, 11, 199, 202])
    def test_no_square(self, tokens):
        assert grid_side(tokens) == 0
        message = f"the grid of {tokens} tokens is not square, with or without a class token"
        with pytest.raises(InputError, match=message):
            to_map(torch.zeros(2, tokens, 4))

    def test_no_samples(self):
        assert to_map(torch.zeros(0, 10, 4)).shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    ("shape", "layout"), [((4,), "first"), ((9, 4), "last"), ((4, 3, 2), "first"), ((4, 3, 2, 2), "first")]
)
def test_usual_layout(shape, layout):
    assert usual_layout(shape) == layout


@pytest.mark.parametrize(
    ("shape", "layout", "order"),
    [
        ((2, 3), "first", (0, 1)),
        ((2, 3), "last", (0, 1)),
        ((2, 3, 4), "first", (0, 1, 2)),
        ((2, 3, 4), "last", (0, 2, 1)),
        ((2, 3, 4, 5), "first", (0, 1, 2, 3)),
        ((2, 3, 4, 5), "last", (0, 3, 1, 2)),
        ((2, 3, 4, 5, 6), "last", (0, 4, 1, 2, 3)),
        ((5,), "last", (0,)),
    ],
)
def test_channels_first(shape, layout, order):
    x = random_tensor(*shape)
    assert torch.equal(channels_first(x, layout), x.permute(order))
    assert is_tokens(x, layout) == (len(shape) == 3 and layout == "last")


class TestPairs:
    @pytest.mark.parametrize("tokens", [(9, 4), (10, 4)])
    @pytest.mark.parametrize("maps", [("first", (5, 3, 2)), ("last", (3, 2, 5))])
    @pytest.mark.parametrize("of", ["student", "teacher"])
    def test_tokens_beside_a_map(self, tokens, maps, of):
        layout, shape = maps
        x, y = random_tensor(2, *tokens), random_tensor(2, *shape, seed=1)
        expected = set_out(x, 3), (y if layout == "first" else y.movedim(-1, 1))
        found = arrange_pair(x, y, ("last", layout)) if of == "student" else arrange_pair(y, x, (layout, "last"))[::-1]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    @pytest.mark.parametrize(
        ("one", "other", "sides"), [(9, 4, (3, 2)), (10, 4, (3, 2)), (17, 10, (4, 3)), (10, 9, (3, 3))]
    )
    def test_tokens_of_other_number_are_maps(self, one, other, sides):
        x, y = random_tensor(2, one, 3), random_tensor(2, other, 5, seed=1)
        for first, second, (mine, theirs) in ((x, y, sides), (y, x, sides[::-1])):
            found = arrange_pair(first, second, ("last", "last"))
            assert torch.equal(found[0], set_out(first, mine)) and torch.equal(found[1], set_out(second, theirs))

    @pytest.mark.parametrize(("one", "other"), [(9, 9), (7, 7), (9, 12), (12, 9), (7, 12)])
    def test_other_tokens_stay_tokens(self, one, other):
        x, y = random_tensor(2, one, 3), random_tensor(2, other, 5, seed=1)
        found = arrange_pair(x, y, ("last", "last"))
        assert torch.equal(found[0], x.mT) and torch.equal(found[1], y.mT)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("first", (4, 9)), ("last", (9, 4))),  # a sequence is no grid
            (("last", (9, 4)), ("first", (4, 3, 3, 3))),
            (("first", (4,)), ("last", (9, 4))),
            (("first", (4, 3, 3)), ("first", (4, 9))),
            (("last", (3, 3, 4)), ("last", (5, 5, 4))),
        ],
    )
    def test_others_are_moved_alone(self, one, other):
        x, y = random_tensor(2, *one[1]), random_tensor(2, *other[1], seed=1)
        found = arrange_pair(x, y, (one[0], other[0]))
        expected = (f.movedim(-1, 1) if layout == "last" else f for f, (layout, _) in ((x, one), (y, other)))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))

    def test_tokens_beside_a_map_that_are_no_square(self):
        with pytest.raises(InputError, match="the grid of 7 tokens is not square"):
            arrange_pair(torch.zeros(1, 7, 4), torch.zeros(1, 4, 3, 3), ("last", "first"))
        with pytest.raises(InputError, match="the grid of 12 tokens is not square"):
            arrange_pair(torch.zeros(1, 4, 3, 3), torch.zeros(1, 12, 4), ("first", "last"))
