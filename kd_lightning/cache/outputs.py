"""A teacher's stored outputs, each with hashes of the inputs that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lightning.cache.codecs import Bytes, Codec
from kd_lightning.cache.store import OutputCache
from kd_lightning.cache.tensors import Hashes

HASH_BYTES = 16  # of both hashes


@dataclass(frozen=True)
class OutputRows:
    """Some rows of a table.

    Attributes:
        views: (B,) hash of each view as the dataset returns it.
        inputs: (B,) hash of each input as the teacher gets it: after the batch hooks, in the training's precision.
        outputs: (B, ...) outputs, as the network returned them.
    """

    views: Hashes
    inputs: Hashes
    outputs: Tensor


class StoredOutputs:
    """Outputs of a teacher for a table of views. Any process can read them; a copy is small.

    Args:
        cache: The table on disk. Its rows have ``HASH_BYTES`` more bytes than the codec's.
        codec: Codec of the outputs.
        shape: Shape of one output.
        dtype: Type of the outputs that the network returns.
    """

    def __init__(self, cache: OutputCache, codec: Codec, shape: torch.Size, dtype: torch.dtype) -> None:
        self.cache = cache
        self.codec = codec
        self.shape = shape
        self.dtype = dtype

    @property
    def folder(self) -> Path:
        """The folder of the table."""
        return self.cache.folder

    def encode(self, rows: OutputRows) -> Bytes | None:
        """Return rows of bytes, or None if a finite output is too large for the codec."""
        outputs = self.codec.encode(rows.outputs.float().reshape(len(rows.outputs), -1))
        if outputs is None:
            return None
        hashes = np.stack([rows.views, rows.inputs], axis=1).astype("<u8")
        return np.concatenate([hashes.view(np.uint8), outputs], axis=1)

    def read(self, numbers: np.ndarray[Any, Any]) -> OutputRows:
        """Read rows by their numbers (B,)."""
        rows = self.cache.read(numbers)
        hashes = np.ascontiguousarray(rows[:, :HASH_BYTES]).view("<u8").astype(np.uint64)
        outputs = self.codec.decode(np.ascontiguousarray(rows[:, HASH_BYTES:]))
        return OutputRows(hashes[:, 0], hashes[:, 1], outputs.reshape(len(rows), *self.shape).to(self.dtype))
