"""Codecs: how logits become rows of bytes, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kd_lightning.errors import InputError

if TYPE_CHECKING:
    pass

Bytes = np.ndarray[Any, Any]


class Format(Protocol):
    """How logits (B, C) become rows of bytes, and back."""

    name: str
    row_bytes: int

    def encode(self, logits: Tensor) -> Bytes | None:
        """Rows (B, row_bytes); None where a finite logit is too large."""

    def decode(self, rows: Bytes) -> Tensor:
        """Logits (B, C), float32."""


class DenseCodec:
    """Every logit, in float16 or float32."""

    def __init__(self, classes: int, dtype: str) -> None:
        self.name = f"{dtype} logits of {classes} classes"
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.row_bytes = classes * self.dtype.itemsize

    def encode(self, logits: Tensor) -> Bytes | None:
        """Rows (B, row_bytes); None where a finite logit is too large."""
        values = _fitting(logits.float(), self.dtype)
        return None if values is None else values.view(np.uint8)

    def decode(self, rows: Bytes) -> Tensor:
        """Logits (B, C), float32."""
        return torch.from_numpy(rows.view(self.dtype).astype(np.float32, copy=False))


class TopKCodec:
    """The k largest logits and their classes; the rest share their probability evenly among them.

    So probabilities at temperature 1 are those of the teacher for the k classes, and right in sum for the others. At
    T > 1 what the others have together is too small by Jensen's inequality, the more so the more they differ.
    """

    def __init__(self, classes: int, dtype: str, k: int) -> None:
        if not 1 <= k < classes:
            raise InputError(f"cache_top_k must be at least 1 and below the number of classes, {classes}, got {k}")
        self.name = f"{dtype} logits of the {k} likeliest of {classes} classes"
        self.classes = classes
        self.k = k
        value = np.dtype(dtype).newbyteorder("<")
        self.record = np.dtype([("values", value, (k,)), ("rest", value), ("classes", "<u4", (k,))])
        self.row_bytes = self.record.itemsize

    def encode(self, logits: Tensor) -> Bytes | None:
        """Rows (B, row_bytes); None where a finite logit is too large."""
        logits = logits.float()
        top, classes = logits.topk(self.k, dim=1)
        rest = logits.scatter(1, classes, -torch.inf).logsumexp(dim=1) - np.log(self.classes - self.k)
        values = _fitting(torch.cat([top, rest[:, None]], dim=1), self.record["rest"])
        if values is None:
            return None
        rows = np.empty(len(values), self.record)
        rows["values"], rows["rest"], rows["classes"] = values[:, :-1], values[:, -1], classes.numpy()
        return rows.view(np.uint8).reshape(len(rows), -1)

    def decode(self, rows: Bytes) -> Tensor:
        """Logits (B, C), float32."""
        records = rows.view(self.record).reshape(len(rows))
        rest = torch.from_numpy(records["rest"].astype(np.float32))
        logits = rest[:, None].repeat(1, self.classes)
        classes = torch.from_numpy(records["classes"].astype(np.int64))
        return logits.scatter_(1, classes, torch.from_numpy(records["values"].astype(np.float32)))


def _fitting(values: Tensor, dtype: np.dtype[Any]) -> Bytes | None:
    finite = values.abs().where(values.isfinite(), 0)
    if finite.numel() and float(finite.max()) > float(np.finfo(dtype).max):
        return None
    return np.ascontiguousarray(values.numpy().astype(dtype))
