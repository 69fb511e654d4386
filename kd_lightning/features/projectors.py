"""Joining a student's layers to a teacher's: projectors, tokens as maps, and a picture of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture, evaluating, find_layer

Shape = Sequence[int]
Join = tuple[list[int], list[int]]
"""Shapes of a guided layer's and a hint layer's outputs for one sample."""


class Projectors(nn.ModuleDict):
    """One projector for each pair of a guided layer (student) and a hint layer (teacher).

    Keyed by the pairs' numbers, since a module's name may hold no dot.

    Args:
        hints: Guided layer to hint layer, by dotted path.
        given: Projectors of one's own, by guided layer; the others are built from what :meth:`measure` sees.

    Raises:
        InputError: For no pairs, or a given projector of none of them.
    """

    def __init__(self, hints: Mapping[str, str], given: Mapping[str, nn.Module] | None = None) -> None:
        if not hints:
            raise InputError("hints must name at least one pair, {guided layer: hint layer}, got none")
        if unknown := [name for name in given or {} if name not in hints]:
            raise InputError(f"projectors: {unknown[0]!r} is no guided layer; hints has {', '.join(hints)}")
        super().__init__({str([*hints].index(name)): module for name, module in (given or {}).items()})
        self.hints = {str(guided): str(hint) for guided, hint in hints.items()}
        self.joins: list[Join] = []
        self.below: frozenset[str] = frozenset()  # the student's parameters up to its guided layers

    def _check_names(self, student: nn.Module, teacher: nn.Module) -> None:
        for guided, hint in self.hints.items():
            for network, name in ((student, guided), (teacher, hint)):
                try:
                    find_layer(network, name)
                except InputError as error:
                    raise InputError(f"hints: {error}") from error

    def measure(self, student: nn.Module, x: Tensor, teacher: nn.Module, teacher_x: Tensor) -> None:
        """Find all shapes by one forward pass of each network, and build the missing projectors.

        Args:
            student: The student.
            x: Its inputs (B, ...).
            teacher: The teacher's network, in eval mode.
            teacher_x: The same samples as the teacher takes them, (B, ...).

        Raises:
            InputError: If a layer is never reached, if no built-in projector joins a pair, or if a given one does not.
        """
        self._check_names(student, teacher)
        parameters = dict(student.named_parameters())
        frozen = [p for p in parameters.values() if not p.requires_grad]
        student.requires_grad_(True)  # what lies below does so whether it trains or not
        try:
            self._measure(student, x, teacher, teacher_x, parameters)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def _measure(
        self,
        student: nn.Module,
        x: Tensor,
        teacher: nn.Module,
        teacher_x: Tensor,
        parameters: dict[str, nn.Parameter],
    ) -> None:
        with evaluating(student), evaluating(self), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            with capture(student, [*self.hints]) as guided:
                student(x)
            with torch.no_grad(), capture(teacher, [*self.hints.values()]) as hints:
                teacher(teacher_x)
            outputs = [
                (_reached("student", guided, name), _reached("teacher", hints, layer))
                for name, layer in self.hints.items()
            ]
            total = torch.stack([mine.float().sum() for mine, _ in outputs]).sum()
            found: Sequence[Tensor | None] = [None] * len(parameters)
            if total.requires_grad and parameters:
                found = torch.autograd.grad(total, [*parameters.values()], allow_unused=True)
            self.below = frozenset(name for name, g in zip(parameters, found, strict=True) if g is not None)
            self.build([([*g.shape[1:]], [*h.shape[1:]]) for g, h in outputs], x.device, outputs[0][0].dtype)
            try:
                pairs = self.pairs(guided, hints)
            except Exception as error:  # a given one may raise anything
                raise InputError(f"projectors: one does not fit its layer: {first_line(error)}") from error
        for name, (regressed, hint) in pairs.items():
            if regressed.shape != hint.shape:
                raise InputError(
                    f"projectors: that of {name} gives {[*regressed.shape[1:]]} for one sample, but the hint of "
                    f"{self.hints[name]} is {[*hint.shape[1:]]}"
                )

    def build(self, joins: Iterable[Join], device: torch.device, dtype: torch.dtype) -> None:
        """The projectors that are not there yet, drawn alike on one process and on many, and by no one's generator."""
        self.joins = [*joins]
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            # the seed alone: several processes start again from it; not torch.manual_seed, which reaches accelerators
            torch.default_generator.manual_seed((torch.initial_seed() + 1) % 2**63)
            self._build(device, dtype)

    def _build(self, device: torch.device, dtype: torch.dtype) -> None:
        for number, ((name, layer), (guided, hint)) in enumerate(zip(self.hints.items(), self.joins, strict=True)):
            if str(number) in self:
                continue
            try:
                self[str(number)] = build_projector(guided, hint).to(device, dtype)
            except InputError as error:
                raise InputError(
                    f"hints: no built-in projector joins {name} {guided} to {layer} {hint} (for one sample): {error}; "
                    "choose other layers, or give one in projectors"
                ) from error

    def pairs(self, guided: Mapping[str, Tensor], hints: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The student's regressed outputs and the hints, of one shape, by guided layer.

        Args:
            guided: What the student's layers gave, by name.
            hints: What the teacher's gave.
        """
        pairs = {}
        for number, (name, layer) in enumerate(self.hints.items()):
            regressed = self[str(number)](_reached("student", guided, name))
            hint = _reached("teacher", hints, layer).to(regressed.device)
            pairs[name] = regressed, target_of(hint, regressed)
        return pairs

    def describe(self) -> str:
        """The pairs, their shapes, and the number of parameters."""
        pairs = zip(self.hints.items(), self.joins, strict=True)
        names = [f"{name} {guided} -> {layer} {hint}" for (name, layer), (guided, hint) in pairs]
        return f"hints: {'; '.join(names)}; {self.size():,} parameters in projectors"

    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _reached(who: str, outputs: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in outputs:
        raise InputError(f"hints: the {who}'s layer {name} is never reached in its forward pass")
    return outputs[name]


def build_projector(guided: Shape, hint: Shape) -> nn.Module:
    """A projector from a guided layer's output to a hint (Romero et al. 2014, section 2.2).

    Maps (C, H, W): the paper's valid convolution, k = N_guided - N_hint + 1 along each side, where the guided map is as
    large or larger (1x1 where equal); a 1x1 convolution and bilinear resizing where it is smaller along a side.
    Vectors (C,), and sequences of equally many tokens (N, C): linear. Other tokens are set out as maps, see
    :func:`to_map`. All are linear. The paper's end in the hint's own non-linearity; that takes a projector of your own
    (benchmarks/RESULTS.md has both).

    Args:
        guided: Shape of the guided layer's output for one sample.
        hint: Shape of the hint layer's.

    Raises:
        InputError: If none of these joins the two.
    """
    layers: list[nn.Module] = []
    if len(guided) == len(hint) == 1 or (len(guided) == len(hint) == 2 and guided[0] == hint[0]):
        layers.append(nn.Linear(guided[-1], hint[-1]))
    else:
        (channels, *size), (hint_channels, *hint_size) = map_shape(guided), map_shape(hint)
        if len(guided) == 2:
            layers.append(TokensToMap())
        if all(one >= other for one, other in zip(size, hint_size, strict=True)):
            kernel = tuple(one - other + 1 for one, other in zip(size, hint_size, strict=True))
            layers.append(nn.Conv2d(channels, hint_channels, kernel))  # type: ignore[arg-type]
        else:
            layers += [nn.Conv2d(channels, hint_channels, 1), nn.Upsample(tuple(hint_size), mode="bilinear")]
    return nn.Sequential(*layers)


def map_shape(shape: Shape) -> Shape:
    """(C, H, W) of a sample's map, or of its tokens (N, C) as :func:`to_map` sets them out.

    Raises:
        InputError: If it is neither.
    """
    if len(shape) == 3:
        return tuple(shape)
    if len(shape) != 2:
        raise InputError(f"{[*shape]} is neither a map (C, H, W) nor tokens (N, C)")
    tokens, channels = shape
    for grid in (tokens, tokens - 1):
        side = math.isqrt(max(grid, 0))
        if side and side * side == grid:
            return channels, side, side
    raise InputError(f"the grid of {tokens} tokens is not square, with or without a class token")


def to_map(tokens: Tensor) -> Tensor:
    """Tokens (B, N, C) as a map (B, C, g, g), N = g * g, or g * g + 1 with a class token first, which is left out.

    Raises:
        InputError: If the grid is not square.
    """
    channels, height, width = map_shape(tokens.shape[1:])
    return tokens[:, -height * width :].transpose(1, 2).reshape(len(tokens), channels, height, width)


class TokensToMap(nn.Module):
    """:func:`to_map` as a layer."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The map."""
        return to_map(tokens)


def target_of(hint: Tensor, regressed: Tensor) -> Tensor:
    """What a projector's output is compared with: the hint, its tokens set out as a map where the output is one."""
    return to_map(hint) if (hint.ndim, regressed.ndim) == (3, 4) else hint
