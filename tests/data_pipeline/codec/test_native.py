"""The source's own vectors: known motion comes out at any sampling, or the file is refused."""

import numpy as np
import pytest
from conftest import write_video

from data_pipeline.codec.decompose import decompose_video
from data_pipeline.codec.framing import Framing
from data_pipeline.codec.native import decompose_native
from data_pipeline.errors import RejectedInput

SIDE = 128


def panning(dx, dy, count):
    """A texture whose content moves by (dx, dy) pixels a frame."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (60, 60, 3)), np.ones((8, 8, 1)))
    for axis in (0, 1):
        texture = (np.roll(texture, 3, axis) + texture + np.roll(texture, -3, axis)) / 3
    top, left = (200 if step > 0 else 10 for step in (dy, dx))
    return [
        texture[top - dy * t :, left - dx * t :][:SIDE, :SIDE].astype(np.uint8).copy()
        for t in range(count)
    ]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, -2), (-1, 4)])
@pytest.mark.parametrize("chosen", [24, 8])
def test_a_pan_yields_its_displacement_since_the_frame_shown_before(
    tmp_path, codec, dx, dy, chosen
):
    options = {"crf": "5", "bf": "0", "refs": "1", "g": "50"} if codec == "libx264" else {"g": "50"}
    path = write_video(tmp_path / "clip.mp4", panning(dx, dy, 24), codec, **options)
    clip = decompose_native(path, Framing(chosen, SIDE, 16))
    gaps = np.diff(np.rint(clip.seconds * 30))
    for t in range(1, chosen):
        inner = clip.motion[t, 3:-3, 3:-3]
        assert abs(np.median(inner[..., 0]) - dx * gaps[t - 1]) <= 0.25 * gaps[t - 1]
        assert abs(np.median(inner[..., 1]) - dy * gaps[t - 1]) <= 0.25 * gaps[t - 1]
    assert clip.residual[1:, 24:-24, 24:-24].mean() < 6


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("chosen", [25, 9])
def test_b_frames_lie_on_the_way_of_the_p_frame_after_them(tmp_path, codec, chosen):
    options = {"bf": "2", "g": "50", "crf": "5", "refs": "1", "b_strategy": "0"}
    path = write_video(tmp_path / "clip.mp4", panning(3, -1, 25), codec, **options)
    clip = decompose_native(path, Framing(chosen, SIDE, 16))
    gaps = np.diff(np.rint(clip.seconds * 30))
    inner = np.median(clip.motion[1:, 3:-3, 3:-3], axis=(1, 2)) / gaps[:, None]
    if codec == "mpeg4":  # FFmpeg exports no vectors for the last P-frame of such a stream
        inner = inner[: -3 if chosen == 25 else -1]
    assert np.abs(inner - (3, -1)).max() <= 0.5
    assert clip.residual[1:, 24:-24, 24:-24].mean() < 8


def test_vectors_into_older_frames_are_noticed(tmp_path):
    """Two pictures take turns, so every frame is predicted from the one before the last."""
    one, two = panning(2, 0, 24), panning(0, 3, 24)[::-1]
    frames = [(one if t % 2 else [255 - x for x in two])[t] for t in range(24)]
    path = write_video(tmp_path / "clip.mp4", frames, bf="0", refs="4", crf="5", g="50")
    with pytest.raises(RejectedInput, match="they refer to other frames"):
        decompose_native(path, Framing(24, SIDE, 16))


def test_the_sources_own_i_frames_are_the_i_frames(tmp_path):
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"}
    path = write_video(tmp_path / "clip.mp4", panning(1, 0, 30), **options)
    clip = decompose_native(path, Framing(30, SIDE, 16))
    assert np.flatnonzero(clip.is_i_frame).tolist() == [0, 10, 20]
    assert not clip.motion[clip.is_i_frame].any() and not clip.residual[clip.is_i_frame].any()


def test_real_video_has_the_same_frames_and_similar_motion_either_way(shared):
    path = shared / "videos" / "h264_no_bframes.mkv"
    native, canonical = (
        decompose_native(path, Framing(64, 112, 16)),
        decompose_video(path, Framing(64, 112, 16)),
    )
    assert np.array_equal(native.frames, canonical.frames)
    both = ~native.is_i_frame & ~canonical.is_i_frame
    speed = [np.linalg.norm(c.motion[both], axis=-1).mean(axis=(1, 2)) for c in (native, canonical)]
    assert np.corrcoef(*speed)[0, 1] > 0.3


@pytest.mark.parametrize("name", ["h264_340x256_a.mp4", "mpeg4.avi", "h264_portrait_a.mp4"])
def test_real_video_is_either_predicted_or_refused_never_wrong(shared, name):
    try:
        clip = decompose_native(shared / "videos" / name, Framing(64, 112, 16))
    except RejectedInput as rejection:
        assert rejection.reason == "no_motion_vectors"
        return
    p_frames = ~clip.is_i_frame
    assert clip.residual[p_frames].mean() < 0.9 * clip.change[p_frames].mean()


def test_a_codec_without_vectors_is_refused_by_name(tmp_path):
    path = write_video(tmp_path / "clip.mkv", panning(1, 0, 8), "libx265")
    with pytest.raises(RejectedInput, match="no_motion_vectors: .*hevc"):
        decompose_native(path, Framing(8, SIDE, 16))
