"""ChannelTrace: where channels are, by the layers around; shapes alone would mislead in most of these networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import convnext_tiny, resnet18, swin_t
from torchvision.models.video import r3d_18
from torchvision.models.vision_transformer import VisionTransformer

from kd_lightning.features.capture import capture, evaluating
from kd_lightning.features.channels import ChannelTrace

SQUARE = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))  # maps (B, C, L) and tokens (B, N, C) alike


def layout(network, name, x=SQUARE):
    """Where a layer has its channels."""
    with evaluating(network), capture(network, [name]) as outputs, ChannelTrace() as trace:
        network(*x) if isinstance(x, tuple) else network(x)
    return trace.layout_of(outputs[name])


class Run(nn.Module):
    """A network of the given layers, whose forward pass is a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.run = forward

    def forward(self, x):
        return self.run(self.layers, x)


FIRST = [
    nn.Conv1d(8, 8, 3, padding=1),
    nn.ConvTranspose1d(8, 8, 1),
    nn.BatchNorm1d(8),
    nn.GroupNorm(2, 8),
    nn.InstanceNorm1d(8, affine=True),
    nn.MaxPool1d(1),
    nn.AvgPool1d(1),
    nn.AdaptiveAvgPool1d(8),
    nn.Conv1d(8, 8, 3, padding="same", padding_mode="circular"),
]
LAST = [
    nn.Linear(8, 8),
    nn.LayerNorm(8),
    nn.RMSNorm(8),
    nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
    nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=True),
]
NEUTRAL = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.GELU(),
    nn.Sigmoid(),
    nn.PReLU(),
    nn.Softplus(),
    nn.Identity(),
    nn.Dropout(0.5),
    nn.Dropout1d(0.5),
    nn.Sequential(nn.Identity(), nn.Sequential(nn.Tanh(), nn.Dropout(0.1))),
]


def name_of(layer):
    return str(layer).replace("\n", "")[:40]


@pytest.mark.parametrize("layer", FIRST, ids=name_of)
def test_channels_first(layer):
    assert layout(nn.Sequential(layer), "0") == "first"


@pytest.mark.parametrize("layer", LAST, ids=name_of)
def test_channels_last(layer):
    assert layout(nn.Sequential(layer), "0") == "last"


def test_embeddings_recurrent_layers_and_attention():
    ids = torch.arange(24).reshape(3, 8)
    assert layout(nn.Sequential(nn.Embedding(24, 8)), "0", ids) == "last"
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        assert layout(nn.Sequential(kind(8, 8, batch_first=True)), "0") == "last"
    for batch_first in (True, False):
        attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        assert layout(Run(lambda m, x: m["a"](x, x, x), a=attention), "layers.a") == "last"


