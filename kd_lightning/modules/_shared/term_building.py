"""What feature terms are built from: a pass of each network, and the first training inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from kd_lightning.batch import Batch
from kd_lightning.cache.tensors import token_mask
from kd_lightning.errors import InputError, first_line
from kd_lightning.features.capture import evaluating, find_layer
from kd_lightning.features.trace import TracedLayers, trace_student, trace_teacher
from kd_lightning.inputs import describe, map_inputs
from kd_lightning.modules._shared.first_inputs import first_inputs
from kd_lightning.teachers.teacher import Teacher

if TYPE_CHECKING:
    from kd_lightning.modules._shared.feature_terms import FeatureTerms

_TO_STANDARDIZE = 512  # samples that standardizations are fitted to


def build_terms(
    terms: FeatureTerms, module: Any, teachers: Sequence[nn.Module], batch: Batch, samples: int | None = None
) -> None:
    """Find the shapes of all layers by one pass of each network, and build what depends on them.

    Args:
        terms: The terms.
        module: The module.
        teachers: Its teachers.
        batch: The inputs.
        samples: Number of samples of the data. Default: None, which means that of the trainer's datamodule, if
            there is one.

    Raises:
        InputError: If a layer does not exist, is not called or has no gradient; if no projector or loss fits.
    """
    batch = batch.to(module.device)
    layers = terms.teacher_layers(len(teachers))
    try:
        students = {
            name: terms.named(name, partial(trace_student, module.student, batch.x, term.layers, module.call))
            for name, term in terms.all.items()
        }
        traced = [
            _trace_teacher(terms, teacher, batch, paths, module.call) if paths else None
            for teacher, paths in zip(teachers, layers, strict=True)
        ]
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # timm and transformers raise any
        reason = f"the networks cannot take inputs of shape {describe(batch.x)}: {first_line(error)}"
        raise InputError(f"features: {reason}") from error
    terms.parameters_below = {name: student.parameters for name, student in students.items()}
    places: dict[str, tuple[TracedLayers, str]] = {}
    for part, paths in zip(traced, layers, strict=True):
        places |= {name: (part, path) for path, name in paths.items() if part is not None}
    samples = count_samples(module) if samples is None else samples
    for name, term in terms.all.items():
        student = students[name]
        parts = [(mine, *places[theirs]) for mine, theirs in term.layers.items()]
        shapes = [(student.shape(mine), part.shape(path)) for mine, part, path in parts]
        layouts = [(student.layouts[mine], part.layouts[path]) for mine, part, path in parts]
        if not term.is_built:
            dtype = student.outputs[next(iter(term.layers))].dtype
            terms.named(name, partial(term.build, shapes, layouts, samples, module.device, dtype))
    terms.set_teacher_layers(teachers)
    outputs = {name: part.outputs[path] for name, (part, path) in places.items()}
    for name, term in terms.all.items():
        with evaluating(term), torch.no_grad():
            terms.named(name, partial(term.projected, students[name].outputs, outputs, len(batch)))


def _trace_teacher(
    terms: FeatureTerms, teacher: nn.Module, batch: Batch, paths: Mapping[str, str], run: Callable[..., Any]
) -> TracedLayers:
    if isinstance(teacher, Teacher):
        teacher.layers = dict.fromkeys(paths)  # one without features refuses them
    network = teacher.network if isinstance(teacher, Teacher) else teacher
    for name, term in terms.all.items():
        for path in [path for path, layer in paths.items() if layer in term.layers.values()]:
            terms.named(name, partial(find_layer, network, path))
    first = next(name for name, term in terms.all.items() if {*term.layers.values()} & {*paths.values()})
    traced: TracedLayers = terms.named(first, partial(_trace, teacher, batch, [*paths], run))
    return traced


def _trace(teacher: nn.Module, batch: Batch, names: list[str], run: Callable[..., Any]) -> TracedLayers:
    if not isinstance(teacher, Teacher):
        with evaluating(teacher):
            return trace_teacher(teacher, batch.teacher_x, names, run)
    with teacher.evaluating(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        no_autocast = torch.autocast(batch.device.type, enabled=False)
        with no_autocast:
            x = teacher.prepare(map_inputs(torch.clone, batch.teacher_x))  # it may change them
        return trace_teacher(teacher.network, x, names)


@torch.no_grad()
def fit_standardizations(terms: FeatureTerms, module: Any, teachers: Sequence[nn.Module]) -> None:
    """Fit standardizations that are not fitted yet to the first training inputs, on the device of the training."""
    parts = [s for term in terms.all.values() for s in term.standardizations]
    if all(s.is_fitted for s in parts):
        return
    device = module.trainer.strategy.root_device
    for teacher in teachers:
        teacher.to(device)  # it goes there soon
    standardize_by(terms, teachers, first_inputs(module, _TO_STANDARDIZE), device)
    for part in parts:  # rows differ between processes
        state = module.trainer.strategy.broadcast({k: v.cpu() for k, v in part.state_dict().items()})
        part.load_state_dict(state)


@torch.no_grad()
def standardize_by(terms: FeatureTerms, teachers: Sequence[nn.Module], batch: Batch, device: torch.device) -> None:
    """Fit standardizations that are not fitted yet to the teachers' features of a batch.

    Args:
        terms: The terms.
        teachers: The teachers.
        batch: The inputs. 64 are computed at a time.
        device: Of the passes.
    """
    features = []
    for some in batch.split([min(64, len(batch) - n) for n in range(0, len(batch), 64)]):
        captured = terms.teacher_features(teachers, some.to(device))
        features.append({name: part.float().cpu() for name, part in captured.items()})
    mask = batch.position_mask if batch.teacher_inputs is None else token_mask(batch.teacher_x)
    mask = None if mask is None else mask.cpu()
    joined = {name: torch.cat([part[name] for part in features]) for name in features[0]}
    for term in terms.all.values():
        if not all(standardize.is_fitted for standardize in term.standardizations):
            term.fit_standardizations(joined, mask)
            term.fitted_to = [teacher.fingerprint() for teacher in teachers if isinstance(teacher, Teacher)]


def check_standardizations(terms: FeatureTerms, teachers: Sequence[nn.Module]) -> None:
    """Raise InputError if standardizations are fitted to other teachers, as those of a term of an earlier module."""
    for name, term in terms.all.items():
        own = [teacher for teacher in teachers if isinstance(teacher, Teacher)]
        saved = own and term.fitted_to  # the teachers that train have none
        if saved and not (len(saved) == len(own) and all(map(Teacher.matches, own, saved))):
            raise InputError(f"features.{name}: standardize is fitted to another teacher; make a new FeatureTerm")


def count_samples(module: LightningModule) -> int | None:
    """Return the number of samples of the module's data, where it is known."""
    samples: Any = getattr(getattr(module._trainer, "datamodule", None), "samples", None)
    return len(samples) if hasattr(samples, "__len__") else None
