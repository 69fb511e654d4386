"""Coverage and precision of pseudo-labels while a network trains, for benchmarks/selections.py."""

import torch
from lightning.pytorch import Callback

from kd_lightning import PseudoLabelRefresh


class Watch(Callback):
    """Compare pseudo-labels with the hidden truth. It only reads: weights and selections move as without it.

    Online, the figures of a record are those of all decisions since the last record, in the views that the selection
    got. Refreshed, they are those of the table in use, of the whole pool; before the first refresh nothing is accepted.

    Args:
        truth: True class of each sample by index, (N,); -1 for a sample of an unknown class.
        every: Steps from one record to the next.

    Attributes:
        records: ``step``, ``coverage`` (mean weight), ``precision`` (share of the weight that is right), ``of all``
            (share of all pseudo-labels that is right) and ``unknown`` (mean weight of samples of unknown classes), in
            %. None if there is no such sample, or no weight.
    """

    def __init__(self, truth, every):
        self.truth, self.every = truth, every
        self.records = []
        self._seen = []

    def on_fit_start(self, trainer, module):
        """Runs at the start of a fit. Listens to the module's selection, if it has one that is called in each step."""
        if getattr(module, "pseudo_labels", "") == "online":
            module.selection.register_forward_hook(self._listen)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """Runs after each step. Makes a record if it is due."""
        if trainer.global_step % self.every:
            return
        refresh = next((one for one in trainer.callbacks if isinstance(one, PseudoLabelRefresh)), None)
        if refresh is not None and refresh.table is not None:
            table = refresh.table
            self._seen = [(table.index, table.label, table.weight)]
        if self._seen or refresh is not None:
            self.records.append({"step": trainer.global_step} | self._figures())
        self._seen = []

    def _listen(self, selection, inputs, outputs):
        target, weight = outputs
        self._seen.append((inputs[2].clone(), target.argmax(dim=1), weight.clone()))

    def _figures(self):
        if not self._seen:
            return {"coverage": 0.0, "precision": None, "of all": None, "unknown": None}
        index, label, weight = (torch.cat(column) for column in zip(*self._seen, strict=True))
        truth = self.truth[index]
        right, weight, unknown = (label == truth).double(), weight.double(), truth < 0
        return {
            "coverage": _percent(weight.sum(), len(weight)),
            "precision": _percent((right * weight).sum(), weight.sum()),
            "of all": _percent(right.sum(), len(right)),
            "unknown": _percent(weight[unknown].sum(), unknown.sum()),
        }


def _percent(part, whole):
    return round(100 * float(part / whole), 2) if whole > 0 else None
