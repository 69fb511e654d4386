"""Projectors (FitNets: regressors): one for each pair of a student's layer and a teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture, evaluating, find_layer
from kd_lightning.features.channels import ChannelTrace, Layout
from kd_lightning.features.regressors import Regressor, build_projector, target_of, usual_layout
from kd_lightning.inputs import Inputs, call, device_of, rows_of

ShapePair = tuple[list[int], list[int]]
"""Output shapes of a guided layer and a hint layer for one sample."""
LayoutPair = tuple[Layout | None, Layout | None]
"""Where the outputs of a guided layer and a hint layer have their channels. None where no operation shows it."""


class Projectors(nn.ModuleDict):
    """One projector for each pair of a guided layer (student) and a hint layer (teacher).

    FitNets calls projectors regressors. Their keys are the numbers of the pairs, since a module's key has no dot.

    Args:
        hints: Dotted path of the guided layer to that of the hint layer.
        given: The user's own projectors, by guided layer. Default: None, which means that
            :meth:`build_from_networks` builds all of them.

    Attributes:
        shapes: Output shapes of each pair of layers, for one sample. Empty until the projectors are built.
        layouts: Where each pair of outputs has its channels. Empty until the projectors are built.
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
        self.layouts: list[LayoutPair] = []
        self.guided_parameters: frozenset[str] = frozenset()
        self._warned: set[int] = set()  # numbers of pairs

    def _check_names(self, student: nn.Module, teacher: nn.Module) -> None:
        for guided, hint in self.hints.items():
            for network, name in ((student, guided), (teacher, hint)):
                try:
                    find_layer(network, name)
                except InputError as error:
                    raise InputError(f"hints: {error}") from error

    def build_from_networks(
        self,
        student: nn.Module,
        x: Inputs,
        teacher: nn.Module,
        teacher_x: Inputs,
        run: Callable[[nn.Module, Inputs], Any] = call,
    ) -> None:
        """Find all shapes by one forward pass of each network, and build the missing projectors.

        Where an output has its channels follows from the layers that give and use it, see
        :class:`~kd_lightning.features.channels.ChannelTrace`.

        Args:
            student: The student.
            x: The student's inputs: a tensor (B, ...), or a mapping or tuple of such tensors.
            teacher: The teacher's network, in eval mode.
            teacher_x: The same samples, preprocessed for the teacher.
            run: Function that calls the student with inputs, such as ``call`` of a module.

        Raises:
            InputError: If a layer is not called; if an output does not have a row for each sample; if a guided output
                has no gradient; if no built-in projector fits a pair, or it is not known where the channels are; or if
                a given projector does not fit.
        """
        self._check_names(student, teacher)
        parameters = dict(student.named_parameters())
        before = [(p, p.requires_grad, p.grad) for p in parameters.values()]
        student.requires_grad_(True)  # guided_parameters include frozen ones
        device = device_of(x)
        try:
            with evaluating(student), evaluating(self), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                with capture(student, [*self.hints]) as guided, ChannelTrace() as student_trace:
                    run(student, x)
                with torch.no_grad(), capture(teacher, [*self.hints.values()]) as hints, ChannelTrace() as trace:
                    call(teacher, teacher_x)
                outputs = self._outputs(guided, hints, rows_of(x))
                check_gradients([(name, output) for name, (output, _) in zip(self.hints, outputs, strict=True)])
                self.guided_parameters = _parameters_below([output for output, _ in outputs], parameters)
                layouts = [(student_trace.layout_of(output), trace.layout_of(hint)) for output, hint in outputs]
                shapes = [([*output.shape[1:]], [*hint.shape[1:]]) for output, hint in outputs]
                self.build(shapes, device, outputs[0][0].dtype, layouts)
                self._check_pairs(guided, hints, rows_of(x))
        finally:
            for parameter, requires_grad, gradient in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient

    def _check_pairs(self, guided: Mapping[str, Tensor], hints: Mapping[str, Tensor], rows: int) -> None:
        """Raise InputError if a projector does not fit its layer, or its hint."""
        try:
            self.pairs(guided, hints, rows)
        except InputError:
            raise
        except Exception as error:  # the user's own projector may raise anything
            raise InputError(f"projectors: one does not fit its layer: {first_line(error)}") from error

    def build(
        self,
        shapes: Iterable[ShapePair],
        device: torch.device,
        dtype: torch.dtype,
        layouts: Iterable[LayoutPair] | None = None,
    ) -> None:
        """Build the missing projectors.

        Their weights depend on torch's initial seed alone, so they are the same on every process. The state of torch's
        generators stays unchanged.

        Args:
            shapes: Output shapes of each pair of layers, for one sample.
            device: Of the projectors.
            dtype: Of the projectors.
            layouts: Where each pair of outputs has its channels. Default: None, which means the usual places.

        Raises:
            InputError: If no built-in projector fits a pair, or it is not known where the channels are.
        """
        self.shapes = [*shapes]
        usual = [(usual_layout(guided), usual_layout(hint)) for guided, hint in self.shapes]
        self.layouts = [*(usual if layouts is None else layouts)]
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which also seeds accelerators
            torch.default_generator.manual_seed((torch.initial_seed() + 1) % 2**63)
            self._build(device, dtype)

    def _build(self, device: torch.device, dtype: torch.dtype) -> None:
        pairs = zip(self.hints.items(), self.shapes, self.layouts, strict=True)
        for number, ((name, layer), shapes, layouts) in enumerate(pairs):
            if str(number) in self:
                continue
            for who, of, shape, layout in zip(("student", "teacher"), (name, layer), shapes, layouts, strict=True):
                if len(shape) > 1 and layout is None:
                    raise InputError(
                        f"hints: no layer around the {who}'s {of} {shape} (for one sample) shows which dimension holds "
                        "the channels; set another layer, or your own projector for this pair"
                    )
            try:
                self[str(number)] = build_projector(*shapes, *layouts).to(device, dtype)
            except InputError as error:
                guided, hint = shapes
                raise InputError(
                    f"hints: no built-in projector maps {name} {guided} to {layer} {hint} (for one sample): {error}; "
                    "set other layers, or your own projectors"
                ) from error

    def pairs(
        self, guided: Mapping[str, Tensor], hints: Mapping[str, Tensor], rows: int, mask: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the student's projected outputs and the hints, of one shape, by guided layer.

        Args:
            guided: Outputs of the student's layers, by name.
            hints: Outputs of the teacher's layers, by name.
            rows: Number of samples B.
            mask: Which positions exist, (B, ...). Both features are 0 at the others, if they have the mask's positions.
                Default: None, which means that all exist.

        Raises:
            InputError: If an output does not have a row for each sample, or if a projected output and its hint have
                different shapes.
        """
        pairs = {}
        outputs = self._outputs(guided, hints, rows)
        for number, ((name, layer), (output, hint)) in enumerate(zip(self.hints.items(), outputs, strict=True)):
            projector = self[str(number)]
            hint = hint.to(output.device)
            if isinstance(projector, Regressor):
                try:
                    target = projector.arrange(hint)
                    projected = projector(output, target.shape[2:])
                except InputError as error:
                    raise InputError(f"hints: {name} -> {layer}: {error}") from error
            else:
                projected = projector(output)
                target = target_of(hint, projected) if self.layouts[number][1] == "last" else hint
            if projected.shape != target.shape:
                raise InputError(
                    f"projectors: that of {name} gives {[*projected.shape[1:]]} for one sample, but the hint of "
                    f"{layer} is {[*target.shape[1:]]}"
                )
            if mask is not None:
                projected, target = self._masked(number, projected, target, mask, target.ndim > hint.ndim)
            pairs[name] = projected, target
        return pairs

    def _masked(
        self, number: int, projected: Tensor, target: Tensor, mask: Tensor, is_arranged: bool
    ) -> tuple[Tensor, Tensor]:
        """Return both features with 0 at the positions that do not exist. Warn once if they have other positions."""
        layout = self.layouts[number][1] or ("first" if target.ndim > 3 else "last")
        first = isinstance(self[str(number)], Regressor) or layout == "first" or is_arranged
        positions = target.shape[:1] + (target.shape[2:] if first else target.shape[1:-1])
        if positions == mask.shape:
            padding = (mask == 0).to(target.device).unsqueeze(1 if first else -1)
            return projected.masked_fill(padding, 0), target.masked_fill(padding, 0)
        if len(positions) == mask.ndim and number not in self._warned and not mask.all():
            self._warned.add(number)
            rank_zero_warn(
                f"hints: padded positions count in that of {[*self.hints][number]}, since it has the positions "
                f"{[*positions[1:]]}, and the mask {[*mask.shape[1:]]}"
            )
        return projected, target

    def _outputs(
        self, guided: Mapping[str, Tensor], hints: Mapping[str, Tensor], rows: int
    ) -> list[tuple[Tensor, Tensor]]:
        return [
            (_output("student", guided, name, rows), _output("teacher", hints, layer, rows))
            for name, layer in self.hints.items()
        ]

    def are_frozen_below(self, student: nn.Module) -> bool:
        """Whether no parameter that the guided layers depend on requires a gradient."""
        parameters = student.named_parameters()
        return not any(p.requires_grad for name, p in parameters if name in self.guided_parameters)

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


def check_gradients(outputs: Iterable[tuple[str, Tensor]], are_frozen: Callable[[], bool] = lambda: False) -> None:
    """Raise InputError if the output of a guided layer has no gradient.

    Args:
        outputs: Names of guided layers, and their outputs in a pass with gradients.
        are_frozen: Whether all parameters below are frozen at present, as a callback does for some epochs. Then there
            is no error.
    """
    for name, output in outputs:
        if not output.requires_grad and not are_frozen():
            raise InputError(
                f"hints: the output of the student's layer {name} has no gradient, so that nothing below it learns; "
                "all parameters below it are frozen, it is detached, or it lies in gradient checkpointing with "
                "use_reentrant=True (use_reentrant=False works)"
            )


def _parameters_below(outputs: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Return the names of the parameters that outputs depend on. Changes their ``grad``."""
    for parameter in parameters.values():
        parameter.grad = None
    # not torch.autograd.grad, which reentrant gradient checkpointing refuses
    torch.stack([output.float().sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    return frozenset(name for name, parameter in parameters.items() if parameter.grad is not None)


def _output(who: str, outputs: Mapping[str, Tensor], name: str, rows: int) -> Tensor:
    if name not in outputs:
        raise InputError(f"hints: the {who}'s layer {name} is never called in its forward pass")
    output = outputs[name]
    if not output.ndim or len(output) != rows:
        raise InputError(
            f"hints: the {who}'s layer {name} must return a row for each of {rows} samples, got {[*output.shape]}; "
            "use another layer (one with batch_first=True)"
        )
    return output
