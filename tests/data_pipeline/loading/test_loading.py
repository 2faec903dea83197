"""Streams: batches are the same bits wherever, however and with how many ranks they are read."""

import contextlib
import dataclasses
import sys
import threading
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from conftest import wait_until

from data_pipeline.clustering.labels import save_labels
from data_pipeline.datasets import resolve_dataset
from data_pipeline.errors import CorruptShard, DataPipelineError, DataTimeout, MissingData
from data_pipeline.loading.choices import FRAME, SampleTable, samples_per_batch
from data_pipeline.loading.config import MAX_FRAMES, StreamConfig, ViewConfig
from data_pipeline.loading.loader import MixtureLoader, SyntheticStream
from data_pipeline.loading.packing import PackBuffers, PackedBatch, pack_views
from data_pipeline.loading.samples import SampleReader, sequential_batches
from data_pipeline.loading.stream import HeadStream
from data_pipeline.loading.views import View
from data_pipeline.shards.jpeg import read_jpeg_header
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.schema import decode_jpeg

VIEW = ViewConfig(codec_ratio=0.5, frame_ratio=0.3, max_tokens=98, max_frames=2)
STREAM = StreamConfig(batch_size=4, view=VIEW, label_width=4, labels_per_step=2, dali_num_threads=1)
JITTERED = dataclasses.replace(
    STREAM, view=dataclasses.replace(VIEW, flip=0.5, colour_jitter=0.3), shuffle_shards=2
)
PACKS = dataclasses.replace(JITTERED, batch_size=2, token_share=0.5, label_width=100)
TENSORS = ("pixels", "colours", "patch_positions", "cu_seqlens", "sample_ids", "labels", "weights")


def assert_same(got: PackedBatch, want: PackedBatch) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert (got.epoch, got.index, got.max_seqlen) == (want.epoch, want.index, want.max_seqlen)


def stream(folder, config=STREAM, seed=0, at=(0, 0), **options) -> HeadStream:
    made = HeadStream(resolve_dataset(str(folder)).load(), config, seed, **options)
    made.seek(*at)
    return made


def take(made, count: int) -> list[PackedBatch]:
    return [next(made) for _ in range(count)]


def item(length: int, value: int = 1) -> View:
    pixels = torch.full((length, 3, 2, 2), value, dtype=torch.uint8)
    return View((pixels,), torch.zeros(length, 3, dtype=torch.int64), (1, 1, length))


def test_packs_fill_up_to_the_budget_with_rows_that_do_not_count():
    ids, labels, weights = torch.tensor([7, 9]), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2)
    batch = pack_views([item(5), item(3)], ids, labels, weights, token_budget=20)
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 13, 18, 20]
    assert batch.sample_ids.tolist() == [7, 9, -1, -1, -1]
    assert batch.num_samples == 2 and batch.num_tokens == 8 and batch.max_seqlen == 5
    rows = batch.hidden_states()
    assert rows.shape == (20, 12) and not rows[8:].any() and rows[:8].all()
    with pytest.raises(DataPipelineError, match="8 tokens do not fit the token budget 6"):
        pack_views([item(5), item(3)], ids, labels, weights, token_budget=6)


def test_memory_of_packs_is_used_again_only_after_its_last_holder_is_gone():
    buffers = PackBuffers(torch.device("cpu"))
    first = buffers.rows(100, 10, torch.uint8)
    place, part = first.data_ptr(), first[50:]
    del first
    assert buffers.rows(100, 10, torch.uint8).data_ptr() != place, "a part of it is still held"
    del part
    held = [buffers.rows(100, 10, torch.uint8) for _ in range(2)]
    assert place in {rows.data_ptr() for rows in held}


