"""Several teachers that answer together."""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses.base import Task, standardize_logits
from kd_lightning.teachers.teacher import Teacher


class Ensemble(nn.Module):
    """K frozen teachers, and what they say together.

    Args:
        teachers: Trained networks, or ``Teacher``s around them; a class that one does not know (its ``classes``)
            must be known to another.
        task: Of all of them.
        weights: K numbers, at least 0 and not all 0; scaled to sum 1. None: all the same.
        use_vmap: Compute teachers of one architecture as one network whose weights have one dimension more: faster
            where a single one leaves the device idle. They must compute on one device.

    Raises:
        InputError: For no teacher, weights that do not fit, and ``use_vmap`` teachers that differ.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        *,
        task: Task = "multiclass",
        weights: Sequence[float] | None = None,
        use_vmap: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(teachers, list | tuple | nn.ModuleList) or not all(
            isinstance(t, nn.Module) for t in teachers
        ):
            raise InputError(f"teachers must be a list of networks, got {type(teachers).__name__}")
        if not teachers:
            raise InputError("teachers must hold at least one teacher, got none")
        self.teachers = nn.ModuleList([t if isinstance(t, Teacher) else Teacher(t) for t in teachers])
        self.task = task
        self.weights = _normalised(weights, len(teachers))
        self.use_vmap = use_vmap and len(teachers) > 1
        self._known: dict[int, Tensor] = {}  # by number of classes
        self._stack: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        if self.use_vmap:
            self._check_alike()

    def __len__(self) -> int:
        return len(self.teachers)

    def __getitem__(self, number: int) -> Teacher:
        teacher = self.teachers[number]
        assert isinstance(teacher, Teacher)
        return teacher

    def __iter__(self) -> Iterator[Teacher]:
        return (self[number] for number in range(len(self)))

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Every teacher's logits (K, B, C), in at least float32; minus infinity for classes that one does not know.

        C is 1 for the binary task.
        """
        kept = all(teacher.keeps(batch) for teacher in self)
        outputs = self._as_one(batch) if self.use_vmap and not kept else [teacher(batch) for teacher in self]
        outputs = [output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs]
        if self.task == "binary":
            outputs = [output.reshape(len(output), -1) for output in outputs]
        whole = {output.shape[1:] for teacher, output in zip(self, outputs, strict=True) if teacher.classes is None}
        if len(whole) > 1 or any(len(shape) != 1 for shape in whole):
            shapes = ", ".join(str([*output.shape][1:]) for output in outputs)
            raise InputError(
                f"teachers give outputs of different shapes, {shapes}; Teacher(classes=...) tells which classes "
                "one of them knows"
            )
        classes = max(output.shape[1] for output in outputs)
        if whole and whole != {(classes,)}:
            number = [output.shape[1] for output in outputs].index(classes)
            raise InputError(
                f"teachers[{number}]: its classes {self[number].classes} exceed the {whole.pop()[0]} outputs of a "
                "teacher without classes"
            )
        pads = [F.pad(output, (0, classes - output.shape[1]), value=-torch.inf) for output in outputs]
        return torch.stack(pads)

    def check_classes(self, answers: Tensor, classes: int) -> None:
        """Refuse answers (K, B, C) to a student of another number of classes, or of one that nobody knows."""
        for number, teacher in enumerate(self):
            if teacher.classes is not None and max(teacher.classes) >= classes:
                raise InputError(
                    f"teachers[{number}]: its classes {teacher.classes} exceed the student's, 0 ... {classes - 1}"
                )
        known = self.knows(classes)[self.weights > 0].any(dim=0)
        if not known.all():
            unknown = (~known).nonzero().flatten().tolist()
            raise InputError(f"no teacher (of weight above 0) knows the student's classes {unknown}")
        if answers.shape[-1] != classes:
            raise InputError(
                f"teachers and student must have the same number of outputs, got {answers.shape[-1]} and {classes}; "
                "Teacher(classes=...) maps other classes"
            )

    def pool(
        self, answers: Tensor, weights: Tensor | None = None, temperature: float = 1.0, standardize: bool = False
    ) -> Tensor:
        """Logits (B, C) whose softened probabilities at the temperature are the weighted mean of the teachers'.

        That is q(c) = sum of w_k q_k(c) over the teachers that know c, over the sum of their w_k; then normalised
        unless labels are independent. Where those that know a class have no weight, the ensemble's own weights count.
        One teacher's logits pass as they are.

        Args:
            answers: (K, B, C), as the ensemble gives them.
            weights: (B, K), each row of sum 1; None: the ensemble's.
            temperature: T.
            standardize: First give each teacher's logits mean 0 and standard deviation 1 over the classes it knows.
        """
        known = self.knows(answers.shape[-1])
        complete = bool(known.all())  # asked of the CPU
        known = known.to(answers.device)
        if standardize:
            answers = torch.stack([_standardized(z, k) for z, k in zip(answers, known, strict=True)])
        if len(self) == 1:
            return answers[0]
        own = self.weights.to(answers)[:, None, None]
        shares = (own if weights is None else weights.to(answers).T.unsqueeze(-1)) * known.unsqueeze(1)
        shares = torch.where(shares.sum(dim=0) > 0, shares, own * known.unsqueeze(1))
        log_shares = (shares / shares.sum(dim=0)).log()
        soft = answers / temperature
        if self.task != "multiclass":
            yes, no = (torch.logsumexp(F.logsigmoid(sign * soft) + log_shares, dim=0) for sign in (1, -1))
            return temperature * (yes - no)
        pooled = torch.logsumexp(soft.log_softmax(dim=-1) + log_shares, dim=0)
        return temperature * (pooled if complete else pooled.log_softmax(dim=-1))

    def choose(self, batch: Batch, choice: Tensor, classes: int) -> Tensor:
        """Logits (B, C) of one teacher for each row, who must know all classes; a row costs that teacher's time alone.

        Args:
            batch: The batch.
            choice: (B,) numbers of teachers, on the CPU.
            classes: The student's number C; 1 for the binary task.
        """
        present = sorted(set(choice.tolist()))
        parts = [(choice == number).to(batch.x.device) for number in present]
        alone = len(present) == 1
        asked = zip(present, parts, strict=True)
        outputs: list[Tensor] = [self[number](batch if alone else batch.select(part)) for number, part in asked]
        for number, output in zip(present, outputs, strict=True):
            if output.numel() != len(output) * classes:
                raise InputError(
                    f"teachers and student must have the same number of outputs, got {[*output.shape][1:]} from "
                    f"teachers[{number}] and {classes} from the student; Teacher(classes=...) maps other classes"
                )
        if alone:
            return outputs[0]
        chosen = outputs[0].new_empty(len(choice), *outputs[0].shape[1:])
        for part, output in zip(parts, outputs, strict=True):
            chosen[part] = output.to(chosen.dtype).view_as(chosen[part])  # binary logits may be (B,) or (B, 1)
        return chosen

    def confidence(self, answers: Tensor, y: Tensor | None) -> Tensor:
        """Weights (B, K) that fall with each teacher's cross-entropy L_k on the true label.

        w_k = (1 - exp(L_k) / sum of exp(L_j)) / (K - 1), among those that know the label (Zhang et al.,
        "Confidence-Aware Multi-Teacher Knowledge Distillation", 2022); the ensemble's where no label is known.
        """
        count, rows, classes = answers.shape
        own = self.weights.to(answers).expand(rows, count)
        if y is None:
            return own
        y = y.reshape(rows, -1)
        labeled = is_labeled(y)
        if self.task == "multiclass":
            target = torch.where(labeled, y, 0).long()
            losses = -answers.log_softmax(dim=-1).gather(-1, target.expand(count, rows, 1)).squeeze(-1)
            counted = labeled.squeeze(1) & losses.isfinite()
        else:
            known = labeled & self.knows(classes).to(answers.device).unsqueeze(1)  # (K, B, C)
            target = torch.where(labeled, y, 0).to(answers).expand_as(answers)
            single = F.binary_cross_entropy_with_logits(answers.masked_fill(~known, 0), target, reduction="none")
            counted = known.any(dim=-1)
            losses = (single * known).sum(dim=-1) / known.sum(dim=-1).clamp(min=1)
        number = counted.sum(dim=0)
        doubt = losses.masked_fill(~counted, -torch.inf).softmax(dim=0).nan_to_num(0)
        weights = (1 - doubt) * counted / (number - 1).clamp(min=1)
        weights = torch.where(number == 1, counted.to(weights.dtype), weights)
        return torch.where(number.unsqueeze(1) > 0, weights.T, own)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ensemble:
        twin = copy(self)  # frozen, so copies of a module (weight averaging) share it
        memo[id(self)] = twin
        return twin

    def knows(self, classes: int) -> Tensor:
        """Which teacher knows which of the student's classes, (K, C)."""
        if classes not in self._known:
            known = torch.zeros(len(self), classes, dtype=torch.bool)
            for number, teacher in enumerate(self):
                named = range(classes) if teacher.classes is None else teacher.classes
                known[number, [c for c in named if c < classes]] = True
            self._known[classes] = known
        return self._known[classes]

    def _check_alike(self) -> None:
        first = self[0].network
        shapes = {name: tensor.shape for name, tensor in first.state_dict().items()}
        if not shapes:
            raise InputError("use_vmap needs teachers with parameters")
        for number, teacher in enumerate(self):
            other = teacher.network
            same = {name: tensor.shape for name, tensor in other.state_dict().items()} == shapes
            if not same or repr(other) != repr(first) or teacher.device != self[0].device:
                raise InputError(
                    f"use_vmap needs teachers of one architecture on one device, but teachers[{number}] "
                    f"({type(other).__name__}) differs from teachers[0] ({type(first).__name__})"
                )

    def _as_one(self, batch: Batch) -> list[Tensor]:
        """Every teacher's outputs in one forward pass."""
        inputs = [teacher.prepare(batch.x) for teacher in self]
        if len({x.shape for x in inputs}) > 1:
            sizes = [[*x.shape[1:]] for x in inputs]
            raise InputError(f"use_vmap needs inputs of one shape, but the teachers' preprocess gives {sizes}")
        shared = all(x is inputs[0] for x in inputs)
        first_use = self._stack is None
        weights, network = self._stacked(), self[0].network

        def answer(weights: tuple[dict[str, Tensor], dict[str, Tensor]], x: Tensor) -> Tensor:
            return logits_of(functional_call(network, weights, (x,)), "the teacher")

        try:
            answer_all = torch.vmap(answer, in_dims=(0, None if shared else 0))
            outputs = answer_all(weights, inputs[0] if shared else torch.stack(inputs))
        except RuntimeError as error:
            raise InputError(f"use_vmap: these teachers cannot be computed as one: {error}") from error
        answers = [teacher.arrange(z.to(batch.x.device)) for teacher, z in zip(self, outputs, strict=True)]
        if first_use:  # networks of one architecture may still differ in what no tensor holds
            for number, (teacher, mine) in enumerate(zip(self, answers, strict=True)):
                alone = teacher(batch)
                tolerance = 0.05 if alone.dtype in (torch.float16, torch.bfloat16) else 1e-3
                if not torch.allclose(mine.float(), alone.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
                    raise InputError(f"use_vmap: teachers[{number}] answers differently alone; set use_vmap to false")
        return answers

    def _stacked(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers of all, (K, ...); the networks' own become views of them, so nothing is held twice."""
        networks = [teacher.network for teacher in self]
        if self._stack is not None:
            parameters, buffers = self._stack
            name, stacked = next(iter((parameters | buffers).items()))
            firsts = [dict([*n.named_parameters(), *n.named_buffers()])[name] for n in networks]
            if all(one.data_ptr() == row.data_ptr() for one, row in zip(firsts, stacked, strict=True)):
                return self._stack
        with torch.inference_mode(False):  # or the networks could never again be trained
            self._stack = parameters, buffers = stack_module_state(networks)
            for number, network in enumerate(networks):
                for name, parameter in network.named_parameters():
                    parameter.data = parameters[name].detach()[number]
                for name, _ in network.named_buffers():
                    owner, _, leaf = name.rpartition(".")
                    network.get_submodule(owner)._buffers[leaf] = buffers[name][number]
        return self._stack


def draw(key: Sequence[int], weights: Sequence[float]) -> int:
    """A number below K, drawn with probabilities of sum 1: the same for the same key, on any machine."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    bounds = list(accumulate(weights))
    number = bisect_right(bounds, int.from_bytes(digest, "little") / 2**64 * bounds[-1])
    return min(number, max(k for k, weight in enumerate(weights) if weight > 0))


def _normalised(weights: Sequence[float] | None, count: int) -> Tensor:
    try:
        numbers = torch.ones(count) if weights is None else torch.tensor([*weights])
    except (TypeError, ValueError) as error:
        raise InputError(f"teacher_weights must be a list of numbers, got {weights!r}") from error
    numbers = numbers.double()
    if numbers.shape != (count,):
        raise InputError(f"teacher_weights must be {count} numbers, one for each teacher, got {[*(weights or [])]}")
    if not numbers.isfinite().all() or numbers.min() < 0 or not 0 < numbers.sum() < torch.inf:
        raise InputError(f"teacher_weights must be finite, at least 0 and not all 0, got {weights}")
    return numbers / numbers.sum()


def _standardized(logits: Tensor, known: Tensor) -> Tensor:
    result = logits.clone()
    alone = known.sum() == 1  # one class has no deviation
    result[:, known] = logits[:, known] * 0 if alone else standardize_logits(logits[:, known])
    return result
