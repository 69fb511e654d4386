"""ForwardCorrectionLoss: formula, minimiser, zeros; estimating, writing and reading the matrix."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import ForwardCorrectionLoss, estimate_transition
from kd_lightning.losses.forward_correction import read_transition, write_transition

# exact in float32
T = np.array([[0.5, 0.25, 0.125, 0.125], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]])
TARGET = torch.tensor([0, 3, 1, 2, 2, 3])


def randn(dtype=torch.float64):
    return (torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula(dtype):
    p = softmax(randn(dtype).double().numpy(), axis=1)
    expected = -np.log((p @ T)[np.arange(6), TARGET])
    found = ForwardCorrectionLoss(T.tolist(), "none")(randn(dtype), TARGET)
    assert found.dtype == dtype
    assert found.double().numpy() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert repr(ForwardCorrectionLoss(T.tolist())) == "ForwardCorrectionLoss(classes=4, reduction='mean')"


def test_identity_is_cross_entropy():
    logits = randn().requires_grad_()
    values = ForwardCorrectionLoss(torch.eye(4).tolist())(logits, TARGET), F.cross_entropy(logits, TARGET)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))


def test_minimum_is_the_classifier_of_the_true_labels():
    """Three inputs with known distributions of true classes, and noisy labels in their exact shares."""
    noise = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.0, 0.4, 0.6]])
    clean = np.array([[0.9, 0.05, 0.05], [0.1, 0.1, 0.8], [0.3, 0.5, 0.2]])
    noisy = torch.from_numpy(clean @ noise)
    target = torch.arange(3).repeat(3)  # each label for each input; the loss is weighted by its share
    for matrix, expected in ((noise, clean), (np.eye(3), noisy.numpy())):
        logits = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        loss = ForwardCorrectionLoss(matrix.tolist(), "none")
        optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def closure(logits=logits, loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            value = (noisy.flatten() * loss(logits.repeat_interleave(3, dim=0), target)).sum()
            value.backward()
            return value

        optimizer.step(closure)
        assert logits.detach().softmax(dim=1).numpy() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_almost_impossible_label_stays_finite(dtype):
    """Only class 1 gets the label 1, and its probability is 0 by the logits."""
    logits = torch.tensor([[1e30, -1e30]], dtype=dtype).repeat(64, 1).requires_grad_()
    value = ForwardCorrectionLoss([[1.0, 0.0], [0.5, 0.5]])(logits, torch.ones(64, dtype=torch.long))
    value.backward()
    assert value.isfinite() and value > 1e20
    assert logits.grad.isfinite().all()


def test_an_impossible_label_is_refused():
    loss = ForwardCorrectionLoss([[1.0, 0.0], [1.0, 0.0]])
    loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="matrix: column 1 is all 0, but a label has this class"):
        loss(torch.zeros(3, 2), torch.tensor([0, 1, 0]))


def test_bfloat16_weights():
    """As a trainer of precision bf16-true makes them."""
    loss = ForwardCorrectionLoss(T.tolist()).bfloat16()
    assert torch.equal(loss(randn(), TARGET), ForwardCorrectionLoss(T.tolist())(randn(), TARGET))


def test_matrix_is_not_in_the_checkpoint():
    assert not ForwardCorrectionLoss(T.tolist()).state_dict()


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.5], [0.5, 0.4]], "matrix: row 1 must sum to 1, got 0.9"),
        ([[0.5, 0.5]], "matrix must be square, but row 0 of 1 has 2 entries"),
        ([[1.5, -0.5], [0.0, 1.0]], "matrix: row 0 must hold probabilities"),
        ([], "matrix must have at least 2 classes, got 0"),
        ("no/such.csv", "matrix: no/such.csv cannot be read: No such file or directory"),
    ],
)
def test_bad_matrix(matrix, message):
    with pytest.raises(InputError, match=message):
        ForwardCorrectionLoss(matrix)


def test_other_classes_than_the_logits():
    with pytest.raises(InputError, match="matrix must have 3 classes, as the logits, got 4"):
        ForwardCorrectionLoss(T.tolist())(torch.zeros(2, 3), torch.tensor([0, 1]))


class TestEstimate:
    def test_comes_near(self):
        """Noisy posteriors of samples of which some are surely of a class, and a little blur on top."""
        rng = np.random.default_rng(0)
        clean = rng.dirichlet([0.05] * 4, size=4000)  # mostly near the corners
        noisy = softmax(np.log(clean @ T + 1e-6) + rng.normal(0, 0.02, (4000, 4)), axis=1)
        for quantile in (0.97, 1.0):
            found = estimate_transition(torch.from_numpy(noisy), quantile)
            assert found.dtype == torch.float64
            assert found.sum(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-12)
            # the most sure of class 0 is where its noisy label is most likely, and so of the others
            assert found.numpy() == pytest.approx(T, abs=0.08)

    def test_by_hand(self):
        p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5]])
        for quantile, rows in ((1.0, [0, 3]), (0.75, [2, 4]), (0.97, [0, 3])):
            torch.testing.assert_close(estimate_transition(p, quantile), p[rows].double(), atol=1e-7, rtol=0)
        torch.testing.assert_close(estimate_transition(p[:1]), p[[0, 0]].double(), atol=1e-7, rtol=0)
        assert estimate_transition(p.half()).sum(dim=1).tolist() == [1.0, 1.0]

    def test_what_comes_can_be_used(self):
        matrix = estimate_transition(randn(torch.float32).softmax(dim=1)).tolist()
        assert ForwardCorrectionLoss(matrix)(randn(), TARGET).isfinite()

    @pytest.mark.parametrize(
        ("shape", "quantile", "message"),
        [
            ((0, 3), 0.9, r"probabilities must be \(N, C\) of at least one sample, got \[0, 3\]"),
            ((3,), 0.9, r"probabilities must be \(N, C\) .* got \[3\]"),
            ((2, 3), 0.0, r"quantile must lie in \(0, 1\], got 0.0"),
            ((2, 3), 1.1, r"quantile must lie in \(0, 1\], got 1.1"),
        ],
    )
    def test_bad_input(self, shape, quantile, message):
        with pytest.raises(InputError, match=message):
            estimate_transition(torch.ones(shape), quantile)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
    def test_what_are_no_probabilities(self, bad):
        with pytest.raises(InputError, match="probabilities must be finite and at least 0"):
            estimate_transition(torch.tensor([[0.5, 0.5], [bad, 0.5]]))


class TestFile:
    def test_round_trip(self, tmp_path):
        matrix = estimate_transition(randn().softmax(dim=1)).tolist()
        write_transition(tmp_path / "t.csv", matrix)
        assert read_transition(tmp_path / "t.csv") == matrix
        for path in (tmp_path / "t.csv", str(tmp_path / "t.csv")):
            assert torch.equal(
                ForwardCorrectionLoss(path)(randn(), TARGET), ForwardCorrectionLoss(matrix)(randn(), TARGET)
            )

    def test_from_a_spreadsheet(self, tmp_path):
        (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf0.5,0.5\r\n\r\n0,1\r\n")
        assert read_transition(tmp_path / "t.csv") == [[0.5, 0.5], [0.0, 1.0]]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"t\.csv must have at least 2 classes, got 0"),
            (b"0.5,0.5\n0.5,half\n", r"t\.csv, row 1: could not convert string to float: 'half'"),
            (b"a,b\n0.5,0.5\n0,1\n", r"t\.csv, row 0: could not convert"),
            (b"0.5,0.5\n0.5,\n", r"t\.csv, row 1: could not convert"),
            (b"0.5,0.5\n0.5", r"t\.csv must be square, but row 1 of 2 has 1 entries"),
            (b"0.5,0.5\n0.5,0.6\n", r"t\.csv: row 1 must sum to 1, got 1.1"),
            (b"0.5,0.5\nnan,1\n", r"t\.csv: row 1 must hold probabilities"),
            (b"\xff\xfe\x00\x01", r"t\.csv, row 0: .*can't decode"),
            (b"9" * 200_000, r"t\.csv, row 0: field larger than field limit"),
        ],
    )
    def test_damaged(self, tmp_path, content, message):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(InputError, match=message):
            ForwardCorrectionLoss(tmp_path / "t.csv")

    def test_a_folder(self, tmp_path):
        with pytest.raises(InputError, match="cannot be read: Is a directory"):
            ForwardCorrectionLoss(tmp_path)
