"""Which sample a row of a file means: by content and path, by content, by path, else by index."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from kd_lightning.data.identity import Identities, base_content, identify, match, normal_path
from kd_lightning.data.sources.images import Images, path_of

_MOST_COPIES = 100
"""Number of copies of one content up to which the folder of a renamed one is compared."""
_CONTENT = re.compile(r"[a-p]{16}(#[0-9]+)?")


@dataclass(frozen=True)
class RowName:
    """Index, path and content of a row; None or empty where it has none."""

    index: int | None = None
    path: str = ""
    content: str = ""


@dataclass(frozen=True)
class FoundRows:
    """The samples of some rows.

    Attributes:
        samples: Sample of each row; None if it is gone.
        moved: Rows whose sample has another index or path now.
        changed: Rows found by path alone, although their content is known: the file is another picture now.
        several: Rows whose path fits several samples.
    """

    samples: list[int | None]
    moved: list[int]
    changed: list[int]
    several: list[int]


class RowSamples:
    """Find the samples that rows of a file mean.

    Content decides, so that a renamed file is found; path decides among equal contents. A row whose content no sample
    has is found by its path: the file was replaced, or saved anew. If files were renamed as well, a path says too
    little, and such a row is gone. An index decides where there is neither path nor content. Of a row without content
    that has an index, as earlier versions wrote it, the folders above the data may be others.

    Args:
        images: The parts of the data, whose samples have ascending indices.
        identities: Paths and contents of each part. Default: None, which means that they are read where a row has a
            content.
        folders: Folders that relative paths may start from.
    """

    def __init__(
        self, images: Sequence[Images], identities: Sequence[Identities] | None = None, folders: Sequence[str] = ()
    ) -> None:
        self.images = images
        self.folders = folders
        self._identities = identities

    def __len__(self) -> int:
        return sum(map(len, self.images))

    @cached_property
    def has_paths(self) -> bool:
        """Whether any sample has a file."""
        return any(self._absolute)

    def find(self, names: Sequence[RowName]) -> FoundRows:
        """Find the sample of each row."""
        rows = [name if _CONTENT.fullmatch(name.content) else replace(name, content="") for name in names]
        candidates = [self._candidates(row) for row in rows]
        samples = [found[0] if len(found) == 1 else None for found in candidates]
        self._take_copies(rows, samples)
        named = [number for number, row in enumerate(rows) if row.content]
        for number, sample in zip(named, self._match_contents(named, rows, samples), strict=True):
            samples[number] = sample
        moved, changed, renamed = [], [], False
        for number, (row, sample) in enumerate(zip(rows, samples, strict=True)):
            if sample is None:
                continue
            same = not row.content or base_content(self._contents[sample]) in ("", base_content(row.content))
            elsewhere = bool(row.path) and self.has_paths and not self._is_at(sample, row.path)
            renamed |= elsewhere and bool(row.content)
            if not same:
                changed.append(number)
            elif elsewhere or row.index not in (None, sample):
                moved.append(number)
        for number in changed if renamed else ():
            samples[number] = None
        several = [number for number, found in enumerate(candidates) if len(found) > 1 and samples[number] is None]
        return FoundRows(samples, moved, [] if renamed else changed, several)

    def _candidates(self, row: RowName) -> list[int]:
        """Return the samples that a row's path names, or its index: none, one, or several."""
        index = row.index if row.index is not None and 0 <= row.index < len(self) else None
        base = base_content(row.content)
        exact = self._by_content[row.content] if base else []
        if not row.path or not self.has_paths:
            if len(exact) == 1:
                return exact
            return [index] if index is not None and (not base or base_content(self._contents[index]) == base) else []
        found = self._at_path(row.path)
        if not found and base:
            equal = self._by_name[_base_and_name(base, row.path)]
            found = [sample for sample in equal if self._fits(sample, row.path)]
        elif not found and index is not None and not normal_path(row.path).startswith(self._folder):
            found = self._below(row.path) or ([index] if self._fits(index, row.path) else [])
        if index is not None and index in found:
            return [index]
        return [sample for sample in found if sample in exact] or found if len(found) > 1 else found

    def _match_contents(
        self, named: Sequence[int], rows: Sequence[RowName], samples: Sequence[int | None]
    ) -> list[int | None]:
        """Return the samples of the rows that have a content, given the samples that their paths name."""
        if not named:
            return []
        keys: list[tuple[str | int | None, str]] = [
            (rows[n].path if samples[n] is None else samples[n], rows[n].content) for n in named
        ]
        first: dict[tuple[str | int | None, str], int] = {}
        for key, number in zip(keys, named, strict=True):
            first.setdefault(key, number)
        paths = ["" if samples[n] is None else str(samples[n]) for n in first.values()]
        earlier = Identities(paths, [rows[n].content for n in first.values()])
        places = match(earlier, Identities([*map(str, range(len(self)))], self._contents)).places
        place_of = dict(zip(first, places, strict=True))
        return [place_of[key] for key in keys]

    @cached_property
    def _contents(self) -> list[str]:
        identities = [identify(part) for part in self.images] if self._identities is None else self._identities
        return [content for one in identities for content in one.contents]

    @cached_property
    def _by_content(self) -> defaultdict[str, list[int]]:
        """Samples of each content: at most one of each part."""
        return _places(self._contents)

    @cached_property
    def _by_base(self) -> defaultdict[str, list[int]]:
        """Samples of each content without its count."""
        return _places(map(base_content, self._contents))

    @cached_property
    def _by_name(self) -> defaultdict[str, list[int]]:
        """Samples of each content without its count, and name of the file."""
        return _places(map(_base_and_name, self._contents, self._relative))

    # Paths.

    @cached_property
    def _absolute(self) -> list[str]:
        """The absolute path of each sample; empty without a file."""
        paths = (path_of(self.images, number) for number in range(len(self)))
        return [normal_path(os.path.abspath(path)) if path else "" for path in paths]  # noqa: PTH100

    @cached_property
    def _folder(self) -> str:
        """The common folder of all samples, with its separator."""
        return _common_folder(self._absolute)

    @cached_property
    def _starts(self) -> list[str]:
        """The common folder of the part of each sample, with its separator."""
        starts = []
        for first, end in pairwise(accumulate(map(len, self.images), initial=0)):
            starts += [_common_folder(self._absolute[first:end])] * (end - first)
        return starts

    @cached_property
    def _relative(self) -> list[str]:
        """The path of each sample below the source's folder, or below the common folder of its part."""
        if self._identities is not None:
            return [path for one in self._identities for path in one.paths]
        return [path.removeprefix(start) for path, start in zip(self._absolute, self._starts, strict=True)]

    @cached_property
    def _by_path(self) -> dict[str, list[int]]:
        """Samples of each path that a row may hold.

        These are the absolute path, and the paths relative to the common folders of the sample's part and of all
        samples, and to the source's folder.
        """
        found = defaultdict[str, list[int]](list)
        for number, (path, relative) in enumerate(zip(self._absolute, self._relative, strict=True)):
            if path:
                names = (path, path.removeprefix(self._folder), path.removeprefix(self._starts[number]), relative)
                for name in dict.fromkeys(names):
                    found[name].append(number)
        return dict(found)

    def _at_path(self, path: str) -> list[int]:
        for text in (path, path.replace("\\", "/")):  # a file made on Windows
            keys = (normal_path(os.path.normpath(os.path.join(start, text))) for start in ("", *self.folders))  # noqa: PTH118
            if found := sorted({number for key in keys for number in self._by_path.get(key, ())}):
                return found
        return []

    def _below(self, path: str) -> list[int]:
        """Return the samples at the end of a path, of at least two parts, whatever the folders above the data are."""
        parts = _parts(path)
        ends = ("/".join(parts[number:]) for number in range(len(parts) - 1))
        return next((self._by_path[end] for end in ends if end in self._by_path), [])

    def _take_copies(self, rows: Sequence[RowName], samples: list[int | None]) -> None:
        """Give each row of a renamed file that has copies the copy in its folder, if no other row has it."""
        taken = {*samples}
        for number, row in enumerate(rows):
            if samples[number] is not None or not (row.content and row.path):
                continue
            copies = self._by_base[base_content(row.content)]
            free = [sample for sample in copies if sample not in taken] if 2 <= len(copies) <= _MOST_COPIES else []
            if not free:
                continue
            folder = _parts(row.path)[-2::-1]  # upwards
            shared = [_count_equal(folder, _parts(self._absolute[sample])[-2::-1]) for sample in free]
            if max(shared):
                samples[number] = free[shared.index(max(shared))]
                taken.add(samples[number])

    def _is_at(self, sample: int, path: str) -> bool:
        return sample in self._at_path(path) or self._fits(sample, path)

    def _fits(self, sample: int, path: str) -> bool:
        """Whether a path is that of a sample as far as both are known: the folders above the data may be others."""
        mine, other = _parts(self._relative[sample]), _parts(path)
        count = min(len(mine), len(other))
        return count > 0 and mine[-count:] == other[-count:]


def _count_equal(a: Sequence[str], b: Sequence[str]) -> int:
    """Return at how many places from the first two sequences are equal."""
    return next((n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


def _common_folder(paths: Sequence[str]) -> str:
    known = [os.path.dirname(path) for path in paths if path]  # noqa: PTH120
    return normal_path(os.path.commonpath(known)).rstrip("/") + "/" if known else "/"


def _places(names: Iterable[str]) -> defaultdict[str, list[int]]:
    found = defaultdict[str, list[int]](list)
    for number, name in enumerate(names):
        found[name].append(number)
    return found


def _parts(path: str) -> list[str]:
    return [part for part in normal_path(path).replace("\\", "/").split("/") if part not in ("", ".")]


def _base_and_name(content: str, path: str) -> str:
    """Return a content without its count, and the name of the file."""
    return "/".join([base_content(content), *_parts(path)[-1:]])
