"""Contact sheets: many small images on one figure, with captions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from PIL import Image

from kd_lightning.errors import InputError

_LINE_LENGTH = 20  # of a caption, in letters


def contact_sheet(images: Sequence[Any], captions: Sequence[str], columns: int = 6, title: str | None = None) -> Figure:
    """Put images on a figure, row by row.

    Args:
        images: PIL images, tensors or arrays, (H, W) or (C, H, W), of any size and number type. Three channels are
            RGB, four RGBA; of any other number of channels the first is shown. Values of uint8 lie in [0, 255]. If
            values of another type lie outside [0, 1], the image is scaled to its own range. Arrays may be (H, W, C).
        captions: One text for each image, shown below it.
        columns: Images in a row, at least 1.
        title: Text above all images. If None, there is no title.

    Raises:
        InputError: If there are no images, if the number of captions differs, or for a value that is no image.

    >>> sheet = contact_sheet([torch.rand(3, 8, 8), torch.rand(1, 4, 6)], ["a tench", "a digit"])
    >>> len(sheet.axes)
    2
    """
    if not images or len(captions) != len(images):
        raise InputError(f"images: at least one, each with a caption; got {len(images)}, and {len(captions)} captions")
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    texts = [_wrap(caption) for caption in captions]
    lines = max(text.count("\n") + 1 for text in texts)
    sheet = Figure(
        figsize=(1.5 * columns, (1.4 + 0.13 * lines) * rows + 0.3 * (title is not None)), layout="constrained"
    )
    panels = sheet.subplots(rows, columns, squeeze=False).flat
    for image, text, panel in zip(images, texts, panels, strict=False):  # zip takes no panel beyond the last image
        panel.imshow(picture_values(image), cmap="gray", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel(text, fontsize=7, parse_math=False)  # the name of a class may be $
    for panel in list(panels):
        panel.remove()
    if title is not None:
        sheet.suptitle(title, fontsize=9, parse_math=False)
    return sheet


def write_contact_sheet(out: Path, images: Sequence[Any], captions: Sequence[str], title: str) -> bool:
    """Write a contact sheet of the samples that are pictures, and print a line about those that are none.

    Args:
        out: The file, whose suffix is the format. If no sample is a picture, an older file is deleted.
        images: Samples of any kind; pictures are those that :func:`contact_sheet` takes.
        captions: One text for each sample.
        title: Text above all images.

    Returns:
        Whether there is a sheet.

    Raises:
        ValueError: For a suffix that no format has.
    """
    shown, others = [], []
    for image, caption in zip(images, captions, strict=True):
        try:
            _values(image)
            shown.append((image, caption))
        except InputError as error:
            others.append(str(error))
    if others:
        what = f"{len(others)} samples are left out of" if shown else "there is no"
        print(f"{what} contact sheet{f' {out}' if shown else ''}, since samples are no pictures: {others[0]}")
    if not shown:
        out.unlink(missing_ok=True)
        return False
    sheet = contact_sheet([image for image, _ in shown], [caption for _, caption in shown], title=title)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(out, dpi=120)
    return True


def _wrap(caption: str) -> str:
    lines = [line for text in caption.splitlines() for line in textwrap.wrap(text, _LINE_LENGTH) or [""]]
    return "\n".join(lines)


def picture_values(image: Any) -> npt.NDArray[np.float32]:
    """Return the values of a picture of any kind, (H, W), (H, W, 3) or (H, W, 4), in [0, 1]; InputError if it is none."""
    return _stretch(_values(image))


def _values(image: Any) -> npt.NDArray[Any]:
    """Return the values of a picture, (H, W), (H, W, 3) or (H, W, 4); an InputError for anything else."""
    if isinstance(image, Image.Image):
        return _of_pil(image)
    if isinstance(image, torch.Tensor) and image.layout == torch.strided and not image.is_complex():
        image = image.detach().cpu()
        values = image.float().numpy() if image.is_floating_point() else image.numpy()  # NumPy has no bfloat16
    elif isinstance(image, np.ndarray) and image.dtype.kind in "biuf":
        values = image
        if values.ndim == 3 and values.shape[2] in (1, 3, 4) and values.shape[0] not in (1, 3, 4):
            values = values.transpose(2, 0, 1)
    else:
        kind = f"{type(image).__name__} of {image.dtype}" if hasattr(image, "dtype") else type(image).__name__
        raise InputError(f"images must be PIL images, tensors or arrays of numbers, got {kind}")
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise InputError(f"an image must have shape (H, W) or (C, H, W), got {tuple(values.shape)}")
    if values.ndim == 3:
        values = values.transpose(1, 2, 0) if len(values) in (3, 4) else values[0]
    return np.asarray(values)


def _of_pil(image: Image.Image) -> npt.NDArray[Any]:
    mode = image.mode
    if mode.startswith("I") or mode in ("F", "L", "RGB", "RGBA"):  # 16 and 32 bits have other ranges
        return np.asarray(image)
    return np.asarray(image.convert("L" if mode == "1" else "RGBA" if mode in ("P", "PA", "LA") else "RGB"))


def _stretch(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Scale values to [0, 1] if they exceed it; not-a-number becomes the lowest value."""
    if values.dtype == np.uint8:
        return (values / 255).astype(np.float32)
    values = values.astype(np.float64)
    low, high = _range(values)
    if low < 0 or high > 1:
        values = values[..., :3] if values.ndim == 3 else values  # a normalised alpha channel has no meaning
        low, high = _range(values)
        values = (values - low) / (high - low or 1.0)
        low, high = 0.0, 1.0
    return np.nan_to_num(values.astype(np.float32), nan=low, posinf=high, neginf=low)


def _range(values: npt.NDArray[Any]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
