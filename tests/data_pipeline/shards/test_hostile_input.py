"""Broken and hostile files beside good ones, packed in one run: each has its reason, the rest is
packed, nothing outside is read.

Numbers in the names are those of the fault table that the packer is built to.
"""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import wave
import zlib

import numpy as np
import psutil
import pytest
from conftest import ROOT, run, write_video

from data_pipeline.codec.guard import GuardedProcess
from data_pipeline.codec.open_video import InputLimits
from data_pipeline.errors import CorruptShard, RejectedInput
from data_pipeline.shards import sample_builder
from data_pipeline.shards.inputs import Input, list_inputs
from data_pipeline.shards.manifest import MANIFEST_NAME, load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig, SamplePool, build_sample
from data_pipeline.shards.schema import SampleInfo
from data_pipeline.shards.statistics import statistics
from data_pipeline.shards.verify import verify

CONFIG = PackConfig(
    SampleConfig(size=32, patch_size=16, gop=64, budget=64), samples_per_shard=100, workers=2
)
SIDE = 64


def frames(count=40, side=SIDE):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (side, 2 * side, 3), dtype=np.uint8)
    return [np.ascontiguousarray(picture[:, t : t + side]) for t in range(count)]


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def damage(path):
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 3, len(data) // 3 + 3000):
        data[place] ^= 0x5A
    path.write_bytes(data)


def good(path, **options):
    write_video(path, frames(), crf="5", **options)


def front(path):
    good(path, container_options={"movflags": "faststart"})


