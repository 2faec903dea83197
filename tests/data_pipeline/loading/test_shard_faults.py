"""Cases 21-41: whatever is wrong with shards has one policy, a name, and loses no good data.

stop        the run does not start, the message lists what is wrong
quarantine  the sample gives way to its reserve, recorded and counted; good samples are the same
reject      the packer leaves the input out, with a reason
verify      training is not reached by it, `verify` names it
continue    no effect
"""

import dataclasses
import io
import json
import os
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import forked_ranks
from PIL import Image

from data_pipeline.clustering.labels import save_labels
from data_pipeline.datasets import resolve_dataset
from data_pipeline.errors import BudgetExceeded, DataPipelineError, DataTimeout
from data_pipeline.loading.choices import SampleTable
from data_pipeline.loading.config import ErrorBudget, StreamConfig, ViewConfig
from data_pipeline.loading.loader import MixtureLoader
from data_pipeline.loading.shard_reader import ShardReader
from data_pipeline.loading.stream import HeadStream
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest, write_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig
from data_pipeline.shards.schema import decode_array
from data_pipeline.shards.verify import verify
from data_pipeline.shards.writer import index_text
from data_pipeline.side_files import array_bytes
from model_factory.files import DIGEST_KEY, file_sha256, json_bytes

pytestmark = pytest.mark.dali
VIEW = ViewConfig(codec_ratio=1.0, frame_ratio=0.0, max_tokens=98, max_frames=2)
JPEG_SIDES = struct.Struct(">HH")  # rows and columns in a frame header
PATIENT = ErrorBudget(share=0.6, shard_share=0.6)
STREAM = StreamConfig(batch_size=4, view=VIEW, label_width=4, labels_per_step=2, dali_num_threads=1)
PACKED = PackConfig(SampleConfig(size=64, gop=64, budget=64), samples_per_shard=9, workers=1)


def open_stream(folder: Path, budget=PATIENT, view=VIEW, allow_missing=False, **options):
    config = dataclasses.replace(STREAM, view=view, error_budget=budget, **options)
    return HeadStream(resolve_dataset(str(folder)).load(allow_missing), config, seed=0)


def read_epoch(stream: HeadStream) -> tuple[dict[int, torch.Tensor], dict[int, int]]:
    """({sample: its pixels}, {bad sample: stand-in}) of the first epoch."""
    pixels, replaced = {}, {}
    while (batch := next(stream)).epoch == 0:
        pieces = batch.pixels.split(batch.cu_seqlens.diff().tolist())
        ids = batch.sample_ids[: batch.num_samples].tolist()
        pixels |= dict(zip(ids, pieces, strict=False))
        replaced |= dict(batch.replaced)
    return pixels, replaced


def assert_contained(folder: Path, packed: Path, bad: set[int], view=VIEW, budget=PATIENT) -> None:
    """Dropped = injected, good samples unchanged, and the same again on a second reading."""
    got, replaced = read_epoch(open_stream(folder, budget, view))
    want, _ = read_epoch(open_stream(packed / "train", budget, view))
    assert set(replaced) == bad and not bad & set(replaced.values())
    assert set(got) == set(want) - bad
    assert all(torch.equal(got[sample], want[sample]) for sample in got)
    assert read_epoch(open_stream(folder, budget, view))[1] == replaced


def flip_bytes(folder: Path, samples, member: str) -> None:
    manifest = load_manifest(folder)
    for sample in samples:
        place = manifest.member(sample, member)
        with open(place.path, "r+b") as tar:
            tar.seek(place.offset + place.size // 2)
            byte = tar.read(1)[0]
            tar.seek(place.offset + place.size // 2)
            tar.write(bytes([byte ^ 255]))


def rebind(folder: Path, change) -> None:
    """Let `change(records)` alter the shards' records and bind the folder anew, as a careless or
    hostile writer would; labels follow."""
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("video-*.json"))]
    change(records)
    for record in records:
        tar = folder / f"{record['name']}.tar"
        record |= {"size": tar.stat().st_size, "sha256": file_sha256(tar)}
        record.pop(DIGEST_KEY, None)
        (folder / f"{record['name']}.json").write_bytes(json_bytes(record, indent=None))
        (folder / f"{record['name']}.tar.idx").write_text(index_text(record))
    write_manifest(folder, records, settings)
    labels = np.load(folder / "labels.npy")
    save_labels(folder, labels, load_manifest(folder), 8, {})


