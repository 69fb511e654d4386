"""Networks by name: ``timm/NAME``, ``torchvision/NAME``, or a class path."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import kd_lightning.models
from kd_lightning.errors import InputError
from kd_lightning.runs.build import build
from kd_lightning.runs.class_paths import find_class, missing_package

Spec = dict[str, Any]
_NEAREST = 3
_CLASSES = "num_classes"


@dataclass(frozen=True)
class Network:
    """A network that is not built yet.

    Attributes:
        name: Its name, as given.
        option: The option that names it, for messages.
        class_path: Path of its class or function.
        arguments: What it is called with beside the number of classes.
        keyword: Whether ``init_args`` takes the number of classes (its signature has it), or else ``dict_kwargs``.
    """

    name: str
    option: str
    class_path: str
    arguments: Spec = field(default_factory=dict)
    keyword: bool = False

    def spec(self, classes: int | None) -> Spec:
        """Return the network as a config describes it.

        Args:
            classes: Number of classes. None means the network's default.
        """
        arguments = self.arguments | ({} if classes is None else {_CLASSES: classes})
        key = "init_args" if self.keyword else "dict_kwargs"
        return {"class_path": self.class_path} | ({key: arguments} if arguments else {})

    def build(self, classes: int | None) -> nn.Module:
        """Build the network with new weights.

        Raises:
            InputError: If it cannot be built.
        """
        try:
            return build(nn.Module, self.spec(classes))
        except (InputError, AssertionError) as error:
            raise InputError(
                f"{self.option}: {self.name} cannot be built: {str(error) or 'it is no network'}"
            ) from error

    @property
    def slug(self) -> str:
        """The name as that of a folder: without its place.

        >>> Network("torchvision/resnet18", "--student", "torchvision.models.resnet18").slug
        'resnet18'
        """
        last = self.name.rsplit("/", 1)[-1] if "/" in self.name else self.name.rsplit(".", 1)[-1]
        return re.sub(r"[^A-Za-z0-9._-]+", "_", last).strip("._") or "network"

    @property
    def place(self) -> str:
        """``timm``, ``torchvision``, or empty for any other place."""
        known = {"timm.create_model": "timm"}
        return known.get(self.class_path, "torchvision" if self.class_path.startswith("torchvision.") else "")


def find_network(name: str, option: str) -> Network:
    """Return the network of a name.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, a network of this package such as ``resnet8``, or the import path
            of a class or function that returns a network.
        option: The option that has the name, for messages.

    Raises:
        InputError: If there is no such network. The message has the nearest names of its place, or how to install it.
    """
    place, slash, own = name.partition("/")
    if slash and place == "timm":
        return _of_timm(own, name, option)
    if slash and place == "torchvision":
        return _of_torchvision(own, name, option)
    if slash:
        raise InputError(f"{option} must be timm/NAME, torchvision/NAME or a class path, got {name!r}")
    if not hasattr(kd_lightning.models, name) and name in _torchvision_names():
        return _of_torchvision(name, name, option)
    found = find_class(name)
    if found is None:
        raise InputError(_unknown(name, option))
    if not callable(found):
        raise InputError(f"{option} must name a class or a function that returns a network, got {name!r}")
    path = name if "." in name else f"{found.__module__}.{found.__qualname__}"
    if "." not in name and hasattr(kd_lightning.models, name):
        path = f"kd_lightning.models.{name}"
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        parameters = inspect.signature(nn.Module).parameters
    return Network(name, option, path, keyword=_CLASSES in parameters)


def _of_timm(own: str, name: str, option: str) -> Network:
    if missing := missing_package("timm.create_model"):
        raise InputError(f"{option}: {name}: {missing}")
    import timm

    if not timm.is_model(own):
        raise InputError(f"{option}: timm has no network {own!r}{_nearest(own, timm.list_models(), 'timm/')}")
    return Network(name, option, "timm.create_model", {"model_name": own})


def _of_torchvision(own: str, name: str, option: str) -> Network:
    names = _torchvision_names()
    if own not in names:
        raise InputError(f"{option}: torchvision has no network {own!r}{_nearest(own, names, 'torchvision/')}")
    return Network(name, option, f"torchvision.models.{own}")


def _torchvision_names() -> list[str]:
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def _unknown(name: str, option: str) -> str:
    """Return the message for a name without a place: the nearest names of all places, or what the import lacks."""
    if "." in name:
        missing = missing_package(name)
        module, _, last = name.rpartition(".")
        where = f"{module} has no {last}, or cannot be imported"
        names = [entry for entry in vars(kd_lightning.models) if entry[0] != "_"] if "models" in module else []
        return f"{option}: {missing or where}{_nearest(last, names, f'{module}.')}"
    names = [*kd_lightning.models.__all__, *(f"torchvision/{one}" for one in _torchvision_names())]
    if not missing_package("timm.create_model"):
        import timm

        names += [f"timm/{one}" for one in timm.list_models()]
    by_last = {one: one.rpartition("/")[2] for one in names}
    exact = [one for one, last in by_last.items() if last == name]
    similar = [
        one
        for last in difflib.get_close_matches(name, [*by_last.values()], n=_NEAREST, cutoff=0.5)
        for one in names
        if by_last[one] == last
    ]
    found = [*dict.fromkeys([*exact, *similar])][:_NEAREST]
    nearest = f"; nearest: {', '.join(found)}" if found else ""
    return f"{option}: this package and torchvision have no network {name!r}{nearest}"


def _nearest(name: str, allowed: Sequence[str], prefix: str) -> str:
    found = difflib.get_close_matches(name, allowed, n=_NEAREST, cutoff=0.4)
    return f"; nearest: {', '.join(prefix + one for one in found)}" if found else ""
