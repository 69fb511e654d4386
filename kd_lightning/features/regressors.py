"""Regressors of FitNets: the built-in projectors, from a student's feature to the shape of a teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import InputError

Shape = Sequence[int]
_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def build_projector(student: Shape, teacher: Shape) -> nn.Module:
    """Build a projector from a student's feature to a teacher's.

    This is the regressor of FitNets (Romero et al. 2014, section 2.2, https://arxiv.org/abs/1412.6550), for maps of 1,
    2 or 3 sides:

    - Maps (C, L), (C, H, W) or (C, D, H, W), and tokens (C, N), if the student's is at least as large along each side:
      a valid convolution with kernel size k = N_student - N_teacher + 1 along each side, as in the paper. If it is
      smaller along a side: a 1x1 convolution and linear resizing (bilinear, trilinear).
    - Vectors (C,): a linear layer.

    The kernel size is that of these shapes. Where other inputs give maps of other sizes, :class:`Regressor` resizes the
    result to the teacher's size.

    All of them are linear. The paper's regressors end in the teacher's non-linearity, which takes your own projector
    (benchmarks/RESULTS.md compares both).

    Args:
        student: Shape of the student's feature for one sample, with the channels first.
        teacher: Shape of the teacher's.

    Raises:
        InputError: If none of these fits the two shapes.

    >>> build_projector((4, 9), (6, 7))[0]
    Conv1d(4, 6, kernel_size=(3,), stride=(1,))
    """
    if len(student) == len(teacher) == 1:
        return nn.Sequential(nn.Linear(student[0], teacher[0]))
    for shape in (student, teacher):
        if not 2 <= len(shape) <= 4:
            raise InputError(
                f"{[*shape]} is no map (C, ...){'' if len(shape) != 1 else '; pool: mean makes vectors of both'}"
            )
    (channels, *size), (teacher_channels, *teacher_size) = student, teacher
    if len(size) != len(teacher_size):
        raise InputError(f"one is a map of {len(size)} sides, the other of {len(teacher_size)}")
    kernel = tuple(one - other + 1 for one, other in zip(size, teacher_size, strict=True))
    kernel = kernel if min(kernel) > 0 else (1,) * len(size)
    return Regressor(_CONVOLUTIONS[len(size)](channels, teacher_channels, kernel), size=teacher_size)


class Regressor(nn.Sequential):
    """A convolution, and resizing where its result has another size than the teacher's map.

    Args:
        convolution: The convolution.
        size: Sizes of the sides of the teacher's map.
    """

    def __init__(self, convolution: nn.Module, size: Sequence[int]) -> None:
        super().__init__(convolution)
        self.size = tuple(size)

    def forward(self, feature: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return maps (B, C, ...) of the teacher's size.

        Args:
            feature: The student's map (B, C, ...).
            size: Sizes of the sides of the teacher's map, where the inputs differ from those that it was built from.
                Default: None, which means the sizes that it was built for.

        Raises:
            InputError: If the map is smaller than the kernel, or has another number of sides.
        """
        (convolution,) = self
        kernel: tuple[int, ...] = convolution.kernel_size  # type: ignore[assignment]
        if feature.ndim != len(kernel) + 2:
            raise InputError(
                f"the projector was built for {len(kernel)} sides, got a feature {[*feature.shape[1:]]} for one sample"
            )
        if any(one < least for one, least in zip(feature.shape[2:], kernel, strict=True)):
            raise InputError(
                f"a map of {[*feature.shape[2:]]} is smaller than the projector's kernel {[*kernel]}; give larger "
                "inputs, or your own projector"
            )
        maps: Tensor = convolution(feature)
        size = self.size if size is None else tuple(size)
        return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode=_MODES[len(size)])
