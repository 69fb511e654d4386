"""Schedules that consist of others, against torch's own, built by hand."""

import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from kd_lightning import ChainedSchedule, InputError, SequentialSchedule
from kd_lightning.runs.build import ObjectParser
from kd_lightning.schedules import build_scheduler, lengths_of, takes_length

warm_up = partial(LinearLR, start_factor=0.1, total_iters=3)


def optimizer(kind=SGD):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    return kind([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}], lr=0.1)


def rates(make, steps=12, resume_at=None):
    """The learning rates of each step; warnings are errors."""
    built, found = optimizer(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make(built)
        for step in range(steps):
            if step == resume_at:
                state, groups = scheduler.state_dict(), built.state_dict()
                built = optimizer()
                scheduler = make(built)
                built.load_state_dict(groups)
                scheduler.load_state_dict(state)
            found.append([group["lr"] for group in built.param_groups])
            built.step()
            scheduler.step()
            assert scheduler.get_last_lr() == [group["lr"] for group in built.param_groups]
    return found


KINDS = {
    "cosine": partial(CosineAnnealingLR, T_max=9, eta_min=1e-3),
    "restarts": partial(CosineAnnealingWarmRestarts, T_0=4),
    "exponential": partial(ExponentialLR, gamma=0.9),
    "steps": partial(StepLR, step_size=2),
    "polynomial": partial(PolynomialLR, total_iters=9),
    "lambda": partial(LambdaLR, lr_lambda=lambda step: 0.8**step),
    "factor": partial(MultiplicativeLR, lr_lambda=lambda step: 0.8),
    "one cycle": partial(OneCycleLR, max_lr=0.3, total_steps=9, cycle_momentum=False),
}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("resume_at", [None, 2, 3, 7])
def test_sequential(second, resume_at):
    ours = partial(SequentialSchedule, schedulers=[warm_up, KINDS[second]], milestones=[3])
    by_hand = rates(lambda o: SequentialLR(o, [warm_up(o), KINDS[second](o)], [3]))
    assert rates(ours, resume_at=resume_at) == by_hand
    if second not in ("one cycle", "factor"):  # these begin with other rates, in torch's class, too
        torch.testing.assert_close(by_hand[0], [0.01, 0.05])
        torch.testing.assert_close(by_hand[3], [0.1, 0.5])  # the warm-up is over


@pytest.mark.parametrize("resume_at", [None, 4])
def test_chained(resume_at):
    ours = partial(ChainedSchedule, schedulers=[warm_up, KINDS["exponential"]])
    assert rates(ours, resume_at=resume_at) == rates(
        lambda o: ChainedScheduler([warm_up(o), KINDS["exponential"](o)], o)
    )


def test_three_parts():
    parts = [warm_up, KINDS["cosine"], KINDS["steps"]]
    ours = partial(SequentialSchedule, schedulers=parts, milestones=[3, 8])
    assert rates(ours) == rates(lambda o: SequentialLR(o, [part(o) for part in parts], [3, 8]))


def test_states_are_those_of_torch():
    ours = SequentialSchedule(optimizer(), [warm_up, KINDS["cosine"]], [3])
    other = optimizer()
    theirs = SequentialLR(other, [warm_up(other), KINDS["cosine"](other)], [3])
    assert ours.state_dict() == theirs.state_dict()


CHAIN = partial(ChainedSchedule, schedulers=[warm_up])
SEQUENCE = partial(SequentialSchedule, schedulers=[warm_up, warm_up], milestones=[1])
COSINE, CYCLE = CosineAnnealingLR, partial(OneCycleLR, max_lr=0.1)


@pytest.mark.parametrize(
    ("scheduler", "lengths"),
    [
        (COSINE, [12]),
        (partial(COSINE, eta_min=0.1), [12]),
        (partial(partial(COSINE, T_max=None), eta_min=0.1), [12]),
        (CYCLE, [12]),
        (partial(CYCLE, epochs=2, steps_per_epoch=3), None),
        (partial(COSINE, T_max=7), None),
        (lambda o: COSINE(o, 7), None),
        (LinearLR, None),
        (partial(SequentialSchedule, schedulers=[warm_up, COSINE], milestones=[3]), [9]),
        (partial(SequentialSchedule, schedulers=[COSINE, CYCLE, COSINE], milestones=[3, 5]), [3, 2, 7]),
        (partial(SequentialSchedule, schedulers=[COSINE, StepLR], milestones=[3]), None),
        (partial(SequentialSchedule, schedulers=[warm_up, COSINE], milestones=[3], length=5), None),
        (partial(SequentialSchedule, schedulers=[warm_up, COSINE], milestones=[30]), [1]),
        (partial(ChainedSchedule, schedulers=[warm_up, COSINE]), [12]),
        (partial(ChainedSchedule, schedulers=[COSINE, partial(COSINE, T_max=2)]), [12, 2]),
    ],
)
def test_lengths_that_are_left_out(scheduler, lengths):
    assert takes_length(scheduler) == (lengths is not None)
    if lengths is not None:
        assert [*lengths_of(build_scheduler(scheduler, optimizer(), 12))] == lengths


def test_subclasses():
    class Same(CosineAnnealingLR):
        """The constructor of torch's class."""

    class Other(CosineAnnealingLR):
        def __init__(self, optimizer, half):
            super().__init__(optimizer, T_max=2 * half)

    assert takes_length(Same)
    assert not takes_length(Other)
    assert not takes_length(partial(Other, half=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(SequentialSchedule, schedulers=[warm_up], milestones=[1]), "one fewer than the schedulers, of which"),
        (partial(SequentialSchedule, schedulers=[], milestones=[]), "of which there are 0, got \\[\\]"),
        (partial(SequentialSchedule, schedulers=[warm_up] * 2, milestones=[0]), "at least 1 and grow, got \\[0\\]"),
        (partial(SequentialSchedule, schedulers=[warm_up] * 3, milestones=[4, 4]), "at least 1 and grow"),
        (partial(SequentialSchedule, schedulers=[warm_up, ReduceLROnPlateau], milestones=[1]), r"schedulers\[1\] must"),
        (partial(ChainedSchedule, schedulers=[ReduceLROnPlateau]), r"schedulers\[0\] must not be ReduceLROnPlateau"),
        (partial(SequentialSchedule, schedulers=[CHAIN, warm_up], milestones=[1]), r"schedulers\[0\] must not consist"),
        (partial(SequentialSchedule, schedulers=[warm_up, SEQUENCE], milestones=[1]), "must not consist of other"),
        (partial(ChainedSchedule, schedulers=[SEQUENCE]), "got SequentialSchedule"),
        (partial(ChainedSchedule, schedulers=[]), "schedulers must be at least one"),
        (partial(ChainedSchedule, schedulers=[StepLR]), r"schedulers\[0\]: .*step_size"),
        (partial(ChainedSchedule, schedulers=[COSINE]), r"schedulers\[0\]: T_max of CosineAnnealingLR is missing"),
    ],
)
def test_refused(make, message):
    with pytest.raises(InputError, match=message):
        make(optimizer())


def test_in_yaml():
    parser = ObjectParser()
    parser.add_argument("--schedule", type=LRSchedulerCallable)
    text = """
    schedule:
      class_path: kd_lightning.SequentialSchedule
      init_args:
        schedulers:
        - {class_path: torch.optim.lr_scheduler.LinearLR, init_args: {start_factor: 0.1, total_iters: 3}}
        - {class_path: torch.optim.lr_scheduler.CosineAnnealingLR}
        milestones: [3]
    """
    config = parser.parse_string(text)
    make = parser.instantiate(config).schedule
    assert takes_length(make)
    expected = rates(lambda o: SequentialLR(o, [warm_up(o), CosineAnnealingLR(o, 9)], [3]))
    assert rates(lambda o: build_scheduler(make, o, 12)) == expected
    again = parser.instantiate(parser.parse_string(parser.dump(config))).schedule
    assert rates(lambda o: build_scheduler(again, o, 12)) == expected
    assert rates(lambda o: build_scheduler(make, optimizer(AdamW) and o, 12)) == expected  # it can be called again
