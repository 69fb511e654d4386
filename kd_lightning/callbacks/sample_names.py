"""Paths and contents of the samples that a loader has loaded, for files of predictions."""

from __future__ import annotations

from collections.abc import Callable
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
