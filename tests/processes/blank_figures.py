"""Blank figures in place of those that take longer to draw than most fits of the tests.

Each of these functions has tests of its own. Loggers get a blank figure, so that its name and step are what they are.
"""

from matplotlib.figure import Figure

SAMPLES = ("callbacks.sample_figures.draw_views", "callbacks.sample_figures.draw_outputs")
CONFUSION = ("modules._shared.evaluation.draw_confusion_matrix",)
OF_METHODS = (
    "modules.hint.hint_figure",
    "pseudo_labels.tasks.base.confidence_figure",
    "pseudo_labels.tasks.base.class_figure",
    "pseudo_labels.tasks.values.spread_figure",
    "pseudo_labels.tasks.values.value_figure",
)


def leave_blank(patch, names):
    """Replace functions of the package that draw, by a ``pytest.MonkeyPatch``."""
    for name in names:
        patch.setattr(f"kd_lightning.{name}", lambda *args, **kwargs: Figure(figsize=(1, 1)))
