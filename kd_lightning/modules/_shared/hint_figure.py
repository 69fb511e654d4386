"""A picture of the teacher's features above those of the student."""

from __future__ import annotations

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor


def hint_figure(hint: Tensor, regressed: Tensor, title: str, samples: int = 2, channels: int = 6) -> Figure:
    """Hint maps above the student's regressed ones, of a few samples and the channels that vary most.

    Args:
        hint: (B, C, H, W); tokens (B, N, C) and vectors (B, C) are drawn as one matrix a sample.
        regressed: Of the same shape.
        title: Of the figure.
        samples: How many samples.
        channels: How many channels.
    """
    hint, regressed = (t[:samples].detach().float().cpu() for t in (hint, regressed))
    if hint.ndim < 4:
        hint, regressed = (t.reshape(len(t), 1, -1, t.shape[-1]) for t in (hint, regressed))
    chosen = hint.var(dim=(0, 2, 3), correction=0).topk(min(channels, hint.shape[1])).indices
    figure, axes = plt.subplots(
        2 * len(hint), len(chosen), squeeze=False, figsize=(1.3 * len(chosen) + 0.8, 2.6 * len(hint) + 0.4)
    )
    for row, axis in enumerate(axes):
        source = (hint, regressed)[row % 2][row // 2]
        axis[0].set_ylabel(("hint", "regressed")[row % 2])
        for column, channel in enumerate(chosen):
            low, high = hint[row // 2][channel].aminmax()
            axis[column].imshow(source[channel].numpy(), vmin=float(low), vmax=float(high), aspect="auto")
            axis[column].set(xticks=[], yticks=[])
            if row == 0:
                axis[column].set_title(f"channel {channel}" if hint.shape[1] > 1 else "", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure
