"""Hashes of files, remembered with size and times of each file, so that an unchanged file is read once."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import numpy as np
import xxhash
from lightning.pytorch.utilities import rank_zero_warn

from kd_lightning.data.sources.images import printable
from kd_lightning.errors import InputError

T = TypeVar("T")

_THREADS, _AT_ONCE = 8, 64
_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
_DIGITS = str.maketrans("abcdefghijklmnop", "0123456789abcdef")
_SAMPLE = (0.01, 64, 2000)
"""Share of the unchanged files that is hashed again, its least and its largest number."""
_SETTLED = 2.0
"""Seconds after its last change from which on a file is noted: times of files are not exact."""
_CHECK = 16  # bytes of the checksum at the beginning of the notes
_NOTE = np.dtype([(name, "<u8") for name in ("path", "size", "modified", "changed", "content")])


class FileState(NamedTuple):
    """Size in bytes, times in ns, and number of a file. A file that is replaced or written has another state."""

    size: int
    modified: int
    changed: int
    inode: int


_hashes: dict[str, tuple[FileState, str]] = {}
"""State and hash of each file that this process knows, by path."""


def hash_file(path: str, *, anew: bool = False) -> str:
    """Hash the bytes of a file: 16 letters. An unchanged file is not read again.

    Args:
        path: The file.
        anew: Whether to read the file in any case.

    Raises:
        InputError: If the file cannot be read.
    """
    state = _state_of(path)
    known = _hashes.get(path)
    if anew or known is None or known[0] != state:
        _hashes[path] = known = state, _read_and_hash(path)
    return known[1]


def hash_files(paths: Iterable[str], *, anew: bool = False) -> list[str]:
    """Hash many files, see :func:`hash_file`."""
    return _in_threads(partial(hash_file, anew=anew), [*paths])


def letters(digest: str) -> str:
    """Write a hash in the letters a to p: a spreadsheet takes some hexadecimal numbers for numbers and changes them."""
    return digest.translate(_LETTERS)


def number_of(content: str) -> int:
    """Return a hash of 16 letters as an integer of 64 bits.

    >>> number_of("aaaaaaaaaaaaaabc")
    18
    """
    return int(content.translate(_DIGITS), 16)


class FileNotes:
    """Hashes of files from earlier fits, in one file: a later process reads only the files that have changed since.

    Any number of processes may use it at the same time, for files of several data sets. The file is replaced as a
    whole. If it is damaged, or cannot be written, files are hashed again.

    Args:
        file: The file of the notes. Its folder is created when there is something to note.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def recall(self, paths: Sequence[str], *, trust: bool = True, write: bool = True) -> bool:
        """Find the hashes of files, which :func:`hash_file` returns from now on.

        Size and times of all files are compared with the notes. Those that differ are hashed, and a random sample of
        the others: 1 in 100, at least 64 and at most 2,000. If one of the sample has another content, all are hashed.

        Args:
            paths: The files.
            trust: Whether to use the notes. If not, all files are hashed.
            write: Whether to write what is new to the notes.

        Returns:
            Whether a file of the sample has another content, so that the notes cannot be trusted.

        Raises:
            InputError: If a file cannot be read.
        """
        paths = [*dict.fromkeys(map(str, paths))]
        states = _in_threads(_state_of, paths)
        notes, now = self._read() if trust else np.zeros(0, _NOTE), _rows(paths, states)
        place = np.searchsorted(notes["path"], now["path"]).clip(max=max(len(notes) - 1, 0))
        noted = notes[place] if len(notes) else np.zeros(len(now), _NOTE)
        same = np.all([noted[name] == now[name] for name in ("path", "size", "modified", "changed")], axis=0)
        unchanged = np.flatnonzero(same).tolist()
        contents = dict(zip(unchanged, map(_letters_of, noted["content"][same].tolist()), strict=True))
        share, least, most = _SAMPLE
        count = min(len(unchanged), max(least, min(round(share * len(unchanged)), most)))
        sample = np.random.default_rng().choice(unchanged, count, replace=False).tolist()  # another one in each fit
        found = hash_files([paths[number] for number in sample], anew=True)
        wrong = [n for n, content in zip(sample, found, strict=True) if content != contents[n]]
        if wrong:
            rank_zero_warn(
                f"decoded: image {printable(paths[wrong[0]])} has another content, but the same size and times as in "
                f"{self.file}, so that all files are read again"
            )
            hash_files([paths[number] for number in unchanged], anew=True)
        else:
            _hashes.update({paths[number]: (states[number], content) for number, content in contents.items()})
        news = paths if wrong else [path for path, is_known in zip(paths, same.tolist(), strict=True) if not is_known]
        hash_files(news, anew=not trust)
        if write and news:
            self._add(news)
        return bool(wrong)

    def _read(self) -> np.ndarray[Any, Any]:
        """The notes, sorted by path; empty if the file is absent or damaged."""
        try:
            data = self.file.read_bytes()
        except OSError:
            data = b""
        check, rows = data[:_CHECK], data[_CHECK:]
        return np.frombuffer(rows if check == _checksum(rows) and len(rows) % _NOTE.itemsize == 0 else b"", _NOTE)

    def _add(self, paths: Sequence[str]) -> None:
        """Write the hashes of files, beside those that other processes have written."""
        settled = time.time_ns() - _SETTLED * 1e9
        states = {path: _hashes[path] for path in paths if max(_hashes[path][0][1:3]) < settled}
        if not states:
            return
        rows = _rows([*states], [state for state, _ in states.values()])
        rows["content"] = [number_of(content) for _, content in states.values()]
        written = self.file.with_name(f"{self.file.name}-{uuid4().hex}.new")
        from filelock import FileLock  # here, since few runs need it

        with suppress(OSError, NotImplementedError):  # no right to write, a full disk, or no locks
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.file.with_name(f"{self.file.name}.lock")):
                every = np.concatenate([rows, self._read()])
                _, first = np.unique(every["path"], return_index=True)  # sorted; the first of a path is the new one
                data = every[first].tobytes()
                try:
                    with written.open("xb") as file:
                        file.write(_checksum(data) + data)
                        file.flush()
                        os.fsync(file.fileno())
                    written.replace(self.file)
                finally:
                    written.unlink(missing_ok=True)


def _in_threads(function: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    """Call a function for each path, since reading many small files is mostly waiting."""
    some = [paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [one for found in pool.map(lambda few: [*map(function, few)], some) for one in found]


def _read_and_hash(path: str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"image {printable(path)} cannot be read: {error}") from error
    return letters(digest.hexdigest())


def _state_of(path: str) -> FileState:
    try:
        status = os.stat(path)  # noqa: PTH116  (there may be a million)
    except OSError as error:
        raise InputError(f"image {printable(path)} cannot be read: {error}") from error
    return FileState(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _rows(paths: Sequence[str], states: Sequence[FileState]) -> np.ndarray[Any, Any]:
    """Notes of files, without contents."""
    rows = np.zeros(len(paths), _NOTE)
    rows["path"] = [_key(path) for path in paths]
    for number, name in enumerate(("size", "modified", "changed")):
        rows[name] = np.array([state[number] for state in states], np.int64).view(np.uint64)
    return rows


def _letters_of(content: int) -> str:
    return letters(f"{content:016x}")


def _key(path: str) -> int:
    return xxhash.xxh3_64_intdigest(os.path.abspath(path).encode(errors="surrogateescape"))  # noqa: PTH100


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECK).digest()
