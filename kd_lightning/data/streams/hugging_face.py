"""A stream of a Hugging Face dataset, for YAML."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from kd_lightning.errors import InputError

_SHARDS = 64


class HuggingFaceStream(IterableDataset[Any]):
    """A split of a Hugging Face dataset that is read in order, as ``load_dataset(..., streaming=True)`` reads it.

    It is opened when it is first used. In Python, a ``datasets.IterableDataset`` may be given to
    :class:`~kd_lightning.data.stream_datamodule.StreamDataModule` as it is.

    Args:
        path: Folder that ``save_to_disk`` has written, or what ``datasets.load_dataset`` takes: the name of a dataset,
            or a format such as ``parquet``, ``json``, ``imagefolder`` or ``webdataset``.
        split: Name of the split.
        data_files: Files of a format, with wildcards. Default: None, which means none.
        shuffle_buffer: Samples among which the next one is drawn, at least 2. Shards are shuffled, too. Default: None,
            which means that the order is that of the dataset.
        seed: Seed of the shuffling. The order of each epoch is another one.

    Raises:
        InputError: If ``shuffle_buffer`` is out of range; on first use, if the dataset cannot be opened.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        data_files: str | list[str] | None = None,
        shuffle_buffer: int | None = None,
        seed: int = 0,
    ) -> None:
        if shuffle_buffer is not None and shuffle_buffer < 2:
            raise InputError(f"shuffle_buffer must be at least 2, or null, got {shuffle_buffer}")
        self.path = path
        self.split = split
        self.data_files = data_files
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed

    @cached_property
    def stream(self) -> Any:
        """The ``datasets.IterableDataset``."""
        try:
            from datasets import load_dataset, load_from_disk
        except ImportError as error:
            raise InputError("HuggingFaceStream needs datasets: pip install 'kd-lightning[hf]'") from error
        folder = Path(self.path).expanduser()
        try:
            if {"dataset_dict.json", "state.json"} & {file.name for file in folder.glob("*.json")}:
                saved = load_from_disk(str(folder))
                saved = saved[self.split] if isinstance(saved, dict) else saved
                stream = saved.to_iterable_dataset(num_shards=max(1, min(_SHARDS, len(saved))))
            else:
                files = {} if self.data_files is None else {"data_files": self.data_files}
                stream = load_dataset(self.path, split=self.split, streaming=True, **files)
        except Exception as error:  # of many classes
            text = " ".join(str(error).split())
            raise InputError(f"HuggingFaceStream: {self.path}, split {self.split}: {text:.200}") from error
        if self.shuffle_buffer is None:
            return stream
        return stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)

    def __iter__(self) -> Any:
        return iter(self.stream)
