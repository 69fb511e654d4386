"""Codecs: they turn logits or features into rows of bytes, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kd_lightning.errors import InputError

Bytes = np.ndarray[Any, Any]  # of uint8
_MOST = 2**25  # logits that are sorted at a time: their copies take a few times as much memory


class Codec(Protocol):
    """Turns logits (B, C) into rows of bytes, and back.

    Attributes:
        name: Identifies the codec and its settings.
        dtype: Type of the stored values.
        row_bytes: Bytes of one row.
    """

    name: str
    dtype: torch.dtype
    row_bytes: int

    def encode(self, logits: Tensor) -> Bytes | None:
        """Return rows (B, row_bytes), or None if a finite logit is too large for them."""

    def decode(self, rows: Tensor) -> Tensor:
        """Return logits (B, C) in float32, on the device of the rows (B, row_bytes), which are uint8."""


class DenseCodec:
    """Stores every logit, or every value of a feature.

    Args:
        classes: C.
        dtype: ``"float16"`` or ``"float32"``.
    """

    def __init__(self, classes: int, dtype: str) -> None:
        self.name = f"{dtype} logits of {classes} classes"
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.value = np.dtype(dtype).newbyteorder("<")
        self.row_bytes = classes * self.value.itemsize

    def encode(self, logits: Tensor) -> Bytes | None:
        """Return rows (B, row_bytes), or None if a finite logit is too large for them."""
        values = _cast(logits.float().cpu(), self.value)
        return None if values is None else values.view(np.uint8)

    def decode(self, rows: Tensor) -> Tensor:
        """Return logits (B, C) in float32, on the device of the rows (B, row_bytes), which are uint8."""
        return rows.view(self.dtype).float()


class TopKCodec:
    """Stores the k largest logits and their classes. The other classes share the rest of the probability evenly.

    Outputs that are none of the student's classes do not count: they are not stored, and have no share.

    At temperature 1 the probabilities of the k classes are exact, and so is the sum of the others. At T > 1 the sum of
    the others is too large (Jensen's inequality), the more so the more their logits differ.

    Args:
        classes: C.
        dtype: ``"float16"`` or ``"float32"``.
        k: Number of logits to store, at least 1 and below the number of outputs that count.
        kept: Numbers of the outputs that count. Logits of others are minus infinity when they are read. Default: None,
            which means all.

    Raises:
        InputError: If k is out of range.
    """

    def __init__(self, classes: int, dtype: str, k: int, kept: Sequence[int] | None = None) -> None:
        count = classes if kept is None else len(kept)
        if not 1 <= k < count:
            raise InputError(f"cache_top_k must be at least 1 and below the number of classes, {count}, got {k}")
        self.name = f"{dtype} logits of the {k} likeliest of {classes} classes"
        self.name += "" if kept is None else f", among {[*kept]}"
        self.classes = classes
        self.kept = None if kept is None else torch.tensor(kept)
        self.k = k
        self.dtype: torch.dtype = getattr(torch, dtype)
        value = np.dtype(dtype).newbyteorder("<")
        self.record = np.dtype([("values", value, (k,)), ("rest", value), ("classes", "<u4", (k,))])
        self.row_bytes = self.record.itemsize

    def encode(self, logits: Tensor) -> Bytes | None:
        """Return rows (B, row_bytes), or None if a finite logit is too large for them. It sorts on their device."""
        parts = [self._largest(some) for some in torch.split(logits, max(1, _MOST // self.classes))]
        values = _cast(torch.cat([part for part, _ in parts]), self.record["rest"])
        if values is None:
            return None
        rows = np.empty(len(values), self.record)
        rows["values"], rows["rest"] = values[:, :-1], values[:, -1]
        rows["classes"] = torch.cat([classes for _, classes in parts]).numpy()
        return rows.view(np.uint8).reshape(len(rows), -1)

    def _largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest logits and the rest (B, k + 1), and the classes (B, k), on the CPU."""
        kept = None if self.kept is None else self.kept.to(logits.device)
        logits = logits.float() if kept is None else logits.float()[:, kept]
        top, classes = logits.topk(self.k, dim=1)
        rest = logits.scatter(1, classes, -torch.inf).logsumexp(dim=1) - np.log(logits.shape[1] - self.k)
        classes = classes if kept is None else kept[classes]
        return torch.cat([top, rest[:, None]], dim=1).cpu(), classes.cpu()

    def decode(self, rows: Tensor) -> Tensor:
        """Return logits (B, C) in float32, on the device of the rows (B, row_bytes), which are uint8."""
        split = (self.k + 1) * self.dtype.itemsize
        values, classes = (
            part.clone(memory_format=torch.contiguous_format) for part in (rows[:, :split], rows[:, split:])
        )
        numbers, places = values.view(self.dtype).float(), classes.view(torch.int32).long()
        logits = numbers[:, self.k :].repeat(1, self.classes)
        if self.kept is not None:
            kept = self.kept.to(rows.device)
            logits = torch.full_like(logits, -torch.inf).index_copy_(1, kept, logits[:, kept])
        return logits.scatter_(1, places, numbers[:, : self.k])


def _cast(values: Tensor, dtype: np.dtype[Any]) -> Bytes | None:
    """Cast values to the type, or return None if a finite one is too large for it."""
    finite = values.abs().where(values.isfinite(), 0)
    if finite.numel() and float(finite.max()) > float(np.finfo(dtype).max):
        return None
    return np.ascontiguousarray(values.numpy().astype(dtype))
