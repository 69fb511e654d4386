"""Rows of bytes on disk, keyed by what they were computed from, and never half of them taken for all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from kd_lightning.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

RECORD = 16  # bytes of a chunk's checksum; all zero: the chunk is absent


class OutputCache:
    """A table of rows of bytes in a folder of its own, filled chunk by chunk, by any number of processes.

    The folder, ``<root>/<name>-<key>``, holds ``cache.json`` (what the rows were computed from), ``outputs`` (the rows,
    mapped into memory), and ``chunks``, a checksum for each chunk, written and flushed only after the chunk itself. So
    whatever ends a process, a chunk without its checksum is absent, and one that does not fit it is found damaged.

    Args:
        root: Folder of all caches.
        name: How the folder's name begins, for the reader.
        parts: Everything that the rows depend on, by name; any difference makes another folder.
        rows: How many there are.
        row_bytes: Of one row.
        chunk: Rows that are written at a time.

    Raises:
        InputError: If the folder cannot be made or is another's.
    """

    def __init__(
        self, root: Path, name: str, parts: Mapping[str, str], rows: int, row_bytes: int, *, chunk: int
    ) -> None:
        self.parts = {**parts}
        self.rows = rows
        self.row_bytes = row_bytes
        content = json.dumps([self.parts, rows, row_bytes], sort_keys=True)
        self.root = root
        self.name = name
        self.folder = root / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
        self.chunk = self._open(chunk)
        self._table: np.memmap[Any, Any] | None = None

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.rows // self.chunk)

    @property
    def size(self) -> int:
        """Bytes of the whole table."""
        return self.rows * self.row_bytes

    def lock(self) -> FileLock:
        """Held by the run that fills; the system frees it when that run ends, however it ends."""
        from filelock import FileLock  # here, since few runs need it

        return FileLock(self.folder / "lock")

    def _open(self, chunk: int) -> int:
        """Make the folder where it is not there; the chunk size that the table has."""
        try:
            if (found := self._chunk_of(self.folder)) and self._misfits(found) == []:
                return found  # so that what is whole may lie where nobody can write
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.lock():
                found = self._chunk_of(self.folder)
                if found is None:  # new, or damaged: then nobody knows how the rest was written
                    header = self.folder / "cache.json"
                    if header.is_file():
                        rank_zero_warn(f"cache: {header} is damaged, so all of its cache is computed again")
                    (self.folder / "chunks").unlink(missing_ok=True)
                    written = header.with_suffix(".new")
                    written.write_text(json.dumps({"chunk": chunk, "parts": self.parts}, indent=1, sort_keys=True))
                    written.replace(header)
                else:
                    chunk = found
                for file, size in self._misfits(chunk):
                    with file.open("ab") as opened:
                        opened.truncate(size)  # what is missing reads as zeros
        except (OSError, NotImplementedError) as error:  # the latter where locks are not
            raise InputError(f"cache: {self.folder} cannot be used: {error}; name another folder") from error
        return chunk

    def _misfits(self, chunk: int) -> list[tuple[Path, int]]:
        """Files that have not the size that they should, which comes with them."""
        sizes = {self.folder / "outputs": self.size, self.folder / "chunks": -(-self.rows // chunk) * RECORD}
        return [(file, size) for file, size in sizes.items() if not file.is_file() or file.stat().st_size != size]

    def _chunk_of(self, folder: Path) -> int | None:
        """The chunk size of a cache of these parts; None where there is none, or a damaged one."""
        header = _header(folder)
        chunk = header.get("chunk")
        whole = header.get("parts") == self.parts and isinstance(chunk, int) and chunk > 0
        return chunk if whole else None

    def difference(self) -> str:
        """Which parts differ from those of the nearest other cache of this name; empty where there is none."""
        nearest: list[str] | None = None
        for folder in self.root.glob(f"{self.name}-*"):
            other = _header(folder).get("parts")
            if folder == self.folder or not isinstance(other, dict):
                continue
            changed = [key for key in sorted({*self.parts, *other}) if self.parts.get(key) != other.get(key)]
            if nearest is None or len(changed) < len(nearest):
                nearest = changed
        return ", ".join(nearest or [])

    def rows_of(self, number: int) -> range:
        """A chunk's rows."""
        return range(self.rows)[number * self.chunk : (number + 1) * self.chunk]

    def _records(self) -> np.ndarray[Any, Any]:
        return np.fromfile(self.folder / "chunks", dtype=np.uint8).reshape(-1, RECORD)

    def absent(self) -> list[int]:
        """Chunks that are not written yet."""
        return np.flatnonzero(~self._records().any(axis=1)).tolist()

    def damaged(self, numbers: Iterable[int]) -> list[int]:
        """Those of the written chunks that do not fit their checksum."""
        records = self._records()
        found = []
        with (self.folder / "outputs").open("rb") as file:
            for number in numbers:
                rows = self.rows_of(number)
                file.seek(rows.start * self.row_bytes)
                data = file.read(len(rows) * self.row_bytes)
                if records[number].any() and records[number].tobytes() != _checksum(number, data):
                    found.append(number)
        return found

    def drop(self, numbers: Iterable[int]) -> None:
        """Make chunks absent."""
        with (self.folder / "chunks").open("r+b") as file:
            for number in numbers:
                file.seek(number * RECORD)
                file.write(bytes(RECORD))

    def check_room(self, rows: int) -> None:
        """Refuse to fill so many rows where the disk has no room for them."""
        needed, free = rows * self.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"cache: {readable(needed)} of outputs do not fit into {self.root}, where {readable(free)} are free; "
                "name another folder, keep fewer views, or set cache_top_k"
            )

    def write(self, number: int, rows: np.ndarray[Any, Any]) -> None:
        """Write a chunk (rows, row_bytes), then its checksum.

        Raises:
            InputError: If it cannot be written, as on a full disk; the chunk then stays absent.
        """
        place = self.rows_of(number)
        data = np.ascontiguousarray(rows).tobytes()
        if len(data) != len(place) * self.row_bytes:
            raise ValueError(f"chunk {number} has {len(place) * self.row_bytes} bytes, got {len(data)}")
        try:
            for file, start, content in (
                ("outputs", place.start * self.row_bytes, data),
                ("chunks", number * RECORD, _checksum(number, data)),
            ):
                with (self.folder / file).open("r+b", buffering=0) as opened:
                    opened.seek(start)
                    written = 0
                    while written < len(content):  # the system may take less than all
                        written += opened.write(content[written:]) or 0
                    os.fsync(opened.fileno())
        except OSError as error:
            raise InputError(f"cache: {self.folder} cannot be written: {error}") from error

    def read(self, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows (B, row_bytes), by their numbers; a copy."""
        if self._table is None:
            self._table = np.memmap(self.folder / "outputs", np.uint8, "r", shape=(self.rows, self.row_bytes))
        return np.asarray(self._table[numbers])


def _header(folder: Path) -> dict[str, Any]:
    """What a cache's folder says of it; empty where that cannot be read."""
    try:
        header = json.loads((folder / "cache.json").read_text())
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def readable(size: float) -> str:
    """A number of bytes for people.

    >>> readable(1536)
    '1.5 KiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _checksum(number: int, data: bytes) -> bytes:
    """Of a chunk in its place; never all zero in practice."""
    return hashlib.blake2b(data, digest_size=RECORD, salt=number.to_bytes(8, "little")).digest()
