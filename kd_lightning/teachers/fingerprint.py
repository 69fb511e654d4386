"""The fingerprint of a teacher, which a resumed run compares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.cache.content import Code, attributes_of, fingerprint
from kd_lightning.cache.tensors import values_of
from kd_lightning.errors import InputError
from kd_lightning.runs.weights import plain_key
from kd_lightning.teachers.preprocess import Preprocess

_VERSION = "v2:"


def hash_weights(networks: Sequence[nn.Module]) -> str:
    """Return the SHA-256 of the networks' present weights and buffers, as far as a state dict holds them."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            if not isinstance(tensor, Tensor):  # extra state of a module
                continue
            values = values_of(tensor)
            shape = [] if values is None else [*tensor.shape]
            digest.update(f"{plain_key(name)} {tensor.dtype} {shape}".encode())
            digest.update(fingerprint(tensor).encode() if values is None else values.data)
    return digest.hexdigest()


def hash_extra_state(networks: Sequence[nn.Module]) -> dict[str, str]:
    """Return hashes of what a state dict holds beside tensors, such as the extra state of modules, by name."""
    states = {f"{number}": network.state_dict() for number, network in enumerate(networks)}
    found = {f"{number}.{plain_key(key)}": value for number, state in states.items() for key, value in state.items()}
    return {name: _hash(value) for name, value in found.items() if not isinstance(value, Tensor)}


def hash_attributes(networks: Sequence[nn.Module]) -> dict[str, str]:
    """Return hashes of the attributes of all modules, and of buffers that are not saved, by name."""
    found: dict[str, str] = {}
    for number, network in enumerate(networks):
        programs: list[str] = []
        for path, module in network.named_modules():
            name = f"{number}.{plain_key(path)}"
            if hasattr(module, "_orig_mod") or any(name.startswith(program) for program in programs):
                continue
            if isinstance(module, torch.jit.ScriptModule):
                programs.append(f"{name}." if path else name)
                found[name] = fingerprint(module)
                continue
            found[name] = f"{type(module).__module__}.{type(module).__qualname__}"
            code: Code = "functions" if number < len(networks) - 1 else False
            code = isinstance(module, Preprocess) or code
            attributes = attributes_of(module)
            buffers = attributes.pop("_buffers")
            attributes |= {key: buffers[key] for key in sorted(module._non_persistent_buffers_set) if key in buffers}
            for key, value in attributes.items():
                if key not in ("_parameters", "_modules"):
                    found[f"{name}: {key}"] = _hash(value, code)
    return found


class TeacherFingerprint:
    """Identifies a teacher, whatever a run does to it.

    It covers weights and buffers, extra state, attributes, the preprocessing and the class map. Code does not count,
    except that of functions in the preprocessing. A cast or move, compilation, and attributes that a forward pass
    changes do not change it.

    Args:
        networks: The preprocessing, if there is one, and the network.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = networks
        self._first: dict[str, str] = {}  # hashes by name, before casts and forward passes
        self._last: dict[str, str] = {}  # the same hashes as they were at the last look
        self._unchanged: dict[str, bool] = {}  # whether each of them is the same just before a cast
        self._unstable: set[str] = set()  # names of attributes that a forward pass changes
        self._forward_is_due = False
        self._texts = ("", "")  # of this version, and of the version before

    @property
    def known(self) -> bool:
        """Whether it has been computed."""
        return bool(self._first)

    def compute(self, classes: list[int | None] | None, anew: bool = False) -> str:
        """Return the fingerprint. It is computed if it never was.

        Args:
            classes: The class map.
            anew: Compute it again from what has changed since, casts and forward passes apart.
        """
        if anew or not self.known:
            now = self._hash_all()
            changed = {name for name in now.keys() | self._last.keys() if now.get(name) != self._last.get(name)}
            for name in changed - self._unstable:
                self._first.pop(name, None)
                self._first |= {name: now[name]} if name in now else {}
            self._last, self._forward_is_due = now, True
            about = [classes, len(self.networks), sorted(self._first.items())]
            before = (classes, *map(repr, self.networks[:-1]), self._first["weights"])
            text, earlier = (hashlib.sha256(repr(part).encode()).hexdigest() for part in (about, before))
            self._texts = (_VERSION + text, earlier)
        return self._texts[0]

    def matches(self, fingerprint: str, classes: list[int | None] | None) -> bool:
        """Whether a fingerprint of this or the earlier version is this teacher's. The earlier one covers less."""
        self.compute(classes)
        return fingerprint == self._texts[0 if fingerprint.startswith(_VERSION) else 1]

    def note_forward(self) -> None:
        """Note which attributes a forward pass has changed. After the first pass it does nothing."""
        if self._forward_is_due:
            self._forward_is_due = False
            before, now = self._last, {"weights": self._last["weights"], **self._hash_rest()}
            self._unstable |= {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}
            self._last = now

    def note_cast(self, cast: bool) -> None:
        """Call it before and after a cast, which does not count as a change.

        Args:
            cast: False before, True after.
        """
        if not self.known:
            return
        now = self._hash_all()
        if cast:
            self._last = {name: now.get(name, "") if same else "changed" for name, same in self._unchanged.items()}
        else:
            self._unchanged = {name: now.get(name) == self._last.get(name) for name in now.keys() | self._last.keys()}

    def _hash_rest(self) -> dict[str, str]:
        return hash_extra_state(self.networks) | hash_attributes(self.networks)

    def _hash_all(self) -> dict[str, str]:
        return {"weights": hash_weights(self.networks), **self._hash_rest()}


def _hash(value: object, code: Code = False) -> str:
    try:
        return fingerprint(value, code=code)
    except InputError:  # nested too deeply
        return type(value).__qualname__
