"""Label spreading against linear algebra, its limit cases, and the features of networks."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
import torchvision
from jsonargparse import auto_cli
from sklearn.datasets import make_moons
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision.models import resnet18, vgg11, vit_b_16

from kd_lightning.errors import InputError
from kd_lightning.models import CifarResNet, DigitsCNN
from kd_lightning.pseudo_labels.graph_labels import GraphPseudoLabels
from kd_lightning.quantization.layers import quantize


def spread_by_hand(features, y, classes, neighbors, alpha):
    """Label spreading's closed form in dense float64."""
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = 1 - x @ x.T
    np.fill_diagonal(distance, np.inf)
    w = np.zeros_like(distance)
    for row, nearest in enumerate(np.argsort(distance, axis=1, kind="stable")[:, :neighbors]):
        w[row, nearest] = 1
    w = np.maximum(w, w.T)
    degree = w.sum(axis=0)
    s = w / np.sqrt(degree[:, None] * degree[None, :])
    known = np.eye(classes + 1)[np.where(y < 0, classes, y)][:, :classes]
    f = (1 - alpha) * np.linalg.solve(np.eye(len(x)) - alpha * s, known)
    return f / f.sum(axis=1, keepdims=True)


def blobs(count=60, classes=3, width=5, seed=0, labeled=4):
    """Overlapping clusters around axes: features, the true classes, and labels of the first few of each."""
    random = np.random.default_rng(seed)
    true = np.arange(count) % classes
    features = 2.0 * np.eye(width)[true] + random.normal(size=(count, width))
    y = np.where(np.arange(count) < labeled * classes, true, -100)
    return torch.from_numpy(features), torch.from_numpy(true), torch.from_numpy(y)


def circle(*degrees):
    angles = torch.tensor(degrees).double().deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


