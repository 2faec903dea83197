"""Views: the right pixels at the right positions, mirrored, shrunk and recoloured as wholes."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from data_pipeline.loading.choices import (
    SampleTable,
    choose_labels,
    choose_views,
    draws,
    num_tokens,
    possible_lengths,
)
from data_pipeline.loading.config import MAX_FRAMES, Stage, StreamConfig, ViewConfig
from data_pipeline.loading.views import (
    View,
    choose_frames,
    codec_view,
    collage_view,
    flip,
    frame_view,
    image_view,
    jitter_colours,
)
from data_pipeline.shards.schema import SampleInfo

VIEW = ViewConfig(codec_ratio=0.5, frame_ratio=0.3, max_tokens=98, max_frames=2)


def info(**changes) -> SampleInfo:
    base = SampleInfo("video", "a", "", 32, 48, 16, 5, 8, 8, (0, 21, 42, 63))
    return dataclasses.replace(base, **changes)


def pixels(*shape) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))


def patches(view: View) -> torch.Tensor:
    """uint8 [K, 3, p, p] as a pack would hold them."""
    rows = torch.empty(len(view), view.patch_dim, dtype=torch.uint8)
    view.write(rows)
    return rows.view(len(view), *view.pieces[0].shape[-3:])


def table(**columns) -> SampleTable:
    count = len(next(iter(columns.values())))
    base = {"rows": [2] * count, "columns": [3] * count, "num_patches": [5] * count}
    base |= {"num_frames": [4] * count, "is_image": [False] * count} | columns
    arrays = {k: np.array(v, bool if k == "is_image" else np.int32) for k, v in base.items()}
    return SampleTable(**arrays)


def test_views_place_the_right_pixels_at_the_right_positions():
    frames = pixels(4, 32, 48, 3)
    strip, chosen = frames.flatten(0, 1), np.array([1, 3])
    view = frame_view(strip, info(), chosen)
    assert view.grid == (2, 2, 3) and len(view) == 12
    assert view.positions[7].tolist() == [63, 0, 1]
    assert torch.equal(patches(view)[7], frames[3, :16, 16:32].permute(2, 0, 1))

    collage = collage_view(view)
    assert collage.grid == (1, 4, 3) and collage.positions[:, 0].unique().tolist() == [0]
    assert torch.equal(patches(collage), patches(view))
    assert collage.positions[7].tolist() == [0, 2, 1]


def test_strips_of_padded_frames_lose_their_padding():
    frames = pixels(4, 32, 42, 3)  # height 28 is stored in 32 rows
    view = frame_view(frames.flatten(0, 1), info(height=28, width=42, patch_size=14), np.array([2]))
    assert view.grid == (1, 2, 3)
    assert torch.equal(patches(view)[4], frames[2, 14:28, 14:28].permute(2, 0, 1))


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("max_tokens", [20, 32, 35, 64])
def test_codec_view_reads_tiles_in_order_and_any_prefix(patch_size, max_tokens):
    mosaic = pixels(32, 32 * 16, 3)
    positions = np.stack([np.arange(40), np.zeros(40), np.ones(40)], -1).astype(np.uint16)
    view = codec_view(mosaic, positions, patch_size, max_tokens)
    count = min(40, max_tokens)
    assert view.grid == (1, 1, count) and view.positions[-1].tolist() == [count - 1, 0, 1]
    row, column = divmod(count - 1, 32)
    tile = mosaic[row * 16 :, column * 16 :][:patch_size, :patch_size]
    assert torch.equal(patches(view)[-1], tile.permute(2, 0, 1))


def test_a_mirrored_item_is_the_item_of_the_mirrored_frame():
    picture = pixels(32, 48, 3)
    got, want = flip(image_view(picture, 16), 3), image_view(picture.flip(1), 16)
    assert torch.equal(patches(got), patches(want)) and torch.equal(got.positions, want.positions)
    strip = pixels(4, 32, 48, 3)
    got = flip(frame_view(strip.flatten(0, 1), info(), np.array([0, 3])), 3)
    want = frame_view(strip.flip(2).flatten(0, 1), info(), np.array([0, 3]))
    assert torch.equal(patches(got), patches(want))


def test_mirrored_tiles_move_to_their_mirrored_places():
    mosaic = pixels(16, 32 * 16, 3)
    positions = np.array([[0, 0, 0], [5, 1, 2]], np.uint16)
    view = codec_view(mosaic, positions, 16, 9)
    mirrored = flip(view, columns=3)
    assert mirrored.positions.tolist() == [[0, 0, 2], [5, 1, 0]]
    assert torch.equal(patches(mirrored), patches(view).flip(-1))
    again = flip(mirrored, columns=3)
    assert torch.equal(patches(again), patches(view))
    assert torch.equal(again.positions, view.positions)


def test_shrunk_frames_have_smaller_grids_and_the_same_picture():
    ramp = torch.linspace(0, 255, 96).to(torch.uint8)[None, :, None].expand(64, 96, 3).contiguous()
    view = image_view(ramp, 16, scale=0.5)
    assert view.grid == (1, 2, 3)
    left, right = patches(view)[0].float().mean(), patches(view)[2].float().mean()
    assert 30 < left < 50 and 205 < right < 225
    strip = pixels(4, 64, 96, 3)
    small = frame_view(strip.flatten(0, 1), info(height=64, width=96), np.array([0, 3]), 0.5)
    assert small.grid == (2, 2, 3) and small.positions[-1].tolist() == [63, 1, 2]


def test_colour_jitter_recolours_an_item_as_a_whole_and_moves_nothing():
    view = image_view(pixels(32, 48, 3), 16)
    draw = np.array([0.5, 0.1, 0.9, 0.2, 0.4, 0.6, 0.8, 0.3, 0.7], np.float32)
    first, second = (jitter_colours(view, 0.4, draw) for _ in range(2))
    assert torch.equal(patches(first), patches(second)) and torch.equal(
        first.positions, view.positions
    )

    def normalised(item: View) -> torch.Tensor:
        gain, offset = item.colour
        return patches(item).float() * gain[:, None, None] + offset[:, None, None]

    before, after = normalised(view), normalised(first)
    for new, old in enumerate([1, 0, 2]):  # the order of the first three numbers
        gain = 1 + 0.4 * (2 * draw[3 + new] - 1)
        shift = 0.4 * (2 * draw[6 + new] - 1)
        assert torch.allclose(after[:, new], before[:, old] * gain + shift, atol=1e-5)


def test_frames_are_drawn_one_per_bin():
    assert choose_frames(8, 2, None).tolist() == [2, 6]
    found = np.stack([choose_frames(16, 4, draw[16:]) for draw in draws(0, 0, np.arange(200))])
    assert (found // 4 == np.arange(4)).all()
    assert len(np.unique(found[:, 0])) == 4


def test_no_number_is_drawn_for_two_things_or_two_samples():
    found = draws(0, 0, np.arange(100))
    # 8,000 numbers of 24 bits: two meet by chance now and then
    assert found.shape == (100, 16 + MAX_FRAMES) and len(np.unique(found)) > 7_950


def test_view_choice_follows_the_ratio_and_nothing_but_seed_epoch_and_sample():
    columns, ids = table(is_image=[False] * 2000 + [True]), np.arange(2001)
    views = choose_views(columns, VIEW, 0, 0, ids)
    counts = Counter(views[:2000].tolist())
    assert abs(counts[0] / 2000 - 0.5) < 0.05 and abs(counts[2] / 2000 - 0.2) < 0.05
    assert views[2000] == 3
    shuffled = np.random.default_rng(0).permutation(ids)
    assert np.array_equal(choose_views(columns, VIEW, 0, 0, shuffled), views[shuffled])
    assert not np.array_equal(choose_views(columns, VIEW, 0, 1, ids), views)


def test_lengths_are_known_before_anything_is_read():
    columns = table(
        is_image=[False, False, True],
        rows=[4, 3, 6],
        columns=[6, 5, 5],
        num_patches=[70, 20, 30],
        num_frames=[8, 1, 1],
    )
    config = ViewConfig(max_tokens=64, max_frames=4)
    ids = np.arange(3)
    lengths = [num_tokens(columns, config, np.full(3, view), ids).tolist() for view in range(4)]
    assert lengths[0][:2] == [64, 20]
    assert lengths[1][:2] == lengths[2][:2] == [48, 15] and lengths[3][2] == 30
    half = dataclasses.replace(config, scale=0.5)
    assert num_tokens(columns, half, np.array([1, 1, 3]), ids).tolist() == [24, 6, 9]
    possible = possible_lengths(columns, config)
    assert possible.max(axis=0).tolist() == [64, 20, 30] and possible.min() == 15


def test_labels_are_drawn_among_those_that_are_there():
    labels = np.full((50, 100), -1)
    labels[:, :3] = np.arange(3)
    labels[0, :90] = np.arange(90)
    ids = np.arange(50)
    chosen = choose_labels(labels, 8, seed=0, epoch=0, ids=ids)
    assert chosen.shape == (50, 8) and (np.diff(chosen[0]) > 0).all()
    assert all(sorted(row.tolist()) == [-1] * 5 + [0, 1, 2] for row in chosen[1:])
    assert np.array_equal(choose_labels(labels[7:9], 8, 0, 0, ids[7:9]), chosen[7:9])
    assert not np.array_equal(choose_labels(labels, 8, 0, 1, ids)[0], chosen[0])
    assert np.array_equal(choose_labels(labels, 100, 0, 0, ids), labels)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ViewConfig(codec_ratio=0.8, frame_ratio=0.4), "--residual_ratio 0.8"),
        (lambda: ViewConfig(flip=1.5), "flip 1.5"),
        (lambda: ViewConfig(scale=0.0), "scale 0.0"),
        (lambda: ViewConfig(max_frames=65), "--num_frames 65"),
        (lambda: StreamConfig(stages=((0.1, 9, 1),)), "the first at 0"),
        (lambda: StreamConfig(stages=((0, 9, 1), (0.5, 0, 1))), "--target_num 0"),
        (lambda: StreamConfig(token_share=2.0), "token_share 2.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_stages_replace_the_bounds_of_the_view():
    config = StreamConfig(view=VIEW, stages=[[0, 49, 1, 0.5], [0.25, 98, 2]])
    assert config.stages == (Stage(0, 49, 1, 0.5), Stage(0.25, 98, 2))
    low, high = config.views()
    assert (low.max_tokens, low.scale, high.max_frames) == (49, 0.5, 2)
    assert low.codec_ratio == VIEW.codec_ratio and config.stage_starts(1000) == [0, 250]
