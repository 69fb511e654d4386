"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_map

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import arguments_of, describe, map_inputs
from kd_lightning.losses.base import Task, at_least_float32, standardize_logits
from kd_lightning.runs.class_paths import network_reader
from kd_lightning.teachers.exported import is_exported
from kd_lightning.teachers.input_guard import InputGuard
from kd_lightning.teachers.teacher import Teacher
from kd_lightning.teachers.teacher_weights import normalised


class Ensemble(nn.Module):
    """K frozen teachers, and the ways to combine their logits.

    Args:
        teachers: Trained networks, or ``Teacher``s around them. Each class must be one of the ``classes`` of at least
            one teacher.
        task: Task of all teachers.
        weights: K numbers, at least 0 and not all 0. They are scaled to sum 1. Default: None, which means
            equal weights.
        use_vmap: Compute all teachers in one forward pass, by ``torch.vmap`` over their stacked weights. Faster where a
            single teacher does not fill the device. The teachers must have one architecture and one device.
        class_dim: The dimension of dense outputs, such as (B, C, H, W), that holds classes. Default: None, which means
            outputs (B, C).

    Raises:
        InputError: If there is no teacher, if the weights do not fit, or if ``use_vmap`` is set for teachers that
            differ.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        *,
        task: Task = "multiclass",
        weights: Sequence[float] | None = None,
        use_vmap: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(teachers, list | tuple | nn.ModuleList) or not all(
            isinstance(t, nn.Module) or is_exported(t) for t in teachers
        ):
            files = [t for t in teachers if isinstance(t, str | Path)] if isinstance(teachers, list | tuple) else []
            got = f"{files[0]!r}{network_reader(str(files[0]))}" if files else type(teachers).__name__
            raise InputError(f"teachers must be a list of networks, got {got}")
        if not teachers:
            raise InputError("teachers must hold at least one teacher, got none")
        self.teachers = nn.ModuleList([t if isinstance(t, Teacher) else Teacher(t) for t in teachers])
        self.task = task
        self.weights = normalised(weights, len(teachers))
        self.use_vmap = use_vmap and len(teachers) > 1
        self.class_dim = class_dim
        for teacher in self:
            teacher.class_dim = class_dim
        self._known: dict[int, Tensor] = {}  # by number of classes
        self._fits: set[tuple[int, int]] = set()  # numbers of the teachers' and the student's classes that were checked
        self._shares: tuple[Any, Tensor, bool, Tensor] | None = None  # see _log_shares
        self._stack: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self._guard = InputGuard()  # with use_vmap; else each teacher has its own
        if self.use_vmap:
            self._check_alike()

    def __len__(self) -> int:
        return len(self.teachers)

    def __getitem__(self, number: int) -> Teacher:
        teacher = self.teachers[number]
        assert isinstance(teacher, Teacher)
        return teacher

    def __iter__(self) -> Iterator[Teacher]:
        return iter(self.teachers)  # type: ignore[arg-type]

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Compute every teacher's logits (K, B, C), in at least float32. Dense ones are (K, B, C, H, W), for example.

        C is 1 for the binary task. Logits of classes that a teacher does not know are minus infinity.
        """
        stored = self.use_vmap and all(teacher.stored(batch) is not None for teacher in self)
        together = self.use_vmap and not stored
        outputs = self._as_one(batch) if together else [teacher(batch) for teacher in self]
        # classes last, so that one dimension before them is left where outputs are (B, C)
        outputs = [self._with_classes_last(output) for output in outputs]
        whole = {output.shape[1:] for teacher, output in zip(self, outputs, strict=True) if teacher.classes is None}
        positions = {output.shape[:-1] for output in outputs}
        if len(whole) > 1 or len(positions) > 1 or (self.class_dim is None and any(len(shape) != 1 for shape in whole)):
            shapes = ", ".join(str([*output.shape][1:]) for output in outputs)
            raise InputError(
                f"teachers must give outputs of one shape, got {shapes}; Teacher(classes=...) names the classes that a "
                "teacher knows"
            )
        classes = max(output.shape[-1] for output in outputs)
        if whole and (found := whole.pop()[-1]) != classes:
            number = [output.shape[-1] for output in outputs].index(classes)
            raise InputError(
                f"teachers[{number}]: its classes {self[number].classes} exceed the {found} outputs of a "
                "teacher without classes"
            )
        if any(output.shape[-1] < classes for output in outputs):
            outputs = [at_least_float32(output) for output in outputs]
            outputs = [F.pad(output, (0, classes - output.shape[-1]), value=-torch.inf) for output in outputs]
        logits = at_least_float32(torch.stack(outputs))
        return logits if self.class_dim is None else logits.movedim(-1, self.class_dim % outputs[0].ndim + 1)

    def _with_classes_last(self, output: Tensor) -> Tensor:
        if self.class_dim is not None:
            return output.movedim(self.class_dim % output.ndim, -1)
        single = self.task == "binary" or (self.task == "regression" and output.ndim == 1)
        return output.reshape(len(output), -1) if single else output

    def check_classes(self, logits: Tensor, classes: int) -> None:
        """Check that the teachers' logits (K, B, C) fit a student.

        Args:
            logits: The ensemble's logits, dense ones as rows (K, N, C).
            classes: The student's number of classes.

        Raises:
            InputError: If C is another number, or if no teacher of weight above 0 knows some class.
        """
        if (logits.shape[-1], classes) in self._fits:
            return
        for number, teacher in enumerate(self):
            if max(teacher.known_classes or [-1]) >= classes:
                raise InputError(
                    f"teachers[{number}]: its classes {teacher.classes} exceed the student's, 0 ... {classes - 1}"
                )
        known = self.known_classes(classes)[self.weights > 0].any(dim=0)
        if not known.all():
            unknown = (~known).nonzero().flatten().tolist()
            raise InputError(f"no teacher (of weight above 0) knows the student's classes {unknown}")
        if logits.shape[-1] != classes:
            raise InputError(
                f"teachers and student must have the same number of outputs, got {logits.shape[-1]} and {classes}; "
                "Teacher(classes=...) maps other classes"
            )
        self._fits.add((logits.shape[-1], classes))

    def pool(
        self, logits: Tensor, weights: Tensor | None = None, temperature: float = 1.0, standardize: bool = False
    ) -> Tensor:
        """Combine the teachers' logits into logits (B, C).

        Their softened probabilities are the weighted mean of the teachers': q(c) is the sum of w_k q_k(c) over the
        teachers that know class c, divided by the sum of their w_k. For the multiclass task q is then normalised. If
        all teachers that know a class have weight 0, the ensemble's own weights count. The logits of a single teacher
        are returned unchanged. Values of the regression task are the weighted mean of the teachers' values.

        Args:
            logits: (K, B, C), as the ensemble returns them; dense ones as rows.
            weights: (B, K), each row of sum 1. Default: None, which means the ensemble's weights.
            temperature: T.
            standardize: First scale each teacher's logits to mean 0 and standard deviation 1 over the classes that it
                knows.
        """
        if standardize:
            known = self.known_classes(logits.shape[-1]).to(logits.device)
            logits = torch.stack([_standardized(z, k) for z, k in zip(logits, known, strict=True)])
        if len(self) == 1:
            return logits[0]
        complete, log_shares = self._log_shares(logits, weights)
        if self.task == "regression":
            return (log_shares.exp() * logits.masked_fill(log_shares.isneginf(), 0)).sum(dim=0)
        soft = logits / temperature
        if self.task != "multiclass":
            log_yes, log_no = (torch.logsumexp(F.logsigmoid(sign * soft) + log_shares, dim=0) for sign in (1, -1))
            return temperature * (log_yes - log_no)
        pooled = torch.logsumexp(soft.log_softmax(dim=-1) + log_shares, dim=0)
        return temperature * (pooled if complete else pooled.log_softmax(dim=-1))

    def _log_shares(self, logits: Tensor, weights: Tensor | None) -> tuple[bool, Tensor]:
        """Return whether every teacher knows every class, and the logarithm of each teacher's share, (K, B or 1, C).

        Without ``weights`` they are the same in each step, and are computed once.
        """
        classes = logits.shape[-1]
        key = (classes, logits.dtype, logits.device, self.weights._version)
        held = self._shares
        if weights is None and held is not None and held[0] == key and held[1] is self.weights:
            return held[2:]
        known = self.known_classes(classes)
        complete = bool(known.all())  # computed on the CPU, so that no device is waited for
        known = known.to(logits.device)
        own = self.weights.to(logits)[:, None, None]
        shares = (own if weights is None else weights.to(logits).T.unsqueeze(-1)) * known.unsqueeze(1)
        shares = torch.where(shares.sum(dim=0) > 0, shares, own * known.unsqueeze(1))
        result = complete, (shares / shares.sum(dim=0)).log()
        if weights is None:
            self._shares = (key, self.weights, *result)
        return result

    def are_complete(self) -> bool | None:
        """Whether all teachers know all classes. None if it depends on their number, as :meth:`known_classes` does."""
        named = {None if one.known_classes is None else frozenset(one.known_classes) for one in self}
        if not all(one is None or one == {*range(len(one))} for one in named):
            return False
        if len(named) == 1:
            return True
        return None if None in named and len(named) == 2 else False  # C may be the number that is named

    def selected_logits(self, batch: Batch, selected: Tensor) -> Tensor:
        """Compute logits (B, C), or dense ones, of one teacher for each sample. Each computes its own samples alone.

        Args:
            batch: The batch.
            selected: (B,) numbers of teachers, on the CPU. Each of them must know all classes.
        """
        present = sorted(set(selected.tolist()))
        parts = [(selected == number).to(batch.device) for number in present]
        alone = len(present) == 1
        outputs: list[Tensor] = [
            self[number](batch if alone else batch.select(part)) for number, part in zip(present, parts, strict=True)
        ]
        if alone:
            return outputs[0]
        outputs = [output.unsqueeze(1) if output.ndim == 1 else output for output in outputs]  # of a single output
        if len({output.shape[1:] for output in outputs}) > 1:
            shapes = ", ".join(f"{[*z.shape][1:]} from teachers[{n}]" for n, z in zip(present, outputs, strict=True))
            raise InputError(
                f"teachers must give outputs of one shape, got {shapes}; Teacher(classes=...) maps other classes"
            )
        logits = outputs[0].new_empty(len(selected), *outputs[0].shape[1:])
        for part, output in zip(parts, outputs, strict=True):
            logits[part] = output.to(logits.dtype)
        return logits

    def confidence(self, logits: Tensor, y: Tensor | None) -> Tensor:
        """Compute weights (B, K): the larger a teacher's cross-entropy L_k on the true label, the smaller its weight.

        w_k = (1 - exp(L_k) / sum of exp(L_j)) / (K - 1), among the teachers that know the label (Zhang et al.,
        "Confidence-Aware Multi-Teacher Knowledge Distillation", 2022, https://arxiv.org/abs/2201.00007). Samples
        without a label have the ensemble's weights.

        Args:
            logits: (K, B, C), as the ensemble returns them.
            y: Labels; None if there are none.
        """
        count, rows, classes = logits.shape
        own = self.weights.to(logits).expand(rows, count)
        if y is None:
            return own
        y = y.reshape(rows, -1)
        if self.task == "binary" and y.shape[1] == 2:
            y = y[:, 1:]  # probabilities of two classes, as of mixed samples
        if self.task == "multiclass" and y.shape[1] != 1:
            raise InputError(f"teacher_weights: confidence needs class indices (B,), got labels {[*y.shape]}")
        labeled = is_labeled(y)
        if self.task == "multiclass":
            target = torch.where(labeled, y, 0).long()
            losses = -logits.log_softmax(dim=-1).gather(-1, target.expand(count, rows, 1)).squeeze(-1)
            counted = labeled.squeeze(1) & losses.isfinite()
        else:
            known = labeled & self.known_classes(classes).to(logits.device).unsqueeze(1)  # (K, B, C)
            target = torch.where(labeled, y, 0).to(logits).expand_as(logits)
            single = F.binary_cross_entropy_with_logits(logits.masked_fill(~known, 0), target, reduction="none")
            counted = known.any(dim=-1)
            losses = (single * known).sum(dim=-1) / known.sum(dim=-1).clamp(min=1)
        number = counted.sum(dim=0)
        doubt = losses.masked_fill(~counted, -torch.inf).softmax(dim=0).nan_to_num(0)
        weights = (1 - doubt) * counted / (number - 1).clamp(min=1)
        weights = torch.where(number == 1, counted.to(weights.dtype), weights)
        return torch.where(number.unsqueeze(1) > 0, weights.T, own)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ensemble:
        copied = copy(self)  # copies of a module, as of weight averaging, share the frozen networks
        memo[id(self)] = copied
        return copied

    def known_classes(self, classes: int) -> Tensor:
        """Which teacher knows which of the student's classes: booleans (K, C)."""
        if classes not in self._known:
            known = torch.zeros(len(self), classes, dtype=torch.bool)
            for number, teacher in enumerate(self):
                named = range(classes) if teacher.known_classes is None else teacher.known_classes
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
        """Compute every teacher's outputs in one forward pass."""
        with ExitStack() as stack:
            for teacher in self:
                stack.enter_context(teacher.evaluating())
            x = stack.enter_context(self._guard.protect(batch.teacher_x))
            return self._compute_as_one(batch, x)

    def _compute_as_one(self, batch: Batch, x: Any) -> list[Tensor]:
        # each preprocess gets inputs of its own, which it may change in place
        own = [map_inputs(torch.clone, x) if teacher.has_preprocess else x for teacher in self]
        inputs = [teacher.prepare(part) for teacher, part in zip(self, own, strict=True)]
        if len({*map(describe, inputs)}) > 1:
            sizes = ", ".join(map(describe, inputs))
            raise InputError(f"use_vmap needs inputs of one shape, but the teachers' preprocess gives {sizes}")
        first_use = self._stack is None
        weights, network = self._stacked(), self[0].network
        given, dims = arguments_of(inputs[0]), None
        if not all(part is inputs[0] for part in inputs):
            dims = tree_map(lambda part: 0 if isinstance(part, Tensor) else None, given)
            given = tree_map(_stack, *map(arguments_of, inputs))

        def compute(weights: tuple[dict[str, Tensor], dict[str, Tensor]], given: Any) -> Tensor:
            return logits_of(functional_call(network, weights, *given), "the teacher")

        try:
            outputs = torch.vmap(compute, in_dims=(0, dims))(weights, given)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"use_vmap: these teachers cannot be computed as one; set it to false: {reason}"
            ) from error
        logits = [teacher.arrange(z.to(batch.device)) for teacher, z in zip(self, outputs, strict=True)]
        if first_use:  # networks of one architecture may still differ in attributes that are no tensors
            for number, (teacher, stacked) in enumerate(zip(self, logits, strict=True)):
                alone = teacher.arrange(teacher.compute(batch))  # never what is stored, which may be rounded
                tolerance = 0.05 if alone.dtype in (torch.float16, torch.bfloat16) else 1e-3
                if not torch.allclose(stacked.float(), alone.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
                    raise InputError(f"use_vmap: teachers[{number}] gives other outputs alone; set use_vmap to false")
        return logits

    def _stacked(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Stack the parameters and buffers of all networks, (K, ...).

        The networks' own tensors become views of the stack, so that each weight is in memory once.
        """
        networks = [teacher.network for teacher in self]
        if self._stack is not None:
            parameters, buffers = self._stack
            name, stacked = next(iter((parameters | buffers).items()))
            firsts = [dict([*n.named_parameters(), *n.named_buffers()])[name] for n in networks]
            if all(one.data_ptr() == row.data_ptr() for one, row in zip(firsts, stacked, strict=True)):
                return self._stack
        with torch.inference_mode(False):  # else the networks could never train again
            self._stack = parameters, buffers = stack_module_state(networks)
            for number, network in enumerate(networks):
                for name, parameter in network.named_parameters():
                    parameter.data = parameters[name].detach()[number]
                for name, _ in network.named_buffers():
                    owner, _, leaf = name.rpartition(".")
                    network.get_submodule(owner)._buffers[leaf] = buffers[name][number]
        return self._stack


def _stack(*parts: Any) -> Any:
    """Stack tensors; return the first of anything else."""
    return torch.stack(parts) if isinstance(parts[0], Tensor) else parts[0]


def _standardized(logits: Tensor, known: Tensor) -> Tensor:
    result = logits.clone()
    single = known.sum() == 1  # one class has no standard deviation
    result[:, known] = logits[:, known] * 0 if single else standardize_logits(logits[:, known])
    return result