def test_two_threads_never_hold_the_same_memory(soak):
    buffers, clashes = PackBuffers(torch.device("cpu")), []

    def use(mark: int) -> None:
        for _ in range(20_000 if soak else 6_000):
            rows = buffers.rows(4, 4, torch.uint8)
            rows.fill_(mark)
            if not bool((rows == mark).all()):
                clashes.append(mark)

    threads = [threading.Thread(target=use, args=(mark,)) for mark in (1, 2, 3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not clashes


def test_an_item_beyond_the_budget_is_refused_at_the_start(packed, mixed):
    small = dataclasses.replace(STREAM, view=ViewConfig(max_tokens=48))
    with pytest.raises(DataPipelineError, match="one frame of clips/train_00000.mp4 is 49 tokens"):
        stream(packed / "train", small)
    with pytest.raises(DataPipelineError, match="98 tokens, a pack holds 97: raise pack_tokens"):
        stream(mixed, PACKS, pack_tokens=97)


def test_an_unknown_dataset_says_what_is_known():
    with pytest.raises(MissingData, match="motion_shapes.*nor a folder"):
        resolve_dataset("motion_shape")


@pytest.mark.dali
@pytest.mark.parametrize("config, pack", [(JITTERED, None), (PACKS, 400)])
def test_a_stream_started_anywhere_gives_the_same_batches_bitwise(mixed, config, pack):
    batches = take(stream(mixed, config, seed=3, pack_tokens=pack), 14)
    ends = [i for i, batch in enumerate(batches) if batch.epoch == 1]
    assert ends, "the epoch's end is among them"
    for start in (1, ends[0] - 1, ends[0], ends[0] + 1):
        at = (batches[start].epoch, batches[start].index)
        resumed = stream(mixed, config, seed=3, at=at, pack_tokens=pack)
        for want in batches[start : start + 2]:
            assert_same(next(resumed), want)
    beyond = (0, batches[ends[0] - 1].index + 1)  # what is saved after an epoch's last batch
    resumed = stream(mixed, config, seed=3, at=beyond, pack_tokens=pack)
    assert_same(next(resumed), batches[ends[0]])


@pytest.mark.dali
def test_threads_and_prefetch_change_nothing(mixed):
    want = take(stream(mixed, PACKS, pack_tokens=400), 4)
    threads = dataclasses.replace(PACKS, dali_num_threads=3)
    made = stream(mixed, threads, pack_tokens=400)
    assert made.plan_sha256 == stream(mixed, PACKS, pack_tokens=400).plan_sha256
    with MixtureLoader({"a": made}, prefetch_bytes=1) as loader:
        for batch in want:
            assert_same(next(loader)["a"], batch)


@pytest.mark.dali
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("config, pack", [(JITTERED, None), (PACKS, 120)])
def test_ranks_together_hold_the_batch_of_one(mixed, world, config, pack):
    alone = dataclasses.replace(config, batch_size=12)
    share = dataclasses.replace(config, batch_size=12 // world)
    (whole,) = take(stream(mixed, alone, pack_tokens=pack), 1)
    shares = [
        stream(mixed, share, rank=r, world_size=world, pack_tokens=pack) for r in range(world)
    ]
    assert {made.plan_sha256 for made in shares} == {
        stream(mixed, alone, pack_tokens=pack).plan_sha256
    }
    parts = [next(made) for made in shares]
    assert len({len(part.labels) for part in parts}) == 1, "losses need equal shapes"
    assert len({len(part.pixels) for part in parts}) == 1
    for name in ("pixels", "patch_positions"):
        joined = torch.cat([getattr(part, name)[: part.num_tokens] for part in parts])
        assert torch.equal(joined, getattr(whole, name)[: whole.num_tokens]), name
    for name in ("sample_ids", "labels", "weights"):
        joined = torch.cat([getattr(part, name)[: part.num_samples] for part in parts])
        assert torch.equal(joined, getattr(whole, name)[: whole.num_samples]), name
    for part in parts:
        assert not part.weights[part.num_samples :].any()
        assert (part.labels[part.num_samples :] == -1).all()


@pytest.mark.dali
def test_packs_of_pictures_and_clips_hold_each_once_per_epoch(mixed):
    made = stream(mixed, PACKS, pack_tokens=400)
    seen, batch = Counter(), next(made)
    while batch.epoch == 0:
        counted = batch.weights[: batch.num_samples] > 0
        seen.update(batch.sample_ids[: batch.num_samples][counted].tolist())
        assert len(batch.pixels) == 800 and batch.num_tokens <= 800
        lengths = batch.cu_seqlens.diff()
        assert lengths.min() > 0 and lengths.max() == batch.max_seqlen
        batch = next(made)
    assert seen == Counter(range(40))


@pytest.mark.dali
def test_decoded_tokens_are_the_clips_normalised_patches(packed):
    from data_pipeline.shards.schema import decode_patches
    from data_pipeline.shards.view import read_sample
    from model_factory.packing import CLIP_MEAN, CLIP_STD

    manifest = load_manifest(packed / "train")
    (batch,) = sequential_batches(manifest, [13], 4, "codec", VIEW)
    sample, members = read_sample(manifest, 13)
    tiles = decode_patches(sample, members["tiles.jpg"], "x")
    want = (torch.from_numpy(tiles).float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(
        CLIP_STD
    )
    got = batch.hidden_states().unflatten(1, (3, 16, 16)).movedim(1, -1)
    assert (got - want).abs().mean() < 0.01  # two JPEG decoders round differently


@pytest.mark.dali
def test_early_stages_see_fewer_tokens_and_the_plan_knows_it(packed):
    config = dataclasses.replace(STREAM, stages=((0, 49, 1, 0.5), (0.5, 98, 2, 1.0)))
    made = stream(packed / "train", config, total_samples=48)
    first, *_, last = take(made, 12)
    assert len(first.pixels) == 4 * 49 and len(last.pixels) == 4 * 98
    frames = [grid for grid in first.grid_thw.tolist() if grid[1] > 1]
    assert frames and all(grid == [1, 4, 4] for grid in frames)  # 7 x 7 shrunk to half
    other = stream(packed / "train", config, total_samples=480)
    assert other.plan_sha256 != made.plan_sha256


@pytest.mark.dali
def test_a_stage_of_packs_lasts_its_share_of_the_samples(mixed):
    config = dataclasses.replace(PACKS, stages=((0, 49, 1, 0.5), (0.5, 98, 2, 1.0)))
    dataset = resolve_dataset(str(mixed)).load()
    mean = samples_per_batch(dataset, config, 0, units=2, pack_tokens=400)
    made = stream(mixed, config, pack_tokens=400, total_samples=400)
    batches = take(made, round(400 / mean))
    seen = sum(int((batch.weights > 0).sum()) for batch in batches)
    assert 280 < seen < 480  # small windows fill badly
    stages = np.concatenate([made.plan.batch(b.epoch, b.index).stages for b in batches])
    assert abs((stages == 0).mean() - 0.5) < 0.15


@pytest.mark.dali
def test_the_samples_of_a_batch_of_packs_are_foretold(mixed):
    dataset = resolve_dataset(str(mixed)).load()
    expected = samples_per_batch(dataset, PACKS, 0, units=2, pack_tokens=400)
    batches = take(stream(mixed, PACKS, pack_tokens=400), 8)
    counts = [batch.num_samples for batch in batches if batch.weights.all()]
    assert abs(expected - np.mean(counts)) < 0.25 * expected
    assert samples_per_batch(dataset, STREAM, 0, units=8, pack_tokens=None) == 8


@pytest.mark.dali
def test_long_label_lists_reach_the_batch_without_their_padding(mixed):
    config = dataclasses.replace(PACKS, label_width=100, labels_per_step=8)
    dataset = resolve_dataset(str(mixed)).load()
    (batch,) = take(stream(mixed, config, pack_tokens=400), 1)
    for sample, labels in zip(batch.sample_ids.tolist(), batch.labels.tolist(), strict=False):
        stored = dataset.labels[sample]
        there = stored[stored >= 0].tolist()
        drawn = [label for label in labels if label >= 0]
        assert len(labels) == 8 and len(drawn) == min(8, len(there))
        assert not Counter(drawn) - Counter(there)


@pytest.mark.dali
def test_sequential_batches_hold_every_sample_once_in_order(packed):
    manifest = load_manifest(packed / "train")
    ids = [
        i
        for batch in sequential_batches(manifest, range(24), 7, "frame", VIEW)
        for i in batch.sample_ids
    ]
    assert [int(i) for i in ids] == list(range(24))


@pytest.mark.dali
def test_sequential_batches_name_every_damaged_sample(packed, tmp_path):
    import shutil

    shutil.copytree(packed / "train", tmp_path / "copy")
    manifest = load_manifest(tmp_path / "copy")
    place = manifest.member(5, "tiles.jpg")
    data = bytearray(place.path.read_bytes())
    data[place.offset + 50] ^= 1
    place.path.write_bytes(data)
    with pytest.raises(CorruptShard, match=r"video-000000.tar: member .tiles.jpg of sample 5"):
        list(sequential_batches(manifest, range(24), 7, "codec", VIEW))


@pytest.mark.dali
def test_the_loader_starts_no_process_and_ends_its_thread(packed):
    before = psutil.Process().children(recursive=True)
    with MixtureLoader({"a": stream(packed / "train")}) as loader:
        next(loader)
        assert psutil.Process().children(recursive=True) == before
        assert loader._thread in threading.enumerate()
    assert loader._thread not in threading.enumerate()


@pytest.mark.dali
def test_the_position_is_that_of_the_batches_handed_out_not_of_those_read_ahead(packed):
    with MixtureLoader({"a": stream(packed / "train")}) as loader:
        assert loader.state_dict() == {}
        next(loader), next(loader)
        time.sleep(0.3)
        assert loader.state_dict() == {"a": {"epoch": 0, "next_batch": 2}}


def synthetic(rank=0) -> SyntheticStream:
    return SyntheticStream(4, 12, 16, 5, 2, seed=0, rank=rank)


def test_what_waits_in_memory_is_bounded_by_bytes():
    made, batch = synthetic(), next(synthetic())
    with MixtureLoader({"a": made}, prefetch_bytes=3 * batch.num_bytes()) as loader:
        wait_until(lambda: len(loader._ready) == 3)
        time.sleep(0.3)  # a fourth would come now
        assert len(loader._ready) == 3 and loader._waiting_bytes <= 3 * batch.num_bytes()
        next(loader)


class Stuck(SyntheticStream):
    """Gives one batch and then hangs, as a read on a dead network folder does."""

    activity = "reading /mnt/far/video-000007.tar"
    released = threading.Event()

    def __next__(self):
        if self._next == 1:
            self.released.wait(60)
        return super().__next__()


def test_a_read_that_hangs_is_warned_of_and_then_named(caplog):
    import logging

    stuck = Stuck(4, 12, 16, 5, 2, seed=0, rank=0)
    loader = MixtureLoader({"clips": stuck}, 1 << 30, 0.2, 0.6, logging.getLogger("test"))
    wait_until(lambda: loader._ready)  # only the second batch may take too long
    next(loader)
    with pytest.raises(DataTimeout, match="head clips: reading /mnt/far/video-000007.tar"):
        next(loader)
    assert "waiting for data" in caplog.text and "video-000007.tar" in caplog.text
    stuck.released.set()
    loader.close()


class Slow(SyntheticStream):
    """Every batch takes a while."""

    def __next__(self):
        time.sleep(0.2)
        return super().__next__()


def test_the_time_spent_waiting_for_slow_data_is_counted():
    with MixtureLoader({"a": Slow(4, 12, 16, 5, 2, seed=0, rank=0)}) as loader:
        for _ in range(3):
            next(loader)
        assert loader.wait_s > 0.3


def test_the_synthetic_stream_keeps_the_contract_and_resumes():
    straight = synthetic(rank=1)
    batches = take(straight, 3)
    resumed = synthetic(rank=1)
    resumed.seek(0, 2)
    batch = next(resumed)
    assert_same(batch, batches[2])
    assert batch.cu_seqlens.tolist() == [0, 12, 24, 36, 48] and batch.labels.shape == (4, 2)


def test_every_rank_has_noise_of_its_own():
    ours, theirs = next(synthetic(rank=0)), next(synthetic(rank=1))
    assert not set(ours.sample_ids.tolist()) & set(theirs.sample_ids.tolist())
    assert not torch.equal(ours.labels, theirs.labels)
    assert not torch.equal(ours.pixels, theirs.pixels)


def test_another_seed_size_of_packs_or_view_makes_another_plan(packed):
    folder = packed / "train"
    larger = dataclasses.replace(STREAM, view=dataclasses.replace(VIEW, max_tokens=196))
    plans = {
        stream(folder).plan_sha256,
        stream(folder, seed=1).plan_sha256,
        stream(folder, pack_tokens=500).plan_sha256,
        stream(folder, pack_tokens=600).plan_sha256,
        stream(folder, larger).plan_sha256,
        stream(folder, world_size=2).plan_sha256,
    }
    assert len(plans) == 6
    threads = dataclasses.replace(STREAM, dali_num_threads=3)
    assert stream(folder, threads).plan_sha256 in plans, "how it is read decides no batch"


def test_frames_and_flips_are_chosen_by_numbers_of_their_own(packed):
    manifest = load_manifest(packed / "train")
    config = ViewConfig(max_tokens=196, max_frames=4, flip=0.5)
    with contextlib.closing(SampleReader(manifest, SampleTable.of(manifest))) as reader:
        request = reader.read(0, FRAME, config)
        data = request.encoded.tobytes()
        header = read_jpeg_header(data, "frames")
        picture = decode_jpeg(data, size=(header.height, header.width), name="frames")
        picture = torch.from_numpy(picture.copy())
        draw = np.full(16 + MAX_FRAMES, 0.99, np.float32)
        plain = reader.make_view(request, picture, draw)
        draw[0] = 0.0
        mirrored = reader.make_view(request, picture, draw)
        draw[16:] = 0.0
        early = reader.make_view(request, picture, draw)
    times = request.info.frame_times
    assert plain.positions[::49, 0].tolist() == list(times[1::2]), "the last of every two"
    assert early.positions[::49, 0].tolist() == list(times[::2])
    assert torch.equal(mirrored.positions, plain.positions)
    assert torch.equal(mirrored.pieces[0], plain.pieces[0].flip(-1, -4))


def test_other_labels_make_another_plan(packed, tmp_path):
    import shutil

    shutil.copytree(packed / "train", tmp_path / "train")
    manifest = load_manifest(tmp_path / "train")
    before = stream(tmp_path / "train").plan_sha256
    save_labels(
        tmp_path / "train", np.load(tmp_path / "train" / "labels.npy")[::-1], manifest, 8, {}
    )
    assert stream(tmp_path / "train").plan_sha256 != before
