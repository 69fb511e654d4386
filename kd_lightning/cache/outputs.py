"""A teacher's stored outputs, each with hashes of the inputs that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lightning.cache.codecs import Bytes
from kd_lightning.cache.row_format import HASH_BYTES, RowFormat
from kd_lightning.cache.store import OutputCache
from kd_lightning.cache.tensors import Hashes, Lengths
from kd_lightning.teacher_outputs import TeacherOutputs


@dataclass(frozen=True)
class OutputRows:
    """Some rows of a table.

    Attributes:
        views: (B,) hash of each view as the dataset returns it.
        inputs: (B,) hash of each input as the teacher gets it: after the batch hooks, in the training's precision.
        logits: (B, ...) logits, as the network returned them. None if they are not needed.
        features: (B, ...) outputs of layers by their dotted path.
        lengths: (B,) lengths of the token sequences. None if all logits have one shape.
        tokens: Number of tokens of the inputs, padding included. None if the inputs have no ``attention_mask``.
    """

    views: Hashes
    inputs: Hashes
    logits: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    lengths: Lengths | None = None
    tokens: int | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        """All tensors, by the names of :attr:`RowFormat.parts`."""
        features = {f"layer {name}": feature for name, feature in self.features.items()}
        return features if self.logits is None else {**features, "logits": self.logits}

    def cpu(self) -> OutputRows:
        """Return the rows on the CPU."""
        logits = None if self.logits is None else self.logits.cpu()
        return replace(self, logits=logits, features={name: part.cpu() for name, part in self.features.items()})

    def row(self, number: int) -> OutputRows:
        """Return one row, as a table of one."""
        rows = slice(number, number + 1)
        return OutputRows(
            self.views[rows],
            self.inputs[rows],
            None if self.logits is None else self.logits[rows],
            {name: feature[rows] for name, feature in self.features.items()},
            None if self.lengths is None else self.lengths[rows],
            self.tokens,
        )


@dataclass(frozen=True)
class PackedRows:
    """Some rows of a table as they are stored.

    Attributes:
        packed: (B, bytes), uint8, with the hashes.
    """

    packed: Bytes

    @property
    def views(self) -> Hashes:
        """(B,) hashes, see :class:`OutputRows`."""
        return self._hashes[:, 0]

    @property
    def inputs(self) -> Hashes:
        """(B,) hashes, see :class:`OutputRows`."""
        return self._hashes[:, 1]

    @property
    def _hashes(self) -> Hashes:
        return np.ascontiguousarray(self.packed[:, :HASH_BYTES]).view("<u8").astype(np.uint64)


class PackedOutputs(TeacherOutputs):
    """Stored outputs of teachers as they are stored: they have their own size and type only where they are used.

    Args:
        outputs: Rows (B, bytes), uint8, by the teacher's name.
        formats: What they hold, by the teacher's name.
        kwargs: Other arguments of ``TeacherOutputs``.
    """

    def __init__(self, outputs: Mapping[str, Tensor], formats: Mapping[str, RowFormat], **kwargs: Any) -> None:
        super().__init__(outputs, **kwargs)
        self.formats = {**formats}

    def logits(self, name: str) -> Tensor | None:
        """Return the stored logits of a teacher; None if there are none."""
        return self.formats[name].logits_of(self.outputs[name]) if name in self.formats else None

    def features(self, name: str, layers: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return stored features of a teacher; None unless all of these layers are stored.

        Args:
            name: Name of the teacher.
            layers: How each layer is pooled, by its dotted path.
        """
        return self.formats[name].features_of(self.outputs[name], layers) if name in self.formats else None

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedOutputs:
        """Return a copy with all tensors changed."""
        plain = super().map(change)
        return PackedOutputs(
            plain.outputs,
            self.formats,
            sources=plain.sources,
            inputs=plain.inputs,
            changed=plain.changed,
            of_images=plain.of_images,
        )


class StoredOutputs:
    """Outputs of a teacher for a table of views. Any process can read them; a copy is small.

    Args:
        cache: The table on disk.
        format: What its rows hold.
    """

    def __init__(self, cache: OutputCache, format: RowFormat) -> None:
        self.cache = cache
        self.format = format

    @property
    def folder(self) -> Path:
        """The folder of the table."""
        return self.cache.folder

    def encode(self, rows: OutputRows) -> Bytes | list[Bytes] | None:
        """Return rows of bytes, or None if a finite output is too large for the format.

        Raises:
            InputError: If outputs have another shape than the others.
        """
        self.format.check_tokens(rows.tokens)
        encoded = self.format.encode(rows.parts)
        if encoded is None:
            return None
        hashes = np.stack([rows.views, rows.inputs], axis=1).astype("<u8")
        table = np.concatenate([hashes.view(np.uint8), encoded], axis=1)
        if rows.lengths is None or self.format.logits is None:
            return table
        sizes = (self.format.fixed_bytes + rows.lengths * self.format.logits.codec.row_bytes).tolist()
        return [row[:size] for row, size in zip(table, sizes, strict=True)]

    def read_packed(self, numbers: np.ndarray[Any, Any], tokens: int | None = None) -> PackedRows:
        """Read rows by their numbers (B,).

        Args:
            numbers: The numbers.
            tokens: Number of tokens of the batch, to which logits of ragged rows are padded with zeros. Default: None,
                which means that of the longest row.

        Raises:
            InputError: If a file is gone or too short; if features are stored for another number of tokens.
        """
        self.format.check_tokens(tokens)
        return self._read(numbers, tokens)

    def read(self, numbers: np.ndarray[Any, Any], length: int | None = None) -> OutputRows:
        """Read rows, and unpack them. Logits of ragged rows get ``length`` tokens, or those of the longest row."""
        return self._unpacked(self._read(numbers, length))

    def _read(self, numbers: np.ndarray[Any, Any], tokens: int | None) -> PackedRows:
        return PackedRows(self._padded(numbers, tokens) if self.cache.ragged else self.cache.read(numbers))

    def rounded(self, rows: OutputRows) -> OutputRows | None:
        """Return rows as they are when they were stored and read, or None if a value is too large for the format."""
        encoded = self.encode(rows)
        return None if encoded is None else self._unpacked(PackedRows(np.stack([*encoded])))

    def _unpacked(self, rows: PackedRows) -> OutputRows:
        packed = torch.from_numpy(rows.packed)
        layers = {name: part.pool for name, part in self.format.features.items()}
        features = self.format.features_of(packed, layers) or {}
        return OutputRows(rows.views, rows.inputs, self.format.logits_of(packed), features)

    def _padded(self, numbers: np.ndarray[Any, Any], tokens: int | None) -> Bytes:
        """Read ragged rows, and bring them to one length."""
        found, logits = self.cache.read_ragged(numbers), self.format.logits
        size = max((len(row) for row in found), default=self.format.fixed_bytes)
        if tokens is not None and logits is not None:
            size = self.format.fixed_bytes + tokens * logits.codec.row_bytes
        rows = np.zeros((len(found), size), np.uint8)
        for row, data in zip(rows, found, strict=True):
            row[: len(data)] = data[:size]  # a batch that is shorter than a row is another one, see its hash
        return rows
