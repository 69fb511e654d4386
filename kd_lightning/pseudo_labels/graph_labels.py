"""Labels that spread from the labeled samples over the graph of nearest neighbors among features."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture


class GraphPseudoLabels:
    """Labels the pool by label spreading (Zhou et al. 2004) on a network's features, by scikit-learn's LabelSpreading.

    Two samples are joined where one is among the nearest neighbors of the other by cosine; near ones count as much as
    far ones. (Scikit-learn's own ``knn`` kernel joins them one way: on the pixels of the digits, with 4 labels a class,
    that labels 91.4 % of the others right, and this 92.4 %.)

    Args:
        neighbors: How many nearest others each sample is joined to, at most all (scikit-learn's ``n_neighbors`` less
            the sample itself).
        alpha: Share, in (0, 1), of what a sample takes from its neighbors; the rest is its own label. Large ones
            overrule labels that the neighbors disagree with.
        layer: Dotted path of the layer whose output is the features. None: what goes into the last linear layer that
            the network calls.

    Raises:
        InputError: For values that are not allowed.

    >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
    >>> labeler = GraphPseudoLabels(neighbors=1)
    >>> labeler(features, torch.tensor([0, -100, -100, 1]), classes=2)
    tensor([[1., 0.],
            [1., 0.],
            [0., 1.],
            [0., 1.]])
    """

    def __init__(self, neighbors: int = 10, alpha: float = 0.9, layer: str | None = None) -> None:
        if isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < 1:
            raise InputError(f"neighbors must be an integer of at least 1, got {neighbors}")
        if not 0.0 < alpha < 1.0:
            raise InputError(f"alpha must lie between 0 and 1, both excluded, got {alpha}")
        self.neighbors = neighbors
        self.alpha = alpha
        self.layer = layer

    def features_of(self, network: nn.Module, x: Tensor) -> Tensor:
        """Features (B, D) of inputs (B, ...), from one forward pass in the mode that the network is in.

        Of maps (B, C, ...) it is the mean over places, of tokens (B, T, D) the mean over tokens.

        Raises:
            InputError: Without ``layer``, if the network calls no linear or convolutional layer, or its last one not
                with a row for each input; with it, if there is no such layer, or its output is not as above.
        """
        if self.layer is None:
            return _into_last(network, x)
        with capture(network, [self.layer]) as outputs:
            network(x)
        if self.layer not in outputs:
            raise InputError(f"layer {self.layer}: the network has it, but does not call it; name another")
        output = outputs[self.layer]
        if output.ndim < 2 or len(output) != len(x):
            raise InputError(
                f"layer {self.layer} must give features ({len(x)}, D), maps ({len(x)}, C, ...) or tokens "
                f"({len(x)}, T, D), got {tuple(output.shape)}"
            )
        return output.mean(dim=1) if output.ndim == 3 else output.flatten(2).mean(dim=2) if output.ndim > 3 else output

    def __call__(self, features: Tensor, y: Tensor, classes: int) -> Tensor:
        """Probabilities (N, C) of all samples, labeled ones included, in float32 on the CPU.

        Rows that no label reaches, among them those whose features are all 0 (they have no direction), are uniform.
        A class without a label has probability 0 in all other rows.

        Args:
            features: (N, D), finite.
            y: Labels (N,), integers 0 ... C - 1; -100 where there is none. At least two classes must be there.
            classes: C.

        Raises:
            InputError: For anything else.
        """
        features, y = features.detach().cpu().double(), y.detach().cpu()
        _check(features, y, classes)
        length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        known = y != IGNORE_INDEX
        probabilities = torch.full((len(y), classes), 1.0 / classes, dtype=torch.float64)
        probabilities[known] = torch.nn.functional.one_hot(y[known].long(), classes).double()
        placed = length.flatten() > 0  # zeros are equally far from all: their neighbors would be any
        if (placed & known).any():
            points = features[placed] / length[placed]
            probabilities[placed] = self._spread(points, torch.where(known, y, -1)[placed], classes)
        return probabilities.float()

    def _spread(self, points: Tensor, y: Tensor, classes: int) -> Tensor:
        """Probabilities (M, C) of points (M, D), where y is -1 for no label."""
        # A number of steps in place of a tolerance: that is of the sum over all samples, and stops before the labels
        # have come to far samples, or settled there. What is left out after them is alpha ** steps.
        steps = max(100, math.ceil(math.log(1e-6) / math.log(self.alpha)))
        from sklearn.exceptions import ConvergenceWarning  # here, since it takes half a second
        from sklearn.semi_supervised import LabelSpreading

        spreading = LabelSpreading(kernel=self._joined, alpha=self.alpha, max_iter=steps, tol=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            spreading.fit(points.numpy(), y.numpy())
        spread = torch.zeros(len(points), classes, dtype=torch.float64)
        spread[:, torch.from_numpy(spreading.classes_)] = torch.from_numpy(spreading.label_distributions_)
        spread[spread.sum(dim=1) == 0] = 1.0 / classes  # no label came: scikit-learn's zeros would be class 0
        return spread

    def _joined(self, points: Any, _: Any) -> Any:
        """Which of the points (M, D) are joined, a sparse matrix (M, M) of zeros and ones."""
        count = min(self.neighbors + 1, len(points))  # each is its own nearest
        from sklearn.neighbors import NearestNeighbors

        graph = NearestNeighbors(n_neighbors=count).fit(points).kneighbors_graph(points)
        return graph.maximum(graph.T)


def _into_last(network: nn.Module, x: Tensor) -> Tensor:
    """What goes into the last layer that is called, (B, D), averaged over tokens or places if it has them.

    Layers are linear ones and convolutions, as networks have them for a head.
    """
    found: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[:] = [args[0] if args else kwargs["input"]]
        if found[0].ndim == 2:
            found[0] = found[0].clone()  # a later layer may change it in place
        elif found[0].ndim > 2:
            linear = isinstance(layer, nn.Linear)  # whose channels come last
            found[0] = found[0].flatten(1, -2).mean(dim=1) if linear else found[0].flatten(2).mean(dim=2)

    handles = []
    try:
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
        with capture(network, []):  # runs a compiled network uncompiled, where hooks are seen
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    kind = type(network).__name__
    if not found:
        raise InputError(
            f"{kind} calls no linear or convolutional layer to take features from; give layer, a dotted path"
        )
    if found[0].ndim != 2 or len(found[0]) != len(x):
        raise InputError(
            f"the last layer of {kind} gets {tuple(found[0].shape)}, no row for each of {len(x)} inputs; "
            "give layer, a dotted path"
        )
    return found[0]


def _check(features: Tensor, y: Tensor, classes: int) -> None:
    if features.ndim != 2 or not features.numel():
        raise InputError(f"features must be (N, D), N and D at least 1, got {tuple(features.shape)}")
    if y.shape != features.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise InputError(
            f"y must be {len(features)} integers, one for each row of features, got {tuple(y.shape)} of {y.dtype}"
        )
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        raise InputError(
            f"features must be finite, got NaN or infinity in {int((~finite).sum())} of {len(finite)} samples, first "
            f"in row {int((~finite).nonzero()[0])}"
        )
    labels = sorted(set(y[y != IGNORE_INDEX].tolist()))
    if wrong := [label for label in labels if not 0 <= label < classes]:
        raise InputError(f"y must be 0 ... {classes - 1}, or {IGNORE_INDEX} for no label, got {wrong[0]}")
    if len(labels) < 2:
        raise InputError(f"labels must be of at least two classes to spread, got {labels or 'none'}")
