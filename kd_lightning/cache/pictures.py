"""A crash-safe store of pictures of any size on disk, which any number of processes fills together."""

from __future__ import annotations

import json
import math
import mmap
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import xxhash
from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.cache.content import fingerprint
from kd_lightning.cache.store import format_size
from kd_lightning.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""Pixels (H, W, C)."""
Contents = np.ndarray[Any, np.dtype[np.uint64]]

_FIELDS = {"content": "<u8", "offset": "<u8", "height": "<u4", "width": "<u4", "channels": "<u4", "pixels": "<u8"}
_RECORD = np.dtype([*_FIELDS.items(), ("record", "<u8")])
"""A picture's content, place and shape, checksum of its pixels, and checksum of the record itself."""
_PLACE = np.dtype([("file", "<u4"), *_FIELDS.items()])
_SHARES = 256
"""Number of shares of all contents. A process that decodes a share holds its lock."""
_HELD = 16
"""Largest number of locks that a process holds."""
_PENDING = 2**25
"""Bytes of pictures after which a process writes their records, and frees the locks of finished shares."""
_PATIENCE = 10.0
"""Seconds after which a process announces that it waits for others."""


class PictureStore:
    """Pictures by the content of their files, in a folder that any number of processes fills and reads.

    Each process that fills writes two files of its own: ``<name>.pixels`` (the pictures, one after another) and
    ``<name>.records`` (content, place, shape and checksum of each). Records are written after their pictures are on
    disk, so a crash at any time leaves a store that the next fill completes: a record that is incomplete, or whose
    picture is, counts for nothing. Nothing is ever written over.

    Contents are divided into shares. A process decodes a share under its lock, which the system frees when the process
    ends or crashes. So processes of one or several fits, on one or several nodes, divide the work, and each picture is
    decoded once.

    Nothing is written through a link: a store with a link in its folder can be read, but not filled. The folder of all
    stores itself may be a link.

    Args:
        root: Folder of all stores.
        parts: What decides the pixels beside the content of a file, by name. Any difference gives another folder.
    """

    def __init__(self, root: Path, parts: Mapping[str, str]) -> None:
        self.root = root
        self.parts = {**parts}
        self.folder = root / f"pictures-{fingerprint(self.parts)[:32]}"
        self._read: dict[str, int] = {}  # bytes of each file of records that are read
        self._numbers: dict[Path, int] = {}  # of the files of pictures
        self._places: list[np.ndarray[Any, Any]] = []

    def refresh(self) -> list[int]:
        """Read the records that processes have written since the last call. Return their contents."""
        found = []
        for file in sorted(self.folder.glob("*.records")):
            start = self._read.setdefault(file.name, 0)
            try:
                with file.open("rb") as opened:
                    opened.seek(start)
                    data = opened.read()
                size = file.with_suffix(".pixels").stat().st_size
            except OSError:  # the pictures are gone
                continue
            data = data[: len(data) // _RECORD.itemsize * _RECORD.itemsize]  # a process may be writing the last one
            rows = np.frombuffer(data, _RECORD)
            self._read[file.name] = start + len(data)
            whole = [number for number, row in enumerate(_cut(data)) if _record_checksum(row[:-8]) == row[-8:]]
            rows = rows[whole]
            rows = rows[rows["offset"] + _sizes(rows) <= size]
            places = np.empty(len(rows), _PLACE)
            places["file"] = self._numbers.setdefault(file.with_suffix(".pixels"), len(self._numbers))
            for name in _FIELDS:
                places[name] = rows[name]
            self._places.append(places)
            found += rows["content"].tolist()
        return found

    def missing(self, contents: Contents) -> Contents:
        """Return those of some contents whose picture is not in the store, each once."""
        self.refresh()
        known = [places["content"] for places in self._places]
        return np.setdiff1d(contents, np.concatenate([np.empty(0, np.uint64), *known]))

    def table(self, contents: Contents) -> PictureTable:
        """Return the pictures of contents (N,), all of which are in the store."""
        places = np.concatenate([np.empty(0, _PLACE), *self._places])
        order = np.argsort(places["content"], kind="stable")
        found = order[np.searchsorted(places["content"], contents, sorter=order)]
        assert (places["content"][found] == contents).all()
        return PictureTable([*self._numbers], places[found])

    def check_room(self, size: float) -> int:
        """Create the folder.

        Args:
            size: Bytes of the pictures to be written.

        Returns:
            Free bytes of the disk.

        Raises:
            InputError: If the disk has no room for them, or the folder cannot be created.
        """
        self._refuse_links()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = self.folder / "about.json"
            if not about.exists():
                with suppress(FileExistsError), about.open("x") as file:
                    json.dump(self.parts, file, indent=1)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self._unusable(error) from error
        if size > free:
            raise InputError(
                f"decoded: {format_size(size)} of pictures do not fit into {self.root}, where {format_size(free)} "
                "are free; set another folder, or a smaller side"
            )
        return free

    def fill(
        self,
        contents: Iterable[int],
        decode: Callable[[int], Picture],
        *,
        threads: int = 1,
        report: Callable[[int], None] = lambda absent: None,
    ) -> None:
        """Decode and write the pictures that are absent, together with all processes that call this.

        Args:
            contents: Contents of the pictures that must be in the store.
            decode: Function from a content to its picture (H, W, C).
            threads: Number of threads that decode.
            report: Called with the number of pictures that are still absent.

        Raises:
            InputError: If a picture cannot be decoded, or the folder cannot be written. Pictures that were decoded
                before stay in the store.
        """
        shares: dict[int, set[int]] = defaultdict(set)
        for content in contents:
            shares[content * _SHARES >> 64].add(content)
        self._drop_found(shares)
        order = [*shares]
        random.Random(uuid4().int).shuffle(order)  # each process begins elsewhere
        self._refuse_links()
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with _Writer(self.folder) as writer, ThreadPoolExecutor(threads) as pool:
                for waits in (False, True):
                    for number in order:
                        if not shares[number]:
                            continue
                        if waits:
                            writer.release()  # never wait while others wait for this process
                        if not writer.hold(self._lock(number), waits=waits):
                            continue
                        self._drop_found(shares)
                        absent = sorted(shares[number])
                        for start in range(0, len(absent), 8 * threads):
                            some = absent[start : start + 8 * threads]
                            for content, picture in zip(some, pool.map(decode, some), strict=True):
                                writer.add(content, picture)
                                shares[number].remove(content)
                            report(sum(map(len, shares.values())))
        except (OSError, NotImplementedError) as error:  # the latter on file systems without locks
            raise self._unusable(error) from error
        self.refresh()

    def _drop_found(self, shares: dict[int, set[int]]) -> None:
        """Remove pictures that are in the store by now."""
        for content in self.refresh():
            shares.get(content * _SHARES >> 64, set()).discard(content)

    def _lock(self, number: int) -> FileLock:
        from filelock import FileLock  # here, since few runs need it

        return FileLock(self.folder / "locks" / f"{number}")

    def _refuse_links(self) -> None:
        folders = self.folder, self.folder / "locks"
        inner = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
        for path in (*folders, *inner):
            if path.is_symlink():
                raise InputError(f"decoded: {path} is a link, through which nothing is written; delete the link")

    def _unusable(self, error: Exception) -> InputError:
        return InputError(f"decoded: {self.folder} cannot be used: {error}; set another folder")


class PictureTable:
    """Pictures of a store, by number. Each process maps their files into memory when it first reads them.

    Args:
        files: Files of pictures.
        places: Place, shape and checksum of each picture, (N,).
    """

    def __init__(self, files: Sequence[Path], places: np.ndarray[Any, Any]) -> None:
        self.files = files
        self.places = places
        self._maps: dict[Path, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.places)

    def read(self, number: int) -> Picture:
        """Return a copy of a picture (H, W, C). Its checksum is compared each time.

        Raises:
            InputError: If the file is gone, too short or damaged.
        """
        place, content, offset, *shape, checksum = self.places[number].item()
        size, file = math.prod(shape), self.files[place]
        try:
            mapped = self._maps.get(file) or self._map(file)
            if mapped.size() < offset + size:  # reading beyond the end of a file would end the process
                raise ValueError("it is too short")
            picture = np.frombuffer(mapped, np.uint8, size, offset).copy()
            if _checksum(content, shape, picture) != checksum:
                raise ValueError("a picture does not match its checksum")
        except (OSError, ValueError) as error:
            raise InputError(
                f"decoded: {file} is damaged: {error}; delete this file and start again, so that its pictures are "
                "decoded again"
            ) from error
        return picture.reshape(shape)

    def _map(self, file: Path) -> mmap.mmap:
        with file.open("rb") as opened:
            self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped files: each process maps them when it first reads."""
        return self.__dict__ | {"_maps": {}}


class _Writer:
    """Writes pictures to a file of this process alone, and frees the locks of their shares when they count."""

    def __init__(self, folder: Path) -> None:
        self.pixels = folder / f"{uuid4().hex}.pixels"
        self.locks: list[FileLock] = []
        self.records: list[bytes] = []
        self.offset = self.recorded = self.released = 0  # bytes of pictures

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, InputError):  # what is decoded stays
                self.flush()
        finally:
            self._free()

    def hold(self, lock: FileLock, *, waits: bool) -> bool:
        """Acquire the lock of a share. Return False if another process holds it."""
        if len(self.locks) >= _HELD or self.offset - self.released >= _PENDING:
            self.release()
        try:
            lock.acquire(timeout=_PATIENCE if waits else 0)
        except TimeoutError:
            if not waits:
                return False
            rank_zero_info(f"decoded: another process is decoding into {self.pixels.parent}; waiting for it")
            lock.acquire()
        self.locks.append(lock)
        return True

    def add(self, content: int, picture: Picture) -> None:
        """Write a picture (H, W, C). It counts when its record is written."""
        if not self.offset:
            self.pixels.open("xb").close()
            self.pixels.with_suffix(".records").open("xb").close()
        with self.pixels.open("ab") as file:
            file.write(np.ascontiguousarray(picture).data)
        row = np.array([(content, self.offset, *picture.shape, _checksum(content, picture.shape, picture), 0)], _RECORD)
        body = row.tobytes()[:-8]
        self.records.append(body + _record_checksum(body))
        self.offset += picture.nbytes
        if self.offset - self.recorded >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Write the records of the pictures, after these are on disk."""
        if self.records:
            for file, data in (self.pixels, b""), (self.pixels.with_suffix(".records"), b"".join(self.records)):
                with file.open("ab") as opened:
                    opened.write(data)
                    opened.flush()
                    os.fsync(opened.fileno())
        self.records, self.recorded = [], self.offset

    def release(self) -> None:
        """Write the records, and free the locks."""
        self.flush()
        self._free()
        self.released = self.offset

    def _free(self) -> None:
        for lock in self.locks:
            lock.release()
        self.locks = []


def _sizes(rows: np.ndarray[Any, Any]) -> Contents:
    """Bytes of the pictures of some records."""
    sizes: Contents = rows["height"].astype(np.uint64) * rows["width"] * rows["channels"]
    return sizes


def _cut(data: bytes) -> Iterator[bytes]:
    size = _RECORD.itemsize
    return (data[start : start + size] for start in range(0, len(data), size))


def _checksum(content: int, shape: Iterable[int], picture: Picture) -> int:
    """Checksum of a picture's values, its shape and its content, so that one in another's place is found."""
    seed = xxhash.xxh3_64_intdigest(f"{content} {[*shape]}".encode())
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(picture).data, seed=seed)


def _record_checksum(body: bytes) -> bytes:
    return xxhash.xxh3_64_digest(body)
