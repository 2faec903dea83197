"""Whatever camera, encoder or editor wrote it: the same picture comes out, once upright, at its
true times.
"""

from fractions import Fraction

import numpy as np
import pytest
from conftest import write_video as write

from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.framing import Framing
from data_pipeline.codec.open_video import InputLimits, open_image
from data_pipeline.errors import RejectedInput

RED, SIZE = (200, 60, 30), 64
MATRICES = {"601": (0.299, 0.114, 5), "709": (0.2126, 0.0722, 1), "2020": (0.2627, 0.0593, 9)}


def yuv_of(rgb, matrix, full_range):
    """ITU-R BT.601/709/2020: 8-bit Y, Cb, Cr of a colour."""
    kr, kb, _ = MATRICES[matrix]
    r, g, b = (channel / 255 for channel in rgb)
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    if full_range:
        return round(255 * y), round(128 + 255 * u), round(128 + 255 * v)
    return round(16 + 219 * y), round(128 + 224 * u), round(128 + 224 * v)


def flat_frames(yuv, height=SIZE, width=SIZE, count=3):
    import av

    frames = []
    for _ in range(count):
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane, value in zip(frame.planes, yuv, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frames.append(frame)
    return frames


def numbered(count, size=SIZE):
    """Frames whose brightness is their number, with a bright left edge and a dark top edge."""
    frames = np.zeros((count, size, size, 3), np.uint8)
    frames += (40 + np.arange(count) * 150 // max(count - 1, 1)).astype(np.uint8)[
        :, None, None, None
    ]
    frames[:, :, : size // 8] = 230
    frames[:, : size // 8] = 20
    return frames


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_follow_the_streams_matrix_and_range(tmp_path, matrix, full_range):
    def tag(stream):
        stream.codec_context.colorspace = MATRICES[matrix][2]
        stream.codec_context.color_range = 2 if full_range else 1

    frames = flat_frames(yuv_of(RED, matrix, full_range))
    path = write(tmp_path / "clip.mp4", frames, setup=tag, crf="1")
    picture = decode_video(path, Framing(3, 32, 16)).frames[0]
    assert np.abs(picture.astype(int) - RED).max() <= 4


@pytest.mark.parametrize(("height", "matrix"), [(480, "601"), (720, "709")])
def test_an_unnamed_matrix_is_taken_by_the_number_of_lines(tmp_path, height, matrix):
    frames = flat_frames(yuv_of(RED, matrix, False), height, height)
    picture = decode_video(
        write(tmp_path / "clip.mp4", frames, crf="1"), Framing(3, 32, 16)
    ).frames[0]
    assert np.abs(picture.astype(int) - RED).max() <= 4


ENCODINGS = {
    "h264 mp4": ("mp4", "libx264", "yuv420p"),
    "h264 mov": ("mov", "libx264", "yuv420p"),
    "h264 ts": ("ts", "libx264", "yuv420p"),
    "h264 10 bit": ("mkv", "libx264", "yuv420p10le"),
    "h264 444": ("mkv", "libx264", "yuv444p"),
    "hevc": ("mp4", "libx265", "yuv420p"),
    "hevc 10 bit": ("mkv", "libx265", "yuv420p10le"),
    "vp9": ("webm", "libvpx-vp9", "yuv420p"),
    "vp8": ("webm", "libvpx", "yuv420p"),
    "av1": ("mkv", "libsvtav1", "yuv420p"),
    "mpeg2": ("mpg", "mpeg2video", "yuv420p"),
    "mpeg4": ("avi", "mpeg4", "yuv420p"),
    "mjpeg": ("avi", "mjpeg", "yuvj420p"),
    "prores": ("mov", "prores_ks", "yuv422p10le"),
    "gray": ("mkv", "libx264", "gray"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_codec_and_container_gives_its_frames_in_order(tmp_path, name):
    import av

    suffix, codec, pix_fmt = ENCODINGS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    frames = numbered(20)
    video = decode_video(
        write(tmp_path / f"clip.{suffix}", frames, codec, pix_fmt=pix_fmt), Framing(8, 32, 16)
    )
    centre = video.frames[:, 16:, 16:].mean(axis=(1, 2, 3))
    chosen = np.rint(np.linspace(0, 19, 8)).astype(int)
    # swscale writes gray in full range into a stream that says limited
    assert np.abs(centre - frames[chosen, -1, -1, 0]).max() < (16 if pix_fmt == "gray" else 8)
    assert video.num_source_frames == 20


def test_b_frames_and_open_gops_come_in_the_order_of_showing(tmp_path):
    options = {"x264-params": "bframes=3:b-adapt=0:open-gop=1:keyint=8:min-keyint=8:scenecut=0"}
    path = write(tmp_path / "clip.mp4", numbered(40), **options)
    centre = decode_video(path, Framing(40, 32, 16)).frames[:, 16:, 16:].mean(axis=(1, 2, 3))
    assert len(centre) == 40 and (np.diff(centre) > 0).all()


def test_a_variable_frame_rate_is_sampled_by_time_not_by_number(tmp_path):
    times = [*range(0, 20), *range(30, 130, 10)]  # 20 fast frames, then 10 slow ones
    path = write(tmp_path / "clip.mkv", numbered(30), times=times, bf="0")
    video = decode_video(path, Framing(5, 32, 16))
    assert np.allclose(video.seconds - video.seconds[0], [0, 1, 2, 3, 4], atol=0.1)


def test_fewer_frames_than_asked_keep_their_true_times(tmp_path):
    video = decode_video(write(tmp_path / "clip.mp4", numbered(5)), Framing(64, 32, 16))
    assert len(video.frames) == 5
    assert np.allclose(np.diff(video.seconds), 1 / 30, atol=1e-3)


def test_the_sample_aspect_is_applied_once(tmp_path):
    def stretch(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    frames = np.full((3, 64, 64, 3), 30, np.uint8)
    frames[:, :, 28:36] = 220  # 8 of 64 columns: 16 of 128 once the pixels are square
    path = write(tmp_path / "clip.mp4", frames, setup=stretch)
    picture = decode_video(path, Framing(3, 64, 16)).frames[0].mean(axis=(0, 2))
    assert 14 <= (picture > 125).sum() <= 18


def test_of_several_streams_the_best_is_taken_and_a_cover_is_no_video(tmp_path):
    import av

    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for side in (32, 128):
            stream = container.add_stream("libx264", rate=30)
            stream.height = stream.width = side
            stream.pix_fmt = "yuv420p"
            streams.append(stream)
        for number in range(10):
            for stream in streams:
                picture = np.full((stream.height, stream.width, 3), stream.width, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    video = decode_video(path, Framing(4, 32, 16))
    assert abs(int(video.frames[0].mean()) - 128) < 4


def interlaced_frames(first):
    """Frames whose rows 0, 2, .. are bright and 1, 3, .. dark, marked as shown `first` (tff, bff)
    field first: the two fields show different moments."""
    import av

    picture = np.zeros((64, 64, 3), np.uint8)
    picture[::2] = 200
    graph = av.filter.Graph()
    source = graph.add_buffer(width=64, height=64, format="rgb24", time_base=Fraction(1, 30))
    order = graph.add("setfield", mode=first)
    graph.link_nodes(source, order, graph.add("buffersink")).configure()
    frames = []
    for number in range(4):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = number
        graph.push(frame)
        frames.append(graph.pull())
    return frames


@pytest.mark.parametrize(
    "suffix, codec, options",
    [
        ("mkv", "libx264", {"crf": "1", "x264-params": "interlaced=1"}),
        ("mpg", "mpeg2video", {"flags": "+ilme+ildct", "b": "5000k"}),
    ],
)
@pytest.mark.parametrize(("first", "is_bright"), [("tff", True), ("bff", False)])
def test_of_an_interlaced_frame_the_first_field_in_time_is_taken(
    tmp_path, suffix, codec, options, first, is_bright
):
    path = tmp_path / f"clip.{suffix}"
    video = decode_video(
        write(path, interlaced_frames(first), codec, **options), Framing(4, 32, 16)
    )
    assert "interlaced" in video.notes
    assert (video.frames.mean() > 180) if is_bright else (video.frames.mean() < 20)


def test_high_dynamic_range_is_refused_by_name(tmp_path):
    def tag(stream):
        stream.codec_context.color_trc = 16

    path = write(tmp_path / "clip.mp4", numbered(3), setup=tag)
    with pytest.raises(RejectedInput, match="hdr: .*PQ"):
        decode_video(path, Framing(3, 32, 16))


@pytest.mark.parametrize("share", [0.4, 0.8])
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_salvage_keeps_the_whole_gops_before_a_cut(tmp_path, suffix, share):
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=2", "crf": "5"}
    rng = np.random.default_rng(0)
    frames = numbered(90) // 2 + rng.integers(0, 100, (90, SIZE, SIZE, 3), dtype=np.uint8)
    front = {"movflags": "faststart"} if suffix == "mp4" else {}
    whole = write(tmp_path / f"whole.{suffix}", frames, container_options=front, **options)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    if suffix != "ts":  # a transport stream announces no length: its cut end is only less video
        with pytest.raises(RejectedInput) as rejection:
            decode_video(cut, Framing(90, 32, 16))
        assert rejection.value.reason in ("decode", "truncated")
    video = decode_video(cut, Framing(90, 32, 16, salvage=True))
    assert 0.5 * share * 90 <= len(video.frames) <= share * 90 + 10
    complete = decode_video(whole, Framing(90, 32, 16))
    assert np.array_equal(video.frames[:10], complete.frames[:10])


def test_a_recording_that_starts_inside_a_gop_begins_at_its_first_key_frame(tmp_path):
    options = {"x264-params": "keyint=20:min-keyint=20:scenecut=0:bframes=2", "crf": "5"}
    rng = np.random.default_rng(0)
    frames = numbered(80) // 2 + rng.integers(0, 100, (80, SIZE, SIZE, 3), dtype=np.uint8)
    whole = write(tmp_path / "whole.ts", frames, **options)
    data = whole.read_bytes()
    late = tmp_path / "late.ts"
    late.write_bytes(data[: 188 * 3] + data[len(data) // 188 * 188 // 3 // 188 * 188 :])
    ours, theirs = (decode_video(path, Framing(80, 32, 16)) for path in (late, whole))
    assert 20 <= len(ours.frames) < 60
    assert np.array_equal(ours.frames[-20:], theirs.frames[-20:])


def write_two_sizes(path):
    """A broadcast whose picture changes its size: two encoders one after the other, one stream."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"bf": "0"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        other = av.CodecContext.create("libx264", "w")
        other.options = {"bf": "0"}
        other.height = other.width = 96
        other.pix_fmt = "yuv420p"
        other.time_base = Fraction(1, 30)
        for number in range(20):
            side = 64 if number < 10 else 96
            frame = av.VideoFrame.from_ndarray(numbered(20, side)[number], format="rgb24")
            frame.pts = number
            frame.time_base = Fraction(1, 30)
            encoder = stream if number < 10 else other
            last = number in (9, 19)
            for packet in [*encoder.encode(frame), *(encoder.encode(None) if last else [])]:
                packet.stream = stream
                packet.time_base = Fraction(1, 30)
                container.mux(packet)
    return path


def test_a_picture_that_changes_its_size_is_refused(tmp_path):
    path = write_two_sizes(tmp_path / "clip.ts")
    with pytest.raises(RejectedInput) as rejection:
        decode_video(path, Framing(20, 32, 16))
    assert rejection.value.reason == "varying"


def test_files_joined_without_remuxing_are_refused(tmp_path):
    part = write(tmp_path / "part.ts", numbered(10)).read_bytes()
    (tmp_path / "twice.ts").write_bytes(part + part)
    with pytest.raises(RejectedInput, match="timestamps: .*times jump back"):
        decode_video(tmp_path / "twice.ts", Framing(8, 32, 16))


def picture(mode):
    from PIL import Image

    gradient = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1))
    rgb = np.stack([gradient, gradient[:, ::-1], np.full_like(gradient, 80)], -1)
    if mode == "I;16":
        return Image.fromarray(gradient.astype(np.uint16) * 257)
    return Image.fromarray(rgb).convert(mode)


IMAGES = {
    "jpeg": ("RGB", "jpg"),
    "gray jpeg": ("L", "jpg"),
    "cmyk jpeg": ("CMYK", "jpg"),
    "png": ("RGB", "png"),
    "palette png": ("P", "png"),
    "gray alpha png": ("LA", "png"),
    "alpha png": ("RGBA", "png"),
    "one bit png": ("1", "png"),
    "16 bit png": ("I;16", "png"),
    "webp": ("RGB", "webp"),
    "bmp": ("RGB", "bmp"),
    "tiff": ("RGB", "tiff"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_mode_become_eight_bit_rgb(tmp_path, name):
    mode, suffix = IMAGES[name]
    path = tmp_path / f"picture.{suffix}"
    picture(mode).save(path)
    pixels = open_image(path, InputLimits())
    assert pixels.shape == (16, 24, 3) and pixels.dtype == np.uint8
    want = np.asarray(picture("L" if mode in ("LA", "I;16") else mode).convert("RGB"))
    if mode == "I;16":
        want = np.tile(np.linspace(0, 255, 24).astype(np.uint8)[None, :, None], (16, 1, 3))
    assert np.abs(pixels.astype(int) - want).mean() < 12


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    from PIL import Image

    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    path = tmp_path / f"moving.{suffix}"
    first.save(path, save_all=True, append_images=[second])
    assert np.abs(open_image(path, InputLimits())[8, 8].astype(int) - (255, 0, 0)).max() < 12


def test_avif_is_read_where_pillow_reads_it(tmp_path):
    from PIL import features

    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF decoder")
    path = tmp_path / "picture.avif"
    picture("RGB").save(path)
    assert np.abs(open_image(path, InputLimits()).astype(int) - picture("RGB")).mean() < 12


@pytest.mark.parametrize("name", ["a.heic", "a.jpg", "a.avif"])
@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_is_refused_by_name_whatever_the_file_is_called(tmp_path, name, brand):
    path = tmp_path / name
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(200))
    with pytest.raises(RejectedInput, match=f"{name} is HEIC.*convert it"):
        open_image(path, InputLimits())


def test_avif_without_a_decoder_names_the_release_that_has_one(tmp_path, monkeypatch):
    from PIL import Image, features

    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    monkeypatch.setattr(features, "check", lambda name: False)
    path = tmp_path / "a.avif"
    path.write_bytes(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(200))
    with pytest.raises(RejectedInput, match="a.avif is AVIF.*pillow>=11.3"):
        open_image(path, InputLimits())
    picture("RGB").save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", InputLimits()).shape == (16, 24, 3), "others still open"


@pytest.mark.parametrize(
    ("suffix", "codec", "mark"), [("mp4", "libx264", b"avc1"), ("avi", "mpeg4", b"FMP4")]
)
def test_a_codec_that_is_not_known_is_named(tmp_path, suffix, codec, mark):
    path = write(tmp_path / f"clip.{suffix}", numbered(10), codec)
    path.write_bytes(path.read_bytes().replace(mark, b"zzzz"))
    with pytest.raises(RejectedInput, match="no_video: .*no video stream that can be decoded"):
        decode_video(path, Framing(4, 32, 16))


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_a_limit_of_seconds_is_on_what_is_shown_not_on_when_it_starts(tmp_path, suffix):
    start = 30 * 3600
    path = write(tmp_path / f"clip.{suffix}", numbered(60), times=range(start, start + 60))
    limits = InputLimits(max_seconds=10)
    assert len(decode_video(path, Framing(100, 32, 16, limits=limits)).frames) == 60


def test_the_note_of_salvage_counts_what_was_lost(tmp_path):
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0", "crf": "5"}
    path = write(tmp_path / "clip.mkv", numbered(90), **options)
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    video = decode_video(path, Framing(90, 32, 16, salvage=True))
    (note,) = [note for note in video.notes if "salvaged" in note]
    kept, total = (int(word) for word in note.split() if word.isdigit())
    assert kept == len(video.frames) < total <= 90