class TestSpreading:
    @pytest.mark.parametrize(("neighbors", "alpha"), [(10, 0.2), (4, 0.2), (6, 0.9), (10, 0.99)])
    @pytest.mark.parametrize("width", [5, 20])  # scikit-learn searches a tree below 16, all pairs above
    def test_closed_form(self, neighbors, alpha, width):
        features, _, y = blobs(width=width)
        found = GraphPseudoLabels(neighbors, alpha)(features, y, 3)
        expected = spread_by_hand(features.numpy(), y.numpy(), 3, neighbors, alpha)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-6, rtol=0)
        assert not np.allclose(expected, np.eye(3)[expected.argmax(axis=1)], atol=0.05)

    def test_lengths_of_features_do_not_matter(self):
        features, _, y = blobs()
        scale = torch.logspace(-20, 20, len(y), dtype=torch.float64)[:, None]
        labeler = GraphPseudoLabels()
        assert torch.allclose(labeler(features * scale, y, 3), labeler(features, y, 3), atol=1e-6)

    def test_two_moons_where_a_line_fails(self):
        x, true = make_moons(400, noise=0.05, random_state=0)
        lifted = np.c_[x, np.full(len(x), 1.0)]  # so that a plane's neighbors are a sphere's, too
        random = np.random.default_rng(0)
        few = np.concatenate([random.choice(np.flatnonzero(true == c), 2, replace=False) for c in (0, 1)])
        y = np.full(len(x), -100)
        y[few] = true[few]
        found = GraphPseudoLabels()(torch.from_numpy(lifted), torch.from_numpy(y), 2).argmax(dim=1).numpy()
        line = LogisticRegression().fit(x[few], true[few]).predict(x)
        assert (found == true).mean() >= 0.95
        assert (line == true).mean() < 0.9

    def test_labels_come_to_samples_far_away(self):
        # 59 steps from the one label: scikit-learn's own tolerance ends long before
        chain = circle(*(1.0 * 1.02**n for n in range(60)), 180.0, 181.0)
        y = torch.full((62,), -100)
        y[0], y[60] = 1, 0
        found = GraphPseudoLabels(neighbors=1)(chain, y, 2)
        assert torch.equal(found[:60], torch.tensor([[0.0, 1.0]]).expand(60, 2))

    def test_an_island_is_uniform(self):
        features = circle(0, 1, 2, 3, 90, 91, 92, 93, 180, 181, 182, 183)
        y = torch.tensor([0, -100, -100, -100, 2, -100, -100, -100, -100, -100, -100, -100])
        found = GraphPseudoLabels(neighbors=3)(features, y, 3)
        assert torch.equal(found[:4].argmax(dim=1), torch.tensor([0] * 4))
        assert torch.equal(found[4:8].argmax(dim=1), torch.tensor([2] * 4))
        assert torch.equal(found[8:], torch.full((4, 3), 1 / 3))

    def test_no_direction_is_uniform_and_leaves_the_others_alone(self):
        features, _, y = blobs()
        dead = torch.zeros(5, features.shape[1], dtype=features.dtype)
        labels = torch.tensor([-100, 2, -100, -100, -100])
        found = GraphPseudoLabels()(torch.cat([dead, features]), torch.cat([labels, y]), 3)
        assert torch.equal(found[[0, 2, 3, 4]], torch.full((4, 3), 1 / 3))
        assert found[1].tolist() == [0, 0, 1]
        assert torch.equal(found[5:], GraphPseudoLabels()(features, y, 3))
        nowhere = GraphPseudoLabels()(torch.zeros(3, 2), torch.tensor([0, 1, -100]), 2)
        assert nowhere.tolist() == [[1, 0], [0, 1], [0.5, 0.5]]

    @pytest.mark.parametrize("missing", [0, 1, 3])
    def test_columns_are_classes_also_when_one_has_no_label(self, missing):
        features, true, y = blobs(labeled=8)
        classes = torch.tensor([c for c in range(4) if c != missing])
        found = GraphPseudoLabels()(features, torch.where(y < 0, y, classes[true]), 4)
        assert torch.equal(found[:, classes], GraphPseudoLabels()(features, y, 3))
        assert not found[:, missing].any()

    @pytest.mark.parametrize("count", [3, 6, 11])
    def test_at_most_all_others_are_neighbors(self, count):
        features, _, _ = blobs(count)
        y = torch.tensor([0, 1] + [-100] * (count - 2))
        found = GraphPseudoLabels(neighbors=50)(features, y, 3)
        assert torch.equal(found, GraphPseudoLabels(neighbors=count - 1)(features, y, 3))
        assert torch.allclose(found[2:], torch.tensor([[0.5, 0.5, 0.0]]).expand(count - 2, 3))  # all are alike

    def test_duplicates(self):
        features, _, y = blobs()
        found = GraphPseudoLabels(neighbors=4)(features.repeat(6, 1), torch.cat([y, y.new_full((300,), -100)]), 3)
        assert found.isfinite().all()
        assert torch.allclose(found.sum(dim=1), torch.ones(360))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_twice_the_same_in_silence_and_nothing_changed(self, dtype):
        features, _, y = blobs()
        features = features.to(dtype).requires_grad_()
        before = (features.clone(), y.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = (GraphPseudoLabels()(features, y, 3) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(features, before[0]) and torch.equal(y, before[1])
        assert not first.requires_grad

    def test_labels_of_the_neighbors_overrule_by_alpha(self):
        features = circle(0, 1, 2, 3, 90, 91, 92, 93)
        y = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1])
        assert GraphPseudoLabels(3, 0.1)(features, y, 2)[0].argmax() == 1
        assert GraphPseudoLabels(3, 0.9)(features, y, 2)[0].argmax() == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"neighbors": 0}, "neighbors must be an integer of at least 1, got 0"),
            ({"neighbors": 2.5}, "neighbors must be an integer"),
            ({"neighbors": True}, "neighbors must be an integer"),
            ({"alpha": 0.0}, "alpha must lie between 0 and 1, both excluded, got 0.0"),
            ({"alpha": 1.0}, "alpha must lie"),
            ({"alpha": float("nan")}, "alpha must lie"),
        ],
    )
    def test_values(self, arguments, message):
        with pytest.raises(InputError, match=message):
            GraphPseudoLabels(**arguments)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_features_that_are_not_finite(self, value):
        features, _, y = blobs()
        features[7, 1] = features[9, 0] = value
        with pytest.raises(InputError, match="NaN or infinity in 2 of 60 samples, first in row 7"):
            GraphPseudoLabels()(features, y, 3)

    @pytest.mark.parametrize(
        ("features", "y", "message"),
        [
            (torch.ones(3, 2, 2), torch.tensor([0, 1, -100]), r"features must be \(N, D\).*got \(3, 2, 2\)"),
            (torch.ones(0, 2), torch.tensor([], dtype=torch.long), "features must be"),
            (torch.ones(3, 2), torch.tensor([0, 1]), "y must be 3 integers"),
            (torch.ones(3, 2), torch.tensor([0.0, 1.0, float("nan")]), "y must be 3 integers.*float32"),
            (torch.ones(3, 2), torch.tensor([0, 1, -1]), "y must be 0 ... 2, or -100 for no label, got -1"),
            (torch.ones(3, 2), torch.tensor([0, 3, -100]), "got 3"),
            (torch.ones(3, 2), torch.tensor([-100, -100, -100]), "at least two classes, got none"),
            (torch.ones(3, 2), torch.tensor([2, 2, -100]), r"at least two classes, got \[2\]"),
        ],
    )
    def test_features_and_labels(self, features, y, message):
        with pytest.raises(InputError, match=message):
            GraphPseudoLabels()(features, y, 3)


