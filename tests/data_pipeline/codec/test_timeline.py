"""Times of pictures as numbers: which are chosen, what is cut off, what is filled in."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.codec.timeline import Timeline, _check_end, _filled, even_frames
from data_pipeline.errors import RejectedInput


@pytest.mark.parametrize(
    ("stamps", "count", "wanted"),
    [
        ([0, 1, 2, 3], 3, [0, 1, 3]),  # 1.5 lies half way between two: the earlier one
        ([0, 2, 4, 6, 8, 10], 4, [0, 2, 3, 5]),  # 3.3 and 6.7
        ([0, 1, 2, 3, 100], 3, [0, 3, 4]),  # 50 is nearer to 3 than to 100
        # two times have the same nearest picture: the next one is taken, or those before the end
        ([0, 97, 98, 99, 100], 4, [0, 1, 2, 4]),
        ([0, 1, 2, 3, 100], 4, [0, 2, 3, 4]),
        ([0, 5, 6], 8, [0, 1, 2]),
    ],
)
def test_pictures_nearest_to_even_times_are_chosen_once_each(stamps, count, wanted):
    assert even_frames(stamps, count) == wanted


@pytest.mark.parametrize(
    ("num_good", "whole", "num_cut"), [(6, [0, 1, 2, 3], 4), (5, [0, 1, 2, 3], 4), (4, [], 8)]
)
def test_damage_takes_the_gop_that_it_lies_in(num_good, whole, num_cut):
    """Where damage follows the fourth picture, it may have begun in the GOP of that one."""
    cut = Timeline(pts=list(range(8)), key_pts=[0, 4]).before_damage(num_good)
    assert (cut.pts, cut.num_cut) == (whole, num_cut)


def test_pictures_without_a_stamp_lie_between_their_neighbours_and_a_step_apart_at_the_ends():
    filled = _filled(np.array([2, 4]), np.array([20, 40]), count=7, step=5)
    assert filled == [10, 15, 20, 30, 40, 45, 50]


@pytest.mark.parametrize(("length", "missing"), [(1.0, 0.4), (60.0, 5.9)])
def test_a_recording_may_lack_half_a_second_or_a_tenth(length, missing):
    unit = Fraction(1, 100)
    announced = [0, int(100 * length)]
    _check_end(Path("a.mp4"), int(100 * (length - missing)), announced, unit)
    with pytest.raises(RejectedInput, match="a.mp4: the packets of its last"):
        _check_end(Path("a.mp4"), int(100 * (length - missing - 0.2)), announced, unit)
