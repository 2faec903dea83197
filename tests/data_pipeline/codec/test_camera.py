"""Camera motion is taken away, and what moves by itself stays."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import write_video as write

from data_pipeline.codec.decompose import CodecClip, decompose_frames, decompose_video
from data_pipeline.codec.framing import Framing
from data_pipeline.codec.saliency import (
    SaliencyConfig,
    camera_motion,
    compensate_camera,
    is_static,
    patch_saliency,
    residual_bits,
)

SIDE = 28


def coordinates():
    y, x = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE), indexing="ij")
    return np.stack([x, y], -1)


FIELDS = {
    "median": np.zeros((2, 2)),
    "similarity": np.array([[0.8, -1.5], [1.5, 0.8]]),
    "affine": np.array([[2.0, 0.7], [-0.4, -1.0]]),
}


@pytest.mark.parametrize("camera", FIELDS)
def test_a_known_camera_field_is_found_behind_an_object_of_a_quarter_of_the_picture(camera):
    rng = np.random.default_rng(0)
    field = coordinates() @ FIELDS[camera].T + (3.0, -2.0)
    noisy = field + rng.normal(0, 0.1, field.shape)
    noisy[4:18, 4:18] += (6.0, 5.0)  # the object
    motion = np.round(np.stack([noisy, np.zeros_like(noisy)]) * 4) / 4  # quarter pixels
    found = np.broadcast_to(camera_motion(motion, camera), motion.shape)
    assert np.abs(found[0] - field).max() < 0.25
    assert np.abs(found[1]).max() < 1e-6
    left = np.linalg.norm(compensate_camera(motion, camera)[0], axis=-1)
    assert left[5:17, 5:17].min() > 6 and np.median(left[20:]) < 0.3


def test_models_nest():
    """A translation is found by every model, a rotation by similarity and affine only."""
    shift = np.full((1, SIDE, SIDE, 2), 2.5)
    turn = (coordinates() @ FIELDS["similarity"].T)[None]
    for camera in FIELDS:
        assert np.abs(compensate_camera(shift, camera)).max() < 1e-6
        left = np.linalg.norm(compensate_camera(turn, camera), axis=-1).mean()
        assert left > 0.5 if camera == "median" else left < 1e-6


def test_none_changes_nothing_and_an_unknown_model_is_named():
    motion = np.ones((1, 4, 4, 2))
    assert compensate_camera(motion, "none") is motion
    with pytest.raises(ValueError, match="camera is 'zoom'; choose one of median"):
        compensate_camera(motion, "zoom")
    with pytest.raises(ValueError, match="camera is 'zoom'"):
        SaliencyConfig(camera="zoom")
    with pytest.raises(ValueError, match="one weight must be positive"):
        SaliencyConfig(motion_weight=0, residual_weight=0)


def quiet_and_loud():
    """A clip whose first half moves a little and whose second half moves much."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (40, 40, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    places = [t // 2 if t < 8 else 4 + 4 * (t - 8) for t in range(16)]
    frames = np.full((16, 112, 112, 3), 90, np.uint8)
    for t, place in enumerate(places):
        frames[t, 40:72, 20 + place : 52 + place] = texture[:32, :32]
    return decompose_frames(frames, gop=16)


def test_per_frame_normalisation_lets_quiet_frames_compete():
    clip = quiet_and_loud()
    by_clip = patch_saliency(clip, 16, SaliencyConfig(residual_weight=0))
    by_frame = patch_saliency(clip, 16, SaliencyConfig(residual_weight=0, normalise="frame"))
    share = [field[1:8].max() / field[8:].max() for field in (by_clip, by_frame)]
    assert share[0] < 0.6 < share[1]


def test_the_centre_prior_favours_the_middle():
    clip = quiet_and_loud()
    plain = patch_saliency(clip, 16)
    central = patch_saliency(clip, 16, SaliencyConfig(centre_prior=0.3))
    assert (central >= plain - 1e-6).all()
    clipped = SaliencyConfig(score="clipped", centre_prior=0.3)
    assert patch_saliency(clip, 16, clipped).max() <= 1 < central.max()
    gain = central[1:].sum(0) / np.maximum(plain[1:].sum(0), 1e-6)
    assert gain[3, 3] > gain[2, 1] > 1