@pytest.mark.parametrize("neutral", NEUTRAL, ids=name_of)
@pytest.mark.parametrize(("layer", "expected"), [(FIRST[0], "first"), (LAST[0], "last")], ids=["conv", "linear"])
def test_other_layers_have_the_layout_of_those_around(neutral, layer, expected):
    assert layout(nn.Sequential(layer, neutral), "1") == expected  # by the layer that feeds it
    assert layout(nn.Sequential(neutral, layer), "0") == expected  # by the layer that it feeds


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m["out"](x + m["conv"](x)), "first"),
        (lambda m, x: m["out"](x + m["linear"](x)), "last"),
        (lambda m, x: m["out"](torch.relu(m["conv"](x)) * m["gate"](x.mean(2)).unsqueeze(2)), "first"),
        (lambda m, x: m["out"](m["conv"](x).transpose(1, 2)), "last"),
        (lambda m, x: m["out"](m["linear"](x).permute(0, 2, 1)), "first"),
        (lambda m, x: m["out"](m["linear"](x).mT), "first"),
        (lambda m, x: m["out"](m["conv"](x).movedim(1, -1).contiguous()), "last"),
        (lambda m, x: m["out"](m["conv"](x.swapaxes(1, 2)).swapaxes(1, 2) + x), "last"),  # a block for tokens
        (lambda m, x: m["out"](torch.cat([m["linear"](x)[:, :1], x[:, 1:]], dim=1)), "last"),
        (lambda m, x: m["out"](torch.maximum(*m["wide"](x).chunk(2, dim=1))), "first"),  # maxout
        (lambda m, x: m["out"](m["map"](x.reshape(3, 8, 2, 4)).flatten(2)), "first"),
        (lambda m, x: m["out"](m["map"](x.reshape(3, 8, 2, 4)).flatten(2).transpose(1, 2)), "last"),  # patches
        (lambda m, x: m["out"](m["linear"](x.reshape(-1, 8)).view(3, 8, 8)), "last"),
        (lambda m, x: m["out"](x @ m["linear"].weight), "last"),
        (lambda m, x: m["out"](torch.addmm(m["linear"].bias, x.view(-1, 8), m["linear"].weight).view(3, 8, 8)), "last"),
        (lambda m, x: F.layer_norm(m["out"](x), (8,)), "last"),
        (lambda m, x: F.linear(m["out"](x * 2).transpose(1, 2), m["linear"].weight), "first"),
    ],
)
def test_functions_between_layers(forward, expected):
    network = Run(
        forward,
        conv=nn.Conv1d(8, 8, 1),
        wide=nn.Conv1d(8, 16, 1),
        map=nn.Conv2d(8, 8, 1),
        linear=nn.Linear(8, 8),
        gate=nn.Linear(8, 8),
        out=nn.Identity(),
    )
    assert layout(network, "layers.out") == expected


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m["out"](x),  # no layer at all
        lambda m, x: m["linear"](m["out"](m["conv"](x))),  # over channels first, then over time
        lambda m, x: m["out"](m["conv"](x) + m["linear"](x)),
        lambda m, x: m["out"](torch.einsum("bcl,cd->bdl", x, m["linear"].weight)),
        lambda m, x: m["out"](m["conv"](x).reshape(3, 4, 16).reshape(3, 8, 8).cumsum(1)),
        lambda m, x: m["out"](F.layer_norm(x, (8, 8))),  # over both
        lambda m, x: m["out"](x.softmax(1)),
        lambda m, x: m["out"](m["linear"](m["conv"](x)).relu()).mean(2),  # over channels first, then over time
        lambda m, x: m["out"]((m["conv"](x) @ m["linear"].weight).relu()).mean(2),  # a graph of places
        lambda m, x: m["out"](m["score"](x) + m["score"](x).transpose(1, 2)),  # a score for each pair of tokens
        lambda m, x: m["out"]((x @ x.mT).double().type_as(m["linear"](x))),
        lambda m, x: m["out"]((x @ x.mT).double().to(m["linear"](x))),
        lambda m, x: m["out"](F.pixel_shuffle(x.reshape(3, 2, 4, 2, 4), 2)),  # of a clip (B, T, C, H, W)
        lambda m, x: m["out"](F.pixel_unshuffle(x, 2)),  # of an image (C, H, W)
        lambda m, x: m["out"](torch.fft.fft(m["linear"](x)).imag),
    ],
)
def test_none_where_two_readings_are_possible(forward):
    layers = {"conv": nn.Conv1d(8, 8, 1), "linear": nn.Linear(8, 8), "score": nn.Linear(8, 1), "out": nn.Identity()}
    assert layout(Run(forward, **layers), "layers.out") is None


def test_a_gate_for_one_dimension_shows_nothing_of_the_one_that_it_is_repeated_over():
    def forward(m, x):
        return m["out"](m["linear"](x) * m["gate"](x.mean(1, keepdim=True)).sigmoid())  # ECA for tokens

    network = Run(forward, linear=nn.Linear(8, 8), gate=nn.Conv1d(1, 1, 3, padding=1), out=nn.Identity())
    assert layout(network, "layers.out") == "last"


def test_a_shape_that_changes_in_place():
    layers = {"conv": nn.Conv1d(8, 8, 1), "linear": nn.Linear(8, 8), "out": nn.Identity()}
    network = Run(lambda m, x: m["out"](m["conv"](x).transpose_(1, 2)), **layers)
    assert layout(network, "layers.out") is None
    network = Run(lambda m, x: m["linear"](m["out"](m["conv"](x).transpose_(1, 2))), **layers)
    assert layout(network, "layers.out") == "last"


