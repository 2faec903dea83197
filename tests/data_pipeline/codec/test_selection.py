"""Which patches survive: every I-frame patch, the best of the rest, any budget a prefix."""

import numpy as np
import pytest

from data_pipeline.codec.selection import select_patches


def saliency(seed=0, frames=8, side=3):
    values = np.random.default_rng(seed).random((frames, side, side)).astype(np.float32)
    is_i = np.arange(frames) % 4 == 0
    values[is_i] = 0
    return values, is_i


def test_every_i_frame_patch_is_kept_before_any_other():
    values, is_i = saliency()
    chosen = select_patches(values, is_i, 30)
    i_frames = [(t, h, w) for t in (0, 4) for h in range(3) for w in range(3)]
    assert [tuple(p) for p in chosen.positions[:18].tolist()] == i_frames
    assert len(np.unique(chosen.positions, axis=0)) == 30


def test_the_best_p_frame_patches_follow_by_falling_score():
    values, is_i = saliency()
    chosen = select_patches(values, is_i, 40)
    t, h, w = chosen.positions[18:].astype(int).T
    scores = values[t, h, w]
    assert (np.diff(scores) <= 0).all()
    others = np.setdiff1d(values[~is_i].ravel(), scores)
    assert others.max() <= scores.min()


def test_a_smaller_budget_is_a_prefix():
    values, is_i = saliency()
    large, small = select_patches(values, is_i, 50), select_patches(values, is_i, 20)
    assert np.array_equal(large.positions[:20], small.positions)


def test_a_clip_without_news_keeps_whole_frames_and_says_so():
    _, is_i = saliency()
    chosen = select_patches(np.zeros((8, 3, 3), np.float32), is_i, 18 + 9)
    assert chosen.is_static
    assert len(set(chosen.positions[18:, 0].tolist())) == 1
    assert not select_patches(*saliency(), 27).is_static


def test_a_budget_below_one_i_frame_is_an_error():
    with pytest.raises(ValueError, match="budget of 17 patches cannot hold 2 I-frames of 9"):
        select_patches(*saliency(), 17)


def test_the_published_rule_takes_no_i_frame_patch():
    values, is_i = saliency()
    chosen = select_patches(values, is_i, 20, keep_i_frames=False)
    assert not is_i[chosen.positions[:, 0]].any()
    t, h, w = chosen.positions.astype(int).T
    assert np.allclose(values[t, h, w], np.sort(values[~is_i].ravel())[::-1][:20])


@pytest.mark.parametrize("buckets", [2, 3, 6, 50])
def test_buckets_of_time_take_turns_and_budgets_stay_prefixes(buckets):
    values, is_i = saliency()
    values[5:] *= 0.01  # without turns the end of the clip would get nothing
    whole = select_patches(values, is_i, 60, time_buckets=buckets)
    part = select_patches(values, is_i, 30, time_buckets=buckets)
    assert np.array_equal(whole.positions[:30], part.positions)
    taken = part.positions[18:, 0].astype(int)
    spans = np.searchsorted(np.flatnonzero(~is_i), taken) * min(buckets, 6) // 6
    counts = np.bincount(spans, minlength=min(buckets, 6))
    assert counts.max() - counts.min() <= 1
    plain = select_patches(values, is_i, 30).positions[18:, 0]
    assert (plain < 4).all()


def test_positions_are_rows_and_columns_where_the_grid_is_not_square():
    values = np.zeros((3, 2, 5), np.float32)
    values[1, 1, 4] = 0.9
    values[2, 0, 3] = 0.8
    chosen = select_patches(values, np.array([True, False, False]), 12)
    i_frame = [[0, row, column] for row in range(2) for column in range(5)]
    assert chosen.positions.tolist() == [*i_frame, [1, 1, 4], [2, 0, 3]]
    still = select_patches(0 * values, np.array([True, False, False]), 20)
    assert still.positions[10:].tolist() == [[1, row, column] for _, row, column in i_frame]


@pytest.mark.parametrize(("buckets", "frames"), [(1, [1, 1, 1, 1, 1]), (2, [1, 3, 1, 3, 1])])
def test_equal_patches_are_taken_in_order_of_time_row_and_column(buckets, frames):
    equal = np.ones((5, 2, 3), np.float32)
    is_i_frame = np.arange(5) == 0
    chosen = select_patches(equal, is_i_frame, 6 + 5, time_buckets=buckets).positions[6:]
    assert chosen[:, 0].tolist() == frames
    for frame in set(frames):
        places = [[row, column] for row in range(2) for column in range(3)]
        assert chosen[chosen[:, 0] == frame, 1:].tolist() == places[: frames.count(frame)]


def test_frames_of_a_static_clip_halve_the_largest_gap():
    is_i_frame = np.arange(7) == 0
    chosen = select_patches(np.zeros((7, 1, 2), np.float32), is_i_frame, 14)
    assert chosen.positions[2::2, 0].tolist() == [1, 5, 3, 2, 6, 4]
