"""Networks of Hugging Face's transformers with their trained weights, for configs."""

from __future__ import annotations

from typing import Any

from torch import nn

from kd_lightning.errors import InputError


def from_pretrained(model: type[nn.Module], name: str) -> nn.Module:
    """Return ``model.from_pretrained(name)``, a network of transformers with its trained weights.

    Weights of a name of the Hugging Face Hub are downloaded once, to its cache; a folder is read. Its dropout is that
    of its config.

    Args:
        model: The class, such as ``transformers.Dinov2Model``, ``transformers.SiglipVisionModel`` or, for the class
            that the weights are of, ``transformers.AutoModel``.
        name: Name on the hub, such as ``facebook/dinov2-small``, or a folder that ``save_pretrained`` has written.

    Raises:
        InputError: If the class has no ``from_pretrained``, or the weights cannot be loaded.
    """
    load: Any = getattr(model, "from_pretrained", None)
    if load is None:
        raise InputError(f"model must be a class of transformers with from_pretrained, got {model.__name__}")
    try:
        network = load(name)
    except (OSError, ValueError, RuntimeError) as error:  # of no file, no network, or weights of another network
        reason = " ".join(str(error).split())
        raise InputError(f"name: {name} cannot be loaded as {model.__name__}: {reason:.300}") from error
    assert isinstance(network, nn.Module)
    return network
