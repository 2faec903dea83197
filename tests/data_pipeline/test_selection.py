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
