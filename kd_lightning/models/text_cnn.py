"""A small network for texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextCNN(nn.Module):
    """Convolutions over word vectors, the maximum over the text, and a linear layer (Kim 2014, arXiv:1408.5882).

    Each token begins one window of each width; what a window lacks at the text's end is 0. Padding begins no window, so
    that logits do not depend on how far a text is padded.

    Args:
        num_classes: Number of logits.
        vocab_size: Number of tokens; that of BERT's uncased word pieces by default.
        dim: Size of a word vector.
        channels: Channels of each convolution.
        widths: Widths of the convolutions, in tokens.
        dropout: Probability of dropping a feature before the linear layer.

    Shapes:
        Input ``input_ids`` (B, T) and ``attention_mask`` (B, T), 0 for padding; without a mask, all tokens count.
        Output (B, num_classes).

    >>> sum(p.numel() for p in TextCNN(num_classes=3, vocab_size=100, dim=4, channels=2).parameters())
    523
    """

    def __init__(
        self,
        num_classes: int,
        vocab_size: int = 30522,
        dim: int = 32,
        channels: int = 64,
        widths: tuple[int, ...] = (3, 4, 5),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, dim)
        self.widths = tuple(widths)
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, channels, width) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels * len(widths), num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, num_classes)."""
        words = self.words(input_ids).transpose(1, 2)
        mask = None if attention_mask is None else attention_mask.unsqueeze(1).to(words.dtype)
        words = words if mask is None else words * mask
        features = []
        for width, convolution in zip(self.widths, self.convolutions, strict=True):
            found = convolution(F.pad(words, (0, width - 1))).relu()
            features.append((found if mask is None else found * mask).amax(dim=-1))
        logits: Tensor = self.head(self.dropout(torch.cat(features, dim=1)))
        return logits
