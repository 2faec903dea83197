"""Tubes: tokens of several frames hold the right pixels at the right times, as many as planned."""

import contextlib

import numpy as np
import pytest
import torch

from data_pipeline.datasets import resolve_dataset
from data_pipeline.loading.choices import IMAGE, SampleTable, num_frames, num_tokens
from data_pipeline.loading.config import Stage, StreamConfig, ViewConfig
from data_pipeline.loading.loader import SyntheticStream
from data_pipeline.loading.packing import pack_views
from data_pipeline.loading.samples import SampleReader, sequential_batches
from data_pipeline.loading.stream import HeadStream
from data_pipeline.loading.views import (
    View,
    choose_frames,
    flip,
    image_view,
    jitter_colours,
    still_view,
    tube_view,
)
from data_pipeline.shards.jpeg import read_jpeg_header
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.schema import decode_jpeg
from training.record.pack_picture import pack_picture

P = 4
WHOLE = {"codec_ratio": 0.0, "frame_ratio": 1.0}


def tubes_of(count: int, **changes) -> ViewConfig:
    return ViewConfig(**{**WHOLE, "max_frames": 4, "frames_per_token": count, **changes})


def frames(count: int, rows: int = 2, columns: int = 3) -> torch.Tensor:
    shape = (count, rows * P, columns * P, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))


def batch_of(view: View):
    labels = torch.zeros(1, 0, dtype=torch.int64)
    return pack_views([view], torch.zeros(1).long(), labels, torch.ones(1))


