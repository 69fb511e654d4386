"""One term of an objective that compares layers of student and teacher."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError, first_line
from kd_lightning.features.capture import evaluating
from kd_lightning.features.pair import FeaturePair, Layouts, Shapes
from kd_lightning.features.pooling import How
from kd_lightning.features.trace import check_rows


class FeatureTerm(nn.Module):
    """A loss between layers of the student and layers of the teacher, with a weight.

    Features have their channels first when the projector and the loss get them: (B, C), (B, C, N) for tokens,
    (B, C, H, W) for maps. Tokens become a square map where the other layer gives a map. Where the channels are follows
    from the layers around, see :class:`~kd_lightning.features.channels.ChannelTrace`.

    Projectors and the loss's own parameters train beside the student. They are in checkpoints, and never deployed.

    Args:
        layers: Layer of the student to layer of the teacher, by dotted path; "" is the network's own output. Where a
            module has several teachers, the teacher's layer begins with its number: ``"0.layer3"``.
            ``python -m kd_lightning layers`` lists the layers.
        loss: Called as ``loss(student_feature, teacher_feature, batch)`` for each pair of layers, see
            :class:`~kd_lightning.losses.protocols.FeatureLoss`. The term is the sum over the pairs. With several pairs,
            each one has a copy.
        weight: Weight of the term, at least 0. A callback may anneal it: ``attribute: features.<name>.weight``.
        projector: From the student's feature to the teacher's shape: a module for one pair of layers; a dict by layer
            of the student; or a module that joins all pairs (``joint = True``, as
            :class:`~kd_lightning.features.review_fusion.ReviewFusion`). Its method ``build(student_shape,
            teacher_shape)``, if it has one, is called first. Default: None, which means
            :func:`~kd_lightning.features.regressors.build_projector`, if the loss needs both features in one shape.
        pool: Make one vector of each feature first: the ``"mean"`` over its positions, or the ``"first"`` token.
            Default: None, which means that it stays as it is.
        standardize: Standardizes the teacher's feature, as
            :class:`~kd_lightning.features.standardization.ChannelStandardization` does. It is fitted to the first
            training batches. Default: None, which means that the feature stays as it is.
        begin_epoch: First epoch with the term, at least 0.
        ramp_epochs: Number of epochs from there in which the weight rises linearly, at least 0: with 4 it is a quarter
            of the weight in the first one.

    Raises:
        InputError: If there is no pair; if a number is out of range; if a projector is of no pair; if ``standardize``
            cannot be fitted.
    """

    pairs: Any  # a ModuleList of FeaturePair
    losses: Any
    standardizations: Any
    joint: Any  # or None

    def __init__(
        self,
        layers: dict[str, str],
        loss: nn.Module,
        weight: float = 1.0,
        *,
        projector: nn.Module | dict[str, nn.Module] | None = None,
        pool: How | None = None,
        standardize: nn.Module | None = None,
        begin_epoch: int = 0,
        ramp_epochs: int = 0,
    ) -> None:
        super().__init__()
        if not layers:
            raise InputError("layers must name at least one pair, {student's layer: teacher's layer}, got none")
        if not isinstance(loss, nn.Module):
            raise InputError(f"loss must be a module, got {type(loss).__name__}")
        try:
            inspect.signature(loss.forward).bind(None, None, None)
        except TypeError as error:
            raise InputError(
                "loss must take (student_feature, teacher_feature, batch), as those of kd_lightning.losses.features "
                f"do, got {type(loss).__name__}{inspect.signature(loss.forward)}"
            ) from error
        is_own = type(loss).__module__.partition(".")[0] not in ("torch", "kd_lightning")
        if not is_own and not hasattr(loss, "needs_projector"):
            raise InputError(
                f"loss must be one of kd_lightning.losses.features, or your own, got {type(loss).__name__}; losses of "
                "logits are for soft_loss"
            )
        for name, number in (("begin_epoch", begin_epoch), ("ramp_epochs", ramp_epochs)):
            if number < 0:
                raise InputError(f"{name} must be at least 0, got {number}")
        if pool not in (None, *get_args(How)):
            raise InputError(f"pool must be one of {get_args(How)} or None, got {pool!r}")
        if standardize is not None and not hasattr(standardize, "is_fitted"):
            raise InputError(
                "standardize must be fitted, as ChannelStandardization and PHIStandardization are, got "
                f"{type(standardize).__name__}"
            )
        self.layers = {str(student): str(teacher) for student, teacher in layers.items()}
        self.weight = weight
        self.begin_epoch = begin_epoch
        self.ramp_epochs = ramp_epochs
        self.weight_in(0)  # checks it
        needs_projector = bool(getattr(loss, "needs_projector", True))
        self.joint, own = _given(projector, self.layers)
        self.pairs = nn.ModuleList(
            FeaturePair(student, teacher, own.get(student), needs_projector and self.joint is None, pool)
            for student, teacher in self.layers.items()
        )
        self._checks_shapes = needs_projector
        self.losses = nn.ModuleList(_copies(loss, len(self.layers)))
        self.standardizations = nn.ModuleList(deepcopy(standardize) for _ in self.layers if standardize is not None)
        self.fitted_to: list[str] | None = None  # fingerprints of the teachers that standardizations are fitted to
        self.samples: int | None = None

    @property
    def loss(self) -> nn.Module:
        """The loss of the first pair."""
        loss: nn.Module = self.losses[0]
        return loss

    @property
    def trains_only(self) -> bool:
        """Whether the term has no value in validation."""
        return bool(getattr(self.loss, "trains_only", False))

    @property
    def is_built(self) -> bool:
        """Whether the shapes of the layers are known."""
        return all(pair.shapes is not None for pair in self.pairs)

    def weight_in(self, epoch: int) -> float:
        """Return the weight in an epoch, with the warm-up.

        Raises:
            InputError: If the weight is not a number of at least 0; a callback may have set it.

        >>> from kd_lightning.losses.features import MSEFeatureLoss
        >>> FeatureTerm({"1": "2"}, MSEFeatureLoss(), weight=2.0, begin_epoch=1, ramp_epochs=4).weight_in(2)
        1.0
        """
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InputError(f"weight must be finite and at least 0, got {self.weight}")
        if epoch < self.begin_epoch:
            return 0.0
        passed = epoch - self.begin_epoch + 1
        return self.weight if passed >= self.ramp_epochs else self.weight * passed / self.ramp_epochs

    def build(
        self,
        shapes: list[Shapes],
        layouts: list[Layouts],
        samples: int | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build projectors and losses for the shapes of the layers.

        Their weights depend on torch's initial seed alone, so they are the same on every process of one seed; of
        several seeds, DDP sends those of the first process. The state of torch's generators stays unchanged.

        Args:
            shapes: Output shapes of each pair of layers, for one sample.
            layouts: Where each pair of outputs has its channels.
            samples: Number of samples of the data. None if it is not known.
            device: Of what is built.
            dtype: Of what is built.

        Raises:
            InputError: If no projector or loss fits the shapes, or it is not known where the channels are.
        """
        self.samples = samples
        with _seeded():
            for pair, of_pair, where in zip(self.pairs, shapes, layouts, strict=True):
                pair.build(of_pair, where, torch.device("cpu"), dtype)
            if self.joint is not None and callable(make := getattr(self.joint, "build", None)):
                arranged = [pair.arranged_shapes() for pair in self.pairs]
                make([student for student, _ in arranged], [teacher for _, teacher in arranged])
            for loss, (student, teacher) in zip(self.losses, self._projected_shapes(shapes, dtype), strict=True):
                if callable(make := getattr(loss, "build", None)):
                    make(student, teacher, samples)
        self.to(device, dtype)

    def start_fit(self, samples: int | None) -> None:
        """Runs at the start of each further fit. Deletes what losses have stored of samples: they may be others now.

        Args:
            samples: Number of samples of the data. Default: None, which means as many as before.
        """
        self.samples = self.samples if samples is None else samples
        with _seeded():
            for loss in self.losses:
                if callable(reset := getattr(loss, "reset", None)):
                    reset(self.samples)

    @torch.no_grad()
    def _projected_shapes(self, shapes: list[Shapes], dtype: torch.dtype) -> list[Shapes]:
        """Return the shapes of the features that the losses get, for one sample."""
        dtype = torch.promote_types(dtype, torch.float32)  # the CPU lacks operations in half precision
        self.to("cpu", dtype)
        zeros = [[torch.zeros(1, *shape, dtype=dtype) for shape in of_pair] for of_pair in shapes]
        try:
            with evaluating(self):
                found = self._join([student for student, _ in zeros], [teacher for _, teacher in zeros], None)
        except InputError:
            raise
        except Exception as error:  # the user's own projector may raise anything
            raise InputError(f"projector: one does not fit its layer: {first_line(error)}") from error
        return [([*student.shape[1:]], [*teacher.shape[1:]]) for student, teacher in found]

    def _join(self, students: list[Tensor], teachers: list[Tensor], mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        pairs = [*zip(self.pairs, students, teachers, strict=True)]
        if self.joint is None:
            return [pair(student, teacher, mask) for pair, student, teacher in pairs]
        arranged = [pair.arrange(student, teacher, mask) for pair, student, teacher in pairs]
        projected = self.joint([student for student, _ in arranged])
        found = []
        for pair, student, (_, teacher) in zip(self.pairs, projected, arranged, strict=True):
            if self._checks_shapes and student.shape != teacher.shape:
                raise InputError(
                    f"the projector gives {[*student.shape[1:]]} for one sample of {pair.student}, but the teacher's "
                    f"{pair.teacher} is {[*teacher.shape[1:]]}"
                )
            found.append(pair.finish(student, teacher, mask))
        return found

    def fit_standardizations(self, teacher: Mapping[str, Tensor], mask: Tensor | None = None) -> None:
        """Fit those that are not fitted yet to the teacher's features.

        Args:
            teacher: Features (B, ...), by the layer's name in ``layers``.
            mask: Which positions exist, (B, ...). Others do not count, if a feature has the mask's positions.
        """
        for standardize, pair in zip(self.standardizations, self.pairs, strict=False):
            if not standardize.is_fitted:
                feature = pair.arrange_teacher(teacher[pair.teacher], mask)
                rows = feature.movedim(1, -1)
                is_masked = mask is not None and mask.shape == rows.shape[:-1]
                standardize.fit(rows[mask != 0] if is_masked else rows.flatten(0, -2))

    def features(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], rows: int, mask: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the student's projected features and the teacher's, as the loss gets them, by layer of the student.

        Args:
            student: Outputs of the student's layers, by name.
            teacher: Outputs of the teacher's layers, by name.
            rows: Number of samples B.
            mask: Which positions exist, (B, ...). Both features are 0 at the others, if they have the mask's positions.
                Default: None, which means that all exist.

        Raises:
            InputError: If an output does not have a row for each sample, or if the shapes do not fit.
        """
        found = self.projected(student, teacher, rows, mask)
        if self.standardizations:
            parts = zip(self.pairs, self.standardizations, found, strict=True)
            found = [pair.finish(mine, standardize(theirs), mask) for pair, standardize, (mine, theirs) in parts]
        return dict(zip(self.layers, found, strict=True))

    def projected(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], rows: int, mask: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the features of each pair as :meth:`features` does, before the teacher's are standardized."""
        check_rows("student", student, self.layers, rows)
        check_rows("teacher", teacher, self.layers.values(), rows)
        students = [student[name] for name in self.layers]
        teachers = [teacher[name].to(students[0].device) for name in self.layers.values()]
        return self._join(students, teachers, mask)

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the loss of each pair, by layer of the student; see :meth:`features`."""
        features = self.features(student, teacher, len(batch), batch.position_mask)
        values = {}
        for loss, (name, (mine, theirs)) in zip(self.losses, features.items(), strict=True):
            value = loss(mine, theirs, batch)
            if not isinstance(value, Tensor) or value.ndim:
                shown = [*value.shape] if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"loss: {type(loss).__name__} must return a scalar, got {shown}")
            values[name] = value
        return values

    def describe(self) -> str:
        """Describe the pairs, their shapes, and the number of parameters."""
        pairs = "; ".join(pair.describe() for pair in self.pairs)
        return f"{pairs}; {self.size():,} parameters in projectors"

    def size(self) -> int:
        """Number of parameters of projectors and losses."""
        return sum(p.numel() for p in self.parameters())


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed torch's generator for the CPU by its initial seed. Its state is as before after the block."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which also seeds accelerators
        torch.default_generator.manual_seed((torch.initial_seed() + 1) % 2**63)
        yield


def _given(
    projector: nn.Module | Mapping[str, nn.Module] | None, layers: Mapping[str, str]
) -> tuple[nn.Module | None, Mapping[str, nn.Module]]:
    """Return the projector that joins all pairs, or the user's own ones by layer of the student."""
    if projector is None:
        return None, {}
    if isinstance(projector, nn.Module) and not isinstance(projector, Mapping | nn.ModuleDict):
        if getattr(projector, "joint", False):
            return projector, {}
        if len(layers) > 1:
            raise InputError(
                f"projector must be a dict by layer of the student where there are {len(layers)} pairs, got "
                f"{type(projector).__name__}"
            )
        return None, {next(iter(layers)): projector}
    if unknown := [name for name in projector if name not in layers]:
        raise InputError(f"projector: {unknown[0]!r} is no layer of the student; layers has {', '.join(layers)}")
    if joint := [name for name, own in projector.items() if getattr(own, "joint", False)]:
        raise InputError(
            f"projector: {type(projector[joint[0]]).__name__} joins all pairs; give it alone, not in a dict"
        )
    return None, {**projector}


def _copies(module: nn.Module, count: int) -> list[nn.Module]:
    """Return the module, and copies of it where it holds something of its own."""
    has_state: Any = getattr(module, "build", None) or next(iter(module.state_dict()), None) is not None
    return [module, *(deepcopy(module) if has_state else module for _ in range(count - 1))]
