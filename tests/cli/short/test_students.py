"""Which of several students is deployed, and the front."""

from dataclasses import dataclass

import pytest

from kd_lightning.cli.short.costs import Costs
from kd_lightning.cli.short.students import Candidate, choose, write_students
from kd_lightning.errors import InputError


@dataclass(frozen=True)
class Made(Candidate):
    """A candidate without runs."""

    right: float = 0.0

    @property
    def accuracy(self):
        return self.right

    @property
    def alone(self):
        return self.right - 0.1

    @property
    def samples(self):
        return 50


def candidate(name, megabytes, latency, right):
    return Made(name, Costs(1000, megabytes, 1e6, latency, 0.0, 0.0), None, right)


SMALL, MIDDLE, LARGE, POOR = (
    candidate("small", 1, 2.0, 0.8),
    candidate("torchvision/middle", 4, 3.0, 0.9),
    candidate("large", 8, 9.0, 0.9),
    candidate("poor", 5, 4.0, 0.5),
)
ALL = [LARGE, SMALL, POOR, MIDDLE]


def test_the_most_accurate_within_the_limits_and_the_smallest_of_equal_ones():
    assert choose(ALL, None, None) is MIDDLE
    assert choose(ALL, 3.9, None) is SMALL
    assert choose(ALL, 8, 2.5) is SMALL
    with pytest.raises(InputError, match="no student is within the limits"):
        choose(ALL, 0.5, None)


def test_front():
    assert [one.is_dominated(ALL) for one in (SMALL, MIDDLE, LARGE, POOR)] == [False, False, True, True]
    assert not candidate("twin", 1, 2.0, 0.8).is_dominated([*ALL])  # equal in all


def test_table_and_picture(tmp_path, capsys):
    table, picture = write_students(ALL, MIDDLE, tmp_path / "students")
    lines = table.read_text().splitlines()
    assert lines[0].startswith("student,accuracy_percent,alone_percent,size_mb,latency_ms")
    assert lines[1] == "small,80.0,70.0,1,2,1000000,1000,1,0"
    assert [line.split(",")[0] for line in lines[1:]] == ["small", "torchvision/middle", "poor", "large"]
    assert lines[2].endswith(",1,1") and picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "torchvision/middle *" in out and "poor *" not in out
