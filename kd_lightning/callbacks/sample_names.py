"""Paths and contents of the samples that a loader has loaded, for files of predictions."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, Literal

from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.sources.pixels import DecodedImages
from kd_lightning.data.views.dataset import ViewDataset

Names = Callable[[int], tuple[str, str]]


def sample_names(datamodule: Any, loaders: Any, part: Literal["train", "test"]) -> Names:
    """Return a function from the index of a sample to its path and content; both are empty if they are not known.

    Args:
        datamodule: Any datamodule. Its ``identities(part)``, if it has the method, names the samples.
        loaders: The loader, or loaders, of which the first counts. Those of a ``SemiSupervisedDataModule`` count only
            if they load the images of one of its parts: a subclass may have loaders of other images.
        part: Part that the samples are of.
    """
    identities = getattr(datamodule, "identities", None)
    if isinstance(datamodule, SemiSupervisedDataModule):
        loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
        dataset = getattr(loader, "dataset", None)
        parts = datamodule.samples.parts if isinstance(dataset, ViewDataset) else None
        images = getattr(getattr(parts, part, None), "images", None)
        loaded = dataset.images[0] if isinstance(dataset, ViewDataset) else None
        loaded = loaded.part if isinstance(loaded, DecodedImages) else loaded
        if images is None or loaded is not images:
            identities = None
    if identities is None:
        return lambda index: ("", "")
    found = identities(part)
    return lambda index: (found.paths[index], found.contents[index]) if 0 <= index < len(found) else ("", "")


def file_stems(datamodule: Any, names: Names, part: Literal["train", "test"]) -> Callable[[int], str]:
    """Return a function from the index of a sample to the stem of a file for it. No two samples have the same.

    The stem is that of the sample's path. If two paths of the part have one stem, the index comes first in all.

    Args:
        datamodule: The datamodule that ``names`` are of.
        names: From :func:`sample_names`.
        part: Part that the samples are of.
    """
    identities = getattr(datamodule, "identities", None)
    paths = [] if identities is None or not names(0)[0] else [*identities(part).paths]
    stems = [PurePath(path).stem for path in paths]
    alone = len({unicodedata.normalize("NFC", stem).casefold() for stem in stems}) == len(stems)

    def stem_of(index: int) -> str:
        number = f"{index:0{max(6, len(str(len(stems))))}d}"
        if not 0 <= index < len(stems) or not stems[index]:
            return number
        return stems[index] if alone else f"{number}_{stems[index]}"

    return stem_of
