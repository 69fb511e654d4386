"""Whether more or less of a metric is better, by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, Literal

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from kd_lightning.errors import InputError

Direction = Literal["min", "max"]

_MIN = re.compile(
    "loss|err|error|kld?|jsd|r?mse|s?map?e|r?msle|nll|b?ce|ece|mce|brier|perplexity|ppl|divergence|distance|cost|"
    "difference|"
    "flips|[wc]er|fid|lpips|f[pn]r"
)
_MAX = re.compile(
    "acc|accuracy|f1|fbeta|precision|recall|sensitivity|specificity|t[pn]r|auroc|auc|auprc|m?ap|agreement|coverage|"
    "confidence|r2|rankme|m?iou|jaccard|dice|kappa|mcc|psnr|ssim|ndcg|mrr|bleu"
)
# terms of this package's objectives, also of the teacher or the peer that train beside the student
_TERM = re.compile(r"(teacher_|peer_)?(hard|soft|hint|unsupervised)|feature|global(_\d+)?")
_SUFFIX = re.compile(r"\d+|step|epoch|top|macro|micro|mean|avg|average|rate|score")  # as in accuracy_top5, error_rate
_NEGATION = re.compile("1|neg|negative|minus|inverse|inverted|negated")  # as in 1-accuracy


def direction_of(metric: str, terms: Collection[str] = ()) -> Direction | None:
    """Return ``"min"`` if less of a metric is better, ``"max"`` if more is, None if its name does not show it.

    The last part of the path decides, without the number of a data loader. In it, the last word decides.

    Args:
        metric: Name of the metric.
        terms: Names of an objective's terms. ``val/<term>`` and ``val/<term>/<layer>`` are losses.

    >>> [direction_of(name) for name in ("val/loss/1", "val/teacher_kl", "pseudo_labels/precision", "soft_weight")]
    ['min', 'min', 'max', None]
    """
    parts = metric.split("/")
    if len(parts) > 1 and parts[1] in terms:
        return "min"
    if any(part.startswith("recall_") for part in parts):  # val/recall_<class>; a class may be "loss" or "a/loss"
        return "max"
    while len(parts) > 1 and re.fullmatch(r"(dataloader_idx_)?\d+", parts[-1]):
        parts.pop()
    if "hint" in parts[:-1]:  # val/hint/<layer>
        return "min"
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", parts[-1]).lower()
    words = re.findall(r"f1|r2|[a-z]+|\d+", name)
    if not words or _NEGATION.fullmatch(words[0]):
        return None
    while len(words) > 1 and _SUFFIX.fullmatch(words[-1]):
        words.pop()
    if _MIN.fullmatch(words[-1]) or words[-2:] == ["cross", "entropy"] or _TERM.fullmatch(name):
        return "min"
    return "max" if _MAX.fullmatch(words[-1]) or _MAX.fullmatch(parts[-1].lower()) else None


def check_direction(key: str, monitor: str, mode: str, terms: Collection[str] = ()) -> None:
    """Raise InputError if a metric's name shows that the opposite mode is right.

    Args:
        key: What follows the metric, at the start of the message.
        monitor: Name of the metric.
        mode: ``"min"`` or ``"max"``.
        terms: Names of the objective's terms.
    """
    right = direction_of(monitor, terms)
    if right is not None and mode != right:
        better = "less" if right == "min" else "more"
        raise InputError(f"{key}: mode must be {right} with monitor {monitor}, of which {better} is better, got {mode}")


def check_callbacks(callbacks: Iterable[Any], terms: Collection[str] = ()) -> None:
    """Raise InputError if an EarlyStopping or ModelCheckpoint follows a known metric in the wrong direction."""
    for callback in callbacks:
        if isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor is not None:
            check_direction(type(callback).__name__, callback.monitor, callback.mode, terms)
