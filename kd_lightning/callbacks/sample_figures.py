"""Log pictures of samples: as training sees them, and with the outputs of student and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import Tensor

from kd_lightning.batch import Batch, class_labels, unpack
from kd_lightning.runs.figures.contact_sheet import contact_sheet, picture_values
from kd_lightning.runs.figures.log_figure import log_figure, only_warn

_SAMPLES = 6  # on a figure
_EXAMINED = 32  # validation samples of which those are shown on which student and teacher differ most
_CLASSES = 4  # bars of a sample
_STUDENT, _TEACHER = "#0b6bcb", "#9aa5b1"


class SampleFigures(Callback):
    """Log two figures of pictures, once in a fit, to each logger that takes figures.

    - ``samples/augmentation``: samples of the first training batch, each as in the data, as augmented, and in its
      strong view, with the label that training sees.
    - ``samples/teacher_and_student``: at the end of training, the samples of the first validation batch on which
      student and teacher differ most, with both distributions. It needs a module of the multiclass task with
      ``teacher_logits(batch)``, as those of this package, on one device or with DDP.

    Only pictures of 1 or 3 channels are drawn; other data have no figures. A failure is a warning. A resumed fit has no
    second figure of its first batch. Random generators stay as they are.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of a fit. Forgets the samples of an earlier one."""
        self._batch = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Draws samples of the first one."""
        if batch_idx == 0 and trainer.global_step == 0 and trainer.current_epoch == 0 and _draws(trainer):
            with only_warn("figure samples/augmentation"), isolate_rng():
                rows = unpack(pl_module, batch)
                if _is_picture(rows.x) and getattr(pl_module, "class_dim", None) is None:
                    data = getattr(trainer, "datamodule", None)
                    log_figure(trainer, "samples/augmentation", lambda: draw_views(rows, data))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Runs after each validation batch. Stores samples of the first one of the fit."""
        if self._batch is None and batch_idx == dataloader_idx == 0 and _draws(trainer) and _compares(pl_module):
            with only_warn("figure samples/teacher_and_student"):
                rows = unpack(pl_module, batch)
                if _is_picture(rows.x):
                    parts = (rows.x, rows.y, rows.index, rows.teacher_inputs)
                    x, y, index, inputs = (p[:_EXAMINED].cpu() if isinstance(p, Tensor) else None for p in parts)
                    self._batch = Batch(x, y, index, teacher_inputs=inputs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of training. Draws the validation samples with the outputs of student and teacher."""
        batch, self._batch = self._batch, None
        if batch is None or not _draws(trainer) or _is_compiled(pl_module):
            return
        with only_warn("figure samples/teacher_and_student"), isolate_rng():
            student, teacher = _probabilities(trainer, pl_module, batch)
            if teacher is not None and teacher.shape == student.shape:
                names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
                log_figure(trainer, "samples/teacher_and_student", lambda: draw_outputs(batch, student, teacher, names))


def _draws(trainer: Trainer) -> bool:
    plain = type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)  # others shard weights
    quick = getattr(trainer, "fast_dev_run", False) or trainer.sanity_checking
    return trainer.is_global_zero and bool(trainer.loggers) and plain and not quick


def _compares(module: LightningModule) -> bool:
    one_class = getattr(module, "task", None) == "multiclass" and getattr(module, "class_dim", None) is None
    return one_class and callable(getattr(module, "teacher_logits", None)) and hasattr(module, "student")


def _is_picture(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3) and len(x) > 0


def _is_compiled(module: LightningModule) -> bool:
    """Whether another batch size would compile a network anew."""
    parts = list(module.modules())
    return any(getattr(p, "_compiled_call_impl", None) is not None or hasattr(p, "_orig_mod") for p in parts)