def replace_member(folder: Path, sample: int, member: str, data: bytes) -> None:
    """Other bytes in the place of a member, with a right crc: the writer's own mistake."""
    import zlib

    place = load_manifest(folder).member(sample, member)
    assert len(data) <= place.size
    with open(place.path, "r+b") as tar:
        tar.seek(place.offset)
        tar.write(data)

    def change(records):
        entry = records[sample // 10]["samples"][sample % 10]["members"]
        entry[member] = [place.offset, len(data), zlib.crc32(data)]

    rebind(folder, change)


def jpeg(mode: str, size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, 90 if mode == "L" else None).save(stream, "JPEG")
    return stream.getvalue()


def broken_codes() -> bytes:
    """A picture of a right header whose Huffman tables no decoder takes."""
    data = bytearray(jpeg("RGB", (512, 64)))
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16
    return bytes(data)


def add_member(folder: Path, name: str, kind=tarfile.REGTYPE, format=tarfile.GNU_FORMAT) -> None:
    with tarfile.open(folder / "video-000001.tar", "a:", format=format) as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    rebind(folder, lambda records: None)


# --- stop ------------------------------------------------------------


def missing_shards(folder, packed):
    for name in ("video-000000.tar", "video-000002.tar"):
        (folder / name).unlink()
    with pytest.raises(DataPipelineError, match=r"(?s)video-000000.tar.*video-000002.tar"):
        open_stream(folder)
    stream = open_stream(folder, allow_missing=True)
    pixels, replaced = read_epoch(stream)
    assert set(pixels) == set(range(10, 20)) and not replaced
    assert stream.plan_sha256 != open_stream(packed / "train").plan_sha256


def all_shards_missing(folder, packed):
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DataPipelineError, match="none of the 3 shards"):
        open_stream(folder, allow_missing=True)


def truncated_shards(folder, packed):
    for name, size in (("video-000000.tar", 1000), ("video-000001.tar", 0)):
        os.truncate(folder / name, size)
    with pytest.raises(DataPipelineError, match=r"(?s)video-000000.tar: 1000.*video-000001.tar: 0"):
        open_stream(folder)


def random_bytes(folder, packed):
    tar = folder / "video-000001.tar"
    good = tar.read_bytes()
    noise = bytearray(np.random.default_rng(0).bytes(len(good)))
    for sample in (10, 19):  # else the start would find it
        place = load_manifest(folder).member(sample, "json")
        noise[place.offset : place.offset + place.size] = good[place.offset :][: place.size]
    tar.write_bytes(noise)
    with pytest.raises(BudgetExceeded, match=r"of 10 samples of video-000001.tar are bad"):
        read_epoch(open_stream(folder, ErrorBudget(1.0, 0.3)))
    with pytest.raises(BudgetExceeded, match=r"\d bad samples in epoch 0.*1 are allowed"):
        read_epoch(open_stream(folder, ErrorBudget(shard_share=1.0)))
    assert_contained(folder, packed, set(range(10, 20)), budget=ErrorBudget(1.0, 1.0))


def labels_that_do_not_fit(folder, packed):
    manifest, labels = load_manifest(folder), np.load(folder / "labels.npy")
    for wrong, said in ((labels + 8, "below 8"), (labels - 9, "-1"), (labels[:-1], "24 rows")):
        save_labels(folder, wrong, manifest, 8, {})
        with pytest.raises(DataPipelineError, match=f"expected .*{said}"):
            open_stream(folder)


def fewer_samples_than_a_batch(folder, packed):
    with pytest.raises(DataPipelineError, match="24 samples, one global batch takes 25"):
        open_stream(folder, batch_size=25)


def partial_fc_without_positives(folder, packed):
    done = forked_ranks(2, "tests/training/losses/partial_fc_ranks.py", "positives")
    assert done.stdout.count("positives ok") == 2


def items_too_long_or_empty(folder, packed):
    with pytest.raises(DataPipelineError, match="train_00000.mp4 is 49 tokens, --target_num"):
        open_stream(folder, view=ViewConfig(max_tokens=48))
    rebind(folder, lambda records: records[1]["samples"][3].update(num_patches=0))
    with pytest.raises(DataPipelineError, match="record of clips/train_00013.mp4 says.* 0 patches"):
        open_stream(folder)


# --- quarantine ------------------------------------------------------------


