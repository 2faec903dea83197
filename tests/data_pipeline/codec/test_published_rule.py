"""The published rules: their formula, their frames, and what the public tool chose for a clip."""

import dataclasses

import numpy as np
import pytest
from conftest import write_video

from data_pipeline.codec import published_rule
from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.framing import Framing
from data_pipeline.codec.patches import SelectionConfig
from data_pipeline.codec.published_rule import (
    check_has_news,
    choose_published,
    compensated_speed,
    decompose_published,
    implicit_weight,
    patch_sums,
    pixel_scores,
)
from data_pipeline.codec.selection import Order
from data_pipeline.errors import RejectedInput
from data_pipeline.shards.sample_builder import SampleConfig, build_sample

SIDE = 128
B_FRAMES = {"bf": "2", "b_strategy": "0", "g": "50", "crf": "12", "refs": "1", "sc_threshold": "0"}


def texture(seed, height=SIDE, width=SIDE):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 215, (-(-height // 8), -(-width // 8), 3))
    fine = np.kron(coarse, np.ones((8, 8, 1)))[:height, :width]
    for axis in (0, 1):
        fine = (np.roll(fine, 3, axis) + fine + np.roll(fine, -3, axis)) / 3
    return fine


def fading(count):
    """One texture becomes another: what lies between two frames is their weighted mean."""
    first = texture(0)
    last = texture(1)
    shares = np.linspace(0, 1, count)
    return [((1 - share) * first + share * last).astype(np.uint8) for share in shares]


def moving_square(count, height=SIDE, width=SIDE):
    """A square that wanders over a still texture from edge to edge."""
    pictures = []
    for t in range(count):
        picture = texture(2, height, width).astype(np.uint8)
        left = (width - 24) * t // (count - 1)
        top = (height - 24) * t // (count - 1)
        picture[top : top + 24, left : left + 24] = texture(3)[:24, :24]
        pictures.append(picture)
    return pictures


def sample_by(rule, **others):
    return SampleConfig(size=SIDE, selection=SelectionConfig(rule=rule), **others)


def framing_of(count, **others):
    given = {"size": SIDE, "patch_size": 16, "by_index": True, **others}
    return Framing(num_frames=count, **given)


def slow_percentile(values):
    """The 95th percentile, linear between the two nearest ranks."""
    ordered = sorted(float(value) for value in np.ravel(values))
    rank = 0.95 * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def test_scores_are_those_of_a_slow_loop():
    rng = np.random.default_rng(0)
    vectors = rng.integers(-40, 40, (4, 6, 2)).astype(np.int32)
    residual = (rng.exponential(4, (32, 48))).astype(np.uint8)
    median_x = sorted(vectors[..., 0].ravel() / 4)
    median_y = sorted(vectors[..., 1].ravel() / 4)
    middle = ((median_x[11] + median_x[12]) / 2, (median_y[11] + median_y[12]) / 2)
    speed = np.zeros((32, 48))
    for y in range(32):
        for x in range(48):
            vector_x, vector_y = vectors[y // 8, x // 8] / 4
            speed[y, x] = np.hypot(vector_x - middle[0], vector_y - middle[1])
    full_speed = slow_percentile(speed)
    full_residual = slow_percentile(residual)
    wanted = np.zeros((2, 3))
    for y in range(32):
        for x in range(48):
            moved = min(speed[y, x] / full_speed, 1)
            left = min(residual[y, x] / full_residual, 1)
            wanted[y // 16, x // 16] += (moved + left) / 2
    per_cell = compensated_speed(vectors)
    per_pixel = np.repeat(np.repeat(per_cell, 8, axis=0), 8, axis=1)
    assert np.allclose(patch_sums(pixel_scores(per_pixel, residual), 16), wanted, rtol=1e-5)


def test_each_pixel_is_clipped_before_the_sum():
    """One enormous pixel is worth no more than one at full scale."""
    values = np.zeros((16, 32), np.float32)
    values[:, 16:18] = 2  # full scale: 6 % of the pixels
    values[0, 0] = 1000
    left, right = patch_sums(pixel_scores(values, np.zeros_like(values)), 16)[0]
    assert (left, right) == (0.5, 0.5 * 32)


def test_without_a_percentile_whatever_there_is_is_full_scale():
    values = np.zeros((20, 20), np.float32)
    values[3, 3] = 0.25
    assert pixel_scores(values, np.zeros_like(values)).sum() == 0.5
    assert not pixel_scores(np.zeros_like(values), np.zeros_like(values)).any()


@pytest.mark.parametrize(("given", "weight"), [((1, 2), 32), ((1, 3), 21), ((2, 3), 42)])
def test_implicit_weights_are_the_standards(given, weight):
    assert implicit_weight(*given) == weight


@pytest.mark.parametrize("count", [7, 64])
def test_frames_lie_at_even_indices_whatever_their_times(tmp_path, count):
    times = np.cumsum([1 + (number > 10) * 4 for number in range(30)])
    path = write_video(tmp_path / "clip.mp4", moving_square(30), times=times.tolist(), bf="0")
    video = decode_video(path, framing_of(count))
    assert video.indices.tolist() == sorted({int(i) for i in np.linspace(0, 29, count)})


def test_b_frames_are_predicted_from_both_sides_by_their_distances(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", fading(13), **B_FRAMES)
    errors = []
    real = published_rule.predict_from_both

    def seen(luma, past, future, masks, share):
        prediction = real(luma, past=past, future=future, masks=masks, share=share)
        both = np.repeat(np.repeat(masks[0] & masks[1], 8, axis=0), 8, axis=1)
        mean = (past + future + 1) >> 1
        choices = (prediction, past, future, mean)
        errors.append([np.abs(luma.astype(int) - choice)[both].mean() for choice in choices])
        return prediction

    monkeypatch.setattr(published_rule, "predict_from_both", seen)
    decompose_published(path, framing_of(13))
    assert len(errors) == 8
    ours, past, future, mean = np.nanmean(errors, axis=0)
    assert ours < 1.0
    assert ours < 0.4 * min(past, future)
    assert ours < 0.7 * mean


@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_cell_with_two_vectors_takes_what_explains_it(is_weighted):
    rng = np.random.default_rng(0)
    past, future = rng.integers(0, 255, (2, 20, 28)).astype(np.int16)
    both = (43 * past + 21 * future + 32) >> 6 if is_weighted else (past + future + 1) >> 1
    luma = both.copy()
    luma[:8, :8] = past[:8, :8]
    luma[8:16, 16:] = future[8:16, 16:]
    named = np.ones((3, 4), bool)
    share = (1, 3)
    prediction = published_rule.predict_from_both(luma, past, future, (named, named), share)
    assert np.array_equal(prediction, luma)
    # where one direction is named alone, it is taken
    none = np.zeros_like(named)
    for masks, wanted in (((named, none), past), ((none, named), future)):
        prediction = published_rule.predict_from_both(luma, past, future, masks, share)
        assert np.array_equal(prediction, wanted)


def test_vectors_leave_much_less_than_the_plain_difference(tmp_path, monkeypatch):
    first, step = texture(0, 2 * SIDE, 2 * SIDE), 3
    pictures = [
        first[step * t : step * t + SIDE, 2 * t : 2 * t + SIDE].astype(np.uint8) for t in range(16)
    ]
    path = write_video(tmp_path / "clip.mp4", pictures, **B_FRAMES)
    left = []
    real = published_rule.pixel_scores

    def seen(speed, residual):
        left.append(residual[24:-24, 24:-24].mean())
        return real(speed, residual)

    monkeypatch.setattr(published_rule, "pixel_scores", seen)
    decompose_published(path, framing_of(16))
    plain = np.abs(np.diff(np.stack(pictures).mean(axis=-1), axis=0)).mean()
    assert len(left) == 15 and np.mean(left) < 0.25 * plain


@pytest.mark.parametrize("options", [B_FRAMES, {"bf": "0", "g": "8"}])
def test_published_takes_no_i_frame_and_its_llava_variant_the_first_one_whole(tmp_path, options):
    path = write_video(tmp_path / "clip.mp4", moving_square(24), **{**options, "g": "8"})
    clip, scores = decompose_published(path, framing_of(24))
    assert clip.is_i_frame.sum() >= 3 and not scores[clip.is_i_frame].any()
    selection = choose_published(clip, scores, budget=256, whole_first_frame=False)
    frames = selection.positions[:, 0]
    assert len(frames) == 256 and not clip.is_i_frame[frames].any()
    ranked = scores[tuple(selection.positions.astype(int).T)]
    assert (np.diff(ranked) <= 0).all()
    selection = choose_published(clip, scores, budget=256, whole_first_frame=True)
    assert (selection.positions[:64, 0] == 0).all()
    assert len(np.unique(selection.positions[:64], axis=0)) == 64
    assert (selection.positions[64:, 0] > 0).all()
    # the square wanders along the diagonal: its patches come first
    best = selection.positions[64:96].astype(int)
    assert np.abs(best[:, 1] - best[:, 2]).mean() < 1.5


def test_equal_scores_stay_in_order_of_position(tmp_path):
    path = write_video(tmp_path / "clip.mp4", moving_square(6), bf="0")
    clip, scores = decompose_published(path, framing_of(6))
    selection = choose_published(clip, np.zeros_like(scores), budget=10, whole_first_frame=False)
    assert selection.positions[:, 0].tolist() == [1] * 10
    assert selection.positions[:, 2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


@pytest.mark.parametrize("whole_first_frame", [False, True])
@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("shape", [(128, 80), (80, 128)])
def test_no_patch_of_padding_is_taken(tmp_path, shape, patch_size, whole_first_frame):
    path = write_video(tmp_path / "clip.mp4", moving_square(12, *shape), **B_FRAMES)
    framing = framing_of(12, size=112 * patch_size // 14, patch_size=patch_size, fit="pad")
    clip, scores = decompose_published(path, framing)
    # more than there is: everything that may be taken is taken
    selection = choose_published(clip, scores, budget=10**6, whole_first_frame=whole_first_frame)
    later = selection.positions[selection.positions[:, 0] > 0].astype(int)
    top, left = (later[:, axis] * patch_size for axis in (1, 2))
    content = clip.content
    assert (top >= content.top).all() and (top + patch_size <= content.bottom).all()
    assert (left >= content.left).all() and (left + patch_size <= content.right).all()
    per_frame = clip.whole_patches(patch_size).sum()
    assert 0 < per_frame < 64 and len(later) == 11 * per_frame


@pytest.mark.parametrize("rule", published_rule.PUBLISHED_RULES)
def test_a_codec_without_vectors_is_rejected(tmp_path, rule):
    path = write_video(tmp_path / "clip.mkv", moving_square(6), "mpeg2video")
    config = sample_by(rule)
    with pytest.raises(RejectedInput, match="no vectors: choose --rule") as caught:
        build_sample(path, "clip.mkv", config)
    assert caught.value.reason == "no_motion_vectors"


def test_nothing_can_be_taken_of_i_frames_alone(tmp_path):
    path = write_video(tmp_path / "clip.mp4", moving_square(6), g="1")
    clip, _ = decompose_published(path, framing_of(6))
    with pytest.raises(RejectedInput, match="all chosen frames are I-frames"):
        check_has_news(path, clip)
    with pytest.raises(RejectedInput, match="clip.mp4: all chosen frames"):
        build_sample(path, "clip.mp4", sample_by("published"))
    _, info = build_sample(path, "clip.mp4", sample_by("published_llava"))
    assert info.num_patches == 6 * 64


def test_a_published_sample_is_that_of_the_rule(tmp_path):
    path = write_video(tmp_path / "clip.mp4", moving_square(12, 80, 128), **B_FRAMES)
    config = SampleConfig(
        size=SIDE,
        selection=SelectionConfig(rule="published_llava"),
        fit="pad",
        budget=100,
        num_frames=12,
    )
    assert config.selection.vectors == "native"
    _, info = build_sample(path, "clip.mp4", config)
    assert (info.num_patches, info.content) == (100, (24, 0, 104, 128))
    assert dataclasses.asdict(info)["codec"] == "h264" and not info.is_static


@pytest.mark.parametrize("rule", published_rule.PUBLISHED_RULES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vectors": "canonical"}, "not --vectors canonical"),
        ({"order": Order(time_buckets=4)}, "a formula of its own"),
    ],
)
def test_what_a_published_rule_does_not_leave_open_is_refused(rule, given, message):
    with pytest.raises(ValueError, match=f"--rule {rule} .*{message}"):
        SelectionConfig(rule=rule, **given)


def test_the_first_frame_must_fit_into_the_budget():
    with pytest.raises(ValueError, match="cannot hold the 196 of all I-frames"):
        SampleConfig(selection=SelectionConfig(rule="published_llava"), budget=195)
    SampleConfig(selection=SelectionConfig(rule="published"), budget=1)


def test_the_public_tools_choice_is_found_again(shared):
    folder = shared / "public_index"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    video = shared / "videos" / "h264_portrait_a.mp4"
    framing = Framing(num_frames=64, size=576, patch_size=16, fit="pad", by_index=True)
    indices = decode_video(video, framing).indices
    assert np.array_equal(indices, np.load(folder / "h264_portrait_a.frame_ids.npy"))
    clip, scores = decompose_published(video, framing)
    public = np.load(folder / "h264_portrait_a.visidx_thw.npy")
    selection = choose_published(clip, scores, budget=len(public), whole_first_frame=True)
    masks = []
    for positions in (public, selection.positions.astype(int)):
        mask = np.zeros(scores.shape, bool)
        mask[tuple(positions.T)] = True
        assert mask[0].all() and not mask[1:, ~clip.whole_patches(16)].any()
        masks.append(mask[1:])
    theirs, ours = masks
    assert ours.sum() == theirs.sum() == 9072
    assert (ours & theirs).sum() / 9072 >= 0.72  # 0.20 by chance
    per_frame = np.corrcoef(ours.sum(axis=(1, 2)), theirs.sum(axis=(1, 2)))
    assert per_frame[0, 1] > 0.8
