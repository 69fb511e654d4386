"""Names of terms."""

import pytest

from kd_lightning.errors import InputError
from kd_lightning.modules._shared.term_names import check_name


@pytest.mark.parametrize("name", ["at", "maps", "kl", "global_0", "at_weight", "teacher"])
def test_allowed(name):
    check_name("features", name)


@pytest.mark.parametrize(
    "name", ["at/1", "", "1a", "hard", "loss", "soft", "teacher_kl", "recall_0", "keys", "training"]
)
def test_no_word_or_taken(name):
    with pytest.raises(
        InputError, match=r"^features: a term's name must be a word that no other term or metric has, got "
    ):
        check_name("features", name)


@pytest.mark.parametrize("name", ["map", "feature_map", "attention_map", "topAP", "dense_precision"])
def test_a_metric_of_which_more_is_better(name):
    """A checkpoint with ``monitor: val/map`` takes the mode max, which would be the worst one of a loss."""
    with pytest.raises(
        InputError, match=f"^soft_loss: '{name}' reads as a metric of which more is better; give the term"
    ):
        check_name("soft_loss", name)
