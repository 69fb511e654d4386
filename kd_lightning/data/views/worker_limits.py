"""Limits of the system that worker processes can reach: shared memory and open files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from kd_lightning.errors import InputError

try:
    import resource
except ImportError:  # on Windows, which has no such limit
    resource = None  # type: ignore[assignment]

_SHARED = Path("/dev/shm")
_TENSORS = 4
"""Tensors of a batch, each of which is an open file."""
_SPARE_FILES = 24


def share(tensor: Tensor) -> Tensor:
    """Move a batch's tensor to shared memory, through which a worker process sends it; elsewhere leave it as it is.

    The thread that sends a batch would otherwise move it there. If the memory is full, that thread loses the batch, and
    the main process waits for ever.

    Raises:
        InputError: If the shared memory is full.
    """
    if get_worker_info() is None:
        return tensor
    try:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        free = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else 0
        raise InputError(
            f"num_workers: {_SHARED}, through which worker processes send batches, is full ({free / 1e6:.1f} MB are "
            f"free, a batch needs {tensor.nbytes / 1e6:.1f} MB); lower num_workers or batch_size, or enlarge {_SHARED}"
        ) from error
    return tensor


def check_open_files(loader: DataLoader[Any], more_tensors: int = 0) -> None:
    """Check that this process may open the files through which a loader's workers send batches.

    Args:
        loader: The loader.
        more_tensors: Tensors of a batch beyond inputs, second view, index and view.

    Raises:
        InputError: If the limit of the system is too low.
    """
    folder = Path("/proc/self/fd")
    is_running = loader._iterator is not None  # persistent workers, after the first epoch
    if not loader.num_workers or is_running or resource is None or not folder.is_dir():
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    queues, in_flight = 4 * loader.num_workers, (_TENSORS + more_tensors) * (loader.prefetch_factor or 0)
    try:
        used = len([*folder.iterdir()])
    except OSError:  # not even this folder can be opened
        used = limit
    needed = used + queues + in_flight * (loader.num_workers if loader.pin_memory else 1) + _SPARE_FILES
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise InputError(
            f"num_workers: {loader.num_workers} workers need about {needed} open files, but the limit is {limit}; "
            "lower num_workers, or raise the limit (ulimit -n)"
        )