def slow_rows(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of the tubes of frames [F, H, W, 3], number by number."""
    count, height, width, _ = pixels.shape
    rows = []
    for first in range(0, count, size):
        for top in range(0, height, P):
            for left in range(0, width, P):
                row = [
                    pixels[first + f, top + y, left + x, channel]
                    for channel in range(3)
                    for f in range(size)
                    for y in range(P)
                    for x in range(P)
                ]
                rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_tube_is_its_frames_patches_channel_by_channel(size):
    pixels = frames(4)
    view = tube_view(still_view(list(pixels), P, torch.tensor([0, 21, 42, 63])), size)
    batch = batch_of(view)
    assert torch.equal(batch.pixels, slow_rows(pixels, size))
    assert view.grid == (4 // size, 2, 3) and len(view) == 24 // size
    times = {1: [0, 21, 42, 63], 2: [11, 53], 4: [32]}[size]  # halves are rounded up
    assert view.positions[::6, 0].tolist() == times
    assert view.positions[:6, 1:].tolist() == [[h, w] for h in range(2) for w in range(3)]
    # each channel is normalised by its own numbers, in all frames
    gain, offset = view.colour
    normalised = slow_rows(pixels, size).view(len(view), 3, -1) * gain[:, None] + offset[:, None]
    torch.testing.assert_close(batch.hidden_states(), normalised.flatten(1))


def test_mirrored_and_recoloured_tubes_are_tubes_of_such_frames():
    pixels, times = frames(4), torch.tensor([0, 21, 42, 63])
    view = tube_view(still_view(list(pixels), P, times), 2)
    mirrored = flip(view, 3)
    assert torch.equal(batch_of(mirrored).pixels, slow_rows(pixels.flip(2), 2))
    draw = np.array([0.9, 0.1, 0.5, 0, 1, 0, 1, 0, 1])  # the order of channels, then strengths
    jittered = jitter_colours(view, 0.3, draw)
    assert torch.equal(batch_of(jittered).pixels, slow_rows(pixels[..., [1, 2, 0]], 2))
    single = jitter_colours(still_view(list(pixels), P, times), 0.3, draw)
    assert torch.equal(jittered.colour, single.colour)


def test_an_image_is_repeated():
    (pixels,) = frames(1)
    view = tube_view(image_view(pixels, P), 3)
    assert view.grid == (1, 2, 3) and view.positions[:, 0].tolist() == [0] * 6
    assert torch.equal(batch_of(view).pixels, slow_rows(pixels.expand(3, -1, -1, -1), 3))


def test_the_bound_is_one_of_tokens_and_only_whole_tubes_count():
    def count(stored: int, **changes) -> int:
        return int(num_frames(6, num_stored=stored, view=tubes_of(2, **changes)))

    assert count(8, max_tokens=12) == 4, "twice as many frames as of single ones"
    assert count(8, max_tokens=17) == 4 and count(8, max_tokens=11) == 2
    assert count(8, max_tokens=99) == 4, "max_frames counts frames"
    assert count(3, max_tokens=99) == 2, "the third frame would be half of a tube"
    assert count(1, max_tokens=99) == 2, "too short a clip repeats frames"
    assert choose_frames(1, count=2, draw=None).tolist() == [0, 0]
    assert choose_frames(2, count=4, draw=np.full(4, 0.99)).tolist() == [0, 0, 1, 1]

    size = np.array([2, 2, 2], np.int32)
    table = SampleTable(
        is_image=np.array([False, False, True]),
        rows=size,
        columns=size,
        num_patches=size,
        num_frames=np.array([8, 1, 1], np.int32),
    )
    views = np.array([1, 1, IMAGE])
    got = num_tokens(table, view=tubes_of(2), views=views, ids=np.arange(3))
    assert got.tolist() == [8, 4, 4]


@pytest.mark.dali
def test_streams_make_the_tokens_that_they_plan(packed):
    view = tubes_of(2, max_tokens=147, max_frames=6, flip=0.5, colour_jitter=0.2)
    config = StreamConfig(batch_size=4, view=view, label_width=4, labels_per_step=2)
    dataset = resolve_dataset(str(packed / "train")).load()
    with contextlib.closing(HeadStream(dataset, config, 0)) as stream:
        batch = next(stream)
    assert batch.pixels.shape == (4 * 147, 2 * 768) and batch.num_tokens == 4 * 147
    assert batch.grid_thw.tolist() == [[3, 7, 7]] * 4
    assert batch.hidden_states().shape == (4 * 147, 2 * 768)
    single = StreamConfig(batch_size=4, view=ViewConfig(**WHOLE), label_width=4, labels_per_step=2)
    joined = StreamConfig(
        batch_size=4, view=tubes_of(2, max_frames=8), label_width=4, labels_per_step=2
    )
    plans = set()
    for settings in (single, joined):
        with contextlib.closing(HeadStream(dataset, settings, 0)) as stream:
            plans.add(stream.plan_sha256)
    assert len(plans) == 2, "tubes are other batches"


@pytest.mark.dali
def test_tubes_of_a_clip_hold_its_stored_frames_and_their_pairs_mean_time(packed):
    manifest = load_manifest(packed / "train")
    plain = ViewConfig(**WHOLE, max_tokens=196, max_frames=4)
    tubes = tubes_of(2, max_tokens=98)
    (single,) = sequential_batches(manifest, [3], 1, "frame", plain)
    (joined,) = sequential_batches(manifest, [3], 1, "frame", tubes)
    pairs = single.pixels.view(2, 2, 49, 3, 256)
    want = pairs.permute(0, 2, 3, 1, 4).reshape(98, -1)
    assert torch.equal(joined.pixels, want)
    times = single.patch_positions[::49, 0].view(2, 2).sum(1)
    assert joined.patch_positions[::49, 0].tolist() == ((times + 1) // 2).tolist()

    with contextlib.closing(SampleReader(manifest, SampleTable.of(manifest))) as reader:
        request = reader.read(3, 1, tubes_of(2, max_tokens=98, flip=1.0))
        data = request.encoded.tobytes()
        header = read_jpeg_header(data, "frames")
        picture = decode_jpeg(data, size=(header.height, header.width), name="frames")
        picture = torch.from_numpy(picture.copy())
        draw = np.full(16 + 64, 0.5, np.float32)
        mirrored = reader.make_view(request, picture, draw)
    tiles = joined.pixels.view(2, 7, 7, 3, 32, 16).flip(2, 5)
    assert torch.equal(batch_of(mirrored).pixels.view(tiles.shape), tiles)

    drawn = pack_picture(joined, 16)
    first = joined.pixels[0].view(3, 2, 16, 16)[:, 0].permute(1, 2, 0).numpy()
    assert np.array_equal(drawn[:16, :16], first), "of a tube its first frame"


def test_noise_for_tubes_has_their_width_and_a_plan_of_its_own():
    single, joined = (
        SyntheticStream(4, 12, 16, 5, 2, seed=0, rank=0, frames_per_token=count) for count in (1, 2)
    )
    assert next(single).pixels.shape == (48, 768) and next(joined).pixels.shape == (48, 1536)
    assert single.plan_sha256 == "noise (4, 12, 16) 5 2 0" != joined.plan_sha256


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": 0}, "frames_per_token 0"),
        ({"codec_ratio": 0.5, "frame_ratio": 0.5}, "frames_per_token 2 joins whole frames alone"),
        ({"frame_ratio": 0.5}, "--frame_sampling_ratio 1, not 0.0 and 0.5"),
        ({"max_frames": 3}, "--num_frames 3 is no multiple of frames_per_token 2"),
    ],
)
def test_anything_but_whole_tubes_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        tubes_of(**{"count": 2, **changes})


def test_stages_are_whole_tubes_too():
    with pytest.raises(ValueError, match="--num_frames 3"):
        StreamConfig(view=tubes_of(2), stages=(Stage(0, 98, 2), Stage(0.5, 98, 3)))