@torch.no_grad()
def _probabilities(trainer: Trainer, module: LightningModule, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities (B, C) of student and teacher in evaluation mode; the modes stay as they were."""
    modes = {part: part.training for part in module.modules()}
    batch = batch.map(lambda part: part.to(module.device))
    try:
        module.eval()
        with trainer.precision_plugin.forward_context():
            taught: Any = module.teacher_logits(batch)  # type: ignore[operator]
            if taught is None:
                return torch.empty(0), None
            student: Any = module(batch.x)
    finally:
        for part, mode in modes.items():
            part.training = mode
    return student.float().softmax(dim=-1).cpu(), taught.float().softmax(dim=-1).cpu()


def draw_views(batch: Batch, data: Any) -> Figure:
    """Draw samples of a batch side by side: as in the data, as augmented, and in their strong view.

    Args:
        batch: The batch; its labels are those that training sees.
        data: The datamodule, whose ``image(index)`` and ``class_names`` are used if it has them.
    """
    names = getattr(data, "class_names", None)
    labels = [-100] * len(batch.x) if batch.y is None or batch.y.ndim > 2 else _indices(batch.y)
    known = [row for row, label in enumerate(labels) if label >= 0]
    half = max(_SAMPLES // 2, _SAMPLES - (len(labels) - len(known)))
    shown = known[:half] + [row for row, label in enumerate(labels) if label < 0]
    images, captions, strong = [], [], _is_picture(batch.x_strong)
    for row in shown[:_SAMPLES]:
        head = f"label {_name(names, labels[row])}" if labels[row] >= 0 else "no label"
        if batch.partner is not None:
            head = f"mixed, {head}"
        view = f"view {int(batch.view[row])}" if batch.view is not None else "as augmented"
        if batch.index is not None and callable(getattr(data, "image", None)):
            images.append(data.image(int(batch.index[row])))
            captions.append(f"{head}\nas in the data")
        images.append(batch.x[row].detach())
        captions.append(f"{head}\n{view}")
        if strong:
            images.append(batch.x_strong[row].detach())
            captions.append(f"{head}\nstrong view")
    each = len(images) // min(_SAMPLES, len(shown))
    return contact_sheet(images, captions, columns=each * (6 // each), title="The first training batch")


def draw_outputs(batch: Batch, student: Tensor, teacher: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Draw the samples on which student and teacher differ most, with both distributions.

    Args:
        batch: B validation samples, pictures.
        student: Probabilities of the student, (B, C).
        teacher: Those of the teacher, (B, C).
        names: Names of the classes.
    """
    order = (student - teacher).abs().sum(dim=1).argsort(descending=True, stable=True)[:_SAMPLES].tolist()
    labels = [-100] * len(batch.x) if batch.y is None else _indices(batch.y)
    with mpl.rc_context({"text.parse_math": False, "font.size": 8.5}):
        figure = Figure(figsize=(10, 0.6 + 1.75 * ((len(order) + 1) // 2)), layout="constrained")
        panels = figure.subplots((len(order) + 1) // 2, 4, squeeze=False, width_ratios=(1, 1.6, 1, 1.6)).flat
        for row, picture, bars in zip(order, panels, panels, strict=False):
            picture.imshow(picture_values(batch.x[row]), cmap="gray", vmin=0, vmax=1)
            picture.set(xticks=[], yticks=[])
            title = f"label {_name(names, labels[row])}" if labels[row] >= 0 else "no label"
            picture.set_title(title, fontsize=9, fontweight="bold")
            classes = torch.maximum(student[row], teacher[row]).topk(min(_CLASSES, student.shape[1])).indices.tolist()
            places = range(len(classes))
            for shift, color, who, values in (
                (-0.2, _TEACHER, "teacher", teacher),
                (0.2, _STUDENT, "student", student),
            ):
                shares = [100 * float(values[row, number]) for number in classes]
                bars.barh([place + shift for place in places], shares, 0.38, color=color, label=who)
            bars.set_yticks(places, [_short(_name(names, number)) for number in classes])
            bars.set(xlim=(0, 100), ylim=(len(classes) - 0.5, -0.5), xticks=[0, 50, 100])
            bars.spines[["top", "right"]].set_visible(False)
            bars.tick_params(length=0)
        for panel in figure.axes[2 * len(order) :]:
            panel.remove()
        figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False)
        title = f"The {len(order)} of {len(batch.x)} validation samples on which student and teacher differ most (%)"
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def _indices(y: Tensor) -> list[int]:
    labels = class_labels(y)
    return [-100] * len(y) if labels.ndim != 1 else [int(value) if value == value else -100 for value in labels]


def _name(names: Sequence[str] | None, number: int) -> str:
    return str(names[number]) if names is not None and number < len(names) else str(number)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
