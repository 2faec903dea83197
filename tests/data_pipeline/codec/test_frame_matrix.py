"""A clip's frames are the file's pictures, in order, at their times: whatever the container, the
codec, the GOPs, the rate and the start; and whatever was cut, joined or packed afterwards.
"""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from frame_matrix import (
    CONTAINERS,
    COUNT,
    PAIRS,
    RATE,
    Case,
    cases_of,
    number_of,
    picture,
    verdict,
    write_numbered,
)

from data_pipeline.codec import decode
from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.decompose import decompose_video
from data_pipeline.codec.framing import Framing
from data_pipeline.codec.native import decompose_native
from data_pipeline.codec.timeline import segment_frames
from data_pipeline.errors import RejectedInput


def numbers_in(path, **options):
    """Numbers of all pictures that the reader gives."""
    video = decode_video(path, Framing(num_frames=1000, size=64, patch_size=16, **options))
    return [number_of(pixels) for pixels in video.frames]


@pytest.mark.parametrize(("container", "codec"), PAIRS, ids=[f"{c}-{k}" for c, k in PAIRS])
def test_every_picture_in_order_at_its_time(tmp_path, soak, container, codec):
    """A third of the cases of each pair, and another third for the next pair; all with --soak."""
    wrong, turn = [], PAIRS.index((container, codec))
    for number, case in enumerate(cases_of(container, codec)):
        if not soak and (number + turn) % 3:
            continue
        path = tmp_path / f"{number}.{CONTAINERS[container][0]}"
        case.write(path)
        found = verdict(case, path)
        if found != "right" and not (found == "refused" and case.may_be_refused):
            wrong.append(f"{case}: {found}")
    assert not wrong, "\n".join(wrong)


def test_the_bar_code_says_which_picture_it_is():
    assert [number_of(picture(number)) for number in range(256)] == list(range(256))


def cut_copy(source, target, cut):
    """Copy packets as `ffmpeg -ss cut/RATE -i source -c copy target` does: from the key frame
    before the cut on, stamps counted from the cut."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream = read.streams.video[0]
        copied = write.add_stream_from_template(stream)
        packets = [packet for packet in read.demux(stream) if packet.size]
        shift = round(cut / RATE / stream.time_base)
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= shift]
        for packet in packets[keys[-1] :]:
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = copied
            write.mux(packet)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("encoder", ["libx264", "libx265"])
@pytest.mark.parametrize("open_gop", [0, 1])
@pytest.mark.parametrize("cut", [7, 24, 40])
def test_an_edit_list_hides_what_is_before_it_and_nothing_else(
    tmp_path, suffix, encoder, open_gop, cut
):
    gops = f"keyint=24:min-keyint=24:scenecut=0:bframes=3:open-gop={open_gop}"
    name = encoder.removeprefix("lib")
    whole = write_numbered(
        tmp_path / f"whole.{suffix}",
        encoder=encoder,
        times=range(90),
        options={f"{name}-params": gops},
    )
    cut_copy(whole, tmp_path / f"cut.{suffix}", cut)
    video = decode_video(
        tmp_path / f"cut.{suffix}", Framing(num_frames=1000, size=64, patch_size=16)
    )
    assert [number_of(pixels) for pixels in video.frames] == list(range(cut, 90))
    assert np.allclose(video.seconds, np.arange(90 - cut) / RATE, atol=1e-3)


def drop_packets(source, target, count):
    """Copy a video without its first packets, as a recording that begins late."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream = read.streams.video[0]
        copied = write.add_stream_from_template(stream)
        for number, packet in enumerate(read.demux(stream)):
            if packet.size and number >= count:
                packet.stream = copied
                write.mux(packet)


OPEN_GOP = "keyint=24:min-keyint=24:scenecut=0:bframes=3:open-gop=1"
OPEN_GOPS = {
    "libx264": {"x264-params": OPEN_GOP},
    "libx265": {"x265-params": OPEN_GOP},
    "mpeg2video": {},
}


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
@pytest.mark.parametrize("encoder", OPEN_GOPS)
def test_a_recording_that_begins_in_an_open_gop_gives_all_that_can_be_decoded(
    tmp_path, suffix, encoder
):
    whole = write_numbered(
        tmp_path / f"whole.{suffix}",
        encoder=encoder,
        times=range(90),
        options=OPEN_GOPS[encoder],
        gop=24,
        b_frames=2 if encoder == "mpeg2video" else 0,
    )
    complete = decode_video(whole, Framing(num_frames=1000, size=64, patch_size=16))
    for count in (5, 30):
        late = tmp_path / f"late{count}.{suffix}"
        drop_packets(whole, late, count)
        video = decode_video(late, Framing(num_frames=1000, size=64, patch_size=16))
        found = [number_of(pixels) for pixels in video.frames]
        assert found == list(range(first_key(whole, count), 90))
        assert np.array_equal(video.frames, complete.frames[found])


