"""log_figure: which loggers get a figure and how; and failures, which are warnings."""

import warnings
from types import SimpleNamespace

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from kd_lightning.runs.figures.log_figure import log_figure, only_warn


class Calls:
    """Stores the calls of one method."""

    def __init__(self, method, error=None):
        self.calls, self.error = [], error
        setattr(self, method, self.call)

    def call(self, *args, **kwargs):
        if self.error is not None:
            raise self.error
        self.calls.append((args, kwargs))


class Neptune(dict):
    """As the run of neptune: a mapping of series."""

    __module__ = "neptune.metadata_containers.run"

    def __missing__(self, name):
        self[name] = found = Calls("append")
        return found


@pytest.fixture
def log():
    """Logs a figure at step 7 to some loggers; gives the figure, or None if it was not drawn."""

    def run(*loggers, rank=0, draw=None):
        drawn = []

        def default():
            drawn.append(plt.figure(figsize=(1, 1)))
            return drawn[0]

        trainer = SimpleNamespace(loggers=list(loggers), is_global_zero=not rank, global_step=7)
        log_figure(SimpleNamespace(_trainer=trainer), "part/name", draw or default)
        return drawn[0] if drawn else None

    open_ones = plt.get_fignums()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield run
    assert plt.get_fignums() == open_ones


def test_tensorboard(log):
    experiment = Calls("add_figure")
    figure = log(SimpleNamespace(experiment=experiment))
    assert experiment.calls == [(("part/name", figure, 7), {})]


def test_weights_and_biases(log):
    logger = Calls("log_image")
    log(logger)
    ((arguments, named),) = logger.calls
    assert not arguments and (named["key"], named["step"]) == ("part/name", 7)
    (image,) = named["images"]
    assert isinstance(image, Image.Image) and image.size == (100, 100)


def test_mlflow(log):
    experiment = Calls("log_figure")
    figure = log(SimpleNamespace(experiment=experiment, run_id="ab12"))
    assert experiment.calls == [(("ab12", figure, "part/name_step_7.png"), {})]


def test_comet(log):
    experiment = Calls("log_figure")
    figure = log(SimpleNamespace(experiment=experiment))
    assert experiment.calls == [((), {"figure_name": "part/name", "figure": figure, "step": 7})]


def test_neptune(log):
    experiment = Neptune()
    figure = log(SimpleNamespace(experiment=experiment))
    assert experiment["part/name"].calls == [((figure,), {"step": 7})]


@pytest.mark.parametrize("loggers", [[], [SimpleNamespace()], [SimpleNamespace(experiment=object())]])
def test_nothing_is_drawn_for_loggers_without_figures(log, loggers):
    assert log(*loggers) is None


def test_other_ranks_draw_nothing(log):
    logger = Calls("log_image")
    assert log(logger, rank=1) is None
    assert not logger.calls


def test_module_without_a_trainer():
    log_figure(SimpleNamespace(), "name", lambda: pytest.fail("drawn"))


def test_each_logger_gets_the_figure_though_one_fails(log):
    broken, sound = Calls("log_image", OSError("the server is away\nat port 80")), Calls("log_image")
    with pytest.warns(UserWarning, match="the server is away") as found:
        log(broken, sound, broken)
    assert len(sound.calls) == 1
    assert [str(one.message) for one in found] == [
        "figure part/name in Calls is left out, and the run goes on: OSError: the server is away"
    ] * 2


def test_logger_that_cannot_start(log):
    class Away:
        @property
        def experiment(self):
            raise ConnectionError("no route")

    sound = Calls("log_image")
    with pytest.warns(UserWarning, match=r"figure part/name in Away is left out.*ConnectionError: no route"):
        log(Away(), sound)
    assert len(sound.calls) == 1


def test_figure_that_cannot_be_drawn(log):
    def draw():
        raise ValueError("")

    with pytest.warns(UserWarning, match=r"^figure part/name is left out, and the run goes on: ValueError: $"):
        log(Calls("log_image"), draw=draw)


def test_figure_without_pyplot(log):
    logger = Calls("log_image")
    log(logger, draw=lambda: Figure(figsize=(2, 1)))
    assert logger.calls[0][1]["images"][0].size == (200, 100)


def test_only_errors_become_warnings():
    with pytest.raises(KeyboardInterrupt), only_warn("this"):
        raise KeyboardInterrupt
