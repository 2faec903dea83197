"""The public layouts: what is written is what the packed clip holds, and reads back."""

import json

import numpy as np
import pytest
from forked import forked

from data_pipeline.loading.shard_reader import ShardReader
from data_pipeline.shards.interop import (
    NUM_MOSAICS,
    export_mosaics,
    read_mosaics,
    read_visidx,
    write_visidx,
)
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.schema import SampleInfo, decode_array, decode_patches


@pytest.fixture(scope="module")
def exported(packed, tmp_path_factory):
    output = tmp_path_factory.mktemp("export")
    forked("-m", "data_pipeline", "export", packed / "val", "--output", output)
    return load_manifest(packed / "val"), output


def test_mosaics_hold_the_kept_patches_in_order_of_time(exported):
    manifest, output = exported
    records = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(records) == len(manifest)
    for sample_id, record in enumerate(records):
        with ShardReader(manifest) as reader:
            info = SampleInfo.from_bytes(reader.read(sample_id, "json"), "x")
            positions = decode_array(reader.read(sample_id, "positions.npy"), "positions.npy", "x")
            patches = decode_patches(info, reader.read(sample_id, "tiles.jpg"), "x")
        clip = read_mosaics((output / record["positions_thw"]).parent)
        assert clip.positions.dtype == np.int32
        assert len(clip.positions) == NUM_MOSAICS * info.grid[0] * info.grid[1]
        ours = clip.positions[: clip.valid]
        assert (np.diff(ours.astype(np.int64) @ (10_000, 100, 1)) > 0).all()
        known = {tuple(p): patch for p, patch in zip(positions.tolist(), patches, strict=True)}
        assert clip.valid == len(known)
        for position, patch in zip(ours.tolist(), clip.patches, strict=False):
            assert np.array_equal(known[tuple(position)], patch)
        assert (clip.positions[clip.valid :] == ours[-1]).all()


def test_records_name_eight_pictures_and_as_many_marks(exported):
    _, output = exported
    for line in (output / "samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert all((output / path).is_file() for path in record["image"])
        human, answer = record["conversations"]
        assert human["value"].count("<image>") == len(record["image"]) == NUM_MOSAICS
        assert (human["from"], answer["from"]) == ("human", "gpt")


def test_index_files_agree_with_the_positions_and_finished_clips_are_kept(exported):
    manifest, output = exported
    folder = next((output / "assets").iterdir())
    meta = json.loads((folder / "meta.json").read_text())
    positions = read_visidx(folder / f"{folder.name}.visidx.npy", tuple(meta["grid"]))
    assert np.array_equal(positions, read_mosaics(folder).positions[: meta["valid"]])
    before = (folder / "mosaic_000.png").stat().st_mtime_ns
    assert export_mosaics(manifest, output) == len(manifest)
    assert (folder / "mosaic_000.png").stat().st_mtime_ns == before


def test_index_files_round_trip_and_their_faults_are_named(tmp_path):
    rng = np.random.default_rng(0)
    linear = np.sort(rng.choice(64 * 16 * 16, 2048, replace=False))
    positions = np.stack([linear // 256, linear // 16 % 16, linear % 16], -1)
    path = tmp_path / "clip.visidx.npy"
    write_visidx(path, rng.permutation(positions), (16, 16))
    stored = np.load(path)
    assert stored.dtype == np.int32 and np.array_equal(stored, linear)
    assert np.array_equal(read_visidx(path, (16, 16)), positions)
    np.save(path, linear.astype(np.uint16))
    assert np.array_equal(read_visidx(path, (16, 16)), positions)
    for array, message in (
        (linear.astype(np.float32), "float32"),
        (np.array([0, 16384], np.int32), "0 to 16384.*0 to 16383"),
        (np.array([-1, 5], np.int32), "-1 to 5"),
        (np.zeros((2, 3), np.int32), r"\[2, 3\]"),
    ):
        np.save(path, array)
        with pytest.raises(ValueError, match=message):
            read_visidx(path, (16, 16))


def test_index_files_count_patches_row_by_row_where_the_grid_is_not_square(tmp_path):
    positions = np.array([[0, 2, 4], [1, 0, 3], [1, 1, 0]])
    write_visidx(tmp_path / "a.npy", positions, (3, 5))
    assert np.load(tmp_path / "a.npy").tolist() == [14, 18, 20]
    assert np.array_equal(read_visidx(tmp_path / "a.npy", (3, 5)), positions)


def test_mosaics_that_do_not_fit_their_positions_are_named(exported, tmp_path):
    import shutil

    folder = shutil.copytree(next((exported[1] / "assets").iterdir()), tmp_path / "clip")
    (folder / "mosaic_007.png").unlink()
    with pytest.raises(ValueError, match="mosaic_007.png"):
        read_mosaics(folder)


def test_another_format_or_source_is_written_again(exported, tmp_path):
    manifest, _ = exported
    export_mosaics(manifest, tmp_path)
    export_mosaics(manifest, tmp_path, "jpg")
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        assert all((tmp_path / path).is_file() for path in json.loads(line)["image"])
    assert not list(tmp_path.glob("assets/*/*.png"))