def shard_gone_while_training(folder, packed):
    stream = open_stream(folder, ErrorBudget(0.5, 1.0))
    os.unlink(folder / "video-000002.tar")
    stream._samples.close()  # what was open already would still be there
    _, replaced = read_epoch(stream)
    assert set(replaced) == {20, 21, 22, 23} and max(replaced.values()) < 20
    with pytest.raises(BudgetExceeded, match=r"(?s)13 bad.*12 are.*sample 20: .*tar: No"):
        stream.count_bad(9, [20, *range(12)])


def shard_cut_while_training(folder, packed):
    stream = open_stream(folder, ErrorBudget(0.9, 0.9))
    place = load_manifest(folder).member(14, "tiles.jpg")
    os.truncate(folder / "video-000001.tar", place.offset)
    pixels, replaced = read_epoch(stream)
    assert set(replaced) == set(range(14, 20)), "what can be read is read"
    assert set(range(14)) <= set(pixels)


def bit_rot_of_one_view(folder, packed):
    """Other views of the sample go on, whatever the process met before."""
    half = dataclasses.replace(VIEW, codec_ratio=0.5, frame_ratio=0.5)
    flip_bytes(folder, (3, 8, 12, 17, 20), "tiles.jpg")
    straight = open_stream(folder, PATIENT, half)
    batches = [next(straight) for _ in range(12)]
    assert any(batch.replaced for batch in batches if batch.epoch == 1)
    for start in (1, 5, 6, 9):
        resumed = open_stream(folder, PATIENT, half)
        resumed.seek(batches[start].epoch, batches[start].index)
        for want in batches[start:]:
            batch = next(resumed)
            assert torch.equal(batch.pixels, want.pixels) and batch.replaced == want.replaced


def nobody_fits(folder, packed):
    """No reserve is as short as a bad sample: its row is left out, on record."""
    flip_bytes(folder, (5,), "tiles.jpg")
    config = dataclasses.replace(STREAM, error_budget=PATIENT, batch_size=2)
    stream = HeadStream(resolve_dataset(str(folder)).load(), config, seed=0, pack_tokens=200)
    stream.plan.reserve = lambda epoch, sample_id, attempt: sample_id
    replaced, seen = {}, []
    while (batch := next(stream)).epoch == 0:
        replaced |= dict(batch.replaced)
        seen += batch.sample_ids[: batch.num_samples].tolist()
        assert not batch.weights[batch.num_samples :].any() and len(batch.pixels) == 400
    assert replaced == {5: -1} and set(seen) == set(range(24)) - {5}


def decoder_without_a_culprit(folder, packed):
    from data_pipeline.loading import stream as module

    replace_member(folder, 5, "tiles.jpg", broken_codes())
    original, module.undecodable = module.undecodable, lambda *_: {}
    try:
        with pytest.raises(DataPipelineError, match="decoding failed 4 times although"):
            read_epoch(open_stream(folder))
    finally:
        module.undecodable = original


def records_that_lie(folder, packed):
    truth = load_manifest(folder).shards[1]["samples"][2]
    for number, change in enumerate(
        [{"grid": [3, 3]}, {"num_stored_frames": 0}, {"num_patches": 2**40}, {"grid": "7"}]
    ):
        copy = folder.with_name(f"lie_{number}")
        shutil.copytree(folder, copy)
        rebind(copy, lambda records, c=change: records[1]["samples"][2].update(c))
        assert any(truth["key"] in p and "record says" in p for p in verify(load_manifest(copy)))
        if number:
            with pytest.raises(DataPipelineError, match="the record of .*train_00012.mp4"):
                open_stream(copy)
        else:
            frames = dataclasses.replace(VIEW, codec_ratio=0.0, frame_ratio=1.0)
            assert set(read_epoch(open_stream(copy, PATIENT, frames))[1]) == {12}


def hostile_metadata(folder, packed):
    frames = dataclasses.replace(VIEW, codec_ratio=0.0, frame_ratio=1.0)
    with ShardReader(load_manifest(folder)) as reader:
        info = json.loads(reader.read(1, "json"))
    info.pop("seconds")
    for number, change in enumerate(
        [
            {"height": "tall"},
            {"patch_size": 0},
            {"frame_times": 7},
            {"frame_times": ["now"]},
            {"num_patches": 1 << 40},
            {"height": -5},
        ]
    ):
        copy = folder.with_name(f"hostile_{number}")
        shutil.copytree(folder, copy)
        replace_member(copy, 1, "json", json.dumps(info | change).encode())
        assert set(read_epoch(open_stream(copy, PATIENT, frames))[1]) == {1}
        assert any("_000001" in problem for problem in verify(load_manifest(copy)))


