"""What a row of stored outputs holds: logits, features of layers, or both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lightning.cache.codecs import Bytes, Codec
from kd_lightning.errors import InputError

HASH_BYTES = 16  # of a row: both hashes of its inputs


@dataclass(frozen=True)
class Part:
    """How one tensor of a row is stored.

    Attributes:
        codec: Codec of the tensor, or of each of its positions.
        shape: Shape of the tensor for one sample; of tokens in their own lengths, the length does not count.
        dtype: Type of the tensor as the network returns it.
        class_dim: Dimension of the tensors (B, ...) that holds classes, if the codec is for each position. None if it
            is for whole tensors.
        pool: How a layer's output was pooled before it is stored; None if it was not.
    """

    codec: Codec
    shape: torch.Size
    dtype: torch.dtype
    class_dim: int | None = None
    pool: Any = None

    @property
    def positions(self) -> list[int]:
        """Sizes of the dimensions that do not hold classes; empty if the codec is for whole tensors."""
        return [] if self.class_dim is None else [n for dim, n in enumerate(self.shape, 1) if dim != self.class_dim]

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return self.codec.row_bytes * math.prod(self.positions)

    def encode(self, values: Tensor) -> Bytes | None:
        """Return rows of bytes of tensors (B, ...), or None if a finite value is too large for them."""
        flat = values.reshape(len(values), -1)
        if self.class_dim is not None:
            flat = values.movedim(self.class_dim, -1).flatten(0, -2)
        encoded = self.codec.encode(flat)
        return None if encoded is None else encoded.reshape(len(values), -1)

    def decode(self, rows: Tensor) -> Tensor:
        """Return the tensors (B, ...) of rows of bytes, on their device."""
        if self.class_dim is None:
            return self.codec.decode(rows).reshape(len(rows), *self.shape).to(self.dtype)
        values = self.codec.decode(rows.reshape(-1, self.codec.row_bytes)).to(self.dtype)
        positions = self.positions if len(self.positions) > 1 else [-1]  # tokens: those of the batch
        return values.reshape(len(rows), *positions, values.shape[1]).movedim(-1, self.class_dim)


@dataclass(frozen=True)
class RowFormat:
    """The parts of a row. They lie one after the other: hashes, features in the order of their names, logits.

    Attributes:
        logits: How logits are stored; None if they are not.
        features: How the output of each layer is stored, by its dotted path.
        ragged: Whether logits are those of token sequences, each in its own length.
        tokens: Number of tokens of all sequences, if a feature has one row for each of them. None if none has.
    """

    logits: Part | None
    features: Mapping[str, Part] = field(default_factory=dict)
    ragged: bool = False
    tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", {name: self.features[name] for name in sorted(self.features)})

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name; that of the logits is ``logits``, that of a layer ``layer <dotted path>``."""
        features = {f"layer {name}": part for name, part in self.features.items()}
        return features if self.logits is None else {**features, "logits": self.logits}

    @property
    def fixed_bytes(self) -> int:
        """Bytes of all of a row but its logits."""
        return HASH_BYTES + sum(part.row_bytes for part in self.features.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; if rows have lengths of their own, those of a sequence as long as that of the format."""
        return self.fixed_bytes + (0 if self.logits is None else self.logits.row_bytes)

    @property
    def key(self) -> dict[str, str]:
        """What identifies the format, by name."""
        part = self.logits
        if part is None:
            key = {"format": f"{'float16' if self.is_half else 'float32'} features"}
        else:
            key = {"format": part.codec.name}
            if part.class_dim is not None:
                key["format"] += f" in dimension {part.class_dim} of {'tokens' if self.ragged else part.positions}"
        if self.features:
            about = {name: [repr(part.pool), [*part.shape]] for name, part in self.features.items()}
            key["layers"] = json.dumps(about)
        return key

    @property
    def is_half(self) -> bool:
        """Whether values are stored in half precision."""
        return any(part.codec.dtype == torch.float16 for part in self.parts.values())

    def encode(self, values: Mapping[str, Tensor]) -> Bytes | None:
        """Return rows of bytes (B, row_bytes - HASH_BYTES), or None if a finite value is too large for them.

        Args:
            values: The tensors (B, ...) by the name of their part.

        Raises:
            InputError: If a tensor has another shape than those of the others.
        """
        found = []
        for name, part in self.parts.items():
            self._check(name, part, values[name])
            found.append(part.encode(values[name]))
        if any(part is None for part in found):
            return None
        return np.concatenate([part for part in found if part is not None], axis=1)

    def _check(self, name: str, part: Part, values: Tensor) -> None:
        found, wanted = [*values.shape[1:]], [*part.shape]
        if name == "logits" and self.ragged and part.class_dim is not None and len(found) == len(wanted):
            place = 2 - part.class_dim  # of the tokens, in (T, C) or (C, T)
            wanted[place] = found[place]  # a length of its own
        if found != wanted:
            what = "" if name == "logits" else f" at {name}"
            raise InputError(
                f"cache: outputs of the teacher{what} must have one shape for all samples, got {wanted} and {found}; "
                "tokens may have lengths of their own if they are pooled, or if they are logits, the module has "
                "class_dim, and the inputs attention_mask"
            )

    def check_tokens(self, count: int | None) -> None:
        """Raise InputError if features have one row for each token, and a batch has another number of tokens."""
        if None not in (self.tokens, count) and self.tokens != count:
            names = ", ".join(self.features)
            raise InputError(
                f"cache: features of {names} are stored for sequences of {self.tokens} tokens, but a batch has "
                f"{count}; pool the features, pad all sequences to one length, or remove cache"
            )

    def logits_of(self, rows: Tensor) -> Tensor | None:
        """Return the logits of packed rows, on their device; None if they hold none."""
        return None if self.logits is None else self.logits.decode(rows[:, self.fixed_bytes :])

    def features_of(self, rows: Tensor, layers: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return features of packed rows, on their device; None unless all of these layers are stored.

        Args:
            rows: The rows (B, row_bytes), uint8.
            layers: How each layer is pooled, by its dotted path.
        """
        if any(name not in self.features or self.features[name].pool != pool for name, pool in layers.items()):
            return None
        starts, place = {}, HASH_BYTES
        for name, part in self.features.items():
            starts[name], place = place, place + part.row_bytes
        parts = {name: (starts[name], self.features[name]) for name in layers}
        return {name: part.decode(rows[:, start : start + part.row_bytes]) for name, (start, part) in parts.items()}
