"""Which patches survive: every I-frame patch, the best of the rest, any budget a prefix."""

import numpy as np
import pytest

from data_pipeline.codec.selection import Order, select_patches, spread_mask


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


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
def test_a_share_of_each_i_frame_is_spread_evenly_and_no_more_is_ever_taken(share):
    values, is_i = saliency(side=8)
    chosen = select_patches(values, is_i, 8 * 64, order=Order(i_frame_share=share)).positions
    count = round(share * 64)
    first = chosen[: 2 * count]
    assert is_i[first[:, 0]].all() and not is_i[chosen[2 * count :, 0]].any()
    mask = spread_mask(8, 8, share)
    assert np.array_equal(first[:count, 1:], np.argwhere(mask))
    quarters = mask.reshape(2, 4, 2, 4).sum(axis=(1, 3))
    assert quarters.max() - quarters.min() <= 1


def test_i_frame_patches_are_stored_with_the_highest_score():
    values, is_i = saliency()
    scores = select_patches(9 * values, is_i, 30).scores
    assert (scores[:18] == scores[18]).all() and scores[18] > 8
    scores = select_patches(1e6 * values, is_i, 30).scores
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("order", [Order(frame_discount=0.3), Order(time_discount=0.5)])
def test_under_discounts_smaller_budgets_stay_prefixes(order):
    values, is_i = saliency()
    whole = select_patches(values, is_i, 60, order=order)
    part = select_patches(values, is_i, 30, order=order)
    assert np.array_equal(whole.positions[:30], part.positions)
    assert not np.array_equal(part.positions, select_patches(values, is_i, 30).positions)


def test_the_discount_of_a_frame_grows_with_what_it_gives():
    """Frame 1 has the nine best patches, the other frame follows with half their score."""
    values = np.full((3, 3, 3), 0.49, np.float32)
    values[1] = 1.0
    is_i = np.arange(3) == 0
    taken = select_patches(values, is_i, 9 + 9, order=Order(frame_discount=0.5)).positions[9:, 0]
    # 1, 2/3, 1/2, ... against 0.49, 0.33, 0.24, ...
    assert taken.tolist() == [1, 1, 1, 2, 1, 1, 2, 1, 1]


def test_of_equal_places_in_neighbouring_frames_the_best_is_taken_first():
    values = np.zeros((4, 1, 2), np.float32)
    values[1:, 0, 0] = (0.8, 1.0, 0.9)  # one object, seen three times
    values[3, 0, 1] = 0.6
    is_i = np.arange(4) == 0
    plain = select_patches(values, is_i, 5).positions[2:].tolist()
    assert plain == [[2, 0, 0], [3, 0, 0], [1, 0, 0]]
    varied = select_patches(values, is_i, 5, order=Order(time_discount=0.5)).positions[2:].tolist()
    assert varied == [[2, 0, 0], [3, 0, 1], [3, 0, 0]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"i_frame_share": 1.5},
        {"time_discount": -0.1},
        {"frame_discount": float("nan")},
        {"time_buckets": 0},
    ],
)
def test_orders_that_make_no_sense_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Order(**wrong)


@pytest.mark.parametrize("buckets", [2, 3, 6, 50])
def test_buckets_of_time_take_turns_and_budgets_stay_prefixes(buckets):
    values, is_i = saliency()
    values[5:] *= 0.01  # without turns the end of the clip would get nothing
    whole = select_patches(values, is_i, 60, order=Order(time_buckets=buckets))
    part = select_patches(values, is_i, 30, order=Order(time_buckets=buckets))
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
    chosen = select_patches(equal, is_i_frame, 6 + 5, order=Order(time_buckets=buckets)).positions[
        6:
    ]
    assert chosen[:, 0].tolist() == frames
    for frame in set(frames):
        places = [[row, column] for row in range(2) for column in range(3)]
        assert chosen[chosen[:, 0] == frame, 1:].tolist() == places[: frames.count(frame)]


def test_frames_of_a_static_clip_halve_the_largest_gap():
    is_i_frame = np.arange(7) == 0
    chosen = select_patches(np.zeros((7, 1, 2), np.float32), is_i_frame, 14)
    assert chosen.positions[2::2, 0].tolist() == [1, 5, 3, 2, 6, 4]