def clip_of(residual: np.ndarray, gop: int) -> CodecClip:
    """A clip [T, H, W] without motion, whose P-frames show a residual."""
    count, height, width = residual.shape
    is_i_frame = np.arange(count) % gop == 0
    cells = np.zeros((count, height // 8, width // 8), np.float32)
    return CodecClip(
        frames=np.zeros((count, height, width, 3), np.uint8),
        is_i_frame=is_i_frame,
        motion=np.zeros((*cells.shape, 2), np.float32),
        residual=np.where(is_i_frame[:, None, None], 0, residual).astype(np.uint8),
        change=cells,
        times=np.arange(count),
        seconds=np.arange(count, dtype=np.float64),
    )


def test_the_scale_is_that_of_the_p_frames_alone():
    """Residual of 1 to 100 in a hundred patches of one P-frame, beside an I-frame. It is no
    ceiling but under the rule that clips."""
    shown = np.kron(np.arange(1, 101).reshape(1, 10, 10), np.ones((2, 16, 16)))
    scale = np.percentile(np.arange(1, 101), 95)
    wanted = np.arange(1, 101).reshape(10, 10) / scale
    for score, expected in (
        ("peak", wanted),
        ("mean", wanted),
        ("clipped", np.minimum(wanted, 1)),
    ):
        config = SaliencyConfig(score=score, motion_weight=0)
        found = patch_saliency(clip_of(shown, gop=2), 16, config)
        np.testing.assert_allclose(found[1], expected, rtol=1e-6)
        assert not found[0].any()


def test_the_best_quarter_of_a_patch_is_its_score():
    """A residual of 40 in one quarter of a patch, of 20 all over the next one."""
    shown = np.zeros((2, 32, 64))
    shown[1, 8:16, :8] = 40
    shown[1, :16, 16:32] = 20
    scores = {
        score: patch_saliency(clip_of(shown, gop=2), 16, SaliencyConfig(score, motion_weight=0))[1]
        for score in ("peak", "mean")
    }
    assert scores["peak"][0, 0] == 2 * scores["peak"][0, 1] > 0
    assert 2 * scores["mean"][0, 0] == scores["mean"][0, 1] > 0


@pytest.mark.parametrize("patch_size", [14, 16])
def test_bits_are_those_of_the_blocks_that_a_patch_holds(patch_size):
    """A slow loop over 8 x 8 blocks; the residual's sign does not matter, its pattern does."""
    rng = np.random.default_rng(0)
    side = 4 * patch_size
    residual = rng.integers(-60, 60, (2, side, side))
    pixels = np.zeros((2, side, side))
    k = np.arange(8)
    cosines = np.cos(np.pi * (2 * k[None, :] + 1) * k[:, None] / 16) / 2
    cosines[0] /= np.sqrt(2)
    for t, y, x in np.ndindex(2, side // 8, side // 8):
        block = (t, slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
        coefficients = cosines @ residual[block] @ cosines.T
        pixels[block] = np.log2(1 + np.abs(coefficients) / 5).sum() / 64
    whole = side // patch_size
    wanted = pixels.reshape(2, whole, patch_size, whole, patch_size).sum(axis=(2, 4))
    np.testing.assert_allclose(residual_bits(residual, patch_size), wanted, rtol=1e-4)
    np.testing.assert_allclose(residual_bits(-residual, patch_size), wanted, rtol=1e-4)


def test_the_centre_prior_is_a_bell_over_the_shorter_side():
    shown = np.full((2, 64, 128), 10.0)
    shown[:, :, :16] = 100.0  # the scale: what is left is far from being cut off
    clip = clip_of(shown, gop=2)
    plain = patch_saliency(clip, 16, SaliencyConfig(motion_weight=0))[1]
    central = patch_saliency(clip, 16, SaliencyConfig(motion_weight=0, centre_prior=0.5))[1]
    y, x = np.mgrid[:4, :8] - np.array([1.5, 3.5])[:, None, None]
    bell = 1 + 0.5 * np.exp(-(x**2 + y**2) / (2 * (0.35 * 4) ** 2))
    np.testing.assert_allclose((central / plain)[:, 1:], bell[:, 1:], rtol=1e-5)


def test_whether_a_clip_is_static_does_not_depend_on_its_gop():
    """One cell in 400 of the P-frames changed, more than the two in a thousand of noise."""
    for gop in (2, 4):
        clip = clip_of(np.zeros((4, 160, 160)), gop)
        change = clip.change.copy()
        change[~clip.is_i_frame, 0, 0] = 50.0
        assert not is_static(replace(clip, change=change)) and is_static(clip)


@pytest.mark.parametrize("noise", [0, 4])
@pytest.mark.parametrize("crf", [10, 30])
def test_a_still_scene_is_static_through_noise_and_recompression(tmp_path, noise, crf):
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(0, 255, (14, 14, 3)), np.ones((8, 8, 1)))
    frames = scene + rng.integers(-noise, noise + 1, (32, 112, 112, 3))
    path = write(
        tmp_path / "still.mp4", list(np.clip(frames, 0, 255).astype(np.uint8)), crf=str(crf)
    )
    clip = decompose_video(path, Framing(32, 112, 16))
    assert is_static(clip)
    moving = np.clip(frames, 0, 255).astype(np.uint8)
    for t in range(32):
        moving[t, 40:56, 20 + t : 36 + t] = 255  # one small thing crosses it
    path = write(tmp_path / "moving.mp4", list(moving), crf=str(crf))
    assert not is_static(decompose_video(path, Framing(32, 112, 16)))