def first_key(path, count):
    """Number of the first key frame behind the first `count` packets."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    stamps = sorted(packet.pts for packet in packets)
    return stamps.index(next(packet.pts for packet in packets[count:] if packet.is_keyframe))


@pytest.mark.parametrize("suffix", ["ts", "mpg", "flv", "mkv"])
@pytest.mark.parametrize("rates", [(25, 30), (25, 25), (30, 25, 30)])
@pytest.mark.parametrize("count", [60, 8])
def test_recordings_joined_without_remuxing_are_refused(tmp_path, suffix, rates, count):
    joined = tmp_path / f"joined.{suffix}"
    parts = [
        write_numbered(
            tmp_path / f"{number}.{suffix}",
            encoder="mpeg2video" if suffix == "mpg" else "libx264",
            times=range(count),
            rate=rate,
            first=80 * number,
        )
        for number, rate in enumerate(rates)
    ]
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(RejectedInput) as rejection:
        decode_video(joined, Framing(num_frames=8, size=64, patch_size=16))
    assert rejection.value.reason == "timestamps"


@pytest.mark.parametrize("suffix", ["mpg", "vob"])
@pytest.mark.parametrize(("gop", "b_frames"), [(4, 2), (5, 2), (15, 3), (12, 5)])
def test_a_program_stream_of_small_pictures_is_one_recording(tmp_path, suffix, gop, b_frames):
    """Its packets hold several pictures each, and their stamps seem to jump back."""
    path = tmp_path / f"clip.{suffix}"
    write_numbered(
        path,
        encoder="mpeg2video",
        times=range(120),
        options={"b": "3000k"},
        gop=gop,
        b_frames=b_frames,
    )
    video = decode_video(path, Framing(num_frames=1000, size=64, patch_size=16))
    assert [number_of(pixels) for pixels in video.frames] == list(range(120))
    apart = np.abs(video.seconds - video.seconds[0] - np.arange(120) / RATE)
    assert apart.max() <= b_frames / RATE + 1e-3
    assert (np.diff(video.seconds) >= 0).all()


def pack_b_frames(source, target, has_dummies):
    """Put every first B-frame of an MPEG-4 video into the chunk of the P-frame before it, and
    behind the last one a small dummy chunk, as DivX and Xvid did for players that allow one delay.

    Where a dummy is missing the muxer fills the place with a chunk of no bytes.
    """
    packed_mark = b"\x00\x00\x01\xb2DivX503b1393p"
    dummy = b"\x00\x00\x01\xb6\x51\xff" if has_dummies else b""
    start_code = b"\x00\x00\x01\xb6"
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream = read.streams.video[0]
        copied = write.add_stream_from_template(stream)
        coded = [bytes(packet) for packet in read.demux(stream) if packet.size]
        start = coded[0].index(start_code)
        chunks = [coded[0][:start] + packed_mark + coded[0][start:]]
        was_b_frame = False
        for picture in coded[1:]:
            is_b_frame = picture[picture.index(start_code) + 4] >> 6 == 2
            if is_b_frame and not was_b_frame:
                chunks[-1] += picture
            else:
                chunks += [dummy, picture] if was_b_frame and not is_b_frame else [picture]
            was_b_frame = is_b_frame
        chunks.append(dummy)
        for number, chunk in enumerate(chunks):
            if chunk:
                packet = av.Packet(chunk)
                packet.pts = packet.dts = number
                packet.time_base = stream.time_base
                packet.is_keyframe = number == 0
                packet.stream = copied
                write.mux(packet)


@pytest.mark.parametrize("has_dummies", [True, False])
@pytest.mark.parametrize("b_frames", [1, 2])
def test_packed_b_frames_come_in_the_order_of_showing(tmp_path, b_frames, has_dummies):
    plain = write_numbered(
        tmp_path / "plain.avi",
        encoder="mpeg4",
        times=range(43),
        options={"flags": "+bitexact", "b_strategy": "0"},
        gop=250,
        b_frames=b_frames,
    )
    pack_b_frames(plain, tmp_path / "packed.avi", has_dummies)
    video = decode_video(tmp_path / "packed.avi", Framing(num_frames=1000, size=64, patch_size=16))
    assert [number_of(pixels) for pixels in video.frames] == list(range(43))
    assert np.allclose(np.diff(video.seconds), 1 / RATE)
    assert "timestamps sorted" in video.notes


def test_frames_are_the_same_when_others_are_left_undecoded(tmp_path, monkeypatch):
    decoded = []
    index_after = decode._Choice.index_after

    def spy(choice, last, frame):
        decoded.append(frame.pts)
        return index_after(choice, last, frame)

    monkeypatch.setattr(decode._Choice, "index_after", spy)
    gops = "keyint=60:min-keyint=60:scenecut=0:bframes=3:b-adapt=0"
    for suffix in ("mp4", "mkv", "ts", "avi"):
        path = tmp_path / f"clip.{suffix}"
        write_numbered(path, times=range(200), options={"x264-params": gops})
        framing = Framing(size=64, patch_size=16, within=(0.2,) * 7)
        decoded.clear()
        ours = decode_video(path, framing, thorough=False)
        num_decoded = len(decoded)
        assert (num_decoded < 150) == (suffix in ("mp4", "mkv")), "of 177 up to the last wanted"
        whole = decode_video(path, framing)
        wanted = segment_frames(200, framing.within).tolist()
        assert ours.indices.tolist() == wanted
        assert [number_of(pixels) for pixels in ours.frames] == wanted
        assert np.array_equal(ours.frames, whole.frames)
        assert np.array_equal(ours.seconds, whole.seconds)


def test_the_sample_notes_that_timestamps_were_sorted(tmp_path):
    case = Case("avi", "mpeg4", has_b_frames=True)
    case.write(tmp_path / "clip.avi")
    framing = Framing(num_frames=COUNT, size=64, patch_size=16)
    assert "timestamps sorted" in decompose_video(tmp_path / "clip.avi", framing).notes
    clip = decompose_native(tmp_path / "clip.avi", framing)
    assert [number_of(pixels) for pixels in clip.frames] == list(range(COUNT))


def rewrite_edit_list(source, target, segments):
    """Copy an MP4 with another edit list of (seconds shown, first picture or None for a pause)."""

    def boxes(data, start):
        while start < len(data):
            size, kind = struct.unpack_from(">I4s", data, start)
            yield kind, data[start : start + size]
            start += size

    def box(kind, content):
        return struct.pack(">I4s", len(content) + 8, kind) + content

    with av.open(str(source), options={"ignore_editlist": "1"}) as container:
        stream = container.streams.video[0]
        first = min(packet.pts for packet in container.demux(stream) if packet.size)
        ticks = round(1 / RATE / stream.time_base)
    entries = b"".join(
        struct.pack(
            ">iiI", round(1000 * seconds), -1 if at is None else first + at * ticks, 1 << 16
        )
        for seconds, at in segments
    )
    edits = box(b"edts", box(b"elst", struct.pack(">II", 0, len(segments)) + entries))
    *before, (_, moov) = boxes(source.read_bytes(), 0)
    tracks = b""
    for kind, data in boxes(moov, 8):
        if kind == b"trak":
            parts = [part for part in boxes(data, 8) if part[0] != b"edts"]
            data = box(b"trak", b"".join(d + edits * (k == b"tkhd") for k, d in parts))
        tracks += data
    target.write_bytes(b"".join(data for _, data in before) + box(b"moov", tracks))


EDITS = {
    "behind an empty segment": ([(1.0, None), (53 / RATE, 7)], range(7, 60)),
    "the end cut off": ([(1.0, 5)], range(5, 30)),
    "all that follows": ([(0, 5)], range(5, 60)),
    "two parts": ([(0.8, 0), (0.8, 30)], "timestamps"),
    "two parts in another order": ([(0.8, 30), (0.8, 0)], "timestamps"),
    "a pause between two parts": ([(0.8, 0), (0.4, None), (0.8, 30)], "timestamps"),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("encoder", ["libx264", "mpeg4", "mpeg2video"])
def test_an_edit_list_is_followed_or_refused(tmp_path, encoder, name):
    segments, expected = EDITS[name]
    whole = write_numbered(tmp_path / "whole.mp4", encoder, range(60), gop=12, b_frames=2)
    rewrite_edit_list(whole, tmp_path / "edited.mp4", segments)
    if expected == "timestamps":
        with pytest.raises(RejectedInput, match="timestamps: .*several segments"):
            decode_video(tmp_path / "edited.mp4", Framing(num_frames=8, size=64, patch_size=16))
        return
    video = decode_video(tmp_path / "edited.mp4", Framing(num_frames=1000, size=64, patch_size=16))
    assert [number_of(pixels) for pixels in video.frames] == list(expected)
    assert np.allclose(video.seconds - video.seconds[0], np.arange(len(expected)) / RATE, atol=1e-3)


@pytest.mark.parametrize("suffix", ["wmv", "mp4", "mkv", "flv"])
@pytest.mark.parametrize("late", [0, 3 * RATE])
def test_a_stream_that_starts_later_than_another_is_not_truncated(tmp_path, suffix, late):
    """One second of sound from the first moment on, or from the fourth; the video is the other."""
    with av.open(str(tmp_path / f"clip.{suffix}"), "w") as container:
        video = container.add_stream("wmv2" if suffix == "wmv" else "libx264", rate=RATE)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        sound = container.add_stream("wmav2" if suffix == "wmv" else "aac", rate=44100)
        sound.layout = "mono"
        sound.bit_rate = 64000
        packets = []
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = number + late
            frame.time_base = Fraction(1, RATE)
            packets += video.encode(frame)
        size = 2048 if suffix == "wmv" else 1024  # samples that the encoders take at a time
        for number in range(44100 // size):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, size), np.float32), "fltp", "mono")
            silence.sample_rate = 44100
            silence.pts = number * size + 44100 * (3 - late // RATE)
            silence.time_base = Fraction(1, 44100)
            packets += sound.encode(silence)
        packets += video.encode(None) + sound.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    assert numbers_in(tmp_path / f"clip.{suffix}") == list(range(COUNT))


def test_an_edit_list_of_fragments_is_followed(tmp_path):
    muxer = {"movflags": "frag_keyframe+delay_moov"}
    write_numbered(tmp_path / "clip.mp4", times=range(-7, 53), muxer=muxer)
    assert numbers_in(tmp_path / "clip.mp4") == list(range(7, 60))


@pytest.mark.parametrize("encoder", ["libx264", "mpeg2video"])
def test_a_transport_stream_that_lost_packets_is_damaged(tmp_path, encoder):
    rng = np.random.default_rng(0)
    whole = write_numbered(tmp_path / "whole.ts", encoder, range(100), options={"b": "4000k"})
    data = whole.read_bytes()
    rows = [data[start : start + 188] for start in range(0, len(data), 188)]
    for _ in range(10):
        lost = int(rng.integers(len(rows) // 3, len(rows) - 2))
        (tmp_path / "lossy.ts").write_bytes(b"".join(rows[:lost] + rows[lost + 1 :]))
        try:
            found = numbers_in(tmp_path / "lossy.ts")
        except RejectedInput as rejection:
            assert rejection.reason == "decode"
            continue
        assert found == list(range(100)), "only what holds no picture may be lost without a word"


@pytest.mark.parametrize("number", [4, 6, 10, 14])
def test_damage_at_the_head_of_a_late_recording_is_no_missing_reference(tmp_path, number):
    whole = write_numbered(
        tmp_path / "whole.ts", times=range(90), options=OPEN_GOPS["libx264"] | {"crf": "5"}
    )
    drop_packets(whole, tmp_path / "late.ts", 5)
    assert numbers_in(tmp_path / "late.ts") == list(range(first_key(whole, 5), 90))
    damage_packet(tmp_path / "late.ts", tmp_path / "bad.ts", number)
    with pytest.raises(RejectedInput):
        numbers_in(tmp_path / "bad.ts")


def damage_packet(source, target, number):
    """Copy a video with zeros in the second half of a packet, counted from the first key frame."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        copied = write.add_stream_from_template(read.streams.video[0])
        packets = [packet for packet in read.demux(video=0) if packet.size]
        key = next(i for i, packet in enumerate(packets) if packet.is_keyframe)
        for place, packet in enumerate(packets):
            data = bytes(packet)
            if place == key + number:
                data = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
            copy = av.Packet(data)
            copy.pts = packet.pts
            copy.dts = packet.dts
            copy.time_base = packet.time_base
            copy.is_keyframe = packet.is_keyframe
            copy.stream = copied
            write.mux(copy)


# file: numbers of the pictures that it holds, or the reason for which it is refused
SHARED_CASES = {
    "avi_packed_b_frames.avi": range(60),
    "xvid_gop12.avi": range(60),
    "hevc_gop12.mp4": range(60),
    "mpeg2.mpg": range(60),
    "edit_list_trim.mp4": range(38, 200),
    "two_recordings_joined.ts": "timestamps",
    "starts_at_20s.webm": range(60),
    # The first key frame shows picture 40, and nothing from it on is missing or wrong.
    "open_gop_cut.ts": range(40, 120),
    "bottom_field_first.mpg": range(0, 120, 2),
}


@pytest.mark.parametrize("name", SHARED_CASES)
def test_files_that_went_wrong_once(shared, name):
    expected = SHARED_CASES[name]
    path = shared / "cases" / "video" / name
    framing = Framing(num_frames=1000, size=128, patch_size=16, fit="area")
    if isinstance(expected, str):
        with pytest.raises(RejectedInput, match=f"^{expected}: "):
            decode_video(path, framing)
        return
    found = [number_of(pixels) for pixels in decode_video(path, framing).frames]
    assert found == list(expected)
