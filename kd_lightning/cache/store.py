"""A crash-safe table of rows of bytes on disk, keyed by everything that the rows depend on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from kd_lightning.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

RECORD = 16  # bytes of a chunk's checksum; zeros mean that the chunk is absent
_FILES = ("cache.json", "cache.new", "outputs", "chunks", "lock", "too_large")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has none


class OutputCache:
    """A table of rows of bytes in its own folder. Any number of processes fills it, chunk by chunk.

    The folder ``<root>/<name>-<key>`` contains three files: ``cache.json`` (what the rows depend on), ``outputs`` (the
    rows, mapped into memory) and ``chunks`` (a checksum for each chunk). A checksum is written after its chunk is on
    disk. So after a crash, a chunk without a checksum is absent, and a chunk that does not match its checksum is
    damaged.

    Rows that have lengths of their own lie in one file for each chunk, ``outputs-<chunk>``, which begins with the
    places of its rows. A chunk's file is replaced as a whole.

    Nothing is written through a link: a cache with a link in its folder can be read, but not filled. The folder of all
    caches itself may be a link.

    Args:
        root: Folder of all caches.
        name: First part of the folder's name.
        parts: Everything that the rows depend on, by name. Any difference gives another folder.
        rows: Number of rows.
        row_bytes: Bytes of one row; of rows with lengths of their own about the bytes of one.
        chunk: Number of rows that are written at a time. An existing cache has its own.
        ragged: Whether rows have lengths of their own.

    Raises:
        InputError: If the folder cannot be created or written, or has a link in it.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        parts: Mapping[str, str],
        rows: int,
        row_bytes: int,
        *,
        chunk: int,
        ragged: bool = False,
    ) -> None:
        self.parts = {**parts}
        self.rows = rows
        self.row_bytes = row_bytes
        self.ragged = ragged
        content = json.dumps([self.parts, rows, "ragged" if ragged else row_bytes], sort_keys=True)
        self.root = root
        self.name = name
        self.folder = root / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
        self.chunk = self._open(chunk)
        self._table: np.memmap[Any, Any] | None = None
        self._files: dict[int, np.memmap[Any, Any]] = {}  # of ragged rows, by chunk

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.rows // self.chunk)

    @property
    def size(self) -> int:
        """Bytes of the table; about, if rows have lengths of their own."""
        return self.rows * self.row_bytes

    def lock(self) -> FileLock:
        """Return the lock for the run that fills. The system frees it when that run ends or crashes."""
        self._refuse_links()
        from filelock import FileLock  # here, since few runs need it

        return FileLock(self.folder / "lock")

    def _open(self, chunk: int) -> int:
        """Create the folder if it does not exist. Return the table's chunk size."""
        try:
            if (found := self._chunk_of(self.folder)) and self._misfits(found) == []:
                return found  # so that a complete cache may be read-only
            self._refuse_links()
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.lock():
                found = self._chunk_of(self.folder)
                if found is None:  # new, or damaged: then the other files are of unknown origin
                    header = self.folder / "cache.json"
                    if header.is_file():
                        rank_zero_warn(f"cache: {header} is damaged, so the whole cache is computed again")
                    (self.folder / "chunks").unlink(missing_ok=True)
                    written = header.with_suffix(".new")
                    written.unlink(missing_ok=True)
                    with _open_to_write(written, os.O_CREAT | os.O_EXCL) as opened:
                        text = json.dumps({"chunk": chunk, "parts": self.parts}, indent=1, sort_keys=True)
                        opened.write(text.encode())
                    written.replace(header)
                else:
                    chunk = found
                for file, size in self._misfits(chunk):
                    with _open_to_write(file, os.O_CREAT) as opened:
                        opened.truncate(size)  # fills with zeros
        except (OSError, NotImplementedError) as error:  # the latter on file systems without locks
            raise InputError(f"cache: {self.folder} cannot be used: {error}; set another folder") from error
        return chunk

    def _refuse_links(self) -> None:
        for path in (self.folder, *(self.folder / name for name in _FILES)):
            if path.is_symlink():
                raise InputError(f"cache: {path} is a link, through which nothing is written; delete the link")

    def _misfits(self, chunk: int) -> list[tuple[Path, int]]:
        """Files of a wrong size, with the right size."""
        sizes = {self.folder / "chunks": -(-self.rows // chunk) * RECORD}
        if not self.ragged:
            sizes[self.folder / "outputs"] = self.size
        return [(file, size) for file, size in sizes.items() if not file.is_file() or file.stat().st_size != size]

    def _chunk_of(self, folder: Path) -> int | None:
        """Chunk size of the cache in a folder. None if there is no intact cache of the same parts."""
        header = _header(folder)
        chunk = header.get("chunk")
        intact = header.get("parts") == self.parts and isinstance(chunk, int) and chunk > 0
        return chunk if intact else None

    def difference(self) -> str:
        """Names of the parts that differ from the most similar cache of this name; empty if there is no other."""
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
        """Numbers of a chunk's rows."""
        return range(self.rows)[number * self.chunk : (number + 1) * self.chunk]

    def _records(self) -> np.ndarray[Any, Any]:
        return np.fromfile(self.folder / "chunks", dtype=np.uint8).reshape(-1, RECORD)

    def absent(self) -> list[int]:
        """Numbers of the chunks that are not written yet."""
        return np.flatnonzero(~self._records().any(axis=1)).tolist()

    def damaged(self, numbers: Iterable[int]) -> list[int]:
        """Those of the given chunks that are written but do not match their checksum."""
        records = self._records()
        written = (number for number in numbers if records[number].any())
        return [number for number in written if records[number].tobytes() != _checksum(number, self._data(number))]

    def _data(self, number: int) -> bytes:
        """Return the bytes of a chunk that are on disk."""
        if self.ragged:
            path = self._file_of(number)
            return path.read_bytes() if path.is_file() else b""
        rows = self.rows_of(number)
        with (self.folder / "outputs").open("rb") as file:
            file.seek(rows.start * self.row_bytes)
            return file.read(len(rows) * self.row_bytes)

    def _file_of(self, number: int) -> Path:
        """The file of a chunk of ragged rows."""
        return self.folder / f"outputs-{number:06d}"

    def drop(self, numbers: Iterable[int]) -> None:
        """Mark chunks as absent."""
        self._refuse_links()
        with _open_to_write(self.folder / "chunks") as file:
            for number in numbers:
                file.seek(number * RECORD)
                file.write(bytes(RECORD))

    def check_room(self, rows: int) -> None:
        """Raise InputError if the disk has no room for so many rows."""
        needed, free = rows * self.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"cache: {format_size(needed)} of outputs do not fit into {self.root}, where {format_size(free)} are "
                "free; set another folder, fewer num_views, cache_top_k, or pool features"
            )

    def write(self, number: int, rows: Sequence[np.ndarray[Any, Any]] | np.ndarray[Any, Any]) -> None:
        """Write a chunk (rows, row_bytes), or a list of ragged rows, and then its checksum.

        Raises:
            InputError: If the chunk cannot be written, for example on a full disk. It then stays absent.
        """
        self._refuse_links()
        place = self.rows_of(number)
        if self.ragged:
            if len(rows) != len(place):
                raise ValueError(f"chunk {number} has {len(place)} rows, got {len(rows)}")
            ends = np.cumsum([0, *map(len, rows)]).astype("<u8")
            data = ends.tobytes() + b"".join(row.tobytes() for row in rows)
        else:
            data = np.ascontiguousarray(rows).tobytes()
        if not self.ragged and len(data) != len(place) * self.row_bytes:
            raise ValueError(f"chunk {number} has {len(place) * self.row_bytes} bytes, got {len(data)}")
        try:
            if self.ragged:  # a new file, since another run may have mapped the old one
                path = self._file_of(number)
                part = path.with_name(f"{path.name}.part")
                part.unlink(missing_ok=True)
                with _open_to_write(part, os.O_CREAT | os.O_EXCL) as opened:
                    _write_all(opened, 0, data)
                part.replace(path)
            else:
                with _open_to_write(self.folder / "outputs") as opened:
                    _write_all(opened, place.start * self.row_bytes, data)
            with _open_to_write(self.folder / "chunks") as opened:
                _write_all(opened, number * RECORD, _checksum(number, data))
        except OSError as error:
            raise InputError(f"cache: {self.folder} cannot be written: {error}") from error

    @property
    def too_large(self) -> bool:
        """Whether a run found that a value does not fit into the rows."""
        return (self.folder / "too_large").is_file()

    def mark_too_large(self) -> None:
        """Note, for all runs, that a value does not fit into the rows."""
        self._refuse_links()
        _open_to_write(self.folder / "too_large", os.O_CREAT).close()

    def read(self, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return a copy of rows (B, row_bytes), by their numbers.

        Raises:
            InputError: If the file is gone.
        """
        if self._table is None:
            try:
                self._table = np.memmap(self.folder / "outputs", np.uint8, "r", shape=(self.rows, self.row_bytes))
            except (OSError, ValueError) as error:  # the latter if it is too short
                raise InputError(f"cache: {self.folder} cannot be read: {error}; start a new fit") from error
        return np.asarray(self._table[numbers])

    def read_ragged(self, numbers: Iterable[int]) -> list[np.ndarray[Any, Any]]:
        """Return ragged rows of bytes, by their numbers.

        Raises:
            InputError: If a file is gone or too short.
        """
        found = []
        for number in numbers:
            chunk, place = divmod(int(number), self.chunk)
            try:
                if chunk not in self._files:
                    self._files[chunk] = np.memmap(self._file_of(chunk), np.uint8, "r")
                file, first = self._files[chunk], 8 * (len(self.rows_of(chunk)) + 1)
                start, stop = file[8 * place : 8 * place + 16].view("<u8").tolist()
                if first + stop > len(file):
                    raise ValueError("it is too short")
            except (OSError, ValueError) as error:
                path = self._file_of(chunk)
                raise InputError(f"cache: {path} cannot be read: {error}; start a new fit") from error
            found.append(np.array(file[first + start : first + stop]))
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped files: each process maps them when it first reads."""
        return self.__dict__ | {"_table": None, "_files": {}}


def _write_all(file: io.FileIO, start: int, content: bytes) -> None:
    """Write to a place in a file, and wait until it is on disk."""
    file.seek(start)
    written = 0
    while written < len(content):  # a write may take a part only
        written += file.write(content[written:]) or 0
    os.fsync(file.fileno())


def _open_to_write(file: Path, flags: int = 0) -> io.FileIO:
    """Open a file to write it, without a buffer. It must not be a link."""
    opened = os.open(file, os.O_RDWR | flags | _NO_LINK | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(opened, "r+b", buffering=0)


def _header(folder: Path) -> dict[str, Any]:
    """Content of a folder's ``cache.json``; empty if it cannot be read."""
    try:
        header = json.loads((folder / "cache.json").read_text())
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def format_size(size: float) -> str:
    """Format a number of bytes.

    >>> format_size(1536)
    '1.5 KiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _checksum(number: int, data: bytes) -> bytes:
    """Checksum of a chunk and its number. It is never all zeros in practice."""
    return hashlib.blake2b(data, digest_size=RECORD, salt=number.to_bytes(8, "little")).digest()
