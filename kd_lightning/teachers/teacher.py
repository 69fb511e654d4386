"""Frozen teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kd_lightning.batch import Batch
from kd_lightning.cache.content import fingerprint
from kd_lightning.cache.tensors import token_mask
from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture, layers_of
from kd_lightning.features.outputs import logits_of
from kd_lightning.features.pooling import Pool
from kd_lightning.features.trace import check_rows
from kd_lightning.inputs import Inputs, arguments_of, call, explain_call, map_inputs
from kd_lightning.runs.class_paths import network_reader
from kd_lightning.teachers.exported import ExportedNetwork, is_exported
from kd_lightning.teachers.fingerprint import TeacherFingerprint, hash_extra_state, hash_weights
from kd_lightning.teachers.frozen_parameters import freeze
from kd_lightning.teachers.input_guard import InputGuard
from kd_lightning.teachers.preprocess import Preprocess
from kd_lightning.teachers.scripted import check_scripts
from kd_lightning.teachers.shared_layers import SharedLayers, is_training
from kd_lightning.teachers.stored_lookup import StoredLookup


class Teacher(nn.Module):
    """A frozen network that teaches.

    The network is always in eval mode and under ``no_grad``. It is hidden from the module tree: no optimiser, no
    checkpoint and no DDP reducer contains it, and ``.train()`` of another module does not reach it. It moves with
    ``.to(...)``.

    Args:
        network: Network that returns logits (B, C), or (B,) for the binary task. Its parameters are frozen in place. A
            program of ``torch.export`` becomes an :class:`~kd_lightning.teachers.ExportedNetwork`.
        preprocess: Applied to the student's inputs (B, ...) before the network, if the teacher was trained on inputs of
            another normalisation or size: a network, a transform of torchvision (v1 or v2), or any function. It is
            called as the network is: with a mapping as named arguments. It must not be random.
        classes: For each output of the network, the student's class, each class at most once, or None for a class that
            the student does not have. Then probabilities are those among the student's classes. A teacher may know only
            some of the classes; ``EnsembleDistillModule`` combines such teachers. Default: None, which means the
            student's class order.
        device: Device that the teacher computes on, such as ``"cpu"`` or ``"cuda:1"``. Its logits are moved to the
            device of the inputs. Default: None, which means the student's device.
        cache: Folder that stores the teacher's outputs for every training view: logits, and the features that the
            module uses. They are computed once, at the start of a fit; later fits read them. Needs a datamodule with
            ``num_views``. Teachers and runs may share the folder. Default: None, which means that the outputs are
            computed in each step.
        cache_dtype: Type of the stored values, ``"float16"`` (default) or ``"float32"``. If one is too large for
            float16, all are stored as float32. With float32, a run with a cache equals a run without it to the bit,
            provided that the network computes in at most 32 bits and its outputs of a sample do not depend on the
            batch.
        cache_top_k: Number of largest logits to store, at least 1. The other classes share the rest of the probability
            evenly. For losses that need no others, such as ``KDLoss``. With the module's ``class_dim`` it is a number
            for each position. Features are stored whole. Default: None, which means all logits.

    Shapes:
        Input: a ``Batch``, or inputs: a tensor (B, ...), or a mapping or tuple of such tensors. Output: logits (B, C)
        in the student's class order. With ``classes``, C is the largest of them plus 1, and logits of classes that the
        teacher does not know are minus infinity. Dense logits, such as (B, C, H, W) or (B, T, C), stay dense; where a
        module sets ``class_dim``, the student's order is that of this dimension. Token sequences whose inputs have an
        ``attention_mask`` are stored in their own lengths.

    Attributes:
        class_dim: Dimension of dense outputs that holds classes. The module that learns from the teacher sets it, and
            the next two.
        layers: Layers whose outputs are the teacher's features, by dotted path, and how each one is pooled (None: not).
            "" is the network's own output, see :func:`~kd_lightning.features.outputs.feature_of_output`.
        needs_logits: Whether logits are used. If not, a cache stores features alone.

    Raises:
        InputError: If ``classes`` repeats a class, has a negative one, or does not fit the network's outputs; for
            values of ``cache``, ``cache_dtype`` and ``cache_top_k`` that are not allowed; if a TorchScript or exported
            program is random, as one that was made in training mode.
    """

    def __init__(
        self,
        network: nn.Module | ExportedProgram,
        *,
        preprocess: nn.Module | Callable[..., Any] | None = None,
        classes: list[int | None] | None = None,
        device: str | None = None,
        cache: str | Path | None = None,
        cache_dtype: Literal["float16", "float32"] = "float16",
        cache_top_k: int | None = None,
    ) -> None:
        super().__init__()
        if is_exported(network):
            network = ExportedNetwork(network)
        if not isinstance(network, nn.Module):
            file = network_reader(str(network)) if isinstance(network, str | Path) else ""
            raise InputError(f"teacher must be a network, got {type(network).__name__}{file}")
        check_scripts(network)
        if cache_dtype not in ("float16", "float32"):
            raise InputError(f"cache_dtype must be float16 or float32, got {cache_dtype!r}")
        if cache_top_k is not None and cache_top_k < 1:
            raise InputError(f"cache_top_k must be at least 1, got {cache_top_k}")
        if cache is not None and not str(cache).strip():
            raise InputError("cache must name a folder, got an empty name")
        if preprocess is not None and not isinstance(preprocess, nn.Module):
            preprocess = Preprocess(preprocess)
        # in a tuple, so that nn.Module does not register them
        self._hidden = tuple(module for module in (preprocess, network) if module is not None)
        self.classes = None if classes is None else _checked_classes(classes)
        self.device = device
        self.cache = None if cache is None else Path(cache)
        self.cache_dtype = cache_dtype
        self.cache_top_k = cache_top_k
        self.class_dim: int | None = None
        self.layers: Mapping[str, Pool | None] = {}
        self.needs_logits = True
        self.output_name: str | None = None  # name of its outputs in batches, in a fit with a cache
        self.cache_folders: dict[str, Path] = {}  # folders of its outputs by name of the table of views
        self._lookup = StoredLookup()
        self._guard = InputGuard()
        self._architecture: str | None = None
        self._identity = TeacherFingerprint(self._hidden)
        self._shared = SharedLayers(self._hidden)  # with the student
        for module in self._hidden:
            module.eval()
            for parameter in module.parameters():  # nn.Module.requires_grad_ does not work for TorchScript
                freeze(parameter)
            if device is not None:
                module.to(device)

    @property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self._hidden[-1]

    @property
    def has_preprocess(self) -> bool:
        """Whether the inputs are preprocessed."""
        return len(self._hidden) > 1

    def prepare(self, x: Inputs) -> Inputs:
        """Preprocess the student's inputs for the network, on the teacher's device; see :meth:`evaluating`."""
        if self.device is not None:
            x = map_inputs(lambda tensor: tensor.to(self.device), x)
        for preprocess in self._hidden[:-1]:
            x = call(preprocess, x)
        return x

    def forward(self, batch: Batch | Inputs) -> Tensor:
        """Return logits (B, C) in the student's class order. They are computed unless the batch holds them.

        Args:
            batch: A batch, or inputs alone.
        """
        batch = batch if isinstance(batch, Batch) else Batch(batch)
        stored = self.stored(batch)
        return self.arrange(self.compute(batch) if stored is None else stored)

    def compute(self, batch: Batch) -> Tensor:
        """Compute the network's logits (B, M) for the batch's ``teacher_inputs``, or for ``x`` if there are none."""
        args, kwargs = arguments_of(batch.teacher_x)
        return logits_of(self.run(*args, **kwargs), "the teacher").to(batch.device)

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Return the outputs of ``layers`` for a batch. They are computed unless the batch holds them.

        The pass ends at the deepest of these layers.

        Args:
            batch: The batch.

        Returns:
            The outputs (B, ...) by the layer's dotted path, where "" is the network's own output. They are as the layer
            returns them, or vectors (B, C) where ``layers`` has a pool.

        Raises:
            InputError: If the network has no such layer, or never calls it; if its output is no tensor of floats with a
                row for each sample.
        """
        return self._features(batch, {}) if self.layers else {}

    @contextmanager
    def capturing(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """Take the features out of the pass inside the block, if there is one, so that one pass gives logits, too.

        Args:
            batch: The batch of the pass.

        Yields:
            What :meth:`features` returns. It is empty until the block ends.
        """
        found: dict[str, Tensor] = {}
        if not self.layers:
            yield found
            return
        with capture(self.network, [*self.layers]) as captured:
            yield found
        found.update(self._features(batch, captured))

    def _features(self, batch: Batch, captured: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the features of a batch, some of which a pass may have captured."""
        stored = None if captured else self._stored_features(batch)
        return self.compute_features(batch, captured) if stored is None else stored

    @torch.no_grad()
    def compute_features(self, batch: Batch, captured: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Compute the features of a batch, or pool those that a pass has captured; see :meth:`features`."""
        if not captured:
            args, kwargs = arguments_of(batch.teacher_x)
            with capture(self.network, [*self.layers], stop=True) as captured:
                self.run(*args, **kwargs)
        check_rows("teacher", captured, self.layers, len(batch))
        mask = batch.position_mask if batch.teacher_inputs is None else token_mask(batch.teacher_x)
        found = {}
        for name, pool in self.layers.items():
            feature = captured[name]
            if not feature.is_floating_point():
                raise InputError(f"the teacher's layer {name!r} must return floats, got {feature.dtype}")
            found[name] = (feature if pool is None else pool(feature, mask)).to(batch.device)
        return found

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Preprocess the arguments of a call, and return what the network returns for them, without a gradient.

        A network that changes its inputs in place gets a copy of them: they are the student's, too.
        """
        return self.run_network(self.network, args, kwargs)

    @torch.no_grad()
    def run_network(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the network, or a part of it, as :meth:`run` does."""
        with self._guard.protect((args, kwargs)) as given, self.evaluating():
            args, kwargs = given if self.device is None else map_inputs(lambda t: t.to(self.device), given)
            for preprocess in self._hidden[:-1]:
                args, kwargs = arguments_of(preprocess(*args, **kwargs))
            try:
                output = network(*args, **kwargs)
            except TypeError as error:
                explain_call(error, network, args, kwargs, "teacher's network")
                raise
            finally:  # also after a pass that ends at the deepest captured layer
                self._identity.note_forward()
        return output

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the block in eval mode. Layers that the student has, too, have their own mode again after it."""
        with self._shared.keep_modes() if self._shared else nullcontext():
            for module in self._hidden:
                if any(map(is_training, layers_of(module))):  # another module may hold it and call .train()
                    module.eval()  # slower than the check above
            yield

    def find_samples(self, data: Any, part: Literal["train", "test"]) -> None:
        """Runs at the start of each stage, once the data are set up. Does nothing: the outputs depend on inputs alone.

        Args:
            data: The datamodule; None if there is none.
            part: Which samples the ``index`` of batches counts: "train" (validation included) or "test".
        """

    def share_layers(self, student: nn.Module) -> None:
        """Find what the student has, too: outside this teacher's passes such layers have the student's mode."""
        self._shared.find(self._hidden, student)

    def is_training_outside(self, layer: nn.Module) -> bool:
        """Whether a layer is in training mode outside this teacher's passes."""
        return self._shared.mode_of(layer)

    def stored(self, batch: Batch) -> Tensor | None:
        """Return the logits (B, M) of this teacher that a batch holds; None if there are none for these inputs."""
        held = self._lookup.find(batch, self.output_name, self.cache_folders.values())
        logits = None if held is None else held.logits(str(self.output_name))
        return None if logits is None else _to(logits, batch.device)

    def _stored_features(self, batch: Batch) -> dict[str, Tensor] | None:
        """Return the features of this teacher that a batch holds; None unless all of them are there."""
        held = self._lookup.find(batch, self.output_name, self.cache_folders.values())
        features = None if held is None else held.features(str(self.output_name), self.layers)
        return None if features is None else {name: _to(part, batch.device) for name, part in features.items()}

    def start_fit(self, name: str, views: str) -> None:
        """Forget the stored outputs of an earlier fit.

        Args:
            name: Name of the teacher's outputs in the batches of this fit.
            views: Name of the table of views.
        """
        self.output_name = name
        self.cache_folders.pop(views, None)
        self._lookup.start_fit()

    def arrange(self, logits: Tensor) -> Tensor:
        """Bring the network's logits (B, M), or dense ones, into the student's class order (B, C)."""
        if self.classes is None:
            return logits
        if self.class_dim is not None and logits.ndim > 2:
            rows = logits.movedim(self.class_dim, -1)
            ordered = self.arrange(rows.flatten(0, -2))
            return ordered.view(*rows.shape[:-1], ordered.shape[1]).movedim(-1, self.class_dim)
        if logits.ndim != 2 or logits.shape[1] != len(self.classes):
            raise InputError(f"classes has {len(self.classes)} entries, but the teacher's output is {[*logits.shape]}")
        known = {number: column for column, number in enumerate(self.classes) if number is not None}
        ordered = logits.new_full((len(logits), max(known) + 1), -torch.inf)
        ordered[:, [*known]] = logits[:, [*known.values()]]
        return ordered

    @property
    def missing_classes(self) -> list[int]:
        """Classes below the largest of ``classes`` that the teacher does not know."""
        known = self.known_classes or []
        return sorted({*range(max(known, default=0))} - {*known})

    @property
    def known_classes(self) -> list[int] | None:
        """The student's classes that the teacher knows, in the order of its outputs. None means all in their order."""
        return None if self.classes is None else [number for number in self.classes if number is not None]

    def fingerprint(self, *, anew: bool = False) -> str:
        """Return a hash that identifies the teacher: of weights, attributes, extra state, preprocessing and class map.

        The result is stored. A cast or move of the teacher, as by a precision plugin, does not change it. Neither does
        what a forward pass changes.

        Args:
            anew: Compute it again from what has changed since. With a cache, also hash the architecture again.
        """
        if anew and self.cache is not None:  # now, since a forward pass may change the network's attributes
            self._architecture = None
            self.architecture()
        return self._identity.compute(self.classes, anew)

    def matches(self, fingerprint: str) -> bool:
        """Whether a fingerprint in a checkpoint, which may be of an earlier version, is that of this teacher."""
        return self._identity.matches(fingerprint, self.classes)

    def weights(self) -> str:
        """Return the SHA-256 of the present weights and buffers."""
        return hash_weights(self._hidden)

    def architecture(self) -> str:
        """Return the SHA-256 of the networks' classes, code, extra state, and all attributes except ``weights``."""
        if self._architecture is None:
            weights = [w for module in self._hidden for w in module.state_dict(keep_vars=True).values()]
            self._architecture = fingerprint([*self._hidden, *hash_extra_state(self._hidden).items()], weights)
        return self._architecture

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def new_dtype(tensor: Tensor) -> torch.dtype:
            return fn(torch.empty(0, dtype=tensor.dtype)).dtype

        def dtype_alone(tensor: Tensor) -> Tensor:
            return tensor.to(new_dtype(tensor))

        dtypes = {tensor.dtype: tensor for tensor in self.network.parameters()}
        casts = any(new_dtype(tensor) != dtype for dtype, tensor in dtypes.items())
        if casts:
            self._identity.note_cast(False)
        for module in self._hidden:  # with a device of its own it does not move
            module._apply(fn if self.device is None else dtype_alone, recurse)  # type: ignore[no-untyped-call]
        if casts:
            self._identity.note_cast(True)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        copied = copy(self)  # copies of a module, as of weight averaging, share the frozen network
        memo[id(self)] = copied
        return copied


def _checked_classes(classes: Sequence[int | None]) -> list[int | None]:
    """Return a class map as a list of integers and None. Raise InputError if it is none."""
    try:
        numbers = [None if number is None else index(number) for number in classes]
    except TypeError:  # not a sequence, or of other entries
        raise InputError(f"classes must be a list of class numbers and None, got {classes!r}") from None
    known = [number for number in numbers if number is not None]
    if len({*known}) < len(known) or min(known, default=-1) < 0:
        raise InputError(f"classes must name at least one class, from 0 on, and none twice, got {numbers}")
    return numbers


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)


def check_outputs(student: Tensor, teacher: Tensor | None) -> None:
    """Raise InputError unless the teacher's logits have as many rows and outputs as the student's."""
    if teacher is None or teacher.shape == student.shape:
        return
    if (len(teacher), teacher.numel()) != (len(student), student.numel()):
        raise InputError(
            f"teacher and student must have the same number of outputs, got {[*teacher.shape][1:]} from the teacher "
            f"and {[*student.shape][1:]} from the student; Teacher(classes=...) maps another class order, and "
            "drops classes (None)"
        )
