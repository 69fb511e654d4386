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

_HEAD_WIDTH, _TEXT_WIDTH = 22, 26  # letters in a line of a caption: of its first line, of the others
_MOST_LINES = 4  # of each line of a caption, if it is wrapped
_PANEL = 1.75  # inches
_TITLE_WIDTH = 20  # letters of the title above one column


def contact_sheet(
    images: Sequence[Any] | torch.Tensor, captions: Sequence[str], columns: int = 6, title: str | None = None
) -> Figure:
    """Put images on a figure, row by row.

    Args:
        images: PIL images, tensors or arrays, (H, W) or (C, H, W), of any size and number type, or a batch of them in
            one tensor or array. Three channels are RGB, four RGBA; of any other number of channels the first is shown.
            Values of uint8 lie in [0, 255]. If values of another type lie outside [0, 1], the image is scaled to its
            own range. Arrays may be (H, W, C).
        captions: One text for each image. Its first line stands above the image in bold, all others below it.
        columns: Images in a row, at least 1.
        title: Text above all images. If None, there is no title.

    Raises:
        InputError: If there are no images, if the number of captions differs, or for a value that is no image.

    >>> sheet = contact_sheet([torch.rand(3, 8, 8), torch.rand(1, 4, 6)], ["a tench", "a digit"])
    >>> len(sheet.axes)
    2
    """
    if len(images) == 0 or len(captions) != len(images):
        raise InputError(f"images: at least one, each with a caption; got {len(images)}, and {len(captions)} captions")
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    heads, texts = zip(*map(_wrap, captions), strict=True)
    lines = [max(text.count("\n") + bool(text) for text in part) for part in (heads, texts)]
    title = None if title is None else textwrap.fill(title, _TITLE_WIDTH * columns)  # else its end is cut off
    head = 0.0 if title is None else 0.35 + 0.18 * title.count("\n")
    height = (_PANEL + 0.06 + 0.16 * lines[0] + 0.14 * lines[1]) * rows + head
    sheet = Figure(figsize=(_PANEL * columns, height), layout="constrained")
    panels = sheet.subplots(rows, columns, squeeze=False).flat
    for image, head, text, panel in zip(images, heads, texts, panels, strict=False):  # and no panel beyond the last one
        panel.imshow(picture_values(image), cmap="gray", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_color("#c5ccd3")
        panel.set_title(head, fontsize=8.5, fontweight="bold", pad=3, parse_math=False)  # the name of a class may be $
        panel.set_xlabel(text, fontsize=7.5, color="#3d4852", labelpad=3, parse_math=False)
    for panel in list(panels):
        panel.remove()
    if title is not None:
        sheet.suptitle(title, fontsize=10.5, x=0.01, ha="left", parse_math=False)
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


def sample_name(index: int, path: str | None) -> str:
    """Return the line of a caption that names a sample: its index, and the name of its file if it has one.

    >>> sample_name(3, "photos/cat/a.jpg"), sample_name(3, None)
    ('3: a.jpg', '3')
    """
    name = Path(path or "").name
    return f"{index}: {name}" if name else str(index)


def _wrap(caption: str) -> tuple[str, str]:
    """Return the first line of a caption, and the others."""
    head, *rest = caption.split("\n")
    return _fold(head, _HEAD_WIDTH), "\n".join(_fold(line, _TEXT_WIDTH) for line in rest)


def _fold(line: str, width: int) -> str:
    return textwrap.fill(line, width, max_lines=_MOST_LINES, placeholder=" …")


def picture_values(image: Any) -> npt.NDArray[np.float32]:
    """Return the values of a picture of any kind in [0, 1], (H, W), (H, W, 3) or (H, W, 4); else an InputError."""
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
