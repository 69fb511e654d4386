"""Projectors (FitNets: regressors) map a student's features to the shape of a teacher's; tokens as maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture, evaluating, find_layer
from kd_lightning.inputs import Inputs, call, device_of

Shape = Sequence[int]
ShapePair = tuple[list[int], list[int]]
"""Output shapes of a guided layer and a hint layer for one sample."""


class Projectors(nn.ModuleDict):
    """One projector for each pair of a guided layer (student) and a hint layer (teacher).

    FitNets calls projectors regressors. Their keys are the numbers of the pairs, since a module's key has no dot.

    Args:
        hints: Dotted path of the guided layer to that of the hint layer.
        given: The user's own projectors, by guided layer. Default: None, which means that
            :meth:`build_from_networks` builds all of them.

    Attributes:
        shapes: Output shapes of each pair of layers, for one sample. Empty until the projectors are built.
        guided_parameters: Names of the student's parameters that the guided layers depend on.

    Raises:
        InputError: If there is no pair, or if a given projector belongs to no guided layer.
    """

    def __init__(self, hints: Mapping[str, str], given: Mapping[str, nn.Module] | None = None) -> None:
        if not hints:
            raise InputError("hints must name at least one pair, {guided layer: hint layer}, got none")
        if unknown := [name for name in given or {} if name not in hints]:
            raise InputError(f"projectors: {unknown[0]!r} is no guided layer; hints has {', '.join(hints)}")
        super().__init__({str([*hints].index(name)): module for name, module in (given or {}).items()})
        self.hints = {str(guided): str(hint) for guided, hint in hints.items()}
        self.shapes: list[ShapePair] = []
        self.guided_parameters: frozenset[str] = frozenset()

    def _check_names(self, student: nn.Module, teacher: nn.Module) -> None:
        for guided, hint in self.hints.items():
            for network, name in ((student, guided), (teacher, hint)):
                try:
                    find_layer(network, name)
                except InputError as error:
                    raise InputError(f"hints: {error}") from error

    def build_from_networks(self, student: nn.Module, x: Inputs, teacher: nn.Module, teacher_x: Inputs) -> None:
        """Find all shapes by one forward pass of each network, and build the missing projectors.

        Args:
            student: The student.
            x: The student's inputs.
            teacher: The teacher's network, in eval mode.
            teacher_x: The same samples, preprocessed for the teacher.

        Raises:
            InputError: If a layer is not called, if no built-in projector fits a pair, or if a given projector does not
                fit.
        """
        self._check_names(student, teacher)
        parameters = dict(student.named_parameters())
        frozen = [p for p in parameters.values() if not p.requires_grad]
        student.requires_grad_(True)  # guided_parameters include frozen ones
        try:
            self._build_from_networks(student, x, teacher, teacher_x, parameters)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def _build_from_networks(
        self,
        student: nn.Module,
        x: Inputs,
        teacher: nn.Module,
        teacher_x: Inputs,
        parameters: dict[str, nn.Parameter],
    ) -> None:
        device = device_of(x)
        with evaluating(student), evaluating(self), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            with capture(student, [*self.hints]) as guided:
                call(student, x)
            with torch.no_grad(), capture(teacher, [*self.hints.values()]) as hints:
                call(teacher, teacher_x)
            outputs = [
                (_output("student", guided, name), _output("teacher", hints, layer))
                for name, layer in self.hints.items()
            ]
            total = torch.stack([output.float().sum() for output, _ in outputs]).sum()
            found: Sequence[Tensor | None] = [None] * len(parameters)
            if total.requires_grad and parameters:
                found = torch.autograd.grad(total, [*parameters.values()], allow_unused=True)
            self.guided_parameters = frozenset(n for n, g in zip(parameters, found, strict=True) if g is not None)
            self.build([([*g.shape[1:]], [*h.shape[1:]]) for g, h in outputs], device, outputs[0][0].dtype)
            try:
                pairs = self.pairs(guided, hints)
            except Exception as error:  # the user's own projector may raise anything
                raise InputError(f"projectors: one does not fit its layer: {first_line(error)}") from error
        for name, (projected, hint) in pairs.items():
            if projected.shape != hint.shape:
                raise InputError(
                    f"projectors: that of {name} gives {[*projected.shape[1:]]} for one sample, but the hint of "
                    f"{self.hints[name]} is {[*hint.shape[1:]]}"
                )

    def build(self, shapes: Iterable[ShapePair], device: torch.device, dtype: torch.dtype) -> None:
        """Build the missing projectors.

        Their weights depend on torch's initial seed alone, so they are the same on every process. The state of torch's
        generators stays unchanged.

        Args:
            shapes: Output shapes of each pair of layers, for one sample.
            device: Of the projectors.
            dtype: Of the projectors.
        """
        self.shapes = [*shapes]
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which also seeds accelerators
            torch.default_generator.manual_seed((torch.initial_seed() + 1) % 2**63)
            self._build(device, dtype)

    def _build(self, device: torch.device, dtype: torch.dtype) -> None:
        for number, ((name, layer), (guided, hint)) in enumerate(zip(self.hints.items(), self.shapes, strict=True)):
            if str(number) in self:
                continue
            try:
                self[str(number)] = build_projector(guided, hint).to(device, dtype)
            except InputError as error:
                raise InputError(
                    f"hints: no built-in projector maps {name} {guided} to {layer} {hint} (for one sample): {error}; "
                    "set other layers, or your own projectors"
                ) from error

    def pairs(self, guided: Mapping[str, Tensor], hints: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the student's projected outputs and the hints, of one shape, by guided layer.

        Args:
            guided: Outputs of the student's layers, by name.
            hints: Outputs of the teacher's layers, by name.
        """
        pairs = {}
        for number, (name, layer) in enumerate(self.hints.items()):
            projected = self[str(number)](_output("student", guided, name))
            hint = _output("teacher", hints, layer).to(projected.device)
            pairs[name] = projected, target_of(hint, projected)
        return pairs

    def describe(self) -> str:
        """Describe the pairs, their shapes, and the number of parameters."""
        pairs = zip(self.hints.items(), self.shapes, strict=True)
        names = [f"{name} {guided} -> {layer} {hint}" for (name, layer), (guided, hint) in pairs]
        return f"hints: {'; '.join(names)}; {self.size():,} parameters in projectors"

    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())


