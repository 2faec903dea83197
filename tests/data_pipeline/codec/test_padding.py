"""`--fit pad`: the whole picture in the middle of a square, and patches without padding only."""

import json
from fractions import Fraction

import numpy as np
import pytest
from conftest import write_video

from data_pipeline.codec.content import Content
from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.decompose import decompose_video
from data_pipeline.codec.framing import Framing, crop_of
from data_pipeline.codec.native import decompose_native
from data_pipeline.codec.patches import ScoredClip, SelectionConfig, choose_patches
from data_pipeline.codec.saliency import SaliencyConfig, compensate_camera, patch_saliency
from data_pipeline.codec.selection import Order
from data_pipeline.errors import CorruptShard, RejectedInput
from data_pipeline.shards.sample_builder import SampleConfig, build_sample
from data_pipeline.shards.schema import SampleInfo, decode_frames

IDENTITY = bytes.fromhex("00010000" + 3 * "00000000" + "00010000" + 3 * "00000000" + "40000000")
QUARTER = bytes.fromhex(
    "00000000" + "00010000" + "00000000" + "ffff0000" + 4 * "00000000" + "40000000"
)
RED, BLUE = (200, 30, 30), (30, 30, 200)


def halves(height, width):
    """Red on the left, blue on the right."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2] = RED
    picture[:, width // 2 :] = BLUE
    return picture


def padded(size=64, **others):
    return Framing(num_frames=4, size=size, fit="pad", **others)


def turned(path):
    """The same file, to be shown turned by a quarter: the track's display matrix is another."""
    data = path.read_bytes()
    assert data.count(IDENTITY) == 2  # the movie's and the track's
    place = data.rindex(IDENTITY)
    path.write_bytes(data[:place] + QUARTER + data[place + len(IDENTITY) :])
    return path


def is_colour(pixels, colour):
    return np.abs(pixels.reshape(-1, 3).astype(int) - colour).max() < 40


def test_a_wide_and_a_tall_video_lie_in_the_middle(tmp_path):
    wide = decode_video(write_video(tmp_path / "w.mp4", [halves(64, 128)] * 6), padded())
    assert wide.content == Content(16, 0, 48, 64)
    assert wide.frames.shape == (4, 64, 64, 3)
    assert not wide.frames[:, :16].any() and not wide.frames[:, 48:].any()
    assert is_colour(wide.frames[:, 18:46, 2:28], RED)
    assert is_colour(wide.frames[:, 18:46, 36:62], BLUE)
    tall = decode_video(write_video(tmp_path / "t.mp4", [halves(128, 64)] * 6), padded())
    assert tall.content == Content(0, 16, 64, 48)
    assert not tall.frames[:, :, :16].any() and not tall.frames[:, :, 48:].any()
    assert is_colour(tall.frames[:, 2:62, 18:28], RED)


def test_a_rotated_video_is_padded_upright(tmp_path):
    path = turned(write_video(tmp_path / "clip.mp4", [halves(64, 128)] * 6))
    video = decode_video(path, padded())
    assert video.content == Content(0, 16, 64, 48) and video.notes[0].startswith("rotated")
    ends = (video.frames[:, 2:28, 18:46], video.frames[:, 36:62, 18:46])
    assert is_colour(ends[0], RED) and is_colour(ends[1], BLUE)
    native = decompose_native(path, padded())
    assert native.content == video.content


def test_an_anamorphic_video_gets_its_shape(tmp_path):
    def squeezed(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2)

    path = write_video(tmp_path / "clip.mp4", [halves(64, 64)] * 6, setup=squeezed)
    video = decode_video(path, padded())
    assert video.content == Content(16, 0, 48, 64)


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ((640, 360), Content(0, 126, 576, 450)),
        ((360, 640), Content(126, 0, 450, 576)),
        ((577, 576), Content(0, 0, 576, 575)),
        ((300, 300), Content(0, 0, 576, 576)),
    ],
)
def test_the_longer_side_is_the_size(shape, content):
    crop = crop_of(*shape, framing=Framing(size=576, fit="pad"))
    assert (crop.out_height, crop.out_width) == (576, 576)
    assert crop.content == content


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (64, 64), (7, 300)])
def test_an_image_is_padded_as_a_frame_is(tmp_path, shape):
    from PIL import Image

    Image.fromarray(np.full((*shape, 3), 250, np.uint8)).save(tmp_path / "a.png")
    config = SampleConfig(size=64, fit="pad")
    members, info = build_sample(tmp_path / "a.png", "a.png", config)
    image = decode_frames(info, members["jpg"], "a")[0].astype(int)
    content = crop_of(*shape, framing=config.framing).content
    inside = np.zeros((64, 64), bool)
    inside[content.top : content.bottom, content.left : content.right] = True
    assert image[inside].min() > 150 and (inside.all() or image[~inside].max() < 100)
    stored = (content.top, content.left, content.bottom, content.right)
    assert info.content == (() if shape == (64, 64) else stored)