def members_beyond_the_file(folder, packed):
    def change(records):
        records[0]["samples"][4]["members"]["tiles.jpg"] = [512, 1 << 45, 1]

    rebind(folder, change)
    assert_contained(folder, packed, {4})
    assert any("lies outside" in problem for problem in verify(load_manifest(folder)))


def shards_changed_but_not_in_size(folder, packed):
    for name in ("video-000000.tar", "video-000002.tar"):
        tar = folder / name
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(DataPipelineError, match=r"(?s)changed since.*000000.tar.*000002.tar"):
        open_stream(folder)


def no_sample_at_all(folder, packed):
    manifest = dataclasses.replace(load_manifest(folder), shards=())
    with pytest.raises(DataPipelineError, match="holds no sample"):
        SampleTable.of(manifest)


def bit_rot(folder, packed):
    flip_bytes(folder, (3, 11, 21), "tiles.jpg")
    flip_bytes(folder, (7,), "positions.npy")
    assert_contained(folder, packed, {3, 7, 11, 21})
    with pytest.raises(BudgetExceeded, match=r"(?s)sample \d+: .*video-00000\d.tar: member"):
        read_epoch(open_stream(folder, ErrorBudget()))
    frames = dataclasses.replace(VIEW, codec_ratio=0.0, frame_ratio=1.0)
    assert_contained(folder, packed, set(), frames)


def missing_component(folder, packed):
    rebind(folder, lambda records: records[0]["samples"][4]["members"].pop("positions.npy"))
    assert_contained(folder, packed, {4})
    assert any("no member .positions.npy" in problem for problem in verify(load_manifest(folder)))


def undecodable_picture(folder, packed):
    replace_member(folder, 5, "tiles.jpg", b"\xff\xd8 no picture at all")
    replace_member(folder, 16, "tiles.jpg", jpeg("RGB", (512, 64))[:300])
    replace_member(folder, 18, "tiles.jpg", broken_codes())
    assert_contained(folder, packed, {5, 16, 18})


def picture_of_another_size(folder, packed):
    replace_member(folder, 8, "tiles.jpg", jpeg("RGB", (64, 48)))
    assert_contained(folder, packed, {8})
    said = "000_000008.tiles.jpg is a picture of 48x64, its metadata says 64x512"
    assert any(said in problem for problem in verify(load_manifest(folder)))


def huge_picture(folder, packed):
    """Its header claims 13 GB; it never reaches a decoder, and all views name it."""
    header = JPEG_SIDES.pack(65500, 65500)
    for member, size in (("tiles.jpg", (512, 64)), ("frames.jpg", (112, 896))):
        data = jpeg("RGB", size)
        forged = data.replace(JPEG_SIDES.pack(size[1], size[0]), header, 1)
        assert forged != data
        replace_member(folder, 8, member, forged)
    for view in (VIEW, dataclasses.replace(VIEW, codec_ratio=0.0, frame_ratio=1.0)):
        stream = open_stream(folder, PATIENT, view)
        assert set(read_epoch(stream)[1]) == {8}
        assert "is a picture of 65500x65500, its metadata says" in stream.reason(8)
        assert not stream._quarantine._undecodable, "no decoder met it"
    assert any("65500x65500" in problem for problem in verify(load_manifest(folder)))


def places_outside_of_the_grid(folder, packed):
    with ShardReader(load_manifest(folder)) as reader:
        good = decode_array(reader.read(3, "positions.npy"), "positions.npy", "x")
    for number, place in enumerate([(65535, 0, 0), (64, 0, 0), (0, 7, 0), (0, 0, 7), good[0]]):
        copy = folder.with_name(f"places_{number}")
        shutil.copytree(folder, copy)
        wrong = good.copy()
        wrong[50] = place
        replace_member(copy, 3, "positions.npy", array_bytes(wrong))
        assert_contained(copy, packed, {3})
        assert any("000_000003: " in p and "stand" in p for p in verify(load_manifest(copy)))


# --- verify ------------------------------------------------------------


def stale_index(folder, packed):
    shutil.copy(folder / "video-000000.tar.idx", folder / "video-000001.tar.idx")
    assert_contained(folder, packed, set())
    assert "video-000001.tar.idx: missing, stale" in verify(load_manifest(folder))[0]


def malformed_index(folder, packed):
    (folder / "video-000000.tar.idx").write_text("")
    (folder / "video-000001.tar.idx").write_text("v9 x\n\n\n")
    assert_contained(folder, packed, set())
    assert len(verify(load_manifest(folder))) == 2


