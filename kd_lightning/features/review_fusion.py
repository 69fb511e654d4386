"""ReviewKD's fusion: a projector for several stages of a student at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_lightning.errors import InputError
from kd_lightning.features.grids import matching_sides


class ReviewFusion(nn.Module):
    """Fuse the stages of a student from the last one back, so that each teacher's stage is matched by all deeper ones.

    For each stage, from the last to the first (attention-based fusion, ABF):

    1. A 1x1 convolution with BatchNorm brings the student's map to ``width`` channels.
    2. The fused map of the stage before (the next deeper one) is resized to the map's size, by the nearest pixel. A 1x1
       convolution of both, with a sigmoid, gives each position a weight of either. The fused map is their weighted sum.
    3. It is resized to the size of the teacher's map. A 3x3 convolution with BatchNorm brings it to the teacher's
       channels.

    It is a *joint* projector: one call takes the features of all stages, and returns as many. Beside maps it takes
    vectors (B, C), as maps of 1x1: the paper's last stage is the pooled vector. Where the inputs have another size than
    those that it was built from, the ratios of the maps' sides stay.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review" (ReviewKD, CVPR 2021),
    https://arxiv.org/abs/2104.09044. It goes with :class:`~kd_lightning.losses.ReviewLoss`.

    Args:
        width: Largest number of channels of the fused maps, at least 1. The student's last stage may have fewer; then
            they have as many as it.

    Shape:
        - features: a list of (B, C, H, W) and (B, C), the first stage first.
        - output: the same list, with the teacher's channels and sizes.

    Raises:
        InputError: If ``width`` is below 1, if it is used before :meth:`build`, if a feature is neither a map nor a
            vector, or if the stages are not in order.
    """

    joint: ClassVar[bool] = True

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"width must be at least 1, got {width}")
        self.width = width
        self.stages = nn.ModuleList()
        self._sides: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def build(self, student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]]) -> None:
        """Make the layers.

        Args:
            student: Shapes (C, H, W) or (C,) of the student's features of one sample, the first stage first.
            teacher: Shapes of the teacher's.

        Raises:
            InputError: If a shape is neither a map nor a vector, or if a stage has larger maps than the one before.
        """
        pairs = list(zip(student, teacher, strict=True))
        for own, other in pairs:
            if {len(own), len(other)} - {1, 3} or len(own) != len(other):
                raise InputError(
                    "ReviewFusion joins maps (C, H, W), and vectors (C,), got shapes "
                    f"{[*own]} and {[*other]} of one sample"
                )
        for before, own in pairwise(student):
            if any(side > last for side, last in zip(_sides(own), _sides(before), strict=True)):
                raise InputError(
                    "ReviewFusion takes the layers from the first stage to the last, whose maps get no larger, got "
                    f"{[*own]} after {[*before]}"
                )
        width = min(self.width, student[-1][0])
        last = len(pairs) - 1
        self.stages = nn.ModuleList(_Fusion(own[0], width, other[0], i < last) for i, (own, other) in enumerate(pairs))
        self._sides = [(_sides(own), _sides(other)) for own, other in pairs]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the projected features; see the class for shapes."""
        if not self._sides:
            raise InputError("ReviewFusion is not built; call build(student_shapes, teacher_shapes) first")
        if len(features) != len(self.stages):
            raise InputError(f"ReviewFusion is built for {len(self.stages)} stages, got {len(features)} features")
        projected: list[Tensor] = []
        fused: Tensor | None = None
        for stage, feature, sides in reversed(list(zip(self.stages, features, self._sides, strict=True))):
            maps = feature[:, :, None, None] if feature.ndim == 2 else feature
            output, fused = stage(maps, fused, matching_sides(maps.shape[2:], *sides))
            projected.insert(0, output.flatten(1) if feature.ndim == 2 else output)
        return projected


class _Fusion(nn.Module):
    """Attention-based fusion (ABF) of a student's map with the fused map of the next deeper stage."""

    def __init__(self, channels: int, width: int, goal: int, fuses: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.leave = nn.Sequential(nn.Conv2d(width, goal, 3, padding=1, bias=False), nn.BatchNorm2d(goal))
        self.attend = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is None:
                nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, maps: Tensor, deeper: Tensor | None, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the output of the teacher's channels, and the fused map, both of the given sides."""
        fused = self.enter(maps.to(next(self.parameters()).dtype))
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:])
            own, other = self.attend(torch.cat([fused, deeper], dim=1)).split(1, dim=1)
            fused = fused * own + deeper * other
        if fused.shape[2:] != tuple(sides):
            fused = F.interpolate(fused, tuple(sides))
        return self.leave(fused), fused


def _sides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[1:]) or (1, 1)
