"""What must be the same when a fit resumes: split, pool, labels, and the settings of the training batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from kd_lightning.cache.content import fingerprint
from kd_lightning.data.identity import hash_item
from kd_lightning.data.sources.images import Images, has_several_inputs, part_of, read_image
from kd_lightning.data.sources.items import STRONG_INPUTS, content_of, split_strong
from kd_lightning.errors import InputError

_HASHED = 64  # number of samples whose own strong views are compared
_TEXT = 120  # longest text of a transform in a message
_REASONS = {
    "samples": (
        "the images or the unlabeled pool have changed since the checkpoint (the hash of paths and contents differs); "
        "resume with the images of that run, or start a new run"
    ),
    "split": (
        "the checkpoint was trained on another split; resume with the same source, labeled, label_file, val_size, "
        "group and seed, or with labeled: the split.json of its run (it holds the labels of label_file) and no "
        "label_file"
    ),
    "labels": (
        "the checkpoint was trained on other labels (their hash differs); resume with the same label_noise and coarse, "
        "or start a new run"
    ),
}


def batch_settings(datamodule: Any, processes: int) -> dict[str, Any]:
    """Return the settings that decide which samples a training batch holds and how they look.

    Args:
        datamodule: A ``SemiSupervisedDataModule``.
        processes: Number of processes. Sizes of batches are those of all processes together: the same samples are in a
            batch of 64 of one process and in two batches of 32.

    Returns:
        Values by name. A transform is given as its text and its fingerprint.
    """
    sizes = {name: getattr(datamodule, name) for name in ("batch_size", "labeled_batch_size")}
    numbers = {name: getattr(datamodule, name) for name in ("seed", "num_views", "views_per_epoch", "sampler")}
    # pictures of another size have other pixels
    numbers["decoded_side"] = None if datamodule.decoded is None else datamodule.decoded_side
    transforms = {name: getattr(datamodule, name) for name in ("train_transform", "strong_transform", "mix")}
    loader = datamodule.train_dataloader()
    return {
        **{name: None if size is None else size * processes for name, size in sizes.items()},
        **numbers,
        "steps_per_epoch": len(loader),
        STRONG_INPUTS: _hash_of_strong(loader.dataset.images, loader.dataset.indices),
        **describe_transforms(transforms),
    }


def _hash_of_strong(images: Sequence[Images], indices: Tensor) -> str | None:
    """Return a hash of some samples' own strong views, which their content leaves out; None if they have none."""
    if not len(indices) or not has_several_inputs(*part_of(images, int(indices[0]))):
        return None
    some = indices[torch.linspace(0, len(indices) - 1, min(len(indices), _HASHED)).long()].tolist()

    def read() -> list[str]:
        views = (split_strong(read_image(images, sample))[1] for sample in some)
        return [hash_item(content_of(view)) for view in views if view is not None]

    with isolate_rng(include_cuda=False):
        if split_strong(read_image(images, some[0]))[1] is None:
            return None
        first, second = read(), read()
    return hash_item(first) if first == second else "other ones each time"


def describe_transforms(transforms: dict[str, Any]) -> dict[str, Any]:
    """Return the text and the fingerprint of each transform, by name; None for none."""
    return {name: None if t is None else [_text(t), fingerprint(t)] for name, t in transforms.items()}


def check_resume(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the state of a datamodule in a checkpoint with the state now.

    Args:
        saved: ``{"settings": {name: value}}`` and hashes by name. What an older checkpoint lacks is not compared.
        now: The same of this fit. Hashes that it lacks are not compared.

    Raises:
        InputError: If something differs.
    """
    settings = {name: (saved.get("settings", {}).get(name, value), value) for name, value in now["settings"].items()}
    steps = settings.pop("steps_per_epoch", (0, 0))
    for name, (before, value) in settings.items():
        if before == value:
            continue
        texts = [pair[0] if isinstance(pair, list) else pair for pair in (before, value)]
        hint = " (its code or attributes differ)" if texts[0] == texts[1] else ""
        hint = " (rows of all processes)" if name.endswith("batch_size") else hint
        raise InputError(
            f"{name}: the checkpoint was trained with {texts[0]}, got {texts[1]}{hint}; resume with the same, or start "
            "a new run"
        )
    for name, reason in _REASONS.items():
        if name in now and saved.get(name, now[name]) != now[name]:
            raise InputError(reason)
    if steps[0] != steps[1]:  # a row that is left over on a process joins the batch before
        raise InputError(
            f"an epoch of the checkpoint had {steps[0]} steps, and now has {steps[1]}; resume with as many processes, "
            "or start a new run"
        )


def _text(transform: Any) -> str:
    text = " ".join(repr(transform).split())
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}..."
