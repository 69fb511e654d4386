"""A projector of two layers, as the heads of AM-RADIO."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.grids import matching_sides, resize_linearly


class MLPProjector(nn.Module):
    """Linear layer, LayerNorm, GELU, linear layer, at each position: from a student's channels to a teacher's.

    A map whose sides differ from those of the teacher's is then resized linearly. Where the inputs have another size
    than those that it was built from, the ratio of the sides stays.

    Source: the heads of "AM-RADIO: Agglomerative Vision Foundation Model" (Ranzinger et al. 2024,
    https://arxiv.org/abs/2312.06709), one for each teacher and each kind of feature.

    Args:
        hidden: Width of the hidden layer, at least 1. Default: None, which means the larger of both numbers of
            channels.

    Shape:
        - feature: (B, C, ...), a vector, tokens (B, C, N) or maps.
        - output: (B, C_teacher, ...).

    Raises:
        InputError: If ``hidden`` is below 1, if it is used before :meth:`build`, or if the two shapes cannot be joined.

    >>> import torch
    >>> projector = MLPProjector()
    >>> projector.build((4, 7, 7), (6, 16, 16))
    >>> projector(torch.zeros(2, 4, 7, 7)).shape
    torch.Size([2, 6, 16, 16])
    """

    def __init__(self, hidden: int | None = None) -> None:
        super().__init__()
        if hidden is not None and hidden < 1:
            raise InputError(f"hidden must be at least 1, got {hidden}")
        self.hidden = hidden
        self.layers = nn.Sequential()
        self._sides: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def build(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        """Make the layers.

        Args:
            student: Shape (C, ...) of the student's feature of one sample.
            teacher: Shape of the teacher's.

        Raises:
            InputError: If one has more sides than the other, or if tokens differ in number.
        """
        (channels, *sides), (goal, *goal_sides) = student, teacher
        if len(sides) != len(goal_sides) or (len(sides) == 1 and sides != goal_sides):
            raise InputError(
                "MLPProjector joins vectors, tokens of one number, and maps of as many sides, got shapes "
                f"{[*student]} and {[*teacher]} of one sample; set pool, or another layer"
            )
        hidden = max(channels, goal) if self.hidden is None else self.hidden
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, goal)
        )
        self._sides = tuple(sides), tuple(goal_sides)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the projected feature; see the class for shapes."""
        if self._sides is None:
            raise InputError("MLPProjector is not built; call build(student_shape, teacher_shape) first")
        first: nn.Linear = self.layers[0]  # type: ignore[assignment]
        if feature.ndim != len(self._sides[0]) + 2 or feature.shape[1] != first.in_features:
            raise InputError(
                f"MLPProjector is built for {first.in_features} channels and {len(self._sides[0])} sides, so features "
                f"must be (B, {first.in_features}, ...), got {[*feature.shape]}"
            )
        projected = self.layers(feature.movedim(1, -1).to(first.weight.dtype)).movedim(-1, 1)
        return resize_linearly(projected, matching_sides(feature.shape[2:], *self._sides))

    def extra_repr(self) -> str:
        """Show the arguments in ``print(projector)``."""
        return f"hidden={self.hidden}"
