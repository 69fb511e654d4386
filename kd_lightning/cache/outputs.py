"""A teacher's stored outputs, each with hashes of the inputs that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lightning.batch import TeacherOutputs
from kd_lightning.cache.codecs import Bytes, Codec, TopKCodec
from kd_lightning.cache.store import OutputCache
from kd_lightning.cache.tensors import Hashes, Lengths
from kd_lightning.errors import InputError

HASH_BYTES = 16  # of both hashes


@dataclass(frozen=True)
class OutputRows:
    """Some rows of a table.

    Attributes:
        views: (B,) hash of each view as the dataset returns it.
        inputs: (B,) hash of each input as the teacher gets it: after the batch hooks, in the training's precision.
        outputs: (B, ...) outputs, as the network returned them.
        lengths: (B,) lengths of the token sequences. None if all outputs have one shape.
    """

    views: Hashes
    inputs: Hashes
    outputs: Tensor
    lengths: Lengths | None = None

    def row(self, number: int) -> OutputRows:
        """Return one row, as a table of one."""
        rows = slice(number, number + 1)
        lengths = None if self.lengths is None else self.lengths[rows]
        return OutputRows(self.views[rows], self.inputs[rows], self.outputs[rows], lengths)


@dataclass(frozen=True)
class Unpack:
    """Turns packed outputs (B, bytes) of a top-k codec into outputs (B, ...), on their device.

    Attributes:
        codec: The codec of each position.
        shape: Shape of one output; of tokens its length does not count.
        dtype: Type of the outputs.
        class_dim: Dimension of the outputs (B, ...) that holds classes.
    """

    codec: TopKCodec
    shape: torch.Size
    dtype: torch.dtype
    class_dim: int

    def __call__(self, packed: Tensor) -> Tensor:
        """Return the outputs."""
        rows = self.codec.unpack(packed.reshape(-1, self.codec.row_bytes)).to(self.dtype)
        positions = [size for dim, size in enumerate(self.shape, 1) if dim != self.class_dim]
        positions = positions if len(positions) > 1 else [-1]  # tokens: those of the batch
        return rows.reshape(len(packed), *positions, rows.shape[1]).movedim(-1, self.class_dim)


class PackedOutputs(TeacherOutputs):
    """Stored outputs of teachers, some of them packed: a large vocabulary is whole only where it is used.

    Args:
        outputs: See :class:`~kd_lightning.batch.TeacherOutputs`. Packed ones are (B, bytes), uint8.
        unpack: What unpacks them, by the teacher's name.
        kwargs: Other arguments of ``TeacherOutputs``.
    """

    def __init__(self, outputs: Mapping[str, Tensor], unpack: Mapping[str, Unpack], **kwargs: Any) -> None:
        super().__init__(outputs, **kwargs)
        self.unpack = {**unpack}

    def __getitem__(self, name: str) -> Tensor:
        outputs = self.outputs[name]
        return self.unpack[name](outputs) if name in self.unpack else outputs

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedOutputs:
        """Return a copy with all tensors changed."""
        plain = super().map(change)
        return PackedOutputs(
            plain.outputs,
            self.unpack,
            sources=plain.sources,
            inputs=plain.inputs,
            changed=plain.changed,
            of_images=plain.of_images,
        )


class StoredOutputs:
    """Outputs of a teacher for a table of views. Any process can read them; a copy is small.

    Args:
        cache: The table on disk. Its rows have ``HASH_BYTES`` more bytes than the codec's, or than those of all
            positions. If it is ragged, outputs are tokens, and each row has the length of its own sequence.
        codec: Codec of the outputs, or of each position.
        shape: Shape of one output.
        dtype: Type of the outputs that the network returns.
        class_dim: Dimension of the outputs (B, ...) that holds classes, if the codec is for each position. Default:
            None, which means that it is for whole outputs.
    """

    def __init__(
        self, cache: OutputCache, codec: Codec, shape: torch.Size, dtype: torch.dtype, class_dim: int | None = None
    ) -> None:
        self.cache = cache
        self.codec = codec
        self.shape = shape
        self.dtype = dtype
        self.class_dim = class_dim

    @property
    def folder(self) -> Path:
        """The folder of the table."""
        return self.cache.folder

    @property
    def unpack(self) -> Unpack | None:
        """What unpacks the outputs of :meth:`read_packed`; None if they are not packed."""
        if self.class_dim is None or not isinstance(self.codec, TopKCodec):
            return None
        return Unpack(self.codec, self.shape, self.dtype, self.class_dim)

    def encode(self, rows: OutputRows) -> Bytes | list[Bytes] | None:
        """Return rows of bytes, or None if a finite output is too large for the codec.

        Raises:
            InputError: If outputs have another shape than the others.
        """
        self._check(rows)
        outputs = rows.outputs if self.class_dim is None else rows.outputs.movedim(self.class_dim, -1)
        flat = outputs.reshape(len(outputs), -1) if self.class_dim is None else outputs.flatten(0, -2)
        encoded = self.codec.encode(flat)
        if encoded is None:
            return None
        hashes = np.stack([rows.views, rows.inputs], axis=1).astype("<u8")
        table = np.concatenate([hashes.view(np.uint8), encoded.reshape(len(outputs), -1)], axis=1)
        if rows.lengths is None:
            return table
        sizes = (HASH_BYTES + rows.lengths * self.codec.row_bytes).tolist()
        return [row[:size] for row, size in zip(table, sizes, strict=True)]

    def _check(self, rows: OutputRows) -> None:
        found, wanted = [*rows.outputs.shape[1:]], [*self.shape]
        if rows.lengths is not None and self.class_dim is not None and len(found) == len(wanted):
            place = 2 - self.class_dim  # of the tokens, in (T, C) or (C, T)
            wanted[place] = found[place]  # a length of its own
        if found != wanted:
            raise InputError(
                f"cache: outputs of the teacher must have one shape for all samples, got {wanted} and {found}; tokens "
                "may have lengths of their own if the module has class_dim and the inputs attention_mask"
            )

    def read(self, numbers: np.ndarray[Any, Any], length: int | None = None) -> OutputRows:
        """Read rows by their numbers (B,).

        Args:
            numbers: The numbers.
            length: Number of tokens of the batch, to which outputs of ragged rows are padded with zeros. Default: None,
                which means that of the longest row.
        """
        return self._decoded(self._read(numbers, length))

    def read_packed(self, numbers: np.ndarray[Any, Any], length: int | None = None) -> OutputRows:
        """Read rows as :meth:`read` does, but leave the outputs of a top-k codec for positions packed."""
        return self._decoded(self._read(numbers, length), packed=True)

    def _read(self, numbers: np.ndarray[Any, Any], length: int | None) -> Bytes:
        return self._padded(numbers, length) if self.cache.ragged else self.cache.read(numbers)

    def _decoded(self, rows: Bytes, packed: bool = False) -> OutputRows:
        """Return rows of bytes, all of one length, as outputs; those of a top-k codec for positions if ``packed``."""
        hashes = np.ascontiguousarray(rows[:, :HASH_BYTES]).view("<u8").astype(np.uint64)
        data, unpack = np.ascontiguousarray(rows[:, HASH_BYTES:]), self.unpack
        if unpack is not None:
            outputs = torch.from_numpy(data) if packed else unpack(torch.from_numpy(data))
        elif self.class_dim is None:
            outputs = self.codec.decode(data).reshape(len(rows), *self.shape).to(self.dtype)
        else:
            outputs = self.codec.decode(data.reshape(-1, self.codec.row_bytes))
            outputs = outputs.reshape(len(rows), -1, outputs.shape[1]).movedim(-1, self.class_dim).to(self.dtype)
        return OutputRows(hashes[:, 0], hashes[:, 1], outputs)

    def rounded(self, rows: OutputRows) -> Tensor | None:
        """Return outputs as they are when they were stored and read, or None if one is too large for the codec."""
        encoded = self.encode(rows)
        if encoded is None:
            return None
        return self._decoded(np.stack([*encoded])).outputs

    def _padded(self, numbers: np.ndarray[Any, Any], length: int | None) -> Bytes:
        """Read ragged rows, and bring them to one length."""
        found = self.cache.read_ragged(numbers)
        size = max((len(row) for row in found), default=HASH_BYTES)
        size = size if length is None else HASH_BYTES + length * self.codec.row_bytes
        rows = np.zeros((len(found), size), np.uint8)
        for row, data in zip(rows, found, strict=True):
            row[: len(data)] = data[:size]  # a batch that is shorter than a row is another one, see its hash
        return rows
