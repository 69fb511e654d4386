"""Which sample is which: path and content of each sample, and the samples of an earlier state of the data."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from kd_lightning.cache.content import fingerprint
from kd_lightning.data.file_hashes import hash_files, letters
from kd_lightning.data.sources.images import Images, has_several_inputs, path_of, read_image
from kd_lightning.data.sources.items import content_of
from kd_lightning.data.sources.text_source import TokenizedTexts

_MANY = 20_000
"""Number of samples from which on the reading is announced."""
_CHECKED = 128
"""Number of items that are read twice, to find out whether a dataset is random."""


@dataclass(frozen=True)
class Identities:
    """Path and content of each sample of a dataset, by index.

    Attributes:
        paths: Path relative to the source's folder, with ``/`` between its parts, in Unicode NFC. Empty where a sample
            has no file.
        contents: Hash of the file's bytes, 16 letters; where a sample has no file of its own, hash of the item's
            values. The second sample of equal content has the suffix ``#2``, and so on. Empty if the dataset returns
            another item each time.
    """

    paths: list[str]
    contents: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __add__(self, other: Identities) -> Identities:
        """Join two parts. Each counts its equal contents by itself."""
        return Identities(self.paths + other.paths, self.contents + other.contents)

    @property
    def hash(self) -> str:
        """SHA-256 of all paths and contents."""
        return hashlib.sha256("\n".join([*self.paths, *self.contents]).encode()).hexdigest()


@dataclass(frozen=True)
class Match:
    """Where the samples of an earlier state of the data are now.

    Attributes:
        places: Index now of each earlier sample; None if it is gone.
        renamed: Earlier and present path of samples of the same content.
        changed: Paths of files whose content is another.
        gone: Paths or contents of samples that are gone.
        added: Indices of samples that are new.
    """

    places: list[int | None]
    renamed: list[tuple[str, str]]
    changed: list[str]
    gone: list[str]
    added: list[int]

    @property
    def moved(self) -> bool:
        """Whether any sample has another index."""
        return any(place != number for number, place in enumerate(self.places))

    def describe(self) -> str:
        """Describe in one line what is different; empty if nothing is."""
        first, last = self.renamed[0] if self.renamed else ("", "")
        parts = [
            f"{len(self.renamed)} renamed ({first} is {last})" if self.renamed else "",
            f"{len(self.changed)} with another content ({self.changed[0]})" if self.changed else "",
            f"{len(self.gone)} gone ({self.gone[0]})" if self.gone else "",
            f"{len(self.added)} new" if self.added else "",
        ]
        return ", ".join(filter(None, parts)) or ("another order" if self.moved else "")


def identify(images: Images) -> Identities:
    """Return path and content of each sample of a part. Every file is read once; its hash is remembered.

    Raises:
        InputError: If a file or an item cannot be read.
    """
    paths, contents = _describe(images, range(len(images)))
    return Identities(paths, number_copies(contents))


def number_copies(contents: Sequence[str]) -> list[str]:
    """Give each further sample of equal content its number, whatever the suffixes are.

    >>> number_copies(["a", "b", "a", "", "b#2", ""])
    ['a', 'b', 'a#2', '', 'b#2', '']
    """
    counts: Counter[str] = Counter()
    numbered = []
    for content in map(base_content, contents):
        counts[content] += 1
        numbered.append(f"{content}#{counts[content]}" if content and counts[content] > 1 else content)
    return numbered


def match(earlier: Identities, now: Identities) -> Match:
    """Find the samples of an earlier state of the data: by path and content, else by content, else by path.

    A file that was renamed is found by its content, and a file that was replaced by its path. A sample without a file
    is found by its content alone.
    """
    if earlier == now and all(map(max, earlier.paths, earlier.contents)):  # each has a path or a content
        return Match([*range(len(now))], [], [], [], [])
    places: list[int | None] = [None] * len(earlier)
    free = dict.fromkeys(range(len(now)))
    before, after = ([*map(base_content, one.contents)] for one in (earlier, now))
    for old, new in (
        (zip(earlier.paths, before, strict=True), zip(now.paths, after, strict=True)),
        (before, after),
        (earlier.paths, now.paths),
    ):
        names = [*new]
        found = defaultdict[Any, deque[int]](deque)
        for number in free:
            found[names[number]].append(number)
        for number, name in enumerate(old):
            if places[number] is None and name and name != ("", "") and found[name]:
                places[number] = there = found[name].popleft()
                del free[there]
    renamed, changed = [], []
    for number, place in enumerate(places):
        if place is None:
            continue
        if earlier.paths[number] != now.paths[place]:
            renamed.append((earlier.paths[number], now.paths[place]))
        elif before[number] != after[place]:
            changed.append(now.paths[place])
    gone = [earlier.paths[n] or earlier.contents[n] for n, place in enumerate(places) if place is None]
    return Match(places, renamed, changed, gone, [*free])


def base_content(content: str) -> str:
    """Return the content of a sample without its suffix, so that equal samples have equal contents."""
    return content.partition("#")[0]


def hash_item(item: Any) -> str:
    """Hash the values of an item: 16 letters.

    Args:
        item: A PIL image, tensor, array, number, text, None, or a sequence or mapping of these.
    """
    digest = hashlib.blake2b(digest_size=8)
    _feed(item, digest)
    return letters(digest.hexdigest())


def _feed(item: Any, digest: hashlib.blake2b) -> None:
    if isinstance(item, Tensor) and item.layout == torch.strided and not (item.is_nested or item.is_conj()):
        digest.update(f"{str(item.dtype).removeprefix('torch.')} {[*item.shape]}".encode())
        digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(item, np.ndarray | np.generic) and item.dtype != object:
        digest.update(f"{item.dtype} {[*item.shape]}".encode())
        digest.update(np.ascontiguousarray(item).reshape(-1).view(np.uint8).data)
    elif isinstance(item, Image.Image):
        digest.update(f"{item.mode} {item.size} {item.getpalette()}".encode())
        digest.update(item.tobytes())
    elif isinstance(item, Mapping):
        for key, value in item.items():
            digest.update(repr(key).encode())
            _feed(value, digest)
    elif isinstance(item, tuple | list):
        digest.update(f"{len(item)}:".encode())
        for value in item:
            _feed(value, digest)
    elif isinstance(item, str | bytes | int | float | None):
        digest.update(repr(item).encode())
    else:
        digest.update(fingerprint(item).encode())


def _describe(images: Images, numbers: Sequence[int]) -> tuple[list[str], list[str]]:
    """Return relative paths and contents of some samples; equal contents are not numbered."""
    if isinstance(images, Subset):
        return _describe(images.dataset, [int(images.indices[number]) for number in numbers])  # type: ignore[arg-type]
    if isinstance(images, ConcatDataset):
        return _describe_parts(images, numbers)
    if isinstance(images, TokenizedTexts):  # whatever the tokenizer
        return [""] * len(numbers), [hash_item(images.texts[number]) for number in numbers]
    values = _values(images)
    if values is not None and numbers and path_of([images], numbers[0]) is None:
        return [""] * len(numbers), _hash_rows(values, numbers)
    paths = [path_of([images], number) for number in numbers]
    relative = _relative(paths, getattr(images, "root", None))
    if values is not None:
        return relative, _hash_rows(values, numbers)
    files = [os.path.isfile(path) if path else False for path in paths]  # noqa: PTH113  (there may be a million)
    if len(numbers) >= _MANY:
        rank_zero_info(f"data: hashing {len(numbers)} samples of {type(images).__name__}, each once")
    if numbers and all(files):
        contents = hash_files(map(str, paths))
        if len({*paths}) < len(images) and (variants := _variants(images)):
            for place, number in enumerate(numbers):
                if number in variants:
                    contents[place] = hash_item((contents[place], variants[number]))
        if has_several_inputs(images, numbers[0]) and any(items := _read(images, numbers)):
            contents = [*map(hash_item, zip(contents, items, strict=True))]  # not the file alone
        return relative, contents
    return relative, _read(images, numbers)


def _describe_parts(images: ConcatDataset[Any], numbers: Sequence[int]) -> tuple[list[str], list[str]]:
    """Describe samples of joined datasets: contents as of each dataset alone, and paths that differ."""
    contents = [""] * len(numbers)
    places_of = defaultdict[int, list[int]](list)
    for place, number in enumerate(numbers):
        places_of[bisect_right(images.cumulative_sizes, number)].append(place)
    for part, places in places_of.items():
        first = images.cumulative_sizes[part - 1] if part else 0
        found = _describe(images.datasets[part], [numbers[place] - first for place in places])[1]  # type: ignore[arg-type]
        for place, content in zip(places, found, strict=True):
            contents[place] = content
    return _relative([path_of([images], number) for number in numbers], None), contents


def _variants(images: Images) -> dict[int, Any]:
    """Return by number what distinguishes an item from the others of its file, as the tiles of a picture.

    A file that is only listed several times is not among them, since its items are equal.
    """
    numbers_of = defaultdict[str | None, list[int]](list)
    for number in range(len(images)):
        numbers_of[path_of([images], number)].append(number)
    shared = [numbers for numbers in numbers_of.values() if len(numbers) > 1]
    if not shared:
        return {}
    if (given := getattr(images, "variants", None)) is not None:
        return dict(enumerate(given))
    flat = [*chain.from_iterable(shared)]
    items = dict(zip(flat, _read(images, flat), strict=True))
    return {n: items[n] for numbers in shared if len({items[n] for n in numbers}) > 1 for n in numbers}


def _read(images: Images, numbers: Sequence[int]) -> list[str]:
    """Hash items that are read one by one; all hashes are empty if the dataset itself is random."""
    some = np.linspace(0, len(numbers) - 1, min(len(numbers), _CHECKED)).astype(int).tolist()
    with isolate_rng(include_cuda=False):
        contents = [hash_item(content_of(read_image([images], number))) for number in numbers]
        same = all(hash_item(content_of(read_image([images], numbers[place]))) == contents[place] for place in some)
    return contents if same else [""] * len(numbers)


def _hash_rows(values: Tensor | np.ndarray, numbers: Sequence[int]) -> list[str]:
    """Hash rows of a tensor or array: the hashes of :func:`hash_item`, in less time."""
    if values.dtype == object or 0 in values.shape:
        return [hash_item(values[number]) for number in numbers]
    dtype = str(values.dtype).removeprefix("torch.")
    start = hashlib.blake2b(f"{dtype} {[*values.shape[1:]]}".encode(), digest_size=8)
    if isinstance(values, Tensor):
        rows = values.detach().cpu().contiguous().reshape(len(values), -1).view(torch.uint8).numpy()
    else:
        rows = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    contents = []
    for number in numbers:
        digest = start.copy()
        digest.update(rows[number].data)
        contents.append(letters(digest.hexdigest()))
    return contents


def _values(images: Images) -> Any:
    """The values of all items where they are in memory, else None."""
    if type(images) is TensorDataset:
        return images.tensors[0]
    data = getattr(images, "data", None)
    known = type(images).__module__.startswith("torchvision.datasets.") and isinstance(data, Tensor | np.ndarray)
    return data if known else None


def _relative(paths: Sequence[str | None], root: Any) -> list[str]:
    """Make paths relative to the root; without one, to the parent of their common folder. Empty without a path.

    The name of the common folder stays in the path, so that ``cats/0.jpg`` and ``dogs/0.jpg`` differ where a dataset
    holds one of the folders.
    """
    absolute = [os.path.abspath(path) if path else "" for path in paths]  # noqa: PTH100  (resolve() follows links)
    known = [*filter(None, absolute)]
    if not known:
        return [""] * len(paths)
    base = os.path.abspath(root) if isinstance(root, str | Path) else ""  # noqa: PTH100
    start = base.rstrip(os.sep) + os.sep
    if not base or not all(path.startswith(start) for path in known):
        common = os.path.commonpath([os.path.dirname(path) for path in known])  # noqa: PTH120
        start = os.path.dirname(common).rstrip(os.sep) + os.sep  # noqa: PTH120
    return [normal_path(path.removeprefix(start)) for path in absolute]


def normal_path(path: str) -> str:
    """Write a path with ``/`` between its parts, in Unicode NFC."""
    return unicodedata.normalize("NFC", path.replace(os.sep, "/"))