def first_line(error: Exception) -> str:
    """First line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _output(who: str, outputs: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in outputs:
        raise InputError(f"hints: the {who}'s layer {name} is never called in its forward pass")
    return outputs[name]


def build_projector(guided: Shape, hint: Shape) -> nn.Module:
    """Build a projector from a guided layer's output to a hint.

    This is the regressor of FitNets (Romero et al. 2014, section 2.2, https://arxiv.org/abs/1412.6550):

    - Maps (C, H, W), if the guided map is at least as large along each side: a valid convolution with kernel size
      k = N_guided - N_hint + 1 along each side, as in the paper. If it is smaller along a side: a 1x1 convolution and
      bilinear resizing.
    - Vectors (C,), and tokens (N, C) of equal number: a linear layer.
    - Other tokens: first arranged as maps, see :func:`to_map`.

    All of them are linear. The paper's regressors end in the hint's non-linearity, which takes your own projector
    (benchmarks/RESULTS.md compares both).

    Args:
        guided: Shape of the guided layer's output for one sample.
        hint: Shape of the hint layer's output for one sample.

    Raises:
        InputError: If none of these fits the two shapes.
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
    """Return the shape (C, H, W) of a sample's map, or of its tokens (N, C) after :func:`to_map`.

    Raises:
        InputError: If it is neither a map nor tokens of a square grid.
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
    """Arrange tokens (B, N, C) as a map (B, C, g, g), with N = g * g, or N = g * g + 1 with a class token first.

    The class token is left out.

    Raises:
        InputError: If the grid is not square.
    """
    channels, height, width = map_shape(tokens.shape[1:])
    return tokens[:, -height * width :].transpose(1, 2).reshape(len(tokens), channels, height, width)


class TokensToMap(nn.Module):
    """Arranges tokens as a map, by :func:`to_map`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the map (B, C, g, g) of tokens (B, N, C)."""
        return to_map(tokens)


def target_of(hint: Tensor, projected: Tensor) -> Tensor:
    """Return the hint for a projector's output. If that output is a map, a hint of tokens is arranged as a map."""
    return to_map(hint) if (hint.ndim, projected.ndim) == (3, 4) else hint
