"""A layer of the student and a layer of the teacher, and what joins them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.arrange import arrange_pair, channels_first, usual_layout
from kd_lightning.features.channels import Layout
from kd_lightning.features.pooling import How, Pool
from kd_lightning.features.regressors import Regressor, build_projector

Shapes = tuple[list[int], list[int]]
"""Output shapes of a student's and a teacher's layer for one sample."""
Layouts = tuple[Layout | None, Layout | None]
"""Where the outputs of a student's and a teacher's layer have their channels. None where no operation shows it."""


class FeaturePair(nn.Module):
    """Brings the outputs of two layers into one form, and projects the student's.

    Args:
        student: Dotted path of the student's layer.
        teacher: Dotted path of the teacher's layer.
        projector: The user's own projector. Default: None, which means that it is built, if one is needed.
        needs_projector: Whether both features must have one shape.
        pool: See :class:`~kd_lightning.features.term.FeatureTerm`.

    Attributes:
        shapes: Output shapes for one sample. None until the pair is built.
        layouts: Where the outputs have their channels. None until the pair is built.
    """

    def __init__(
        self, student: str, teacher: str, projector: nn.Module | None, needs_projector: bool, pool: How | None
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.projector = projector
        self.needs_projector = needs_projector
        self.pool = pool
        self.shapes: Shapes | None = None
        self.layouts: Layouts | None = None
        self._warned = False

    def build(self, shapes: Shapes, layouts: Layouts, device: torch.device, dtype: torch.dtype) -> None:
        """Note the shapes, and build the projector. Random numbers come from torch's generator.

        Raises:
            InputError: If no built-in projector fits, or if it is not known where the channels are.
        """
        self.shapes, self.layouts = shapes, layouts
        names = (self.student, self.teacher)
        for who, name, shape, layout in zip(("student", "teacher"), names, shapes, layouts, strict=True):
            if len(shape) > 1 and layout is None and self.projector is None:
                raise InputError(
                    f"no layer around the {who}'s {name or 'output'} {shape} (for one sample) shows which dimension "
                    "holds the channels; set another layer, or your own projector for this pair (nn.Identity() for "
                    "none)"
                )
            if len(shape) > 1 and layout is None:
                rank_zero_warn(
                    f"features: no layer around the {who}'s {name or 'output'} {shape} (for one sample) shows which "
                    f"dimension holds the channels; the {usual_layout(shape)} one is taken"
                )
        student, teacher = self.arranged_shapes()
        if self.projector is None and self.needs_projector:
            try:
                self.projector = build_projector(student, teacher)
            except InputError as error:
                one, other = shapes
                raise InputError(
                    f"no built-in projector maps {self.student or 'output'} {one} to {self.teacher or 'output'} "
                    f"{other} (for one sample): {error}; set other layers, or your own projector"
                ) from error
        elif callable(make := getattr(self.projector, "build", None)):
            make(student, teacher)
        self.to(device, dtype)

    def teacher_pool(self) -> Pool | None:
        """Return what makes a vector of the teacher's layer's output; None if nothing does."""
        layout, shape = (None, ()) if self.layouts is None or self.shapes is None else (self.layouts[1], self.shapes[1])
        return None if self.pool is None else Pool(self.pool, layout or usual_layout(shape))

    def arranged_shapes(self) -> Shapes:
        """Return the shapes of both features before the projector, with the channels first, for one sample."""
        assert self.shapes is not None
        student, teacher = self.arrange(*(torch.zeros(1, *shape) for shape in self.shapes))
        return [*student.shape[1:]], [*teacher.shape[1:]]

    def arrange_teacher(self, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the teacher's feature as :meth:`arrange` does."""
        assert self.shapes is not None
        student = teacher.new_zeros(()).expand(len(teacher), *self.shapes[0])
        return self.arrange(student, teacher, mask)[1]

    def arrange(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return both features pooled, where that is set, and with the channels first.

        Args:
            student: Output of the student's layer, (B, ...).
            teacher: Output of the teacher's layer.
            mask: Which positions exist, (B, ...).
        """
        assert self.shapes is not None
        assert self.layouts is not None
        first, second = (
            usual_layout(shape) if layout is None else layout
            for shape, layout in zip(self.shapes, self.layouts, strict=True)
        )
        try:
            if self.pool is None:
                return arrange_pair(student, teacher, (first, second))
            student, teacher = channels_first(student, first), channels_first(teacher, second)
            if self.pool == "mean" and mask is not None:
                self._warn_of_padding(student, teacher, mask)
            pooled = Pool(self.pool)(student, mask)
            if self.projector is not None:  # its weights may be in half precision, but means are not
                pooled = pooled.to(student.dtype)
            return pooled, Pool(self.pool)(teacher, mask)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the student's projected feature and the teacher's, with the channels first.

        Both are 0 at positions that do not exist, if they have the mask's positions.

        Raises:
            InputError: If they must have one shape, and do not; if the built-in projector would have to resize tokens.
        """
        student, teacher = self.arrange(student, teacher, mask)
        if isinstance(self.projector, Regressor):
            if self.layouts == ("last", "last") and student.ndim == 3 and student.shape[2] != teacher.shape[2]:
                raise InputError(
                    f"{self.name}: no built-in projector maps {student.shape[2]} tokens to {teacher.shape[2]}, which "
                    "are no square grids; set pool, other layers, or your own projector"
                )
            try:
                student = self.projector(student, teacher.shape[2:])
            except InputError as error:
                raise InputError(f"{self.name}: {error}") from error
        elif self.projector is not None:
            student = self.projector(student)
        return self.finish(student, teacher, mask)

    def finish(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Check the shapes of features after the projector, and mask them."""
        if self.needs_projector and student.shape != teacher.shape:
            raise InputError(
                f"the projector of {self.student or 'the output'} gives {[*student.shape[1:]]} for one sample, but the "
                f"teacher's {self.teacher or 'output'} is {[*teacher.shape[1:]]}, with the channels first"
            )
        return (student, teacher) if mask is None else self._masked(student, teacher, mask)

    def _masked(self, student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return both features with 0 at the positions that do not exist. Warn once if one has other positions."""
        self._warn_of_padding(student, teacher, mask)
        return _zeroed(student, mask), _zeroed(teacher, mask)

    def _warn_of_padding(self, student: Tensor, teacher: Tensor, mask: Tensor) -> None:
        for name, feature in ((self.student, student), (self.teacher, teacher)):
            positions = _positions(feature)
            if len(positions) > 1 and positions != mask.shape and not self._warned and not mask.all():
                self._warned = True
                rank_zero_warn(
                    f"features: padded positions count in that of {name or 'the output'}, since it has the positions "
                    f"{[*positions[1:]]}, and the mask {[*mask.shape[1:]]}"
                )

    @property
    def name(self) -> str:
        """Both layers, for messages."""
        return f"{self.student or 'output'} -> {self.teacher or 'output'}"

    def describe(self) -> str:
        """Describe the pair, and its shapes."""
        shapes: Any = ("", "") if self.shapes is None else self.shapes
        return f"{self.student or 'output'} {shapes[0]} -> {self.teacher or 'output'} {shapes[1]}"


def _positions(feature: Tensor) -> torch.Size:
    return feature.shape[:1] + feature.shape[2:]


def _zeroed(feature: Tensor, mask: Tensor) -> Tensor:
    if _positions(feature) != mask.shape:
        return feature
    return feature.masked_fill((mask == 0).to(feature.device).unsqueeze(1), 0)
