"""A source whose own validation part is a part of training, so that folds may train on it."""

from __future__ import annotations

from kd_lightning.data.sources.source import Parts, Source, check_parts, join_val


class JoinedSource(Source):
    """Another source, with its validation part behind its training part.

    Args:
        source: The source.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.train_transform = source.train_transform
        self.eval_transform = source.eval_transform
        self.stored_side = source.stored_side

    def prepare(self) -> None:
        """Download the missing files of the source."""
        self.source.prepare()

    def load(self) -> Parts:
        """Return its parts, without one for validation."""
        return join_val(check_parts(self.source.load(), type(self.source).__name__))._replace(own_val=0)
