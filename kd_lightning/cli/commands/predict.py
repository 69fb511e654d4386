"""``predict RUN_OR_FILE SOURCE...``: predict pictures of any files, and write a table."""

from __future__ import annotations

import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd_lightning.deploy.pictures import find_pictures
from kd_lightning.deploy.predict import load_predictor
from kd_lightning.deploy.prediction_files import CSVFile, LinesFile, ParquetFile, PredictionFile, check_parquet
from kd_lightning.errors import InputError

_MOST_WORKERS, _LISTED, _SECONDS = 4, 10, 0.1


def main(options: Namespace) -> None:
    """Write the predictions, and how many files could not be read; exit with status 1 if none could."""
    out: Path | None = options.out
    if out is not None:
        _check_out(out, options.sources)
    predictor = load_predictor(options.model)
    paths = find_pictures(options.sources, predictor.inputs.endings)
    workers = options.workers
    if workers is None:
        few = len(paths) <= 2 * options.batch_size
        workers = 0 if few else min(_MOST_WORKERS, os.cpu_count() or 1)
    start, done, unreadable = time.perf_counter(), 0, 0
    with _open(out, every=options.all) as file, _Progress(len(paths)) as progress:
        for batch in predictor.batches(paths, options.batch_size, workers):
            file.write(batch)
            done += len(batch)
            for row, reason in batch.errors.items():
                unreadable += 1
                if unreadable <= _LISTED:
                    progress.print(f"cannot be read: {batch.paths[row]}: {reason}")
            progress.show(done)
    seconds = max(time.perf_counter() - start, 1e-9)
    if unreadable > _LISTED:
        _print(f"cannot be read: {unreadable - _LISTED} more; the column error has all")
    place, count = "" if out is None else f"{out}: ", f"{done:,} picture{'s'[: done != 1]}"
    if unreadable == done:
        _print(f"{place}none of {count} can be read")
        sys.exit(1)
    problem = f"; {unreadable:,} cannot be read" if unreadable else ""
    _print(f"{place}{count} in {seconds:.1f} s, {done / seconds:,.0f} a second{problem}")


def _check_out(out: Path, sources: list[str]) -> None:
    """Raise InputError for a file that must not be overwritten, or cannot be written."""
    if out.exists() and any(Path(source).exists() and out.samefile(source) for source in sources):
        raise InputError(f"--out: {out} is one of the sources, and would be lost; name another file")
    if out.suffix.lower() == ".parquet":
        check_parquet()
    masks = _masks(out)
    if masks.exists() and (not masks.is_dir() or any(masks.iterdir())):
        raise InputError(f"--out: {masks}, where masks would lie, exists; remove it, or name another file")


def _masks(out: Path) -> Path:
    return out.with_name(f"{out.stem}_masks")


@contextmanager
def _open(out: Path | None, *, every: bool) -> Iterator[PredictionFile]:
    """Open a file, which gets its name when it is complete, as does its folder of masks; standard output for None."""
    if out is None:
        yield CSVFile(sys.stdout, "\n", every=every)
        return
    masks, suffix = _masks(out), out.suffix.lower()
    part, folder = (path.with_name(f".{path.name}.{os.getpid()}.part") for path in (out, masks))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror}") from error
    options: dict[str, Any] = {"every": every, "masks": folder, "masks_name": masks.name}
    try:
        if suffix == ".parquet":
            table = ParquetFile(part, **options)
            yield table
            table.close()
        else:  # a path need not be UTF-8
            with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                yield (CSVFile if suffix == ".csv" else LinesFile)(file, **options)
        if folder.is_dir():
            folder.replace(masks)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


class _Progress:
    """One line on a terminal: how many pictures are done, and how many are predicted in a second."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.is_shown = sys.stderr is not None and sys.stderr.isatty()
        self.start = time.perf_counter()
        self.shown = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def show(self, done: int) -> None:
        """Replace the line, at most ten times a second."""
        now = time.perf_counter()
        if self.is_shown and now - self.shown >= _SECONDS:
            self.shown = now
            rate = done / max(now - self.start, 1e-9)
            self._clear()
            sys.stderr.write(f"{done:,} of {self.total:,} pictures, {rate:,.0f} a second")
            sys.stderr.flush()

    def print(self, text: str) -> None:
        """Print a line above it."""
        self._clear()
        _print(text)

    def _clear(self) -> None:
        if self.is_shown:
            sys.stderr.write("\r\x1b[K")


def _print(text: str) -> None:
    print(text, file=sys.stderr)
