"""Built-in projectors: each against a reference, for maps of one to three sides, tokens and vectors."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.features.regressors import Regressor, build_projector
from tests.features.conftest import random_tensor

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


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
    ((4, 9), (5, 7), (3,)),
    ((4, 6), (5, 6), (1,)),
    ((3, 5, 6, 7), (2, 3, 6, 4), (3, 1, 4)),
    ((2, 4, 4, 4), (3, 4, 4, 4), (1, 1, 1)),
]
SMALLER = [
    ((4, 3, 3), (5, 6, 6)),
    ((4, 3, 5), (2, 7, 6)),
    ((4, 6, 5), (2, 6, 9)),  # along one side
    ((4, 8, 3), (2, 5, 7)),  # larger along the other
    ((4, 1, 1), (2, 3, 3)),
    ((4, 3), (5, 7)),
    ((2, 3, 4, 5), (3, 6, 4, 4)),
    ((2, 1, 1, 1), (3, 2, 2, 2)),
]


def resized(maps, sizes):
    """Linear along one side after the other."""
    for side, new in enumerate(sizes):
        size = maps.shape[2 + side]
        places = ((torch.arange(new, dtype=torch.float64) + 0.5) * size / new - 0.5).clamp(0, size - 1)
        low = places.floor().long()
        high, part = (low + 1).clamp(max=size - 1), places - low
        line = maps.movedim(2 + side, -1)
        maps = (line[..., low] * (1 - part) + line[..., high] * part).movedim(-1, 2 + side)
    return maps


class TestBuild:
    @pytest.mark.parametrize(("student", "teacher", "kernel"), LARGER)
    def test_larger_map_is_a_valid_convolution(self, student, teacher, kernel):
        x, projector = random_tensor(3, *student), build_projector(student, teacher).double()
        weight, bias = weights_of(projector, CONVOLUTIONS[len(kernel)])
        assert tuple(weight.shape) == (teacher[0], student[0], *kernel)
        assert parameters(projector) == weight.numel() + teacher[0]
        windows = x
        for side, size in enumerate(kernel):
            windows = windows.unfold(2 + side, size, 1)
        dims = [*range(1, 2 + len(kernel))]
        expected = torch.tensordot(windows, weight, ([1, *range(-len(kernel), 0)], dims)).movedim(-1, 1)
        expected = expected + bias.reshape(-1, *[1] * len(kernel))
        assert expected.shape == (3, *teacher)
        torch.testing.assert_close(projector(x), expected)

    @pytest.mark.parametrize(("student", "teacher"), SMALLER)
    def test_smaller_map_is_resized(self, student, teacher):
        x, projector = random_tensor(3, *student), build_projector(student, teacher).double()
        weight, bias = weights_of(projector, CONVOLUTIONS[len(student) - 1])
        assert parameters(projector) == (student[0] + 1) * teacher[0]
        mixed = torch.tensordot(x, weight.reshape(teacher[0], student[0]), ([1], [1])) + bias
        torch.testing.assert_close(projector(x), resized(mixed.movedim(-1, 1), teacher[1:]))

    @pytest.mark.parametrize(("student", "teacher"), [((4,), (7,)), ((1,), (1,))])
    def test_vectors_are_linear(self, student, teacher):
        x, projector = random_tensor(3, *student), build_projector(student, teacher).double()
        weight, bias = weights_of(projector, nn.Linear)
        assert parameters(projector) == (student[0] + 1) * teacher[0]
        torch.testing.assert_close(projector(x), torch.einsum("bc,oc->bo", x, weight) + bias)

    @pytest.mark.parametrize(("student", "teacher"), [((4, 6), (7, 6)), ((4, 17), (4, 17)), ((3, 1), (2, 1))])
    def test_equally_many_tokens_are_linear_at_each_one(self, student, teacher):
        x, projector = random_tensor(3, *student), build_projector(student, teacher).double()
        weight, bias = weights_of(projector, nn.Conv1d)
        assert parameters(projector) == (student[0] + 1) * teacher[0]
        torch.testing.assert_close(projector(x), torch.einsum("bcn,oc->bon", x, weight[..., 0]) + bias[:, None])

    @pytest.mark.parametrize(
        ("student", "teacher", "message"),
        [
            ((4,), (4, 3, 3), "[4] is no map (C, ...); pool: mean makes vectors of both"),
            ((4, 3, 3), (4,), "[4] is no map (C, ...); pool: mean makes vectors of both"),
            ((4, 9), (4,), "[4] is no map"),
            ((4, 3, 3, 3), (4, 3, 3), "one is a map of 3 sides, the other of 2"),
            ((4, 3, 3), (4, 2, 3, 3), "one is a map of 2 sides, the other of 3"),
            ((4, 9), (4, 2, 3, 3), "one is a map of 1 sides, the other of 3"),
            ((4, 3, 3, 3, 3), (4, 3, 3), "[4, 3, 3, 3, 3] is no map (C, ...)"),
            ((), (4,), "[] is no map"),
        ],
    )
    def test_shapes_that_do_not_join(self, student, teacher, message):
        with pytest.raises(InputError, match=re.escape(message)):
            build_projector(student, teacher)


class TestOtherSizes:
    """Inputs of another size than those that the projectors were built from."""

    @pytest.mark.parametrize("sides", [1, 2, 3])
    def test_resized_to_the_size_of_each_batch(self, sides):
        larger = build_projector((2, *[6] * sides), (3, *[4] * sides)).double()
        smaller = build_projector((2, *[3] * sides), (3, *[6] * sides)).double()
        for projector, size, goal in (
            (larger, 9, 6),
            (larger, 4, 3),
            (larger, 6, 4),
            (smaller, 5, 10),
            (smaller, 3, 7),
        ):
            x = random_tensor(2, 2, *[size] * sides)
            expected = getattr(F, f"conv{sides}d")(x, *weights_of(projector, CONVOLUTIONS[sides]))
            torch.testing.assert_close(projector(x, (goal,) * sides), resized(expected, (goal,) * sides))

    def test_smaller_than_the_kernel(self):
        projector = build_projector((2, 6, 6), (3, 2, 2))
        message = (
            "a map of [4, 6] is smaller than the projector's kernel [5, 5]; give larger inputs, or your own projector"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            projector(torch.zeros(1, 2, 4, 6), (2, 2))

    @pytest.mark.parametrize("shape", [(2, 9), (2, 3, 3, 3), (2,)])
    def test_another_number_of_sides(self, shape):
        message = f"the projector was built for 2 sides, got a feature {[*shape]} for one sample"
        with pytest.raises(InputError, match=re.escape(message)):
            build_projector((2, 3, 3), (4, 3, 3))(torch.zeros(1, *shape))

    def test_no_samples(self):
        x = torch.zeros(0, 2, 3, 3, requires_grad=True)
        projected = build_projector((2, 3, 3), (4, 5, 5))(x)
        assert projected.shape == (0, 4, 5, 5)
        projected.sum().backward()

    def test_a_resized_result_of_the_right_size_is_the_convolution_itself(self):
        projector = build_projector((2, 3), (4, 3))
        assert isinstance(projector, Regressor) and projector.size == (3,)
        x = torch.ones(1, 2, 3)
        assert torch.equal(projector(x), projector[0](x))
