"""Stored outputs of teachers: crash-safe files, codecs, and fingerprints of what the outputs depend on."""

from kd_lightning.cache.codecs import DenseCodec, TopKCodec
from kd_lightning.cache.content import fingerprint
from kd_lightning.cache.outputs import StoredOutputs
from kd_lightning.cache.row_format import Part, RowFormat
from kd_lightning.cache.store import OutputCache

__all__ = [
    "OutputCache",
    "StoredOutputs",
    "Part",
    "RowFormat",
    "DenseCodec",
    "TopKCodec",
    "fingerprint",
]