def png_bomb(path):
    """A valid PNG header of 60000 x 60000 pixels with almost no data."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10000)
    magic = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(magic + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def sound(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 8000, "NONE", ""))
        file.writeframes(b"\0\0" * 8000)


def sound_in_mp4(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def two_sizes(path):
    parts = []
    for side, start in ((64, 0), (96, 40)):
        part = path.with_name(f"part{side}.part.ts")
        write_video(part, frames(side=side), times=range(start, start + 40))
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))


def picture(path, kind):
    from PIL import Image

    Image.fromarray(frames(1)[0]).save(path, kind)


def high_range(path):
    good(path, setup=lambda stream: setattr(stream.codec_context, "color_trc", 18))


SECRET = "ffconcat version 1.0\nfile 'good_h264.mp4'\n"
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\ngood_h264.mp4\n#EXT-X-ENDLIST\n"
REMOTE = "#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"

# file: (how it is made, reasons that may be given)
HOSTILE = {
    "c01_truncated_tail_index.mp4": (lambda p: (good(p), cut(p, 0.6)), {"container"}),
    "c02_truncated_front_index.mp4": (lambda p: (front(p), cut(p, 0.6)), {"truncated", "decode"}),
    "c03_damaged_inside.mp4": (lambda p: (front(p), damage(p)), {"decode"}),
    "c03_damaged_inside.mkv": (lambda p: (good(p), damage(p)), {"decode", "truncated"}),
    "c04_empty.mp4": (lambda p: p.write_bytes(b""), {"empty"}),
    "c04_page.mp4": (lambda p: p.write_text("<html>404</html>"), {"container"}),
    "c04_zeros.mp4": (lambda p: p.write_bytes(bytes(5000)), {"container"}),
    "c05_sound_only.mp4": (sound_in_mp4, {"no_video"}),
    "c05_wave.mp4": (sound, {"container"}),
    "c06_image_named.mp4": (lambda p: picture(p, "JPEG"), {"container"}),
    "c06_video_named.jpg": (
        lambda p: (good(p.with_suffix(".mp4")), p.with_suffix(".mp4").rename(p)),
        {"image"},
    ),
    "c10_two_sizes.ts": (two_sizes, {"varying", "timestamps"}),
    "c11_bomb.png": (png_bomb, {"too_large"}),
    "c13_high_range.mp4": (high_range, {"hdr"}),
    "c16_concat.mp4": (lambda p: p.write_text(SECRET), {"container"}),
    "c16_playlist.mp4": (lambda p: p.write_text(PLAYLIST), {"container"}),
    "c16_remote_playlist.ts": (lambda p: p.write_text(REMOTE), {"container"}),
    "c32_moving_heic.heic": (lambda p: p.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)), {"image"}),
    "c20_pipe.mp4": (os.mkfifo, {"not_a_file"}),
}
GOOD = {
    "good_h264.mp4": good,
    "good_hevc.mkv": lambda p: write_video(p, frames(), "libx265"),
    "good_one_frame.mp4": lambda p: write_video(p, frames(1)),
    "good_five_frames.mp4": lambda p: write_video(p, frames(5)),
    "good_varying_rate.mkv": lambda p: write_video(
        p, frames(), times=[t * t // 8 + t for t in range(40)], bf="0"
    ),
    "good b,\u00e4 \u4f60\u597d 'quoted'\nnew line.mp4": good,
    f"good_{'long' * 50}.mp4": good,
    "good_copy.mp4": good,
    "good_picture.webp": lambda p: picture(p, "WEBP"),
}


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    inputs = tmp_path_factory.mktemp("hostile")
    for name, (make, _) in HOSTILE.items():
        make(inputs / name)
    for name, make in GOOD.items():
        make(inputs / name)
    return pack(list_inputs([inputs]), tmp_path_factory.mktemp("out"), CONFIG)


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_rejected_with_its_reason(packed_folder, name):
    (shard,) = packed_folder.shards
    (entry,) = [entry for entry in shard["rejected"] if entry["source"] == name]
    assert entry["reason"] in HOSTILE[name][1], entry
    assert len(entry["detail"]) > 20


@pytest.mark.parametrize("name", GOOD, ids=lambda name: ascii(name[:24]))
def test_each_good_file_beside_them_is_packed(packed_folder, name):
    (shard,) = packed_folder.shards
    (sample,) = [sample for sample in shard["samples"] if sample["source"] == name]
    assert sample["key"].replace("_", "").isdigit()
    single = name in ("good_one_frame.mp4", "good_picture.webp")
    assert sample["kind"] == ("image" if single else "video")


def test_the_counters_add_up_and_duplicates_are_counted(packed_folder):
    stats = statistics(packed_folder)
    assert stats["samples"] == len(GOOD) and sum(stats["rejected"].values()) == len(HOSTILE)
    assert stats["duplicate_sources"] == 3  # four names, the same bytes
    assert verify(packed_folder) == []


def test_c17_a_decoder_that_dies_rejects_its_input_and_the_next_one_is_packed(tmp_path):
    good(tmp_path / "a.mp4")
    item = Input(str(tmp_path / "a.mp4"), "a.mp4")
    with SamplePool(CONFIG.sample, num_workers=1, wall_seconds=60) as pool:
        pool.build(item)
        (child,) = children_that_build()
        threading.Thread(target=lambda: (time.sleep(0.01), child.kill())).start()
        with pytest.raises(RejectedInput) as rejection:
            for _ in range(1000):
                pool.build(item)
        assert rejection.value.reason == "crash"
        assert pool.build(item)[1].kind == "video"
    assert children_that_build() == []


def children_that_build():
    """Child processes of this one that build samples."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended while we looked
            if sample_builder.MODULE in child.cmdline():
                found.append(child)
    return found


