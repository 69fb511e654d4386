import copy

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.features.standardization import ChannelStandardization, PHIStandardization

BOTH = [ChannelStandardization, PHIStandardization]


def features(rows=40, channels=12, seed=0):
    """Correlated channels of very different scales, far from 0."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return (z @ mix) * torch.logspace(-1, 2, channels, dtype=torch.float64) + 5


def fitted(kind, rows):
    standardize = kind()
    standardize.fit(rows)
    return standardize


def test_channels_by_hand():
    rows = features()
    found = fitted(ChannelStandardization, rows)(rows)
    by_hand = (rows.numpy() - rows.numpy().mean(0)) / rows.numpy().std(0)
    np.testing.assert_allclose(found.numpy(), by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 7, 12])
def test_phi_s_keeps_angles_and_gives_all_channels_variance_1(channels):
    rows = features(200, channels)
    found = fitted(PHIStandardization, rows)(rows)
    centred = rows - rows.mean(dim=0)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(channels, dtype=torch.float64), rtol=0, atol=1e-5)
    one = torch.ones(channels, dtype=torch.float64)
    torch.testing.assert_close(found.var(dim=0, correction=0), one, rtol=1e-5, atol=0)
    scale = np.mean(np.linalg.eigvalsh(np.cov(rows.numpy().T, bias=True).reshape(channels, channels)))
    torch.testing.assert_close(found @ found.T, centred @ centred.T / scale, rtol=1e-4, atol=1e-4)


def test_phi_s_is_hadamards_rotation_of_the_principal_components():
    rows = features(500, 4)
    found = fitted(PHIStandardization, rows)(rows).numpy()
    centred = rows.numpy() - rows.numpy().mean(0)
    variances, directions = np.linalg.eigh(np.cov(centred.T, bias=True))
    components = centred @ directions
    # each channel is a sum of all components with signs, halved for 4 channels
    signs = found.T @ components / len(rows) / variances * np.sqrt(variances.mean()) * 2
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-4)
    np.testing.assert_allclose(np.sign(signs) @ np.sign(signs).T, 4 * np.eye(4), atol=1e-9)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("shape", [(5, 12), (5, 12, 3), (5, 12, 2, 4), (5, 12, 2, 3, 2), (0, 12, 2, 2)])
def test_maps_and_tokens_are_standardized_at_each_position(kind, shape):
    standardize = fitted(kind, features())
    feature = torch.randn(shape, dtype=torch.float64)
    found = standardize(feature)
    assert found.shape == shape and found.dtype == torch.float64
    rows = standardize(feature.movedim(1, -1).reshape(-1, 12))
    torch.testing.assert_close(found.movedim(1, -1).reshape(-1, 12), rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(standardize.inverse(found), feature, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", BOTH)
def test_dead_channels_do_not_blow_up(kind):
    rows = features(channels=8)
    rows[:, 3] = 1e3  # constant, and large
    rows[:, 5] = 0
    rows[:, 6] = 1e3 + 1e-6 * torch.rand(len(rows), dtype=torch.float64)  # constant but for rounding
    standardize = fitted(kind, rows)
    assert standardize(rows).abs().max() < 20
    assert standardize(rows + 1e-3).abs().max() < 20
    if kind is ChannelStandardization:
        assert standardize(rows)[:, [3, 5]].abs().max() == 0
        alive = [0, 1, 2, 4, 7]
        torch.testing.assert_close(standardize(rows)[:, alive].var(dim=0, correction=0), torch.ones(5).double())


@pytest.mark.parametrize("kind", BOTH)
def test_fewer_rows_than_channels(kind):
    rows = features(5, 12)
    found = fitted(kind, rows)(rows)
    one = torch.ones(12, dtype=torch.float64)
    torch.testing.assert_close(found.var(dim=0, correction=0), one, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(kind, dtype):
    rows = features(channels=8)
    standardize = fitted(kind, rows)
    expected = standardize(rows.to(dtype).double())
    with torch.autocast("cpu", torch.bfloat16):
        found = standardize(rows.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BOTH)
def test_the_network_around_it_may_change_its_type(kind):
    rows = features(channels=8).float()
    standardize = fitted(kind, rows)
    before = standardize(rows)
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        assert torch.equal(change(nn.Sequential(standardize))[0](rows), before)
    assert not [*standardize.parameters()]


@pytest.mark.parametrize("kind", BOTH)
def test_state_dict(kind):
    rows = features(channels=8)
    standardize, fresh, other = fitted(kind, rows), nn.Sequential(kind()), nn.Sequential(fitted(kind, rows[:, :4] * 2))
    state = nn.Sequential(standardize).state_dict()
    for module in (fresh, other):
        module.load_state_dict(state)
        assert module[0].is_fitted and torch.equal(module[0](rows), standardize(rows))
    assert torch.equal(copy.deepcopy(standardize)(rows), standardize(rows))
    fresh.load_state_dict(nn.Sequential(kind()).state_dict())
    assert not fresh[0].is_fitted


@pytest.mark.parametrize("kind", BOTH)
def test_values_of_the_other_kind_are_refused(kind):
    (other,) = {*BOTH} - {kind}
    state = nn.Sequential(fitted(other, features(channels=8))).state_dict()
    with pytest.raises(
        InputError, match=rf"^standardize: 0.scale \[.*\] of the file is of another .* {kind.__name__}$"
    ):
        nn.Sequential(kind()).load_state_dict(state)


@pytest.mark.parametrize("kind", BOTH)
def test_bad_input_is_one_line(kind):
    name, rows = kind.__name__, features(channels=8)
    bad = rows.clone()
    bad[3, 2] = torch.nan
    for call, message in [
        (lambda: kind()(rows), f"{name} is not fitted; call fit(features) first, with the teacher's features (M, C)"),
        (lambda: kind().inverse(rows), f"{name} is not fitted"),
        (lambda: kind().fit(rows.view(2, 20, 8)), f"{name} is fitted to features (M, C) of at least one row, got [2,"),
        (lambda: kind().fit(rows[:0]), "of at least one row, got [0, 8]"),
        (lambda: kind().fit(bad), f"{name}: features must be finite, got NaN or infinity"),
        (lambda: kind().fit(rows[:1]), f"{name}: all 8 channels are constant in 1 rows of features"),
        (lambda: kind().fit(torch.full((9, 3), 0.1)), f"{name}: all 3 channels are constant in 9 rows of features"),
        (
            lambda: fitted(kind, rows).fit(rows),
            f"{name} is fitted already, to 8 channels; use a new one for other feat",
        ),
        (lambda: fitted(kind, rows)(rows[:, :5]), "is fitted to 8 channels, so features must be (B, 8, ...), got [40,"),
        (lambda: fitted(kind, rows)(rows[0]), "features must be (B, 8, ...), got [8]"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value)
