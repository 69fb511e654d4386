import torch

from kd_lightning.features.grids import matching_sides, resize_linearly


def test_sides():
    assert matching_sides([], [], []) == ()
    assert matching_sides([7, 8], [7, 8], [16, 4]) == (16, 4)
    assert matching_sides([1, 3], [7, 7], [7, 2]) == (1, 1)


def test_maps_of_these_sides_are_not_copied():
    maps = torch.randn(2, 3, 4, 5)
    assert resize_linearly(maps, (4, 5)) is maps
    assert resize_linearly(maps, [8, 10]).shape == (2, 3, 8, 10)
    assert resize_linearly(torch.randn(2, 3), ()).shape == (2, 3)
