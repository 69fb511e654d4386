"""Learning rate schedules that consist of others, and schedules whose length is that of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from inspect import isclass
from itertools import pairwise
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from kd_lightning.errors import InputError


class SequentialSchedule(SequentialLR):
    """One schedule after another, such as a warm-up and then a decay. A config can describe it.

    The learning rates are those of torch's SequentialLR, in which ``schedulers[k + 1]`` follows at ``milestones[k]``.
    torch's class itself takes built schedulers, which a config cannot describe, since they need the optimiser.

    A part whose length is left out (``T_max`` of CosineAnnealingLR, ``total_steps`` of OneCycleLR) lasts until the next
    milestone, the last one until the end of the run. ``total_iters`` of LinearLR and others has torch's default, 5.
    MultiplicativeLR begins with the last rate before it, as in torch.

    Args:
        optimizer: The optimiser.
        schedulers: One schedule or more, each called with the optimiser.
        milestones: At which epoch (or step, as of ``lr_interval``) each schedule but the first begins: growing numbers
            of at least 1.
        length: Number of epochs or steps in all. Default: None, which means those of the run.

    Raises:
        InputError: If the numbers of schedulers and milestones do not fit; if the milestones do not grow; if a
            scheduler refuses its arguments, consists of other schedules, or is ReduceLROnPlateau, which follows a
            metric.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: list[LRSchedulerCallable],
        milestones: list[int],
        length: int | None = None,
    ) -> None:
        if len(milestones) != len(schedulers) - 1:
            raise InputError(
                f"milestones must be one fewer than the schedulers, of which there are {len(schedulers)}, "
                f"got {milestones}"
            )
        if any(end <= begin for begin, end in pairwise([0, *milestones])):
            raise InputError(f"milestones must be at least 1 and grow, got {milestones}")
        starts, ends = [0, *milestones], [*milestones, length]
        # a short run, as of a first try, may end before the last milestone
        lengths = [None if end is None else max(end - start, 1) for start, end in zip(starts, ends, strict=True)]
        super().__init__(optimizer, _build_parts(optimizer, schedulers, lengths), list(milestones))


class ChainedSchedule(ChainedScheduler):
    """Several schedules at once, whose factors multiply. A config can describe it.

    The learning rates are those of torch's ChainedScheduler, see :class:`SequentialSchedule`. A part whose length is
    left out lasts until the end of the run.

    Args:
        optimizer: The optimiser.
        schedulers: One schedule or more, each called with the optimiser.
        length: Number of epochs or steps in all. Default: None, which means those of the run.

    Raises:
        InputError: If there is no scheduler, or one is refused as in :class:`SequentialSchedule`.
    """

    def __init__(self, optimizer: Optimizer, schedulers: list[LRSchedulerCallable], length: int | None = None) -> None:
        if not schedulers:
            raise InputError("schedulers must be at least one, got none")
        super().__init__(_build_parts(optimizer, schedulers, [length] * len(schedulers)), optimizer)


def _build_parts(
    optimizer: Optimizer, schedulers: Sequence[LRSchedulerCallable], lengths: Sequence[int | None]
) -> list[LRScheduler]:
    """Build the parts of a schedule. Messages name their number."""
    built: list[LRScheduler] = []
    for number, (scheduler, length) in enumerate(zip(schedulers, lengths, strict=True)):
        try:
            part = build_scheduler(scheduler, optimizer, length)
        except (TypeError, ValueError) as error:
            raise InputError(f"schedulers[{number}]: {error}") from error
        if isinstance(part, ReduceLROnPlateau):
            raise InputError(f"schedulers[{number}] must not be ReduceLROnPlateau, which follows a metric")
        if isinstance(part, SequentialLR | ChainedScheduler):  # torch starts its parts at wrong rates, or fails
            raise InputError(f"schedulers[{number}] must not consist of other schedules, got {type(part).__name__}")
        built.append(part)
    return built


# The length of a schedule.

_LENGTH = {
    CosineAnnealingLR: "T_max",
    OneCycleLR: "total_steps",
    SequentialSchedule: "length",
    ChainedSchedule: "length",
}
"""The argument that is the length of a schedule, of those that cannot do without."""


def takes_length(scheduler: LRSchedulerCallable) -> bool:
    """Return whether a schedule, or its last part, leaves out its length, so that it gets that of the run.

    Args:
        scheduler: A class of torch or of this file, or a ``functools.partial`` of one, as the parser makes. Any other
            function has a length of its own.
    """
    kind, arguments = _open(scheduler)
    name = _length_argument(kind, arguments)
    if name is None or arguments.get(name) is not None or arguments.get("epochs") is not None:
        return False
    parts = arguments.get("schedulers") or ()
    if issubclass(kind, SequentialSchedule):  # the milestones are the lengths of its other parts
        parts = parts[-1:]
    return not issubclass(kind, SequentialSchedule | ChainedSchedule) or any(map(takes_length, parts))


def build_scheduler(scheduler: LRSchedulerCallable, optimizer: Optimizer, length: int | None) -> Any:
    """Build a schedule.

    Args:
        scheduler: Called with the optimiser.
        optimizer: The optimiser.
        length: Number of epochs or steps, for a schedule that leaves out its own. If None, it must not leave it out.
    """
    if not takes_length(scheduler):
        return scheduler(optimizer)
    kind, arguments = _open(scheduler)
    name = str(_length_argument(kind, arguments))
    if length is None:
        raise InputError(f"{name} of {kind.__name__} is missing")
    return scheduler(optimizer, **{name: length})


def lengths_of(scheduler: Any) -> Iterator[int]:
    """Yield the length of a schedule that was built, or of each part that has one."""
    for part in getattr(scheduler, "_schedulers", ()):
        yield from lengths_of(part)
    for kind in (CosineAnnealingLR, OneCycleLR):
        if isinstance(scheduler, kind):
            yield getattr(scheduler, _LENGTH[kind])


def _length_argument(kind: Any, arguments: dict[str, Any]) -> str | None:
    """Return the name of the argument that is the length of a class of schedules, None if it has none."""
    for known, name in _LENGTH.items():
        # a subclass with a constructor of its own may have other arguments
        inherits = isclass(kind) and issubclass(kind, known)
        if inherits and (vars(known)["__init__"] is kind.__init__ or name in arguments):
            return name
    return None


def _open(scheduler: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class of a scheduler callable and the arguments it is called with; the callable if it is no partial.

    The parser's partials call a function with the class as an argument.
    """
    arguments: dict[str, Any] = {}
    while isinstance(scheduler, partial):
        arguments = scheduler.keywords | arguments
        scheduler = next(filter(isclass, scheduler.args), scheduler.func)
    return scheduler, arguments
