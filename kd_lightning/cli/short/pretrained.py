"""Weights for a teacher: of a file, or of the caches of torchvision and timm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kd_lightning.cli.short.networks import Network
from kd_lightning.errors import InputError
from kd_lightning.runs.run import WEIGHTS
from kd_lightning.runs.weights import class_names_of, load_weights

CACHE = "cache"
"""The value of ``--pretrained`` that means the caches of torchvision and timm."""
_NAMES = ("model.safetensors", "pytorch_model.bin")  # of weights on Hugging Face


class Start(NamedTuple):
    """Weights that a teacher has before it is trained.

    Attributes:
        path: The file; None for new weights.
        ready: Whether they were trained on the classes of the folder: the teacher needs no training.
        classes: Number of classes of the file if it is not ready; None for the network's default.
        line: What was found.
    """

    path: Path | None
    ready: bool
    classes: int | None
    line: str


def find_start(teacher: Network, given: str | None, classes: Sequence[str], *, download: bool) -> Start:
    """Find the weights of a teacher. Nothing is downloaded unless ``download`` is set.

    Args:
        teacher: The teacher.
        given: A file, the folder of a run, or ``"cache"``. None means new weights, or with ``download`` the cache.
        classes: Names of the folder's classes.
        download: Whether weights that no cache holds are downloaded.

    Raises:
        InputError: If there are no such weights, or they do not fit the network or the classes.
    """
    if given is None and not download:
        return Start(None, False, None, f"{teacher.name} begins with new weights (--pretrained names others)")
    if given is None or given == CACHE:
        path, where = _find_cached(teacher, download=download)
        _check(teacher, path, None)
        return Start(path, False, None, f"{teacher.name} begins with weights {where}: {path}; its last layer is new")
    if download:
        raise InputError(f"--download is for weights of a cache; leave it out, or --pretrained {given}")
    path = Path(given).expanduser()
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--pretrained: there is no file {path}")
    names = class_names_of(path) if path.suffix == ".safetensors" else None
    if names is not None and names != [*classes]:
        return _other_classes(teacher, path, len(names))
    try:
        _check(teacher, path, len(classes))
    except InputError as error:
        try:
            return _other_classes(teacher, path, None)
        except InputError:
            raise error from None
    line = (
        f"{teacher.name} has the weights of {path}, and is not trained; its accuracy is too high if it was trained on "
    )
    return Start(path, True, None, f"{line}test pictures")


def _other_classes(teacher: Network, path: Path, count: int | None) -> Start:
    """Return weights of other classes, which are the first ones of a teacher with a new last layer."""
    _check(teacher, path, count)
    return Start(path, False, count, f"{teacher.name} begins with the weights of {path}; its last layer is new")


def _check(teacher: Network, path: Path, classes: int | None) -> None:
    try:
        load_weights(teacher.build(classes), path)
    except InputError as error:
        raise InputError(f"--pretrained: {error}") from error


def _find_cached(teacher: Network, *, download: bool) -> tuple[Path, str]:
    """Return the file of a network's weights, and where it comes from."""
    if teacher.place == "torchvision":
        return _of_torchvision(teacher, download=download)
    if teacher.place == "timm":
        return _of_timm(teacher, download=download)
    raise InputError(
        f"--pretrained: only networks of torchvision and timm have weights in a cache, got {teacher.name}; name a file"
    )


def _of_torchvision(teacher: Network, *, download: bool) -> tuple[Path, str]:
    from torchvision import models

    known = models.get_model_weights(teacher.class_path.rpartition(".")[2])
    urls = [known.DEFAULT.url, *(one.url for one in known)] if len(known) else []
    return _of_urls(teacher, [*dict.fromkeys(urls)], download=download)


def _of_urls(teacher: Network, urls: Sequence[str], *, download: bool) -> tuple[Path, str]:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for url in urls:
        if (path := folder / url.rpartition("/")[2]).is_file():
            return path, "of torch's cache"
    if not urls:
        raise InputError(f"--pretrained: there are no weights of {teacher.name}")
    if not download:
        raise _missing(teacher, folder)
    path = folder / urls[0].rpartition("/")[2]
    try:
        torch.hub.load_state_dict_from_url(urls[0], map_location="cpu", progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"--download: {urls[0]} cannot be downloaded: {error}") from error
    return path, f"downloaded from {urls[0]}"


def _of_timm(teacher: Network, *, download: bool) -> tuple[Path, str]:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    config: Any = get_pretrained_cfg(teacher.arguments["model_name"])
    if config is None or not config.has_weights:
        raise InputError(f"--pretrained: there are no weights of {teacher.name}")
    if not config.hf_hub_id:
        return _of_urls(teacher, [config.url] if config.url else [], download=download)
    names = [config.hf_hub_filename] if config.hf_hub_filename else [*_NAMES]
    for name in names:
        found = try_to_load_from_cache(config.hf_hub_id, name)
        if isinstance(found, str):
            return Path(found), "of the Hugging Face cache"
    if not download:
        raise _missing(teacher, Path(constants.HF_HUB_CACHE))
    reason: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(config.hf_hub_id, name)), f"downloaded from {config.hf_hub_id}"
        except Exception as error:  # of a connection, a file that is not there, or a disk
            reason = reason or error
    text = (str(reason).splitlines() or [type(reason).__name__])[0]
    raise InputError(f"--download: {config.hf_hub_id} cannot be downloaded: {text}") from reason


def _missing(teacher: Network, folder: Path) -> InputError:
    return InputError(
        f"--pretrained: {folder} has no weights of {teacher.name}; --download fetches them, or name a file"
    )
