"""Gives each LightningModule of a config its own arguments as hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import _InstantiatorFn
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters, _given_hyperparameters_context

from kd_lightning.runs.class_paths import find_class, walk_config, with_tensors

_PLAIN = (str, bool, int, float, type(None))


class OwnHyperparameters(_InstantiatorFn):
    """Builds the objects of a config. ``self.hparams`` of each holds the arguments of that object, tensors as tensors.

    Lightning gives the arguments of the outermost object to all that are built inside it: to a teacher that is a
    LightningModule, or to a module that is taught. Their ``self.hparams.lr`` would then be missing or another one.
    """

    def __call__(self, class_type: Any, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        """Build an object of a class."""
        self.cli._dump_config()
        # load_from_checkpoint parses hyperparameters with a parser of Lightning's, for which no list is a tensor
        whole = self.cli.config_dump[self.key] = with_tensors(self.cli.config_dump.get(self.key) or {})
        spec = _spec_of(class_type, kwargs, whole)
        if spec is whole:
            return super().__call__(
                class_type, *args, applied_instantiation_links=applied_instantiation_links, **kwargs
            )
        if spec is None:
            token = _given_hyperparameters.set(None)
            try:
                return class_type(*args, **kwargs)
            finally:
                _given_hyperparameters.reset(token)
        hparams = {"_class_path": spec["class_path"], **_arguments(spec)}
        with _given_hyperparameters_context(hparams, "lightning.pytorch.cli.instantiate_module"):
            return class_type(*args, **kwargs)


def _spec_of(class_type: Any, kwargs: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the part of a config that describes an object of this class with these arguments; None if none does."""
    if "class_path" not in whole:
        return whole
    specs = [
        whole,
        *(value for _, _, value, _ in walk_config(whole) if isinstance(value, dict) and "class_path" in value),
    ]
    plain = {name: value for name, value in kwargs.items() if isinstance(value, _PLAIN)}
    for spec in specs:
        given = _arguments(spec)
        if find_class(spec["class_path"]) is class_type and all(given.get(name) == plain[name] for name in plain):
            return spec
    return None


def _arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {**(spec.get("init_args") or {}), **(spec.get("dict_kwargs") or {})}