def moving_dots(height, width, count=16):
    """Bright dots that move over all of a grey picture, so that there is news at the border."""
    rng = np.random.default_rng(0)
    base = rng.integers(60, 120, (height, width, 1)).repeat(3, axis=2)
    places = rng.integers(0, (height, width), (40, 2))
    pictures = []
    for t in range(count):
        picture = base.astype(np.uint8)
        for y, x in (places + (t * 3, t * 5)) % (height, width):
            picture[y : y + 6, x : x + 6] = 240
        pictures.append(picture)
    return pictures


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("decompose", [decompose_video, decompose_native])
def test_p_frame_patches_never_touch_padding(tmp_path, decompose, patch_size):
    path = write_video(tmp_path / "clip.mp4", moving_dots(96, 160), bf="0", refs="1")
    framing = Framing(num_frames=16, size=112 * patch_size // 14, patch_size=patch_size, fit="pad")
    clip = decompose(path, framing)
    mask = clip.whole_patches(patch_size)
    assert 0 < mask.sum() < 64
    for buckets in (1, 4):
        config = SelectionConfig(order=Order(time_buckets=buckets))
        scored = ScoredClip(clip, patch_saliency(clip, patch_size))
        selection = choose_patches(scored, name="a clip", budget=10**5, config=config)
        t, row, column = selection.positions.astype(int).T
        inter = ~clip.is_i_frame[t]
        assert mask[row[inter], column[inter]].all()
        assert inter.sum() == (~clip.is_i_frame).sum() * mask.sum()
        # I-frames are whole, with their padding
        assert (~inter).sum() == clip.is_i_frame.sum() * 64


def test_a_still_clip_gives_whole_contents_of_frames(tmp_path):
    path = write_video(tmp_path / "clip.mp4", [halves(64, 128)] * 16)
    clip = decompose_video(path, Framing(num_frames=16, size=64, fit="pad"))
    scored = ScoredClip(clip, patch_saliency(clip, 16))
    selection = choose_patches(scored, "a clip", budget=16 + 3 * 8, config=SelectionConfig())
    assert selection.is_static
    _, per_frame = np.unique(selection.positions[16:, 0], return_counts=True)
    assert per_frame.tolist() == [8, 8, 8]
    assert set(selection.positions[16:, 1].tolist()) == {1, 2}


def test_padding_moves_neither_the_camera_nor_full_scale():
    """A pan over the content alone is the camera's, although most cells are padding."""
    from data_pipeline.codec.decompose import CodecClip

    motion = np.zeros((2, 8, 8, 2), np.float32)
    motion[1, 3:5] = (4, 0)
    residual = np.zeros((2, 64, 64), np.int16)
    residual[1, 24:40] = 10
    residual[1, 24:32, :8] = 20  # one of the 16 patches of content, one of 64 in all
    clip = CodecClip(
        frames=np.zeros((2, 64, 64, 3), np.uint8),
        is_i_frame=np.array([True, False]),
        motion=motion,
        residual=residual,
        change=np.zeros((2, 8, 8), np.float32),
        times=np.array([0, 63]),
        seconds=np.array([0.0, 1.0]),
        content=Content(24, 0, 40, 64),
    )
    assert compensate_camera(clip.motion, "median")[1, 3:5].any()  # of all cells it is not
    only_motion = SaliencyConfig(score="clipped", residual_weight=0.0)
    assert not patch_saliency(clip, 8, only_motion).any()
    only_residual = SaliencyConfig(score="clipped", motion_weight=0.0)
    # the 95th percentile of 16 values lies a quarter of the way to the highest one: 12.5
    assert np.isclose(np.median(patch_saliency(clip, 8, only_residual)[1, 3:5]), 0.8)


def test_a_strip_without_a_patch_of_its_own_is_rejected(tmp_path):
    path = write_video(tmp_path / "clip.mp4", [halves(16, 320)] * 6)
    with pytest.raises(RejectedInput, match="none of its patches of 16 px"):
        decode_video(path, padded())


def test_the_content_is_stored_only_where_there_is_padding():
    info = SampleInfo("video", "a.mp4", "0", height=64, width=64, patch_size=16)
    assert "content" not in json.loads(info.to_bytes())
    assert SampleInfo.from_bytes(info.to_bytes(), "a").content == ()
    framed = SampleInfo(
        "video", "a.mp4", "0", height=64, width=64, patch_size=16, content=(16, 0, 48, 64)
    )
    assert SampleInfo.from_bytes(framed.to_bytes(), "a") == framed
    wrong = framed.to_bytes().replace(b"48", b"80")
    with pytest.raises(CorruptShard, match="content"):
        SampleInfo.from_bytes(wrong, "a")