def test_a_mixer_of_tokens_is_read_by_its_nearest_layers():
    def forward(m, x):
        x = x + m["tokens"](m["norm"](x).transpose(1, 2)).transpose(1, 2)
        return m["out"](x)

    network = Run(forward, norm=nn.LayerNorm(8), tokens=nn.Linear(8, 8), out=nn.Identity())
    assert layout(network, "layers.out") == layout(network, "layers.norm") == "last"


def of_all_layers(network, x):
    """Layouts of all outputs with two or more sides, by layer."""
    outputs = {}

    def hook_of(name):
        def hook(_layer, _inputs, output):
            outputs.setdefault(name, output)  # nothing is returned: that would replace the output

        return hook

    for name, layer in network.named_modules():
        layer.register_forward_hook(hook_of(name))
    with evaluating(network), torch.no_grad(), ChannelTrace() as trace:
        network(x)
    outputs = {name: output for name, output in outputs.items() if isinstance(output, torch.Tensor) and output.ndim > 2}
    return {name: (output.ndim, trace.layout_of(output)) for name, output in outputs.items()}


def test_networks_of_torchvision():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    assert {*of_all_layers(resnet18(), images).values()} == {(4, "first")}
    assert {*of_all_layers(r3d_18(), torch.randn(2, 3, 4, 16, 16)).values()} == {(5, "first")}
    vit = of_all_layers(VisionTransformer(64, 16, 2, 2, 32, 64), images)
    assert vit.pop("conv_proj") == (4, "first") and {*vit.values()} == {(3, "last")}
    swin = of_all_layers(swin_t(), images)
    assert [name for name, found in swin.items() if found == (4, "first")] == ["features.0.0", "permute", "avgpool"]
    assert {*swin.values()} == {(4, "first"), (4, "last")}
    convnext = of_all_layers(convnext_tiny(), images)
    assert convnext["features.1.0"] == convnext["features.1.0.block.0"] == (4, "first")
    assert convnext["features.1.0.block.2"] == convnext["features.1.0.block.3"] == (4, "last")
    assert None not in {found for _, found in convnext.values()}


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vit_tiny_patch16_224", 32, {"blocks.3": "last", "norm": "last", "patch_embed": "last"}),
        ("mixer_s32_224", 64, {"blocks.3": "last", "blocks.3.mlp_channels": "last"}),
        ("swin_tiny_patch4_window7_224", 56, {"layers.1.blocks.0": "last", "norm": "last"}),
        ("poolformer_s12", 64, {"stages.1": "first"}),
        ("convnext_atto", 64, {"stages.1.blocks.0": "first"}),
        ("levit_128s", 64, {"stages.0.blocks.0": "last"}),
    ],
)
def test_networks_of_timm(name, size, expected):
    timm = pytest.importorskip("timm")
    sizes = {} if name.startswith(("poolformer", "convnext", "levit")) else {"img_size": size}
    network = timm.create_model(name, num_classes=3, **sizes)
    size = 224 if name.startswith("levit") else size
    found = of_all_layers(network, torch.randn(2, 3, size, size))
    assert {layer: found[layer][1] for layer in expected} == expected


def test_networks_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ids = torch.arange(14).reshape(2, 7)
    bert = of_all_layers(transformers.BertModel(transformers.BertConfig(vocab_size=20, **size)), ids)
    gpt = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)
    gpt = of_all_layers(transformers.GPT2LMHeadModel(gpt), ids)
    assert {found for _, found in [*bert.values(), *gpt.values()]} == {"last"}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(vocab_size=20, **size, **convolutions, **positions)
    audio = of_all_layers(transformers.Wav2Vec2Model(config), torch.randn(2, 2000))
    assert audio["feature_extractor.conv_layers.1"] == (3, "first")
    assert audio["encoder.layers.0"] == audio["encoder.layers.1.feed_forward"] == (3, "last")
    assert audio["encoder.pos_conv_embed"] == (3, "last")  # a convolution between two transpositions


def test_tracing_changes_no_output_and_holds_each_tensor_as_itself():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.TransformerEncoderLayer(8, 2, 8))
    with evaluating(network), torch.no_grad():
        expected = [network(SQUARE + n) for n in range(3)]
        with ChannelTrace() as trace:
            found = [network(SQUARE + n) for n in range(3)]  # of passes whose tensors are gone, ids could come again
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
        assert trace.layout_of(other) == "last"
    assert trace.layout_of(torch.zeros(2, 3, 4)) is None
