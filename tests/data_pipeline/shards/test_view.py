"""The pictures of what an encoder sees: what they show is what the shard holds."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from data_pipeline.picture_text import fitted, font
from data_pipeline.shards.clip_columns import ClipView, sample_view
from data_pipeline.shards.contact_sheet import ROWS, clip_rows, draw_animation, draw_sheet
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig
from data_pipeline.shards.view import save_view


@pytest.fixture(scope="module")
def manifest(packed):
    return load_manifest(packed / "train")


@pytest.fixture(scope="module")
def view(manifest) -> ClipView:
    return sample_view(manifest, 0)


def test_every_selected_patch_is_in_one_column_and_drawn_where_it_was(manifest):
    for columns in (None, 3):
        view = sample_view(manifest, 0, columns)
        assert len(view.columns) == (columns or len(view.info.frame_times))
        counted = [column.num_intra + column.num_inter for column in view.columns]
        assert sum(counted) == view.info.num_patches
        first = view.columns[0]  # an I-frame: every patch, as in the frame but for JPEG
        assert first.selected.all() and first.num_intra == first.selected.size
        if columns is None:
            assert np.abs(first.patches.astype(int) - first.frame).mean() < 12
            later = [column.selected.mean() for column in view.columns[1:]]
            assert 0 < max(later) < 0.9  # of P-frames only some patches


def test_times_order_and_whole_frames_follow_the_shard(view):
    times = [column.seconds for column in view.columns]
    assert times == sorted(times) and times[0] == view.info.seconds[0]
    assert times[-1] == view.info.seconds[-1]
    bought = sum(column.bought for column in view.columns)
    rows, columns = view.info.grid
    assert bought == view.info.num_patches // (rows * columns)
    ranks = np.concatenate([c.rank[c.selected & ~c.intra] for c in view.columns])
    assert ranks.min() < 0.1 and 0.8 < ranks.max() <= 1  # the best may be drawn over


def test_rows_have_titles_times_and_sizes(view):
    rows = clip_rows(view)
    assert tuple(row.title for row in rows) == ROWS
    frames, _, _, selected, _, whole = rows
    assert frames.cells[0].caption == f"{view.info.seconds[0]:.2f} s"
    assert selected.cells[0].caption.startswith("49 I")
    assert whole.cells[0].caption == "49 tokens" and whole.cells[1].caption == "not sampled"
    assert np.array_equal(whole.cells[0].picture, frames.cells[0].picture)


def test_motion_to_the_right_is_red_and_to_the_left_cyan(packed, manifest):
    classes = [line.split(",") for line in (packed / "train.csv").read_text().split()]
    labels = {name: int(label) for name, label in classes}
    hues = {}
    for sample_id, source in enumerate(manifest.sources()):
        motion = clip_rows(sample_view(manifest, sample_id))[1].cells
        red, green, blue = np.mean([cell.picture.mean(axis=(0, 1)) for cell in motion], axis=0)
        hues.setdefault(labels[source], []).append(red > (green + blue) / 2)
    assert all(hues[1]) and not any(hues[0])  # classes 1 and 0 of motion_shapes: right and left


def test_pictures_are_written_with_one_frame_per_stored_frame(manifest, tmp_path):
    save_view(manifest, [0, 5], tmp_path / "sheet.png")
    save_view(manifest, [3], tmp_path / "clip.gif")
    save_view(manifest, [3, 4], tmp_path / "clip.webp")
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(tmp_path / "clip.gif") as gif:
        assert sheet.width > 8 * 112 and sheet.height > 2 * len(ROWS) * 112
        assert gif.n_frames == 8 and gif.width > 3 * 200
    for sample_id in (3, 4):
        with Image.open(tmp_path / f"clip_{sample_id}.webp") as animation:
            assert animation.n_frames == 8
    with pytest.raises(ValueError, match=r"must end in .png"):
        save_view(manifest, [0], tmp_path / "x.bmp")


def test_pictures_and_clips_share_a_sheet(manifest, tmp_path):
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "a.png")
    small = SampleConfig(size=56, patch_size=14)
    pack(list_inputs([tmp_path / "a.png"]), tmp_path / "shards", PackConfig(small, workers=1))
    picture = sample_view(load_manifest(tmp_path / "shards"), 0)
    clip = sample_view(manifest, 0, 4)
    both = draw_sheet([picture, clip])
    assert both.height > draw_sheet([clip]).height > draw_sheet([picture]).height
    save_view(load_manifest(tmp_path / "shards"), [0], tmp_path / "a.gif")


def test_names_that_came_with_data_are_drawn_as_one_line(view):
    hostile = "clips/\x1b[2J\n" + "long " * 200 + "end.mp4"
    info = dataclasses.replace(view.info, source=hostile, seconds=())
    columns = [dataclasses.replace(column, seconds=None) for column in view.columns]
    named = dataclasses.replace(view, info=info, columns=columns)
    plain = draw_animation(view)
    assert draw_animation(named)[0].size == plain[0].size
    assert draw_sheet([named]).width == draw_sheet([view]).width
    line = fitted(hostile, 300, font(12))
    assert line.startswith("clips/\\x1b[2J\\n") and line.endswith("end.mp4") and "…" in line
    assert font(12).getlength(line) <= 300
    assert fitted("abc", 1, font(12)) == "…"
