"""Samples as small pictures inside the page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from kd_lightning.data.datamodule import SemiSupervisedDataModule
from kd_lightning.data.sources.images import read_image
from kd_lightning.data.sources.items import picture_of
from kd_lightning.errors import InputError
from kd_lightning.runs.figures.contact_sheet import picture_values

_SIDE = 176  # pixels of the longer side
_SMALL = 64  # a picture up to this side is stored without loss, and shown with hard pixels


def test_picture(data: SemiSupervisedDataModule, index: int) -> str | None:
    """Return a picture of the test part as a data URI; None if the sample is no picture or cannot be read."""
    test = data.samples.parts.test
    return None if test is None else _encode(lambda: picture_of(read_image([test.images], index)))


def training_picture(data: SemiSupervisedDataModule, index: int) -> str | None:
    """Return a picture of training as a data URI; None if the sample is no picture or cannot be read."""
    return _encode(lambda: data.image(index))


def is_small(uri: str) -> bool:
    """Whether a picture is so small that it is shown with hard pixels."""
    return uri.startswith("data:image/png")


def _encode(read: Any) -> str | None:
    try:
        values = picture_values(read())
    except InputError:
        return None
    image = Image.fromarray(np.round(255 * values).astype(np.uint8))
    image = image.convert("RGB") if image.mode == "RGBA" else image
    small = max(image.size) <= _SMALL
    if not small:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 80}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
