"""Groups of parameters: which ones decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from kd_lightning.errors import InputError

_COMPILED = "_orig_mod."  # torch.compile puts it into names


def group_parameters(module: nn.Module, parameters: Iterable[nn.Parameter], prefix: str = "") -> list[dict[str, Any]]:
    """Put parameters into a group that decays and one that does not, for an optimiser of torch.

    The rule is that of timm (``param_groups_weight_decay`` of ``timm/optim/_param_groups.py``,
    https://github.com/huggingface/pytorch-image-models): parameters of at most 1 dimension (biases, norms, scales), and
    those whose name ends with ``.bias``, do not decay; nor do those that a network's own ``no_weight_decay()`` names,
    as those of timm do (position embeddings, class tokens). nanoGPT has the rule of dimensions, too
    (``configure_optimizers`` of https://github.com/karpathy/nanoGPT/blob/master/model.py). Embeddings of tokens decay
    in both.

    Args:
        module: The module whose names they have.
        parameters: The parameters.
        prefix: What the names of the groups begin with.

    Returns:
        The groups ``decay`` and ``no_decay``, without an empty one. They have names of parameters, as ``param_names``
        of the optimiser's groups.
    """
    names = {id(p): name.replace(_COMPILED, "") for name, p in module.named_parameters()}
    exempt = _named_by_networks(module)
    decay: list[tuple[str, nn.Parameter]] = []
    no_decay: list[tuple[str, nn.Parameter]] = []
    for parameter in parameters:
        name = names[id(parameter)]
        is_flat = parameter.ndim <= 1 or name.endswith(".bias")
        is_named = any(fnmatchcase(name, pattern) for pattern in exempt)
        (no_decay if is_flat or is_named else decay).append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": decay, "name": f"{prefix}decay"},
        {"params": no_decay, "name": f"{prefix}no_decay", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _named_by_networks(module: nn.Module) -> list[str]:
    """Return the names and patterns of the parameters that networks exempt by their method ``no_weight_decay``."""
    found = []
    for name, part in module.named_modules():
        method = getattr(part, "no_weight_decay", None)
        if callable(method):
            start = f"{name}.".replace(_COMPILED, "") if name else ""
            found += [f"{start}{pattern}" for pattern in method()]
    return found


def check_groups(checkpoint: Mapping[str, Any], grouped: bool) -> None:
    """Raise InputError if the optimisers of a checkpoint have other groups than ``weight_decay_exclude_1d`` makes."""
    for state in checkpoint.get("optimizer_states") or ():
        groups = state.get("param_groups", ())
        before = any("param_names" in group and str(group.get("name")).endswith("decay") for group in groups)
        if before != grouped:
            raise InputError(
                f"weight_decay_exclude_1d: the checkpoint was trained with {str(before).lower()}, got "
                f"{str(grouped).lower()}; resume with the same value"
            )
