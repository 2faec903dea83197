"""Loading: the plan is exact and elastic, views are true, batches resume bitwise."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.datasets import resolve_dataset
from data_pipeline.errors import CorruptShard, DataPipelineError, MissingData
from data_pipeline.loading.loader import HeadStream, MixtureLoader, StreamConfig, sequential_batches
from data_pipeline.loading.packing import pack_views
from data_pipeline.loading.plan import EpochPlan
from data_pipeline.loading.synthetic import SyntheticStream
from data_pipeline.loading.views import (
    View,
    ViewConfig,
    choose_frames,
    codec_view,
    collage_view,
    frame_view,
    jitter_colours,
)
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.schema import SampleInfo

VIEW = ViewConfig(codec_ratio=0.5, frame_ratio=0.3, max_tokens=98, max_frames=2)
STREAM = StreamConfig(batch_size=4, view=VIEW, label_width=4, labels_per_step=2, dali_num_threads=1)


@given(
    ranks=st.integers(1, 8),
    per_rank=st.integers(1, 5),
    extra=st.integers(0, 200),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_sample_once_for_any_world_size(
    ranks, per_rank, extra, seed, epoch
):
    total = ranks * per_rank + extra
    plan = EpochPlan(total, ranks * per_rank, seed)
    seen = Counter()
    for place in range(plan.batches_per_epoch):
        batch = plan.batch(epoch * plan.batches_per_epoch + place)
        shares = [batch.share(rank, ranks) for rank in range(ranks)]
        assert all(len(share.sample_ids) == per_rank for share in shares)
        joined = np.concatenate([share.sample_ids for share in shares])
        assert np.array_equal(joined, batch.sample_ids)
        seen.update(batch.sample_ids[batch.weights > 0].tolist())
    assert seen == Counter(range(total))


def test_epochs_and_seeds_have_different_orders():
    plan = EpochPlan(50, 10, seed=1)
    first, later = plan.batch(0).sample_ids, plan.batch(plan.batches_per_epoch).sample_ids
    assert not np.array_equal(first, later)
    assert not np.array_equal(first, EpochPlan(50, 10, seed=2).batch(0).sample_ids)


def test_a_dataset_smaller_than_one_batch_is_refused():
    with pytest.raises(DataPipelineError, match="7 samples, one global batch takes 8"):
        EpochPlan(7, 8, 0)


def info(**changes) -> SampleInfo:
    base = SampleInfo("video", "a", "", 32, 48, 16, 5, 8, 8, (0, 21, 42, 63))
    return dataclasses.replace(base, **changes)


def test_views_place_the_right_pixels_at_the_right_positions():
    frames = torch.randn(3, 4, 32, 48)  # C, M, H, W
    strip = frames.flatten(1, 2)
    chosen = np.array([1, 3])
    view = frame_view(strip, info(), chosen)
    assert view.grid == (2, 2, 3) and view.patches.shape == (12, 768)
    assert view.positions[7].tolist() == [63, 0, 1]
    assert torch.equal(view.patches[7], frames[:, 3, :16, 16:32].flatten())

    collage = collage_view(strip, info(), chosen)
    assert collage.grid == (1, 4, 3) and collage.positions[:, 0].unique().tolist() == [0]
    assert torch.equal(collage.patches, view.patches)
    assert collage.positions[7].tolist() == [0, 2, 1]


@pytest.mark.parametrize("patch_size", [14, 16])
def test_codec_view_reads_tiles_in_order_and_any_prefix(patch_size):
    mosaic = torch.randn(3, 32, 32 * 16)
    positions = np.stack([np.arange(40), np.zeros(40), np.ones(40)], -1).astype(np.uint16)
    view = codec_view(mosaic, positions, patch_size, max_tokens=35)
    assert view.grid == (1, 1, 35) and view.positions[34].tolist() == [34, 0, 1]
    tile = mosaic[:, 16 : 16 + patch_size, 32 : 32 + patch_size]
    assert torch.equal(view.patches[34], tile.flatten())


def test_colour_jitter_recolours_an_item_as_a_whole_and_moves_nothing():
    patches = torch.randn(6, 12)
    view = View(patches, torch.randint(0, 9, (6, 3)), (1, 2, 3))
    first, second = (jitter_colours(view, 0.4, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first.patches, second.patches) and torch.equal(
        first.positions, view.positions
    )
    before, after = patches.view(6, 3, 4), first.patches.view(6, 3, 4)
    for channel in range(
        3
    ):  # each new channel is an affine map of one old one, alike in all patches
        fits = [
            np.corrcoef(after[:, channel].ravel(), before[:, old].ravel())[0, 1] for old in range(3)
        ]
        assert max(fits) > 0.9999


def test_frames_are_drawn_one_per_bin():
    assert choose_frames(8, 2, None).tolist() == [2, 6]
    rng = np.random.default_rng(0)
    draws = np.stack([choose_frames(16, 4, rng) for _ in range(200)])
    assert (draws // 4 == np.arange(4)).all()
    assert len(np.unique(draws[:, 0])) == 4


def test_view_choice_follows_the_ratio_and_nothing_else():
    choices = Counter(VIEW.choose("video", 0, 0, i) for i in range(2000))
    assert abs(choices["codec"] / 2000 - 0.5) < 0.05 and abs(choices["collage"] / 2000 - 0.2) < 0.05
    assert VIEW.choose("image", 0, 0, 1) == "image"
    with pytest.raises(ValueError, match="--residual_ratio 0.8"):
        ViewConfig(codec_ratio=0.8, frame_ratio=0.4)


def test_packs_fill_up_to_the_budget_with_rows_that_do_not_count():
    views = [
        View(torch.ones(n, 3), torch.zeros(n, 3, dtype=torch.int64), (1, 1, n)) for n in (5, 3)
    ]
    ids, labels, weights = torch.tensor([7, 9]), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2)
    batch = pack_views(views, ids, labels, weights, token_budget=20)
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 13, 18, 20]
    assert batch.sample_ids.tolist() == [7, 9, -1, -1, -1]
    assert batch.num_samples == 2 and batch.num_tokens == 8 and batch.max_seqlen == 5
    assert len(batch.hidden_states) == 20 and not batch.hidden_states[8:].any()
    with pytest.raises(DataPipelineError, match="8 tokens do not fit the token budget 6"):
        pack_views(views, ids, labels, weights, token_budget=6)


def test_an_item_beyond_the_budget_is_refused_at_the_start(packed):
    dataset = resolve_dataset(str(packed / "train")).load()
    small = dataclasses.replace(STREAM, view=ViewConfig(max_tokens=48))
    with pytest.raises(DataPipelineError, match="one frame of clips/train_00000.mp4 is 49 tokens"):
        HeadStream(dataset, small, seed=0)


def test_an_unknown_dataset_says_what_is_known(tmp_path):
    with pytest.raises(MissingData, match="motion_shapes.*nor a folder"):
        resolve_dataset("motion_shape")


@pytest.mark.dali
def test_a_stream_started_anywhere_gives_the_same_batches_bitwise(packed):
    dataset = resolve_dataset(str(packed / "train")).load()
    straight = HeadStream(dataset, STREAM, seed=3)
    batches = [next(straight) for _ in range(9)]
    for start in (1, 6):
        resumed = next(HeadStream(dataset, STREAM, seed=3, start=start))
        for name in ("hidden_states", "patch_positions", "sample_ids", "labels", "weights"):
            assert torch.equal(getattr(resumed, name), getattr(batches[start], name)), name
    assert batches[6].epoch == 1


@pytest.mark.dali
def test_two_ranks_together_hold_the_batch_of_one(packed):
    dataset = resolve_dataset(str(packed / "train")).load()
    double = dataclasses.replace(STREAM, batch_size=8)
    whole = next(HeadStream(dataset, double, seed=0))
    parts = [next(HeadStream(dataset, STREAM, 0, rank, 2)) for rank in (0, 1)]
    for name in ("hidden_states", "sample_ids", "labels"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name)), name


@pytest.mark.dali
def test_decoded_tokens_are_the_clips_normalised_patches(packed):
    from data_pipeline.shards.schema import decode_jpeg, tiles_from_mosaic
    from data_pipeline.shards.view import read_sample
    from model_factory.packing import CLIP_MEAN, CLIP_STD

    manifest = load_manifest(packed / "train")
    (batch,) = sequential_batches(manifest, [13], 4, "codec", VIEW)
    sample, members = read_sample(manifest, 13)
    tiles = tiles_from_mosaic(decode_jpeg(members["tiles.jpg"]), sample.num_patches, 16)
    want = (torch.from_numpy(tiles).float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(
        CLIP_STD
    )
    got = batch.hidden_states.unflatten(1, (3, 16, 16)).movedim(1, -1)
    assert (got - want).abs().mean() < 0.01  # two JPEG decoders round differently


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
def test_damaged_bytes_stop_the_loader_with_file_and_sample(packed, tmp_path):
    import shutil

    shutil.copytree(packed / "train", tmp_path / "copy")
    dataset = resolve_dataset(str(tmp_path / "copy")).load()
    for sample in range(24):
        for member in ("tiles.jpg", "frames.jpg"):
            place = dataset.manifest.member(sample, member)
            data = bytearray(place.path.read_bytes())
            data[place.offset + 50] ^= 1
            place.path.write_bytes(data)
    with MixtureLoader({"a": HeadStream(dataset, STREAM, seed=0)}) as loader:
        with pytest.raises(CorruptShard, match=r"video-00000.\.tar: member"):
            next(loader)


def test_the_synthetic_stream_keeps_the_contract_and_resumes():
    def stream(start):
        return SyntheticStream(4, 12, 16, 5, 2, seed=0, rank=1, start=start)

    straight = stream(0)
    batches = [next(straight) for _ in range(3)]
    resumed = next(stream(2))
    assert torch.equal(resumed.hidden_states, batches[2].hidden_states)
    assert resumed.cu_seqlens.tolist() == [0, 12, 24, 36, 48] and resumed.labels.shape == (4, 2)
