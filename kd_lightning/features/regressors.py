"""Regressors of FitNets: the built-in projectors, from a student's feature to the shape of a teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.channels import Layout

Shape = Sequence[int]
_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def build_projector(
    guided: Shape, hint: Shape, guided_layout: Layout | None = None, hint_layout: Layout | None = None
) -> nn.Module:
    """Build a projector from a guided layer's output to a hint.

    This is the regressor of FitNets (Romero et al. 2014, section 2.2, https://arxiv.org/abs/1412.6550), for maps of 1,
    2 or 3 sides:

    - Maps (C, L), (C, H, W) or (C, D, H, W), if the guided map is at least as large along each side: a valid
      convolution with kernel size k = N_guided - N_hint + 1 along each side, as in the paper. If it is smaller along a
      side: a 1x1 convolution and linear resizing (bilinear, trilinear).
    - Vectors (C,), and tokens (N, C) of equal number: a linear layer.
    - Other tokens: first arranged as maps: as (C, N) if the other one is a map (C, L), else as a square grid, see
      :func:`to_map`.
    - Maps with the channels last, such as (H, W, C): first arranged as (C, H, W).

    The kernel size is that of these shapes. Where other inputs give maps of other sizes, :class:`Regressor` resizes the
    result to the hint's size.

    All of them are linear. The paper's regressors end in the hint's non-linearity, which takes your own projector
    (benchmarks/RESULTS.md compares both).

    Args:
        guided: Shape of the guided layer's output for one sample.
        hint: Shape of the hint layer's output for one sample.
        guided_layout: Whether the guided layer's output has the channels "first" or "last". Default: None, which means
            last for two dimensions (tokens), and first for more.
        hint_layout: The same for the hint.

    Raises:
        InputError: If none of these fits the two shapes.

    >>> build_projector((4, 9), (6, 7), "first", "first")[0]
    Conv1d(4, 6, kernel_size=(3,), stride=(1,))
    """
    layouts = guided_layout or usual_layout(guided), hint_layout or usual_layout(hint)
    are_tokens = [is_tokens(shape, layout) for shape, layout in zip((guided, hint), layouts, strict=True)]
    if len(guided) == len(hint) == 1 or (all(are_tokens) and guided[0] == hint[0]):
        return nn.Sequential(nn.Linear(guided[-1], hint[-1]))
    of_maps = [len(shape) - 1 for shape, tokens in zip((guided, hint), are_tokens, strict=True) if not tokens]
    sides = 1 if not all(are_tokens) and of_maps[0] == 1 else 2
    channels, *size = map_shape(guided, layouts[0], sides)
    hint_channels, *hint_size = map_shape(hint, layouts[1], sides)
    if len(size) != len(hint_size):
        raise InputError(f"one is a map of {len(size)} sides, the other of {len(hint_size)}")
    kernel = tuple(one - other + 1 for one, other in zip(size, hint_size, strict=True))
    kernel = kernel if min(kernel) > 0 else (1,) * len(size)
    layers: list[nn.Module] = []
    if layouts[0] == "last":
        layers.append(TokensToMap() if are_tokens[0] and sides == 2 else ChannelsFirst())
    convolution = _CONVOLUTIONS[len(size)](channels, hint_channels, kernel)
    return Regressor(*layers, convolution, size=hint_size, hint_layout=layouts[1])


class Regressor(nn.Sequential):
    """Arranges features as maps, convolves them, and resizes the result where it has another size than the hint.

    Args:
        layers: What arranges the features, then the convolution.
        size: Sizes of the hint's sides.
        hint_layout: Where the hint has its channels.
    """

    def __init__(self, *layers: nn.Module, size: Sequence[int], hint_layout: Layout) -> None:
        super().__init__(*layers)
        self.size = tuple(size)
        self.hint_layout = hint_layout

    def forward(self, features: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return maps (B, C, ...) of the hint's size.

        Args:
            features: Output of the guided layer.
            size: Sizes of the hint's sides, where the inputs differ from those that it was built from. Default: None,
                which means the sizes that it was built for.

        Raises:
            InputError: If the map is smaller than the kernel.
        """
        *arranging, convolution = self
        for layer in arranging:
            features = layer(features)
        kernel: tuple[int, ...] = convolution.kernel_size  # type: ignore[assignment]
        if any(one < least for one, least in zip(features.shape[2:], kernel, strict=True)):
            raise InputError(
                f"a map of {[*features.shape[2:]]} is smaller than the projector's kernel {[*kernel]}; give larger "
                "inputs, or your own projector"
            )
        maps: Tensor = convolution(features)
        size = self.size if size is None else tuple(size)
        return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode=_MODES[len(size)])

    def arrange(self, hint: Tensor) -> Tensor:
        """Return the hint as a map (B, C, ...)."""
        if hint.ndim == len(self.size) + 1:  # tokens
            return to_map(hint)
        return hint.movedim(-1, 1) if self.hint_layout == "last" else hint


def usual_layout(shape: Shape) -> Layout:
    """Return the layout that a sample's shape has in most networks: tokens (N, C), and maps (C, H, W)."""
    return "last" if len(shape) == 2 else "first"


def is_tokens(shape: Shape, layout: Layout) -> bool:
    """Whether a sample's feature of a shape is tokens (N, C)."""
    return len(shape) == 2 and layout == "last"


def map_shape(shape: Shape, layout: Layout | None = None, sides: int = 2) -> Shape:
    """Return the shape (C, ...) of a sample's map, or of its tokens after they are arranged as a map.

    Args:
        shape: Shape of the feature of one sample.
        layout: Where it has its channels. Default: None, which means the usual place.
        sides: Number of sides of the map that tokens are arranged as: 1 for (C, N), 2 for a square grid.

    Raises:
        InputError: If it is neither a map nor tokens, or if the grid is not square.
    """
    layout = layout or usual_layout(shape)
    if not 2 <= len(shape) <= 4:
        raise InputError(f"{[*shape]} is neither a map (C, ...) nor tokens (N, C)")
    if layout == "first":
        return tuple(shape)
    if len(shape) > 2 or sides == 1:
        return (shape[-1], *shape[:-1])
    tokens, channels = shape
    for grid in (tokens, tokens - 1):
        side = math.isqrt(max(grid, 0))
        if side and side * side == grid:
            return channels, side, side
    raise InputError(f"the grid of {tokens} tokens is not square, with or without a class token")


def to_map(tokens: Tensor) -> Tensor:
    """Arrange tokens (B, N, C) as a map (B, C, g, g), with N = g * g, or N = g * g + 1 with a class token first.

    The class token is left out.

    Raises:
        InputError: If the grid is not square.
    """
    channels, height, width = map_shape(tokens.shape[1:], "last")
    return tokens[:, -height * width :].transpose(1, 2).reshape(len(tokens), channels, height, width)


class TokensToMap(nn.Module):
    """Arranges tokens as a map, by :func:`to_map`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the map (B, C, g, g) of tokens (B, N, C)."""
        return to_map(tokens)


class ChannelsFirst(nn.Module):
    """Moves the channels from the last dimension to the first after the batch."""

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C, ...) of (B, ..., C)."""
        return features.movedim(-1, 1)


def target_of(hint: Tensor, projected: Tensor) -> Tensor:
    """Return the hint for a projector's output. If that output is a map, a hint of tokens is arranged as a map."""
    return to_map(hint) if (hint.ndim, projected.ndim) == (3, 4) else hint