class Layers(nn.Module):
    """Linear layers in another order than that of the calls; it can raise or change its features in place."""

    def __init__(self, *, fail=False, change=False):
        super().__init__()
        self.head, self.body, self.unused = nn.Linear(3, 2), nn.Linear(4, 3), nn.Linear(9, 9)
        self.fail, self.change = fail, change

    def forward(self, x):
        hidden = self.body(x).tanh()
        logits = self.head(input=hidden)
        if self.fail:
            raise RuntimeError("in the middle")
        if self.change:
            hidden.zero_()
        return logits


class Reshaped(nn.Module):
    """Reshapes its inputs and calls a layer."""

    def __init__(self, shape, layer):
        super().__init__()
        self.shape, self.layer = shape, layer

    def forward(self, x):
        return self.layer(x.reshape(self.shape))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


def hooks(network):
    return [h for layer in network.modules() for h in (*layer._forward_hooks, *layer._forward_pre_hooks)]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class TestFeatures:
    @pytest.mark.parametrize("change", [False, True])
    def test_what_goes_into_the_linear_layer_called_last(self, change):
        network = Layers(change=change)
        assert torch.equal(GraphPseudoLabels().features_of(network, X), network.body(X).tanh())

    def test_a_layer_called_twice_counts_by_its_last_call(self):
        shared = nn.Linear(4, 4)
        assert torch.equal(GraphPseudoLabels().features_of(nn.Sequential(shared, shared), X), shared(X))

    @pytest.mark.parametrize("layer", [None, "body"])
    def test_no_hook_stays(self, layer):
        network = Layers(fail=True)
        with pytest.raises(RuntimeError, match="in the middle"):
            GraphPseudoLabels(layer=layer).features_of(network, X)
        assert not hooks(network)
        network.fail = False
        GraphPseudoLabels(layer=layer).features_of(network, X)
        assert not hooks(network)

    @pytest.mark.parametrize("layer", [None, "body"])
    def test_a_compiled_network(self, layer):
        network = Layers()
        expected = GraphPseudoLabels(layer=layer).features_of(network, X)
        compiled = torch.compile(network, backend="eager")
        compiled(X)
        assert torch.equal(GraphPseudoLabels(layer=layer).features_of(compiled, X), expected)

    def test_the_output_of_a_layer(self):
        network = Layers()
        assert torch.equal(GraphPseudoLabels(layer="body").features_of(network, X), network.body(X))

    def test_maps_are_averaged_over_places(self):
        maps = torch.arange(48.0).reshape(2, 3, 2, 4)
        found = GraphPseudoLabels(layer="0").features_of(nn.Sequential(nn.Identity(), nn.Conv2d(3, 2, 1)), maps)
        assert torch.allclose(found, maps.mean(dim=(2, 3)))
        volumes = maps.reshape(2, 3, 2, 2, 2)
        found = GraphPseudoLabels(layer="0").features_of(nn.Sequential(nn.Identity(), nn.Conv3d(3, 2, 1)), volumes)
        assert torch.allclose(found, maps.mean(dim=(2, 3)))

    def test_features_whose_channels_no_layer_shows_are_refused(self):
        network = nn.Sequential(nn.Identity(), nn.Flatten())
        with pytest.raises(InputError, match="no layer of the network shows which dimension .* holds channels"):
            GraphPseudoLabels(layer="0").features_of(network, torch.zeros(2, 3, 2, 4))

    def test_tokens_are_averaged_over_tokens(self):
        tokens = torch.arange(48.0).reshape(2, 8, 3)
        network = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
        for layer in ("0", None):
            assert torch.allclose(GraphPseudoLabels(layer=layer).features_of(network, tokens), tokens.mean(dim=1))
        places = tokens.reshape(2, 2, 4, 3)  # a linear layer's channels come last
        assert torch.allclose(GraphPseudoLabels().features_of(network, places), tokens.mean(dim=1))

    def test_a_layer_shows_where_its_channels_are(self):
        """Each shape would be read in the other way."""
        torch.manual_seed(0)
        waves = nn.Sequential(nn.Conv1d(1, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(30, 2))
        x = torch.randn(2, 1, 5)
        found = GraphPseudoLabels(layer="1").features_of(waves, x)
        assert torch.allclose(found, waves[:2](x).mean(dim=2)) and found.shape == (2, 6)
        swin = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.LayerNorm(6), nn.Flatten(), nn.Linear(120, 2))
        x = torch.randn(2, 4, 5, 3)
        found = GraphPseudoLabels(layer="1").features_of(swin, x)
        assert torch.allclose(found, swin[:2](x).mean(dim=(1, 2)), atol=1e-6) and found.shape == (2, 6)

    @pytest.mark.parametrize(
        ("make", "layer", "shape", "width"),
        [
            (lambda: DigitsCNN(width=4), "head.1", (1, 8, 8), None),
            (lambda: CifarResNet(depth=8), "layer3", (3, 32, 32), 64),
            (lambda: resnet18(num_classes=7), "avgpool", (3, 32, 32), 512),
            (lambda: vgg11(num_classes=7), "classifier.5", (3, 32, 32), 4096),
            (lambda: vit_b_16(num_classes=7, image_size=32), "encoder.ln", (3, 32, 32), 768),
        ],
    )
    def test_networks(self, make, layer, shape, width):
        torch.manual_seed(0)
        network = make().eval()
        x = torch.randn(2, *shape)
        with torch.no_grad():
            found = GraphPseudoLabels().features_of(network, x)
            last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
            assert width is None or found.shape == (2, width)
            assert torch.allclose(last(found), network(x), atol=1e-6)
            if width is not None:
                named = GraphPseudoLabels(layer=layer).features_of(network, x)
                assert named.shape == found.shape
                # a ViT's head takes the first token alone
                assert torch.allclose(named, found, atol=1e-5) != (layer == "encoder.ln")

    @pytest.mark.parametrize("skip", [("first", "last"), ()])
    def test_quantized(self, skip):
        pytest.importorskip("brevitas")
        torch.manual_seed(0)
        network = quantize(DigitsCNN(width=4), weight_bits=4, skip=skip).eval()
        x = torch.rand(3, 1, 8, 8)
        with torch.no_grad():
            found = GraphPseudoLabels().features_of(network, x)
            last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
            assert torch.allclose(last(found), network(x), atol=1e-6)
        assert copy.deepcopy(network)(x).shape == (3, 10)

    def test_convolution_for_a_head(self):
        """A convolutional head after a gate of linear layers; positions are averaged to logits."""
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(1, 8, 3), torchvision.ops.SqueezeExcitation(8, 2, activation=nn.ReLU))
        body.append(nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 8 * 36), nn.Unflatten(1, (8, 6, 6))))
        head = nn.Conv2d(8, 3, 1)
        network = nn.Sequential(body, head, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        x = torch.rand(4, 1, 8, 8)
        features = GraphPseudoLabels().features_of(network, x)
        torch.testing.assert_close(features, body(x).mean(dim=(2, 3)))
        torch.testing.assert_close(head(features[..., None, None]).flatten(1), network(x))

    @pytest.mark.parametrize(
        ("network", "layer", "message"),
        [
            (nn.Sequential(nn.Tanh()), None, "Sequential calls no linear or convolutional layer.*; give layer"),
            (
                Reshaped((10, 2), nn.Linear(2, 2)),
                None,
                r"last layer of Reshaped gets \(10, 2\), no row.*give layer",
            ),
            (Reshaped((20,), nn.Linear(20, 2)), None, r"gets \(20,\)"),
            (Layers(), "bodyy", "none of that name; nearest: body"),
            (Layers(), "unused", "layer unused: the network does not call this layer"),
            (Reshaped((20,), nn.Tanh()), "layer", r"layer layer must return features \(5, D\).*got \(20,\)"),
            (nn.Sequential(Pair()), "0", "layer 0 must return a tensor, .* got tuple with 2 tensors"),
        ],
    )
    def test_bad_input(self, network, layer, message):
        with pytest.raises(InputError, match=message):
            GraphPseudoLabels(layer=layer).features_of(network, X)
        assert not hooks(network)


def test_from_a_config():
    def take(source: GraphPseudoLabels):
        return source

    given = {
        "class_path": "kd_lightning.pseudo_labels.graph_labels.GraphPseudoLabels",
        "init_args": {"neighbors": 7, "layer": "fc"},
    }
    labeler = auto_cli(take, args=[json.dumps(given)])
    assert (labeler.neighbors, labeler.alpha, labeler.layer) == (7, 0.9, "fc")