def test_c17_a_decoder_that_never_returns_is_killed_at_its_limit(tmp_path):
    os.mkfifo(tmp_path / "endless.mp4")  # read as a file of its own, it would be waited for forever
    code = (
        "from data_pipeline.codec import guard\n"
        "guard.serve(lambda settings: lambda request: open(request['path']).read())"
    )
    (tmp_path / "waits.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        process = GuardedProcess("waits", settings={}, wall_seconds=1.5)
        with pytest.raises(RejectedInput, match="timeout: endless.mp4 took longer than 1.5 s"):
            process.ask({"path": str(tmp_path / "endless.mp4")}, "endless.mp4")
    assert process.child is None


def test_children_go_with_a_parent_that_is_killed(tmp_path):
    good(tmp_path / "a.mp4")
    code = (
        "from data_pipeline.shards.inputs import Input\n"
        "from data_pipeline.shards.sample_builder import SampleConfig, SamplePool\n"
        "pool = SamplePool(SampleConfig(size=32, gop=64, budget=64), 2, 60)\n"
        f"pool.build(Input({str(tmp_path / 'a.mp4')!r}, 'a.mp4'))\n"
        "print('built', flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert parent.stdout.readline() == b"built\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_pack_leaves_no_process_behind(tmp_path):
    good(tmp_path / "a.mp4")
    command = [sys.executable, "-m", "data_pipeline", "pack", str(tmp_path / "a.mp4")]
    command += ["--output", str(tmp_path / "out"), "--size", "32", "--workers", "2"]
    done = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    assert done.wait() == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(done.pid, 0)


def test_c20_a_file_that_changes_or_vanishes_while_it_is_packed_is_rejected(tmp_path, monkeypatch):
    path, real = tmp_path / "a.mp4", sample_builder.decompose
    for reason in ("changed", "missing"):
        good(path)

        def meddle(*args, reason=reason, **options):
            scored = real(*args, **options)
            if reason == "changed":
                path.write_bytes(path.read_bytes() + b"\0")
            else:
                path.unlink()
            return scored

        monkeypatch.setattr(sample_builder, "decompose", meddle)
        with pytest.raises(RejectedInput) as rejection:
            build_sample(path, "a.mp4", CONFIG.sample)
        assert rejection.value.reason == reason


@pytest.mark.parametrize("name", ["pipe:0", "/dev/stdin", "http://127.0.0.1:9/a.mp4"])
def test_c75_pipes_and_addresses_are_never_opened_by_the_decoder(tmp_path, name):
    listed = tmp_path / "list.txt"
    listed.write_text(name + "\n")
    try:
        manifest = pack(list_inputs([listed]), tmp_path / "out", CONFIG)
    except (ValueError, OSError):
        return  # refused before anything was opened
    assert len(manifest) == 0 and manifest.rejected_by_reason().total() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "a key occurs twice"),
        ("[" * 200_000, "is no readable JSON"),
        ("[]", "holds a list"),
        ("{", "is no readable JSON"),
    ],
    ids=["key twice", "deep", "list", "cut"],
)
def test_c78_hostile_json_is_named(tmp_path, text, message):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CorruptShard, match=f"manifest.json.*{message}"):
        load_manifest(tmp_path)
    with pytest.raises(CorruptShard, match=message):
        SampleInfo.from_bytes(text.encode(), "sample")
    with pytest.raises(CorruptShard, match="bytes of JSON, at most"):
        SampleInfo.from_bytes(b" " * (1 << 23), "sample")


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_bytes": 100}, "bytes, the limit is 100"),
        ({"max_pixels": 1000}, "the limits are 1000 pixels"),
        ({"max_side": 32}, "32 a side"),
        ({"max_seconds": 0.5}, "and 0 s|and 1 s"),
        ({"max_frames": 10}, "more than 10 frames"),
    ],
)
def test_c11_every_limit_is_checked_before_decoding(tmp_path, limits, said):
    good(tmp_path / "a.mp4")
    config = SampleConfig(size=32, gop=64, budget=64, limits=InputLimits(**limits))
    with pytest.raises(RejectedInput, match=f"too_large: .*({said})"):
        build_sample(tmp_path / "a.mp4", "a.mp4", config)


def test_a_child_that_burns_processor_time_is_killed():
    code = "from data_pipeline.codec.guard import limit_cpu\nlimit_cpu(0.1)\nwhile True: pass"
    done = run("-c", code, check=False)
    assert done.returncode == -signal.SIGXCPU
