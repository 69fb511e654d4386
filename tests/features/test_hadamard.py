import pytest
import torch

from kd_lightning.features.hadamard import equal_variance_rotation, hadamard

COMMON = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 96, 112, 192, 256, 320, 384, 512, 640, 768]


@pytest.mark.parametrize("size", [*COMMON, 1000, 1152, 1408])
def test_rows_are_orthogonal_and_entries_are_signs(size):
    matrix = hadamard(size)
    assert matrix.shape == (size, size) and matrix.dtype == torch.float64
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 5, 6, 10, 22, 92, 116, 232])
def test_sizes_without_one(size):
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 8, 10, 12, 33, 92, 116])
@pytest.mark.parametrize("kind", ["spread", "one", "equal", "two"])
def test_all_channels_get_the_mean_variance(size, kind):
    variances = {
        "spread": torch.logspace(-6, 4, size, dtype=torch.float64),
        "one": torch.eye(size, dtype=torch.float64)[0] * 7,
        "equal": torch.full((size,), 2.0, dtype=torch.float64),
        "two": torch.arange(size, dtype=torch.float64).clamp(max=1) + 1,
    }[kind]
    rotation = equal_variance_rotation(variances)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    spread = (rotation * variances @ rotation.T).diagonal()
    torch.testing.assert_close(spread, variances.mean().expand(size), rtol=1e-9, atol=0)


def test_the_hadamard_rotation_depends_on_the_size_alone():
    one, other = (equal_variance_rotation(torch.rand(12, dtype=torch.float64)) for _ in range(2))
    assert torch.equal(one, other)