def keys_that_readers_split_differently(folder, packed):
    key = load_manifest(folder).shards[1]["samples"][0]["key"]
    for name, said in ((f"{key}.tiles.jpg", "twice"), ("v1.0/clip.1.cls", "not in the record")):
        copy = folder.with_name(f"keys_{said.split()[0]}")
        shutil.copytree(folder, copy)
        add_member(copy, name, format=tarfile.PAX_FORMAT)
        assert_contained(copy, packed, set())
        assert any(said in problem for problem in verify(load_manifest(copy)))


def members_that_lead_elsewhere(folder, packed):
    for number, (name, kind) in enumerate(
        [
            ("../../up.jpg", tarfile.REGTYPE),
            ("/abs.jpg", tarfile.REGTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("fifo.jpg", tarfile.FIFOTYPE),
            ("device.jpg", tarfile.CHRTYPE),
        ]
    ):
        copy = folder.with_name(f"members_{number}")
        shutil.copytree(folder, copy)
        add_member(copy, name, kind)
        assert_contained(copy, packed, set())
        assert any(name.split("/")[-1] in problem for problem in verify(load_manifest(copy))), name


def compressed_tar(folder, packed):
    import gzip

    tar = folder / "video-000001.tar"
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    rebind(folder, lambda records: None)
    assert any("no readable plain tar" in problem for problem in verify(load_manifest(folder)))
    with pytest.raises(DataPipelineError, match="changed since they were packed"):
        open_stream(folder)


def sparse_and_nested_members(folder, packed):
    inner = folder.with_name("inner.tar")
    with tarfile.open(inner, "w") as archive:
        archive.addfile(tarfile.TarInfo("clip.jpg"))
    with tarfile.open(folder / "video-000001.tar", "a:") as archive:
        archive.add(inner, "inner.tar")
    add_member(folder, "hole.jpg", tarfile.GNUTYPE_SPARSE)
    problems = verify(load_manifest(folder))
    assert any("inner.tar" in p for p in problems)
    assert any("hole.jpg" in p or "no readable" in p for p in problems)
    assert_contained(folder, packed, set())


def assert_contained_but_grey(folder: Path, packed: Path, grey: int, bad: set[int]) -> None:
    """A picture without colour is trained on, one of four components is not."""
    got, replaced = read_epoch(open_stream(folder))
    assert set(replaced) == bad and grey in got


def picture_of_another_mode(folder, packed):
    for number, mode in enumerate(("L", "CMYK")):
        replace_member(folder, 8 + number, "tiles.jpg", jpeg(mode, (512, 64)))
    problems = verify(load_manifest(folder))
    assert any("000008.tiles.jpg has 1 colour component" in p for p in problems)
    assert any("000009.tiles.jpg is a JPEG of 4 components" in p for p in problems)
    assert_contained_but_grey(folder, packed, grey=8, bad={9})


def arrays_that_are_not_finite(folder, packed):
    scores = np.full(98, np.nan, np.float16)
    replace_member(folder, 2, "scores.npy", array_bytes(scores))
    assert any(
        "000002.scores.npy holds numbers that are not finite" in p
        for p in verify(load_manifest(folder))
    )
    assert_contained(folder, packed, set())  # training reads bytes and integers only


# --- reject, continue ------------------------------------------------------------


def pack_pictures(folder: Path, pictures: dict) -> dict:
    """{file name: uint8 picture, or the reason it was rejected for}."""
    from data_pipeline.loading.samples import sequential_batches

    source = folder.with_name("pictures")
    source.mkdir()
    for name, save in pictures.items():
        save(source / name)
    manifest = pack(list_inputs([source]), folder.with_name("made"), PACKED, report=lambda _: None)
    found = {e["source"]: e["reason"] for shard in manifest.shards for e in shard["rejected"]}
    for batch in sequential_batches(manifest, range(len(manifest)), 1, "codec"):
        name = manifest.sources()[int(batch.sample_ids[0])]
        rows, columns = batch.grid_thw[0, 1:].tolist()
        tiles = batch.pixels.view(rows, columns, 3, 16, 16).permute(0, 3, 1, 4, 2)
        found[name] = tiles.reshape(rows * 16, columns * 16, 3).numpy()
    return found


def sixteen_bit_png(folder, packed):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    found = pack_pictures(folder, {"ramp.png": lambda path: Image.fromarray(ramp).save(path)})
    assert np.abs(found["ramp.png"][..., 0] - (ramp >> 8).astype(float)).mean() < 2


def animations_and_unknown_formats(folder, packed):
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    found = pack_pictures(
        folder,
        {
            "moving.gif": lambda path: red.save(path, save_all=True, append_images=[blue]),
            "fake.png": lambda path: path.write_bytes(b"\0\0\0\x1cftypavif" + bytes(100)),
        },
    )
    assert np.abs(found["moving.gif"].astype(int) - (255, 0, 0)).mean() < 8
    assert found["fake.png"] == "image"


def exif_orientation(folder, packed):
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32] = 255  # bright above; orientation 3 turns it upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    found = pack_pictures(
        folder, {"turned.jpg": lambda path: Image.fromarray(half).save(path, exif=exif)}
    )
    assert found["turned.jpg"][:30].mean() < 5 and found["turned.jpg"][34:].mean() > 250


