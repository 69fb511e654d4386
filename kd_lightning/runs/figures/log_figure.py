"""Log figures to any logger. A drawing that fails is a warning."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image


@contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Turn an error within the block into a warning of one line.

    Args:
        what: Name of what is made in the block, such as ``figure weight_levels``.
    """
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        rank_zero_warn(f"{what} is left out, and the run goes on: {type(error).__name__}: {reason}")


def log_figure(owner: Trainer | LightningModule, name: str, draw: Callable[[], Figure]) -> None:
    """Draw a figure and log it to each logger that takes figures, at the current step. A failure is a warning.

    These loggers are TensorBoard, Weights & Biases, MLflow, Comet, Neptune, and any with a method like theirs. In
    MLflow the figure is an artifact, whose name ends with the step. Several processes may call this function. Only
    rank 0 draws.

    Args:
        owner: The trainer, or a module.
        name: Name of the figure, such as ``test/confusion_matrix``.
        draw: Returns the figure, which is closed afterwards. It runs only if a logger takes figures, and on rank 0
            alone, so it must not communicate with other processes.
    """
    trainer: Any = owner if isinstance(owner, Trainer) else getattr(owner, "_trainer", None)
    if trainer is None or not trainer.is_global_zero:
        return
    senders: list[tuple[str, Callable[[Figure], None]]] = []
    for logger in trainer.loggers:
        with only_warn(f"figure {name} in {type(logger).__name__}"):
            if (sender := _sender(logger, name, _step(trainer))) is not None:
                senders.append((type(logger).__name__, sender))
    if not senders:
        return
    with only_warn(f"figure {name}"):
        figure = draw()
        for logger_name, send in senders:
            with only_warn(f"figure {name} in {logger_name}"):
                send(figure)
        plt.close(figure)


def _step(trainer: Any) -> int:
    """Return the current step; of an evaluation that has none, the step at which its metrics are logged."""
    return int(trainer.global_step or trainer.fit_loop.epoch_loop._batches_that_stepped)


def _sender(logger: Any, name: str, step: int) -> Callable[[Figure], None] | None:
    """Return a function that sends a figure to a logger, None if the logger takes no figures."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        return lambda figure: experiment.add_figure(name, figure, step)
    if hasattr(logger, "log_image"):  # Weights & Biases
        return lambda figure: logger.log_image(key=name, images=[_to_image(figure)], step=step)
    if hasattr(experiment, "log_figure"):
        if hasattr(logger, "run_id"):  # MLflow
            return lambda figure: experiment.log_figure(logger.run_id, figure, f"{name}_step_{step}.png")
        return lambda figure: experiment.log_figure(figure_name=name, figure=figure, step=step)  # Comet
    if type(experiment).__module__.startswith("neptune"):
        return lambda figure: experiment[name].append(figure, step=step)
    return None


def _to_image(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)
