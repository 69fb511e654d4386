"""Contrastive representation distillation (CRD)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import check_temperature
from kd_lightning.losses.features.base import pair_rows, unit_vectors
from kd_lightning.losses.products import products
from kd_lightning.ranks import gather_rows


class CRDLoss(nn.Module):
    r"""Tell a sample's features in student and teacher from features of other samples (CRD).

    Both features are embedded by linear layers, and scaled to length 1. For an embedding v and a memory m of the other
    network's embeddings, with K negatives:

    .. math:: -\log h(v, m_i) - \sum_{k=1}^K \log\left(1 - h(v, m_k)\right), \qquad
              h(v, m) = \frac{e^{\langle v, m \rangle / \tau}}{e^{\langle v, m \rangle / \tau} + K Z}

    The loss is its mean over the samples i, for the student against the teacher's memory plus the reverse. Z is the
    mean of the exponentials in the first training step.

    Each network has a memory of an embedding of each sample, which starts at random numbers, the same for any seed, and
    moves to each new one by ``m <- momentum * m + (1 - momentum) * v``, scaled to length 1. The negatives are drawn
    once for all samples of a batch (the authors' code: for each one, which costs B times as much). Left out are a
    sample's own class, as far as the batches so far had labels ("exact" mode of the authors' code), and samples that
    were in no batch so far, as a validation part; the other negatives stand for them, so that they count as K.

    While it trains, all processes exchange embeddings, so that all have the same memories. These are part of
    ``state_dict``: 2 * samples * dim numbers. The loss has no value in validation, whose samples are in no memory.

    Source: Tian et al., "Contrastive Representation Distillation" (ICLR 2020), https://arxiv.org/abs/1910.10699,
    section 3. The defaults and the weight of 0.8 are those of the authors' code (RepDistiller), for CIFAR-100. It
    compares the vectors that are pooled for the classifiers.

    Args:
        dim: Length of the embeddings, at least 1.
        negatives: K, at least 1, and at most the number of samples.
        temperature: tau, above 0.
        momentum: Of the memories, in [0, 1).

    Shape:
        - student_feature: (B, C).
        - teacher_feature: (B, D). Half precision is computed in float32, apart from the linear layers.
        - output: scalar.

    Raises:
        InputError: If an argument is out of range, features are no vectors, ``build`` has not run, the batch lacks
            ``index`` or its rows are mixed, or if it is in eval mode.
    """

    needs_projector: ClassVar[bool] = False
    trains_only: ClassVar[bool] = True

    student_memory: Tensor
    teacher_memory: Tensor
    labels: Tensor
    log_scale: Tensor
    has_scale: Tensor

    def __init__(
        self, dim: int = 128, negatives: int = 16384, temperature: float = 0.07, momentum: float = 0.5
    ) -> None:
        super().__init__()
        for name, number in (("dim", dim), ("negatives", negatives)):
            if number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")
        check_temperature(temperature)
        if not 0.0 <= momentum < 1.0:
            raise InputError(f"momentum must lie in [0, 1), got {momentum}")
        self.dim = dim
        self.negatives = negatives
        self.temperature = float(temperature)
        self.momentum = float(momentum)
        self._is_scaled = False  # whether has_scale is known to be set: to read it would wait for the device

    def build(self, student: Sequence[int], teacher: Sequence[int], samples: int | None) -> None:
        """Make the embeddings and memories, see :class:`~kd_lightning.losses.protocols.FeatureLoss`.

        Raises:
            InputError: If a feature is no vector, if the number of samples is not known, as of a stream, or if there
                are more negatives than samples.
        """
        if len(student) != 1 or len(teacher) != 1:
            raise InputError(
                f"CRDLoss compares vectors (C,), got {[*student]} and {[*teacher]} of one sample; set pool"
            )
        self.student_embedding = nn.Linear(student[0], self.dim)
        self.teacher_embedding = nn.Linear(teacher[0], self.dim)
        self.reset(samples)

    def reset(self, samples: int | None) -> None:
        """Make new memories, as :meth:`build` does. Called at the start of each further fit."""
        if samples is None:
            raise InputError("CRDLoss stores each sample, so it needs data of a known number of samples, and no stream")
        if self.negatives > samples:
            raise InputError(f"negatives must be at most the number of samples, {samples}, got {self.negatives}")
        weight = self.student_embedding.weight
        bound = math.sqrt(3 / self.dim)  # so that the mean square of their length is 1
        generator = torch.Generator().manual_seed(0)  # the same memories on all processes, however they are seeded
        for name in ("student_memory", "teacher_memory"):
            memory = torch.empty(samples, self.dim).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, memory.to(weight))
        labels = torch.full((samples,), -2)  # -1 for unknown ones, -2 before the first batch
        self.register_buffer("labels", labels.to(weight.device))
        self.register_buffer("log_scale", torch.zeros(2).to(weight))  # logarithms of Z
        self.register_buffer("has_scale", torch.zeros((), dtype=torch.bool).to(weight.device))
        self._is_scaled = False

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        index, labels = self._samples_of(batch)
        features = pair_rows(student_feature, teacher_feature)
        if any(feature.ndim != 2 for feature in features):
            shapes = " and ".join(str([*feature.shape]) for feature in features)
            raise InputError(f"CRDLoss compares vectors (B, C), got {shapes}; set pool")
        student, teacher = (
            self._embed(layer, feature[: len(index)])
            for layer, feature in zip((self.student_embedding, self.teacher_embedding), features, strict=True)
        )
        every = gather_rows(torch.stack([index, labels], dim=1))
        self._store_labels(*every.unbind(1))
        drawn = torch.randint(len(self.labels), (self.negatives,), device=index.device)
        known = self.labels[drawn]
        left_out = (drawn == index.unsqueeze(1)) | (known == -2) | ((known == labels.unsqueeze(1)) & (known >= 0))
        pairs = ((student, self.teacher_memory), (teacher, self.student_memory))
        scores = [self._scores(embedding, memory, index, drawn) for embedding, memory in pairs]
        others = (~left_out).to(student.dtype)
        factors = others * (self.negatives / others.sum(dim=1, keepdim=True).clamp(min=1))
        self._set_scale(scores, factors)
        value = student.new_zeros(())
        for (positive, negative), log_scale in zip(scores, self.log_scale.to(student.dtype), strict=True):
            shift = log_scale + math.log(self.negatives)
            rows = F.logsigmoid(positive - shift) + (factors * F.logsigmoid(shift - negative)).sum(dim=1)
            value = value - rows.sum() / max(len(rows), 1)
        self._store_embeddings(every[:, 0], gather_rows(torch.cat([student, teacher], dim=1)))
        return value

    def _samples_of(self, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """Check the batch, and return which samples its rows are and their labels, (B,); -1 for unknown labels."""
        if not hasattr(self, "labels"):
            raise InputError("CRDLoss is not built; call build(student_shape, teacher_shape, samples) first")
        if not self.training:
            raise InputError("CRDLoss has no value in eval mode, since validation samples are in no memory")
        if batch is None or batch.index is None:
            raise InputError(
                "CRDLoss needs to know which samples a batch has, got no index; batches of SemiSupervisedDataModule "
                "have it"
            )
        if batch.partner is not None:
            raise InputError("CRDLoss stores embeddings of single samples; mixed rows (mix) are of two samples")
        index, y = batch.index.to(self.labels.device).long(), batch.y
        if batch.is_padding:
            index = index[:0]
        if index.device.type == "cpu" and ((index < 0) | (index >= len(self.labels))).any():
            raise InputError(f"index must be 0 ... {len(self.labels) - 1}, got {index.min()} ... {index.max()}")
        if y is None or y.ndim != 1 or y.is_floating_point():  # soft or several labels, or regression
            return index, torch.full_like(index, -1)
        return index, y[: len(index)].to(index).clamp(min=-1)

    def _embed(self, layer: nn.Linear, feature: Tensor) -> Tensor:
        embedding: Tensor = layer(feature.to(layer.weight.dtype))
        return unit_vectors(embedding.to(torch.promote_types(feature.dtype, embedding.dtype)), dim=1)

    def _scores(self, embedding: Tensor, memory: Tensor, index: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return products with the memory of the same samples (B,) and of the drawn ones (B, K), over temperature."""
        own, others = memory[index].to(embedding.dtype), memory[drawn].to(embedding.dtype)
        return (embedding * own).sum(dim=1) / self.temperature, products(embedding, others) / self.temperature

    @torch.no_grad()
    def _set_scale(self, scores: Sequence[tuple[Tensor, Tensor]], factors: Tensor) -> None:
        """Set Z in the first training step, from the rows of all processes."""
        if self._is_scaled:
            return
        if self.has_scale:
            self._is_scaled = True
            return
        sums = [torch.cat([own.unsqueeze(1), others + factors.log()], dim=1).logsumexp(dim=1) for own, others in scores]
        rows = gather_rows(torch.stack(sums, dim=1))
        if len(rows):
            self.log_scale.copy_(rows.logsumexp(dim=0) - math.log(len(rows) * (1 + self.negatives)))
            self.has_scale.fill_(True)

    @torch.no_grad()
    def _store_labels(self, index: Tensor, labels: Tensor) -> None:
        last = self._last_rows(index)
        self.labels[index] = torch.where(labels[last] >= 0, labels[last], self.labels[index].clamp(min=-1))

    @torch.no_grad()
    def _store_embeddings(self, index: Tensor, embeddings: Tensor) -> None:
        last = self._last_rows(index)
        memories = (self.student_memory, self.teacher_memory)
        for memory, new in zip(memories, embeddings[last].chunk(2, dim=1), strict=True):
            moved = self.momentum * memory[index] + (1 - self.momentum) * new
            memory[index] = unit_vectors(moved, dim=1).to(memory.dtype)

    def _last_rows(self, index: Tensor) -> Tensor:
        """Return the last row (B,) of each row's sample: if a sample comes twice, it counts, on every process."""
        order = torch.arange(len(index), device=index.device)
        return torch.zeros_like(self.labels).scatter_reduce(0, index, order, "amax")[index]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._is_scaled = False
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"dim={self.dim}, negatives={self.negatives}, temperature={self.temperature}, momentum={self.momentum}"
