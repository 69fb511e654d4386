"""A figure of the teacher's features above the student's."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor


def hint_figure(hint: Tensor, projected: Tensor, title: str, samples: int = 2, channels: int = 6) -> Figure:
    """Draw hint maps above the student's projected maps, for the first samples and the channels that vary most.

    Args:
        hint: The teacher's features: maps (B, C, H, W). Tokens (B, C, N), sequences (B, C, L) and vectors (B, C) become
            one matrix a sample. Of volumes (B, C, ..., H, W) the middle slice is drawn.
        projected: The projector's output, of the same shape.
        title: Title of the figure.
        samples: Number of samples.
        channels: Largest number of channels.
    """
    hint, projected = (_to_maps(features[:samples].detach().float().cpu()) for features in (hint, projected))
    finite = hint.nan_to_num(0.0, 0.0, 0.0)
    shown = finite.var(dim=(0, 2, 3), correction=0).topk(min(channels, hint.shape[1])).indices
    figure = Figure(figsize=(1.3 * len(shown) + 0.8, 2.6 * len(hint) + 0.4))
    axes = figure.subplots(2 * len(hint), len(shown), squeeze=False)
    for row, axis in enumerate(axes):
        source = (hint, projected)[row % 2][row // 2]
        axis[0].set_ylabel(("hint", "projected")[row % 2])
        for column, channel in enumerate(shown):
            low, high = finite[row // 2][channel].aminmax()
            axis[column].imshow(source[channel].numpy(), vmin=float(low), vmax=float(high), aspect="auto")
            axis[column].set(xticks=[], yticks=[])
            if row == 0:
                axis[column].set_title(f"channel {channel}" if hint.shape[1] > 1 else "", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def _to_maps(features: Tensor) -> Tensor:
    """Return features of any shape as maps (B, C, H, W)."""
    if features.ndim < 4:
        return features.reshape(len(features), 1, -1, features.shape[-1] if features.ndim > 1 else 1)
    while features.ndim > 4:
        features = features[:, :, features.shape[2] // 2]
    return features
