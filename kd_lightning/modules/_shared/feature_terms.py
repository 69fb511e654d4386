"""The feature terms of a module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError, first_line
from kd_lightning.features.capture import capture
from kd_lightning.features.pooling import Pool
from kd_lightning.features.term import FeatureTerm
from kd_lightning.features.trace import are_frozen, check_gradients
from kd_lightning.modules._shared.first_inputs import first_inputs
from kd_lightning.modules._shared.term_building import (
    build_terms,
    check_standardizations,
    count_samples,
    fit_standardizations,
)
from kd_lightning.modules._shared.term_names import check_name
from kd_lightning.teachers.teacher import Teacher

SAMPLES = 4  # whose shapes the terms are built from


@dataclass
class Captured:
    """Outputs of layers in one pass of all networks.

    Attributes:
        student: By the layer's dotted path.
        weights: Weights of the terms that are needed, by name.
        teacher: By the dotted path as in ``FeatureTerm.layers``. Filled at the end of :meth:`FeatureTerms.capturing`.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    student: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)


class FeatureTerms(nn.ModuleDict):
    """Feature terms by name. All their layers are captured in one pass.

    Args:
        terms: The terms. None means that there are none.
        several: Whether the module has several teachers, so that a teacher's layer begins with its number.
        taken: Names of the module's soft terms.

    Attributes:
        parameters_below: Names of the student's parameters that a term's layers depend on, by the term's name.

    Raises:
        InputError: If a name is not allowed, or a value is no FeatureTerm.
    """

    def __init__(
        self, terms: Mapping[str, FeatureTerm] | None, several: bool = False, taken: Collection[str] = ()
    ) -> None:
        if not isinstance(terms, Mapping | None):
            raise InputError(f"features must be a dict {{name: FeatureTerm}}, got {type(terms).__name__}")
        for name, term in (terms or {}).items():
            check_name("features", name)
            if name in taken:
                raise InputError(f"features.{name}: soft_loss has a loss of that name; rename one of them")
            if not isinstance(term, FeatureTerm):
                raise InputError(f"features.{name} must be a FeatureTerm, got {type(term).__name__}")
        super().__init__(terms or {})
        self.several = several
        self.parameters_below: dict[str, frozenset[str]] = {}
        self._means: dict[str, MeanMetric] = {}  # of a validation

    @property
    def all(self) -> dict[str, FeatureTerm]:
        """The terms, by name."""
        terms: dict[str, Any] = {**self._modules}
        return terms

    @property
    def is_built(self) -> bool:
        """Whether all shapes are known."""
        return all(term.is_built for term in self.all.values())

    @property
    def student_layers(self) -> list[str]:
        """The student's layers of all terms."""
        return [*dict.fromkeys(layer for term in self.all.values() for layer in term.layers)]

    def teacher_layers(self, teachers: int = 1) -> list[dict[str, str]]:
        """Return the layers of each teacher: dotted path in its network to the name in the terms.

        Raises:
            InputError: If a layer names no teacher.
        """
        found: list[dict[str, str]] = [{} for _ in range(teachers)]
        for name, term in self.all.items():
            for layer in term.layers.values():
                number, dot, path = layer.partition(".") if self.several else ("0", ".", layer)
                if not dot or number not in map(str, range(teachers)):  # "00.layer3" would be a second name
                    raise InputError(
                        f"features.{name}: a teacher's layer must begin with its number, from 0 to {teachers - 1}, "
                        f"such as '0.layer3', or '0.' for its output, got {layer!r}"
                    )
                found[int(number)][path] = layer
        return found

    # Before training.

    def start_fit(self, module: Any) -> None:
        """Runs in ``setup`` of a fit. Of terms that are built already, losses forget the samples of an earlier fit."""
        for name, term in self.all.items():
            if term.is_built:
                self.named(name, partial(term.start_fit, count_samples(module)))

    def configure(self, module: Any, teachers: Sequence[nn.Module]) -> Batch | None:
        """Runs in ``configure_model`` of a fit. Builds the terms from the first training inputs, and returns these.

        Standardizations are fitted here, before callbacks copy the module: the sizes of their buffers stay then.
        """
        check_standardizations(self, teachers)
        if not self or (self.is_built and self.parameters_below):
            return None
        try:
            inputs: Batch = first_inputs(module, SAMPLES).to("cpu")
        except Exception as error:
            raise InputError(f"features: cannot read the first training inputs ({first_line(error)})") from error
        inputs = module.trainer.strategy.broadcast(inputs)  # sizes may differ between processes
        self.build(module, teachers, inputs)
        fit_standardizations(self, module, teachers)
        return inputs

    def build(self, module: Any, teachers: Sequence[nn.Module], batch: Batch, samples: int | None = None) -> None:
        """Find the shapes of all layers, and build what depends on them, see :func:`build_terms`."""
        build_terms(self, module, teachers, batch, samples)

    def set_teacher_layers(self, teachers: Sequence[nn.Module]) -> None:
        """Set the layers whose outputs the teachers give: pooled, where all terms want that."""
        for teacher, paths in zip(teachers, self.teacher_layers(len(teachers)), strict=True):
            if isinstance(teacher, Teacher):
                teacher.layers = {path: self._pool_of(name) for path, name in paths.items()}

    def _pool_of(self, layer: str) -> Pool | None:
        pairs = [pair for term in self.all.values() for pair in term.pairs if pair.teacher == layer]
        pools = {pair.teacher_pool() for pair in pairs}
        return pools.pop() if len(pools) == 1 else None

    def teacher_features(self, teachers: Sequence[nn.Module], batch: Batch) -> dict[str, Tensor]:
        """Return the teachers' features of a batch, by their name in the terms: stored ones, or computed."""
        captured = Captured()
        with self._capturing_teachers(teachers, batch, captured):
            pass
        return captured.teacher

    def check_trainable(self, student: nn.Module) -> None:
        """Raise InputError if all of the student's parameters that a term's layers depend on are frozen."""
        for name, below in self.parameters_below.items():
            if name != "hint" and are_frozen(student, below):  # the hint module checks its own
                layers = ", ".join(layer or "output" for layer in self.all[name].layers)
                raise InputError(f"features.{name}: no parameter below the student's {layers} requires a gradient")

    def own_buffers(self) -> list[str]:
        """Return the names of buffers that agree on all processes by themselves, so that DDP need not send them."""
        names = [name for name, _ in self.named_buffers(prefix="features")]
        return [name for name in names if ".losses." in name or ".standardizations." in name]

    def report(self) -> None:
        """Print the pairs of each term, their shapes, and the number of parameters, once."""
        for name, term in self.all.items():
            if term.is_built:
                rank_zero_info(f"features.{name}: {term.describe()}")

    # In a step.

    @contextmanager
    def capturing(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        batch: Batch,
        weights: Mapping[str, float],
        apart: bool = False,
    ) -> Iterator[Captured]:
        """Capture the layers of all networks in the passes inside the block.

        Features of a teacher that makes no pass there, since its outputs are stored, are read or computed at the end.

        Args:
            student: The student.
            teachers: Its teachers.
            batch: The batch.
            weights: Weights of the terms that are needed, by name.
            apart: Whether the teachers' features are read or computed apart from the passes inside the block, which may
                be over some of the samples.
        """
        captured = Captured(weights)
        if not weights:
            yield captured
            return
        if apart:
            captured.teacher = self.teacher_features(teachers, batch)
        whole = nullcontext() if apart else self._capturing_teachers(teachers, batch, captured)
        with whole, capture(student, self.student_layers) as outputs:
            captured.student = outputs
            yield captured

    @contextmanager
    def _capturing_teachers(self, teachers: Sequence[nn.Module], batch: Batch, captured: Captured) -> Iterator[None]:
        parts: list[Any] = []
        layers = self.teacher_layers(len(teachers))
        with ExitStack() as stack:
            for teacher, paths in zip(teachers, layers, strict=True):
                source: Any = teacher.capturing(batch) if isinstance(teacher, Teacher) else capture(teacher, [*paths])
                parts.append(stack.enter_context(source) if paths else {})
            yield
        for part, paths in zip(parts, layers, strict=True):
            captured.teacher.update({name: part[path].detach() for path, name in paths.items()})  # it may train, too

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight of each term in an epoch, by name."""
        return {name: self.named(name, partial(term.weight_in, epoch)) for name, term in self.all.items()}

    def active(self, epoch: int) -> dict[str, float]:
        """Return the weights of the terms that have one in an epoch, by name."""
        return {name: weight for name, weight in self.weights(epoch).items() if weight}

    def pair_values(
        self, name: str, captured: Captured, batch: Batch, student: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """Return the loss of each pair of a term, by layer of the student.

        Args:
            name: Name of the term.
            captured: The outputs of the layers.
            batch: The batch.
            student: The student in training, whose layers must have a gradient. Default: None, which means that they
                need none.
        """
        term = self.all[name]
        if student is not None and torch.is_grad_enabled():
            layers = [(layer, captured.student[layer]) for layer in term.layers if layer in captured.student]
            frozen = partial(are_frozen, student, self.parameters_below.get(name, frozenset()))
            self.named(name, partial(check_gradients, layers, frozen))
        values: dict[str, Tensor] = self.named(name, partial(term, captured.student, captured.teacher, batch))
        return values

    def record(self, captured: Captured, batch: Batch, names: Collection[str]) -> None:
        """Add a batch of validation to the means of some terms, over all data loaders.

        A batch that is no sample, as on a process that has none, does not count.
        """
        for name in names:
            values = self.pair_values(name, captured, batch)
            charts = {f"val/{name}": sum_of(values)}
            charts |= (
                {f"val/{name}/{layer or 'output'}": value for layer, value in values.items()} if len(values) > 1 else {}
            )
            for chart, value in charts.items():
                if chart not in self._means:
                    self._means[chart] = MeanMetric().to(value.device)
                self._means[chart].update(value.detach(), 0 if batch.is_padding else len(batch))

    def means(self) -> dict[str, Tensor]:
        """Return the means of a validation over all processes, ``val/<name>``; begin anew."""
        values = {chart: mean.compute() for chart, mean in self._means.items()}
        self.clear_means()
        return values

    def clear_means(self) -> None:
        """Forget the means of a validation."""
        self._means = {}

    def unused_parameters(self, epoch: int) -> set[int]:
        """Return the ids of the parameters of terms whose weight is 0 in this epoch."""
        unused = [self.all[name] for name, weight in self.weights(epoch).items() if not weight]
        return {id(parameter) for term in unused for parameter in term.parameters()}

    def named(self, name: str, function: Callable[[], Any]) -> Any:
        """Call a function. The name of the term is put before the message of an InputError."""
        try:
            return function()
        except InputError as error:
            raise InputError(f"{'hints' if name == 'hint' else f'features.{name}'}: {error}") from error

    # Checkpoints.

    def shapes(self) -> dict[str, Any]:
        """Return what the terms are built from, for a checkpoint."""
        return {
            name: {
                "layers": term.layers,
                "shapes": [pair.shapes for pair in term.pairs],
                "layouts": [pair.layouts for pair in term.pairs],
                "samples": term.samples,
                "fitted_to": term.fitted_to,
            }
            for name, term in self.all.items()
            if term.is_built
        }

    def restore(
        self, shapes: Mapping[str, Any], state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Build the terms that are not built yet as in a checkpoint, and load the standardizations.

        Args:
            shapes: What :meth:`shapes` returned.
            state: The module's ``state_dict`` in the checkpoint.
            device: Of what is built.
            dtype: Of what is built.

        Raises:
            InputError: If the checkpoint has other terms, or other layers, or these in another order.
        """
        layers = {name: saved["layers"] for name, saved in shapes.items()}
        own = {name: term.layers for name, term in self.all.items()}
        if layers != own or any([*pairs] != [*own[name]] for name, pairs in layers.items()):  # pairs go by number
            raise InputError(f"features: the checkpoint was trained with {layers or 'none'}, got {own or 'none'}")
        for name, saved in shapes.items():
            if not self.all[name].is_built:
                self.all[name].build(saved["shapes"], saved["layouts"], saved["samples"], device, dtype)
        for name, term in self.all.items():
            term.fitted_to = shapes[name].get("fitted_to")
            for number, standardize in enumerate(term.standardizations):  # their sizes depend on the fit
                prefix = f"features.{name}.standardizations.{number}."
                own_state = {key.removeprefix(prefix): part for key, part in state.items() if key.startswith(prefix)}
                if own_state:
                    standardize.load_state_dict(own_state)


def sum_of(values: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of scalars."""
    return next(iter(values.values())) if len(values) == 1 else torch.stack([*values.values()]).sum()
