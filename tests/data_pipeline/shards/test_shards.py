"""Shards: the schema round-trips, bad input is counted, every changed byte is found."""

import json
import shutil

import numpy as np
import pytest
from forked import forked

from data_pipeline.codec.decompose import decompose_video
from data_pipeline.codec.framing import Framing
from data_pipeline.codec.patches import SelectionConfig
from data_pipeline.codec.saliency import SaliencyConfig
from data_pipeline.codec.selection import cut_patches
from data_pipeline.errors import CorruptShard, MissingData
from data_pipeline.loading.shard_reader import ShardReader
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig, build_sample
from data_pipeline.shards.schema import (
    SampleInfo,
    decode_array,
    decode_frames,
    decode_patches,
)
from data_pipeline.shards.statistics import statistics, statistics_table
from data_pipeline.shards.verify import verify

CONFIG = PackConfig(
    SampleConfig(size=56, patch_size=14, gop=64, budget=32), samples_per_shard=3, workers=2
)


@pytest.fixture
def copy(packed, tmp_path):
    """A copy of the packed training split that a test may damage."""
    shutil.copytree(packed / "train", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("patch_size", [14, 16])
def test_stored_patches_are_the_clips_own(clips, patch_size):
    path = clips / "clips" / "train_00004.mp4"
    config = SampleConfig(size=112, patch_size=patch_size, gop=32, budget=200)
    members, info = build_sample(path, "a", config)
    assert SampleInfo.from_bytes(members["json"], "a") == info
    positions = decode_array(members["positions.npy"], "positions.npy", "a").astype(int)
    tiles = decode_patches(info, members["tiles.jpg"], "a")
    clip = decompose_video(path, Framing(64, 112, patch_size), gop=32)
    want = cut_patches(clip.frames, positions, patch_size)
    error = ((tiles.astype(float) - want) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 33
    frames = decode_frames(info, members["frames.jpg"], "a")
    assert frames.shape == (16, 112, 112, 3)
    assert np.abs(frames[-1].astype(int) - clip.frames[-1]).mean() < 4


def test_bad_inputs_are_rejected_by_name_and_the_rest_is_packed(clips, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    shutil.copy(clips / "clips" / "train_00000.mp4", inputs / "a.mp4")
    shutil.copy(clips / "clips" / "train_00001.mp4", inputs / "b name, with comma.mp4")
    (inputs / "broken.mp4").write_bytes(b"\0" * 1000)
    (inputs / "page.jpg").write_text("<html>")
    manifest = pack(list_inputs([inputs]), tmp_path / "out", CONFIG)
    assert manifest.sources() == ["a.mp4", "b name, with comma.mp4"]
    assert dict(manifest.rejected_by_reason()) == {"container": 1, "image": 1}
    rejected = [entry["source"] for shard in manifest.shards for entry in shard["rejected"]]
    assert rejected == ["broken.mp4", "page.jpg"]
    assert statistics(manifest)["rejected"] == {"container": 1, "image": 1}


def test_a_hanging_input_is_rejected_and_the_next_one_is_packed(clips, tmp_path):
    config = PackConfig(CONFIG.sample, samples_per_shard=3, workers=1, wall_seconds=0.001)
    manifest = pack(list_inputs([clips / "clips" / "train_00000.mp4"]), tmp_path / "out", config)
    assert dict(manifest.rejected_by_reason()) == {"timeout": 1}


def test_packing_twice_gives_the_same_bytes_and_finished_shards_are_kept(clips, tmp_path):
    inputs = list_inputs([clips / "val.csv"])
    first = pack(inputs, tmp_path / "one", CONFIG)
    second = pack(inputs, tmp_path / "two", CONFIG)
    assert [s["sha256"] for s in first.shards] == [s["sha256"] for s in second.shards]
    assert first.sha256 == second.sha256

    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*.tar")}
    (tmp_path / "one" / "video-000001.json").unlink()
    again = pack(inputs, tmp_path / "one", CONFIG)
    changed = [
        p.name for p in (tmp_path / "one").glob("*.tar") if p.stat().st_mtime_ns != times[p.name]
    ]
    assert changed == ["video-000001.tar"]
    assert again.sha256 == first.sha256


def test_packing_again_repairs_a_damaged_shard(clips, tmp_path):
    inputs = list_inputs([clips / "val.csv"])
    first = pack(inputs, tmp_path, CONFIG)
    tar = tmp_path / "video-000001.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    (tmp_path / "video-000000.tar.idx").unlink()
    assert len(verify(first)) >= 2
    assert verify(pack(inputs, tmp_path, CONFIG)) == []


def test_folders_say_what_they_leave_out_and_lists_take_names_whole(clips, tmp_path):
    shutil.copy(clips / "clips" / "train_00000.mp4", tmp_path / "a, b.mp4")
    (tmp_path / "notes.md").write_text("x")
    said = []
    assert [item.source for item in list_inputs([tmp_path], said.append)] == ["a, b.mp4"]
    assert "1 files" in said[0] and ".md" in said[0]
    (tmp_path / "list.txt").write_text("\ufeffa, b.mp4\n", encoding="utf-8")
    assert [item.source for item in list_inputs([tmp_path / "list.txt"])] == ["a, b.mp4"]


@pytest.mark.parametrize("field", ["patch_size", "gop", "num_frames", "num_full_frames", "budget"])
def test_settings_below_one_are_named(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        SampleConfig(**{field: 0})


def test_a_budget_below_all_i_frames_is_refused():
    with pytest.raises(ValueError, match="cannot hold the 3136 of all I-frames"):
        SampleConfig(gop=4)


def test_images_become_image_samples(shared, tmp_path):
    manifest = pack(list_inputs([shared / "images"]), tmp_path / "out", CONFIG)
    assert statistics(manifest)["images"] == 2
    assert verify(manifest) == []


def test_statistics_count_motion_static_clips_tokens_and_rejects(tmp_path):
    """One moving clip, one still one, one broken file: every figure is known."""
    import av

    inputs = tmp_path / "in"
    inputs.mkdir()
    texture = np.random.default_rng(0).integers(0, 255, (14, 40, 3), dtype=np.uint8)
    texture = np.kron(texture, np.ones((8, 8, 1), np.uint8))
    for name, step in (("moving", 4), ("still", 0)):
        with av.open(str(inputs / f"{name}.mp4"), "w") as output:
            stream = output.add_stream("libx264", rate=25, options={"crf": "10"})
            stream.height, stream.width, stream.pix_fmt = 112, 112, "yuv420p"
            for t in range(16):
                picture = np.ascontiguousarray(texture[:, step * t : step * t + 112])
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode(None))
    (inputs / "broken.mp4").write_bytes(b"\0" * 99)
    manifest = pack(list_inputs([inputs]), tmp_path / "out", CONFIG)
    stats = statistics(manifest)
    assert (stats["videos"], stats["images"], stats["static_videos"]) == (2, 0, 1)
    assert stats["static_share"] == 0.5 and stats["rejected"] == {"container": 1}
    assert stats["tokens"]["min"] == stats["tokens"]["max"] == 32
    assert 1.5 < stats["mean_motion"]["max"] < 2.5  # 4 pixels a frame at half the size
    assert stats["mean_motion"]["min"] < 0.05
    table = statistics_table(stats)
    for part in ("static_share  0.5", "container: 1", "mean_motion  min"):
        assert part in table
    json.dumps(stats)


def test_any_flipped_byte_is_found(copy):
    manifest = load_manifest(copy)
    assert verify(manifest) == []
    rng = np.random.default_rng(0)
    tar = copy / "video-000001.tar"
    original = tar.read_bytes()
    for place in rng.integers(0, len(original), 25):
        damaged = bytearray(original)
        damaged[place] ^= 1 << int(rng.integers(8))
        tar.write_bytes(damaged)
        assert any("sha256" in problem for problem in verify(manifest))
    tar.write_bytes(original)


def test_reading_checks_the_crc_before_anything_decodes(copy):
    manifest = load_manifest(copy)
    member = manifest.member(12, "tiles.jpg")
    data = bytearray(member.path.read_bytes())
    data[member.offset + 100] ^= 4
    member.path.write_bytes(data)
    with ShardReader(manifest) as reader:
        reader.read(11, "tiles.jpg")
        with pytest.raises(
            CorruptShard, match=r"video-000001.tar.*tiles.jpg of sample 12.*pack that shard"
        ):
            reader.read(12, "tiles.jpg")


@pytest.mark.parametrize(
    "fault", ["missing shard", "truncated shard", "foreign record", "no manifest"]
)
def test_files_that_are_not_what_the_manifest_binds_stop_the_start(copy, fault):
    if fault == "missing shard":
        (copy / "video-000002.tar").unlink()
    elif fault == "truncated shard":
        tar = copy / "video-000002.tar"
        tar.write_bytes(tar.read_bytes()[:-512])
    elif fault == "foreign record":
        shutil.copy(copy / "video-000000.json", copy / "video-000002.json")
    else:
        (copy / "manifest.json").unlink()
    with pytest.raises((CorruptShard, MissingData), match="video-000002|manifest.json"):
        load_manifest(copy)


def test_a_stale_index_is_found(copy):
    shutil.copy(copy / "video-000000.tar.idx", copy / "video-000001.tar.idx")
    assert verify(load_manifest(copy)) == [
        "video-000001.tar.idx: missing, stale or of another shard"
    ]


@pytest.mark.dali
def test_the_index_is_the_one_dali_reads(packed):
    from nvidia.dali import fn, pipeline_def

    tar = packed / "train" / "video-000000.tar"

    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def read():
        return fn.readers.webdataset(paths=[str(tar)], index_paths=[f"{tar}.idx"], ext=["json"])

    pipeline = read()
    pipeline.build()
    (texts,) = pipeline.run()
    sources = [json.loads(bytes(texts.at(i)))["source"] for i in range(10)]
    assert sources == load_manifest(packed / "train").sources()[:10]


def test_arrays_of_wrong_type_or_size_are_refused():
    import io

    for array in (np.zeros(3), np.array([{}], dtype=object)):
        stream = io.BytesIO()
        np.save(stream, array)
        with pytest.raises(CorruptShard, match="expected uint16"):
            decode_array(stream.getvalue(), "positions.npy", "x")
    bomb = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        bomb, {"descr": "<u2", "fortran_order": False, "shape": (10**12,)}
    )
    with pytest.raises(CorruptShard):
        decode_array(bomb.getvalue(), "positions.npy", "x")


def test_a_user_mistake_ends_with_a_sentence(tmp_path):
    done = forked(
        "-m", "data_pipeline", "pack", tmp_path / "nothing", "--output", tmp_path, check=False
    )
    assert done.returncode == 1
    assert "does not exist" in done.stderr and "Traceback" not in done.stderr


def test_any_changed_byte_of_the_manifest_and_any_stray_shard_is_found(copy):
    path = copy / "manifest.json"
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(original), 60):
        damaged = bytearray(original)
        damaged[place] ^= 1 << int(rng.integers(7))
        path.write_bytes(damaged)
        try:
            problems = verify(load_manifest(copy))
        except CorruptShard:
            continue
        assert any("manifest.json" in problem for problem in problems), place
    path.write_bytes(original)
    shutil.copy(copy / "video-000000.tar", copy / "video-000099.tar")
    assert verify(load_manifest(copy)) == [
        "video-000099.tar: a shard that the manifest does not name"
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 65}, "num_frames is 65: temporal positions run over 0..63"),
        ({"size": 1024, "num_full_frames": 64}, "64 full frames of 1024 px make a strip"),
        ({"budget": 195, "gop": 64}, "budget of 195 patches cannot hold the 196 of all I-frames"),
    ],
)
def test_settings_that_cannot_work_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vectors": "mine"}, "vectors is 'mine'; choose one of canonical, native"),
        ({"rule": "mine"}, "rule is 'mine'; choose one of i_frames_first, published"),
        ({"rule": "random", "saliency": SaliencyConfig("mean")}, "random has no saliency"),
    ],
)
def test_selections_that_cannot_work_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**fields)


def test_a_thin_strip_is_scaled_where_it_is_kept_only(tmp_path):
    from PIL import Image

    Image.new("RGB", (1, 16000), "red").save(tmp_path / "strip.png")
    members, info = build_sample(tmp_path / "strip.png", "strip.png", SampleConfig(size=224))
    assert (info.height, info.width) == (224, 224)
    assert np.abs(decode_frames(info, members["jpg"], "a").astype(int) - (255, 0, 0)).max() < 4