def callback_that_raises(folder, packed):
    stream = open_stream(folder)
    next(stream)
    stream._samples.read = None  # a mistake of ours, not of the data
    with MixtureLoader({"a": stream}) as loader:
        for _ in range(2):  # and the same when asked again
            with pytest.raises(TypeError):
                for _ in range(9):
                    next(loader)


def storage_that_stalls(folder, packed):
    stream = open_stream(folder, ErrorBudget(1.0, 1.0))
    for tar in folder.glob("*.tar"):
        tar.unlink()
        os.mkfifo(tar)  # opening it blocks for ever, as a dead network folder does
    stream._samples.close()
    loader = MixtureLoader({"clips": stream}, warn_s=0.1, timeout_s=2.0)
    with pytest.raises(DataTimeout, match=r"head clips: reading .*video-00000\d.tar"):
        next(loader)
    loader._stopped = True
    for tar in folder.glob("*.tar"):  # let the thread go
        os.close(os.open(tar, os.O_RDWR | os.O_NONBLOCK))


CASES = {
    "21 missing shards: stop, listed; by option planned without them": missing_shards,
    "21 all shards missing: stop": all_shards_missing,
    "22 truncated and empty shards: stop, listed": truncated_shards,
    "22 random bytes: quarantine, then stop": random_bytes,
    "22 a shard gone while training: its samples quarantined": shard_gone_while_training,
    "22 a shard cut while training: what can be read is": shard_cut_while_training,
    "22 shards changed but not in size: stop, listed": shards_changed_but_not_in_size,
    "23 records that lie: stop or quarantine, verify": records_that_lie,
    "23 members beyond the file: quarantine, verify": members_beyond_the_file,
    "23 stale index: never trusted, verify": stale_index,
    "24 malformed, empty index: verify": malformed_index,
    "25 bit rot: quarantine": bit_rot,
    "25 bit rot of one view: the others go on": bit_rot_of_one_view,
    "25 bit rot where nobody fits: the row left out": nobody_fits,
    "26 hostile metadata: quarantine, verify": hostile_metadata,
    "26 missing component: quarantine, verify": missing_component,
    "27 duplicate keys, dots, PAX names: verify": keys_that_readers_split_differently,
    "28 traversal, links, devices: verify": members_that_lead_elsewhere,
    "29 compressed tar: stop, verify": compressed_tar,
    "29 sparse members, tar in a tar: verify": sparse_and_nested_members,
    "30 wrong image mode: verify": picture_of_another_mode,
    "31 16-bit PNG: converted by the packer": sixteen_bit_png,
    "32 animations, unknown formats: first frame, reject": animations_and_unknown_formats,
    "33 EXIF orientation: baked in": exif_orientation,
    "34 undecodable picture: quarantine": undecodable_picture,
    "34 picture of another size: quarantine": picture_of_another_size,
    "34 a decoder that dies without a culprit: stop, named": decoder_without_a_culprit,
    "34 a picture of 65500 x 65500: quarantine, never decoded": huge_picture,
    "34 places outside of the grid, or taken twice: quarantine": places_outside_of_the_grid,
    "35 a callback that raises: the error itself": callback_that_raises,
    "36 storage that stalls: stop, named": storage_that_stalls,
    "37 labels that do not fit: stop": labels_that_do_not_fit,
    "38 fewer samples than a batch: stop": fewer_samples_than_a_batch,
    "38 no sample at all: stop": no_sample_at_all,
    "39 no positives on a shard, one class, no negatives: finite": partial_fc_without_positives,
    "40 items too long or empty: stop": items_too_long_or_empty,
    "41 arrays that are not finite: verify": arrays_that_are_not_finite,
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_has_its_policy(case, packed, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(packed / "train", folder)
    CASES[case](folder, packed)
