"""ResumableCSVLogger: what a resumed run finds in its metrics.csv, and what it leaves there."""

import csv
import resource
from contextlib import contextmanager

import pytest
from lightning.pytorch.utilities import rank_zero_only

from kd_lightning.errors import InputError
from kd_lightning.runs.csv_logger import ResumableCSVLogger, read_metrics, validations


@pytest.fixture
def log(tmp_path):
    """Logs rows of one start of a run."""

    def start(rows, purge_step=None):
        logger = ResumableCSVLogger(str(tmp_path), "run", "version_0", purge_step)
        assert logger.experiment is logger.experiment
        for step, figures in rows:
            logger.log_metrics(figures, step)
            logger.save()

    return start


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run/version_0/metrics.csv"


def read(file):
    with file.open(newline="") as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


OLD = [(0, {"loss": 3.0}), (1, {"loss": 2.0}), (1, {"accuracy": 0.5}), (2, {"loss": 1.0})]


def test_is_on_disk_after_every_log(tmp_path, file):
    logger = ResumableCSVLogger(str(tmp_path), "run", "version_0")
    logger.log_metrics({"loss": 3.0}, 0)
    logger.save()  # as Lightning does where the step is a multiple of the flush interval
    assert logger._flush_logs_every_n_steps == 1
    assert read(file) == [{"step": 0, "loss": 3}]


def test_a_resumed_run_has_its_earlier_rows(log, file):
    log(OLD)
    before = read(file)
    assert len(before) == 4
    log([])
    assert read(file) == before
    log([(3, {"loss": 0.5, "later": 7.0})])  # with a figure that is new
    assert read(file) == [*before, {"step": 3, "loss": 0.5, "later": 7}]
    assert [path.name for path in file.parent.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize(("purge_step", "remaining"), [(None, 4), (3, 4), (2, 3), (1, 1), (0, 0)])
def test_rows_that_are_written_again_are_dropped(log, file, purge_step, remaining):
    log(OLD)
    before = read(file)
    log([(9, {"loss": 9.0})], purge_step)
    assert read(file) == [*before[:remaining], {"step": 9, "loss": 9}]


def test_rows_of_a_repeated_validation_are_there_once(log, file):
    log(OLD)
    log([(2, {"loss": 1.0}), (2, {"accuracy": 0.25}), (3, {"loss": 1.0})], purge_step=3)
    assert [row["step"] for row in read(file)] == [0, 1, 1, 2, 2, 3]
    assert read(file)[-2] == {"step": 2.0, "accuracy": 0.25}


def test_two_runs_do_not_share_their_step(tmp_path, log, file):
    log(OLD)
    ResumableCSVLogger(str(tmp_path), "run", "version_1", purge_step=0).log_metrics({"loss": 1.0}, 0)
    log([])
    assert len(read(file)) == 4


def test_empty_file(log, file):
    file.parent.mkdir(parents=True)
    file.touch()
    log(OLD[:1])
    assert read(file) == [{"step": 0, "loss": 3}]


def test_row_that_was_cut_off(log, file):
    """As a full disk leaves it."""
    log([(0, {"accuracy": 0.5, "val": 1.0}), (1, {"accuracy": 0.25, "val": 2.0})])
    file.write_text(file.read_text().strip()[: -len(",1,2.0")])
    log([(1, {"accuracy": 0.75})], purge_step=1)
    assert read(file) == [{"step": 0, "accuracy": 0.5, "val": 1}, {"step": 1, "accuracy": 0.75}]


def test_only_rank_0_touches_the_file(tmp_path, log, file, monkeypatch):
    """Trainer reads ``experiment`` on every rank; two ranks that rewrite one file would race."""
    log(OLD)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    other = ResumableCSVLogger(str(tmp_path), "run", "version_0", purge_step=0)
    other.experiment.log_hparams({})
    other.log_metrics({"loss": 1.0}, 0)
    assert len(read(file)) == 4


@pytest.fixture
def full_disk():
    """While inside, no file can grow beyond some bytes."""

    @contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.mark.parametrize("new", [{"loss": 1.25}, {"loss": 1.25, "accuracy": 0.5}])
@pytest.mark.parametrize("spare", [0, 3])
def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, file, full_disk, new, spare):
    """Also a row that does not fit in whole, and one with a new column, which rewrites the file."""
    logger = ResumableCSVLogger(str(tmp_path), "run", "version_0")
    logger.log_metrics({"loss": 3.0}, 0)
    before = file.read_text()
    with full_disk(len(before) + spare):
        for step in (1, 2):
            with pytest.raises(OSError, match="too large|No space"):
                logger.log_metrics(new, step)
            assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == ["metrics.csv"]
    logger.log_metrics({"loss": 0.5}, 3)
    assert read(file) == [
        {"step": 0, "loss": 3},
        {"step": 1, **new},
        {"step": 2, **new},
        {"step": 3, "loss": 0.5},
    ]


def test_rows_of_a_fit_and_of_the_command_validate(tmp_path, file):
    """``validate`` logs with step 0; a fit may validate twice at one step, while it accumulates gradients."""
    logger = ResumableCSVLogger(str(tmp_path), "run", "version_0")
    rows = [({"loss": 3.0}, 0), ({"val/a": 0.1}, 3), ({"val/a": 0.2}, 3), ({"val/a": 0.9}, 0), ({"val/b": 0.4}, 7)]
    for figures, step in rows:
        logger.log_metrics(figures, step)
    assert read_metrics(file) == [figures | {"step": step} for figures, step in rows]
    assert [row["step"] for row in validations(read_metrics(file))] == [3, 3, 7]
    assert read_metrics(tmp_path / "none.csv") == []
    file.write_text("step,val/a\n1,high\n")
    with pytest.raises(InputError, match=r"metrics\.csv is damaged"):
        read_metrics(file)
