"""Codec decomposition of real video: safe opening, true motion, faithful prediction."""

import io
import struct

import numpy as np
import pytest
from conftest import write_video

from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.decompose import decompose_frames, decompose_video, rasterise
from data_pipeline.codec.framing import Framing, crop_of
from data_pipeline.codec.open_video import InputLimits, open_image
from data_pipeline.codec.saliency import SaliencyConfig, motion_summary, patch_saliency
from data_pipeline.errors import RejectedInput
from model_factory.packing import TARGET_FRAMES


def panning_frames(dx: int, dy: int, count: int = 12, size: int = 112) -> np.ndarray:
    """A smooth random texture that moves by (dx, dy) pixels a frame."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (40, 40, 3)).astype(np.float32)
    texture = np.kron(coarse, np.ones((8, 8, 1)))
    for axis in (0, 1):
        texture = (np.roll(texture, 3, axis) + texture + np.roll(texture, -3, axis)) / 3
    frames = [texture[100 - dy * t :, 100 - dx * t :][:size, :size] for t in range(count)]
    return np.stack(frames).astype(np.uint8)


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, -2), (-1, 4)])
def test_a_pan_yields_its_vector_and_no_residual(dx, dy):
    clip = decompose_frames(panning_frames(dx, dy), gop=12)
    moving = clip.motion[1:, 2:-2, 2:-2]
    assert np.median(moving[..., 0]) == dx and np.median(moving[..., 1]) == dy
    assert clip.residual[1:, 16:-16, 16:-16].mean() < 1.5


def test_a_blocks_vector_fills_the_cells_of_the_block():
    """FFmpeg names a block by its middle; here one of 16 x 8 pixels and one of 8 x 16."""
    names = ("w", "h", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")
    vectors = np.array(
        [(16, 8, 24, 12, 6, -2, 4), (8, 16, 4, 24, 3, 5, 2)],
        dtype=[(name, np.int32) for name in names],
    )
    wanted = np.zeros((4, 5, 2), np.int32)
    wanted[1, 2:4] = (6, -2)
    wanted[2:4, 0] = (6, 10)  # in halves of a pixel there, in quarters here
    assert np.array_equal(rasterise(vectors, 32, 40), wanted)


def test_i_frames_follow_the_gop_and_carry_no_motion():
    clip = decompose_frames(panning_frames(2, 1, count=10), gop=4)
    assert np.flatnonzero(clip.is_i_frame).tolist() == [0, 4, 8]
    assert not clip.motion[clip.is_i_frame].any() and not clip.residual[clip.is_i_frame].any()


def test_same_frames_decompose_to_the_same_bytes():
    first, second = (decompose_frames(panning_frames(1, 1), gop=6) for _ in range(2))
    assert np.array_equal(first.motion, second.motion)
    assert np.array_equal(first.residual, second.residual)


def test_prediction_is_closer_to_a_real_frame_than_the_frame_before(shared):
    video = decode_video(shared / "videos" / "h264_340x256_a.mp4", Framing(64, 224, 16))
    clip = decompose_frames(video.frames, gop=16)
    p_frames = np.flatnonzero(~clip.is_i_frame)
    luma = video.frames @ np.array([0.257, 0.504, 0.098]) + 16
    difference = np.abs(luma[p_frames] - luma[p_frames - 1]).mean()
    assert clip.residual[p_frames].mean() <= 0.4 * difference


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("h264_portrait_a.mp4", 64),
        ("h264_no_bframes.mkv", 64),
        ("h264_3fps_20frames.mp4", 20),
        ("h264_10bit.mp4", 30),
        ("hevc_10bit.mp4", 30),
        ("av1.mkv", 64),
        ("mpeg4.avi", 64),
    ],
)
def test_real_video_of_any_codec_decodes_in_time_order(shared, name, frames):
    clip = decompose_video(shared / "videos" / name, Framing(64, 112, 16))
    assert clip.frames.shape == (frames, 112, 112, 3)
    assert (np.diff(clip.seconds) > 0).all()
    assert clip.times[0] == 0 and clip.times[-1] == 63
    assert np.abs(clip.motion).sum() > 0


def test_rotation_in_the_metadata_is_applied_once(shared):
    import av

    path = shared / "videos" / "rotation_180_3frames.mov"
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0))
        raw = stored.reformat(
            width=200, height=112, format="rgb24", interpolation="AREA"
        ).to_ndarray()
    upright = decode_video(path, Framing(3, 112, 16)).frames[0].astype(int)
    centre = raw[:, 44:156].astype(int)
    turned, straight = (np.abs(upright - c).mean() for c in (centre[::-1, ::-1], centre))
    assert turned < 0.5 * straight


@pytest.mark.parametrize(
    ("right_goes", "shown_at"), [("down", (0, 1)), ("up", (1, 0)), ("left", (1, 1))]
)
def test_quarter_turns_go_the_way_that_the_matrix_says(tmp_path, right_goes, shown_at):
    """A picture whose upper left quarter is white, as a phone held in another way records it."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48] = 255
    path = write_video(tmp_path / "turned.mp4", [picture] * 3)
    one = 1 << 16  # fixed point of ISO/IEC 14496-12: x' = a x + c y, y' = b x + d y
    a, b, c, d = {
        "down": (0, one, -one, 0),
        "up": (0, -one, one, 0),
        "left": (-one, 0, 0, -one),
    }[right_goes]
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # behind the name and the fields of version 0
    struct.pack_into(">9i", data, matrix, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    shown = decode_video(path, Framing(3, 64, 16, fit="area")).frames[0].mean(axis=-1)
    rows, columns = (side // 2 for side in shown.shape)
    quarters = shown.reshape(2, rows, 2, columns).mean(axis=(1, 3))
    assert (shown.shape[0] > shown.shape[1]) == (right_goes != "left")
    assert np.unravel_index(quarters.argmax(), (2, 2)) == shown_at
    assert quarters.max() > 200 and np.sort(quarters.ravel())[2] < 60


def test_timestamps_out_of_order_give_frames_in_time_order(shared):
    video = decode_video(shared / "videos" / "unordered_pts_4frames.mov", Framing(64, 112, 16))
    assert len(video.frames) == 4 and (np.diff(video.seconds) > 0).all()


@pytest.mark.parametrize(
    ("suffix", "container"), [(".ts", "mpegts"), (".mpg", "mpeg"), (".mkv", "matroska")]
)
def test_streams_without_an_index_give_all_their_frames(tmp_path, suffix, container):
    """MPEG streams seek inexactly and start at odd times; every chosen frame must still come."""
    import av

    path = tmp_path / f"clip{suffix}"
    codec = "mpeg2video" if suffix == ".mpg" else "libx264"
    frames = panning_frames(2, 1, count=50)
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 112, 112, "yuv420p"
        for picture in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    video = decode_video(path, Framing(64, 112, 16))
    assert len(video.frames) == 50
    for place in (0, 20, 49):
        errors = np.abs(video.frames[place].astype(int) - frames).mean(axis=(1, 2, 3))
        assert errors.argmin() == place


@pytest.mark.parametrize("num_frames", [16, 64, 100])
def test_times_run_over_the_64_frame_base_whatever_the_number_of_frames(clips, num_frames):
    clip = decompose_video(
        clips / "clips" / "train_00000.mp4", Framing(num_frames, 112, 16), gop=100
    )
    assert clip.times[0] == 0 and clip.times[-1] == 63 == TARGET_FRAMES - 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text("<html>404 not found</html>"), "container"),
        (lambda p: p.write_text("ffconcat version 1.0\nfile 'other.mp4'\n"), "container"),
        (lambda p: None, "missing"),
    ],
    ids=["empty file", "HTML page", "playlist", "no file"],
)
def test_what_is_no_video_is_rejected_with_its_reason(tmp_path, make, reason):
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(RejectedInput) as rejection:
        decode_video(path, Framing(8, 112, 16))
    assert rejection.value.reason == reason


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_video_is_rejected(clips, tmp_path, share):
    whole = (clips / "clips" / "train_00000.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RejectedInput) as rejection:
        decode_video(path, Framing(64, 112, 16))
    assert rejection.value.reason in ("container", "decode", "truncated")


def test_corrupted_video_is_rejected_not_concealed(shared):
    with pytest.raises(RejectedInput) as rejection:
        decode_video(shared / "videos" / "corrupted.mp4", Framing(64, 112, 16))
    assert rejection.value.reason == "decode"


def test_too_large_a_picture_is_refused_before_decoding(clips):
    with pytest.raises(RejectedInput, match="too_large"):
        decode_video(
            clips / "clips" / "train_00000.mp4",
            Framing(8, 112, 16, limits=InputLimits(max_pixels=100)),
        )


def test_images_are_upright_opaque_and_eight_bit(tmp_path):
    from PIL import Image

    wide = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg", InputLimits()).shape == (40, 20, 3)

    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (open_image(tmp_path / "clear.png", InputLimits()) == 255).all()

    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert (open_image(tmp_path / "deep.png", InputLimits()) == 128).all()

    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    (tmp_path / "cut.png").write_bytes(stream.getvalue()[:40])
    with pytest.raises(RejectedInput, match="image"):
        open_image(tmp_path / "cut.png", InputLimits())


@pytest.mark.parametrize("fit", ["crop", "area"])
@pytest.mark.parametrize("shape", [(256, 340), (640, 360), (100, 1000), (32, 32)])
def test_working_size_is_a_multiple_of_the_patch_inside_the_scaled_picture(fit, shape):
    crop = crop_of(*shape, framing=Framing(size=112, patch_size=14, fit=fit))
    assert crop.out_height % 14 == 0 and crop.out_width % 14 == 0
    assert crop.top + crop.out_height <= crop.height
    assert crop.left + crop.out_width <= crop.width
    if fit == "crop":
        assert (crop.out_height, crop.out_width) == (112, 112)


@pytest.mark.parametrize(("place", "offset"), [(0.0, 0), (0.5, 56), (1.0, 112)])
def test_a_square_lies_at_its_place_along_the_longer_side(place, offset):
    framing = Framing(size=112, patch_size=14, crop_position=place)
    wide = crop_of(100, 200, framing)
    tall = crop_of(200, 100, framing)
    assert (wide.height, wide.width, wide.top, wide.left) == (112, 224, 0, offset)
    assert (tall.height, tall.width, tall.top, tall.left) == (224, 112, offset, 0)


def test_camera_motion_is_no_news():
    clip = decompose_frames(panning_frames(3, 0), gop=12)
    still = patch_saliency(clip, 16, SaliencyConfig(camera="median", residual_weight=0.0))
    moving = patch_saliency(clip, 16, SaliencyConfig(camera="none", residual_weight=0.0))
    assert np.median(still[1:]) == 0 and np.median(moving[1:]) > 0.5


def test_motion_summary_is_the_mean_of_its_cells():
    clip = decompose_frames(panning_frames(3, -1), gop=12)
    summary = motion_summary(clip, 8)
    assert summary.shape == (12, 8, 8, 3)
    assert np.allclose(summary[1:, 2:6, 2:6, 0], 3, atol=0.5)
    assert np.allclose(summary[..., 2].mean(), np.abs(clip.residual).mean(), atol=0.1)
