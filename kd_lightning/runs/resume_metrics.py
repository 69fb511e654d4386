"""Training metrics of an epoch that was interrupted: the sums that Lightning's ``self.log`` has gathered so far.

A checkpoint of Lightning does not hold them. After a resume the epoch's means would be those of the remaining batches,
and values that are logged at an epoch's start would be missing.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)

_PENDING = "pending_sums"  # the attribute of the results that holds what was not logged again yet
_ARGUMENTS = ("fx", "name", "prog_bar", "logger", "on_step")


def training_sums(results: _ResultCollection) -> dict[str, dict[str, Any]]:
    """Return the sums of the epoch's tensors, over all processes where they are synchronised. All must call this."""
    found = dict(vars(results).get(_PENDING, {}))
    for key, metric in results.valid_items():
        meta = metric.meta
        if metric.is_tensor and meta.on_epoch:
            found[key] = {
                "arguments": {name: getattr(meta, name) for name in _ARGUMENTS}
                | {"reduce_fx": meta.reduce_fx.__name__},
                "value": meta.sync(metric.value.clone()).cpu(),
                "count": meta.sync(metric.cumulated_batch_size.clone()).cpu() if meta.is_mean_reduction else None,
            }
    return found


def restore_sums(results: _ResultCollection, sums: dict[str, dict[str, Any]]) -> None:
    """Add the sums of the first batches to each metric when it is logged again."""
    pending = dict(sums)

    def log(fx: str, name: str, *args: Any, **kwargs: Any) -> None:
        type(results).log(results, fx, name, *args, **kwargs)
        if (saved := pending.pop(f"{fx}.{name}", None)) is not None:
            _add(results[f"{fx}.{name}"], saved)

    vars(results).update({_PENDING: pending, "log": log})


def finish_sums(results: _ResultCollection) -> list[str]:
    """Make metrics of the sums that were not logged again. Call it before the hooks at the epoch's end.

    Returns:
        The keys of these metrics. They must be removed after the epoch.
    """
    pending = vars(results).pop(_PENDING, {})
    vars(results).pop("log", None)
    for key, saved in pending.items():
        meta = _Metadata(**saved["arguments"])
        meta.sync = _Sync()
        metric = results[key] = _ResultMetric(meta, is_tensor=True)
        _add(metric, saved)
        mean = meta.is_mean_reduction
        metric._computed = metric.value / metric.cumulated_batch_size if mean else metric.value
    return list(pending)


def _add(metric: _ResultMetric, saved: dict[str, Any]) -> None:
    meta, value, device = metric.meta, saved["value"].to(metric.value.device), metric.value.device
    if meta.is_mean_reduction:
        metric.cumulated_batch_size = saved["count"].to(device) + metric.cumulated_batch_size
    if meta.is_max_reduction or meta.is_min_reduction:
        metric.value = (torch.maximum if meta.is_max_reduction else torch.minimum)(value, metric.value)
    else:
        metric.value = value + metric.value
    metric._computed = None
