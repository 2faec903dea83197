"""Tempo: what was done to the time axis is exactly the label, and no source is on two sides."""

import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.framing import Framing
from data_pipeline.embedded.clips import list_clips, write_clip
from data_pipeline.embedded.motion_shapes import render_clip
from data_pipeline.embedded.sources import Source, changes_of, working_frames
from data_pipeline.embedded.tempo import (
    CLASSES,
    FOREIGN,
    FROZEN,
    NUM_FRAMES,
    USABLE,
    WINDOW,
    frame_order,
    judge_windows,
    plan_groups,
    split_by_hash,
    write_tempo,
)
from data_pipeline.errors import MissingData
from data_pipeline.shards.inputs import list_inputs

LENGTH = 132  # frames of a generated video: five windows
SIZE = 48


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Five videos in which things move, one that breaks off, one that rests, a short one, a copy,
    and a picture."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        clip = render_clip(number, seed=0, index=number, difficulty="hard", size=64, frames=LENGTH)
        write_clip(folder / f"moving_{number}.mp4", clip)
    write_clip(folder / "resting.mp4", np.repeat(clip[:1], LENGTH, axis=0))
    write_clip(folder / "short.mp4", clip[:100])
    shutil.copy(folder / "moving_0.mp4", folder / "twin.mp4")
    whole = (folder / "moving_4.mp4").read_bytes()
    (folder / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def read(path: Path, size: int = SIZE) -> np.ndarray:
    return decode_video(path, Framing(num_frames=1000, size=size, patch_size=2)).frames


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def written(videos, tmp_path_factory) -> tuple[Path, list[str]]:
    """A set of them, and what was reported."""
    folder = tmp_path_factory.mktemp("tempo")
    lines: list[str] = []
    write_tempo(
        folder,
        inputs=list_inputs([videos], report=lines.append),
        num_train=18,
        num_val=12,
        size=SIZE,
        workers=1,
        report=lines.append,
    )
    return folder, lines


def test_each_class_shows_its_frames_of_the_window():
    at, skip = 20, 30
    forward = list(range(NUM_FRAMES))
    wanted = {
        "forward": forward,
        "reversed": forward[::-1],
        "double_speed": list(range(0, WINDOW, 2)),
        "freeze": forward[:20] + [20] * 5 + list(range(21, 60)),
        "jump_cut": forward[:20] + list(range(50, 94)),
        "foreign_frames": forward[:20] + [WINDOW, WINDOW + 1, WINDOW + 2] + forward[23:],
    }
    for name in CLASSES:
        assert frame_order(name, at=at, skip=skip).tolist() == wanted[name], name


def test_frames_of_all_draws_lie_inside_the_window():
    for name in CLASSES:
        for at, skip in ((8, 16), (8, 64), (51, 16), (51, 64)):
            order = frame_order(name, at=at, skip=skip)
            assert order.shape == (NUM_FRAMES,) and order.min() >= 0
            own = order[order < WINDOW]
            assert len(own) == NUM_FRAMES - FOREIGN * (name == "foreign_frames")
            if name == "freeze":
                assert Counter(order.tolist()).most_common(1) == [(at, FROZEN)]


def sources(count: int, length: int = 200) -> list[tuple[Source, np.ndarray]]:
    """Sources that are not there, with hashes spread evenly."""
    pairs = []
    for number in range(count):
        digest = f"{(number * (1 << 32)) // count:08x}".ljust(64, "0")
        source = Source("", name=f"{number}.mp4", sha256=digest, changes=np.ones(length))
        pairs.append((source, np.arange(length - WINDOW + 1)))
    return pairs


def test_a_group_has_one_clip_of_every_class_of_one_window():
    clips = list_clips(num_train=60, num_val=0, num_classes=len(CLASSES))
    groups = list(plan_groups(clips, sources=sources(3), seed=0))
    assert len(groups) == 10
    assert [clip for group in groups for clip in group.clips] == clips
    assert len({(group.source.name, group.first) for group in groups}) == 10
    per_source = Counter(group.source.name for group in groups)
    assert sorted(per_source.values()) == [3, 3, 4]
    rng = np.random.default_rng(0)
    window = rng.integers(0, 256, (WINDOW, 4, 4, 3), dtype=np.uint8)
    foreign = rng.integers(0, 256, (FOREIGN, 4, 4, 3), dtype=np.uint8)
    for group in groups:
        assert group.foreign is not group.source
        assert [clip.label for clip in group.clips] == list(range(6))
        made = {CLASSES[c.label]: group.frames(c, window, foreign) for c in group.clips}
        at, skip = group.at, group.skip
        assert np.array_equal(made["reversed"], made["forward"][::-1])
        assert np.array_equal(made["double_speed"], window[::2])
        assert np.array_equal(made["freeze"][at : at + 5], window[[at] * 5])
        assert np.array_equal(made["freeze"][at + 5 :], window[at + 1 : 60])
        assert np.array_equal(made["jump_cut"][at:], window[at + skip : NUM_FRAMES + skip])
        assert np.array_equal(made["foreign_frames"][at : at + 3], foreign)
        for name in ("freeze", "jump_cut", "foreign_frames"):
            assert np.array_equal(made[name][:at], made["forward"][:at])


def test_groups_do_not_depend_on_their_number():
    few, many = (
        list(plan_groups(list_clips(count, 0, 6), sources=sources(3), seed=4)) for count in (12, 60)
    )
    for one, other in zip(few, many, strict=False):
        assert (one.first, one.at, one.skip) == (other.first, other.at, other.skip)
        assert one.foreign.name == other.foreign.name
    others = list(plan_groups(list_clips(12, 0, 6), sources=sources(3), seed=5))
    assert [g.first for g in few] != [g.first for g in others]


def test_more_groups_than_windows_are_refused():
    clips = list_clips(num_train=66, num_val=0, num_classes=6)
    with pytest.raises(ValueError, match="split train hold 10 usable windows, 66 clips take 11"):
        list(plan_groups(clips, sources=sources(2, length=WINDOW + 4), seed=0))
    used = list(plan_groups(clips[:60], sources=sources(2, length=WINDOW + 4), seed=0))
    assert len({(group.source.name, group.first) for group in used}) == 10


def test_windows_that_the_footage_makes_ambiguous_are_left_out():
    changes = np.full(400, 3.0, np.float32)
    changes[0] = 0
    assert (judge_windows(changes) == USABLE).all() and len(judge_windows(changes)) == 273
    cut = changes.copy()
    cut[200] = 60
    verdicts = judge_windows(cut)
    # the cut is between frames 199 and 200: a window that begins at 200 is without it
    assert (verdicts[73:200] == "cut").all() and verdicts[200] == verdicts[72] == USABLE
    frozen = changes.copy()
    frozen[150:153] = 0.01
    assert judge_windows(frozen)[100] == "still"
    frozen[151] = 3
    assert judge_windows(frozen)[100] == USABLE
    slow = np.full(200, 0.3, np.float32)
    assert set(judge_windows(slow)) == {"static"}
    # fast footage throughout is no cut
    assert set(judge_windows(changes * 10)) == {USABLE}
    assert len(judge_windows(changes[: WINDOW - 1])) == 0
    assert len(judge_windows(changes[:WINDOW])) == 1


def test_both_sides_have_sources_and_none_has_any_of_the_other():
    for count in (4, 5, 20):
        every = [source for source, _ in sources(count)]
        train, val = split_by_hash(every)
        names = [source.name for source in train], [source.name for source in val]
        assert not set(names[0]) & set(names[1]) and len(train) + len(val) == count
        assert len(val) == max(2, round(0.3 * count)) and len(train) >= 2
        # by hash alone: the order of the arguments and the names do not matter
        assert split_by_hash(every[::-1]) == (train, val)
    with pytest.raises(MissingData, match="needs 4 usable videos.*usable here: 0.mp4, 1.mp4"):
        split_by_hash([source for source, _ in sources(3)])


def test_consecutive_frames_are_those_that_the_packer_reads(videos):
    path = videos / "moving_1.mp4"
    frames = list(working_frames(path, size=SIZE))
    assert np.array_equal(np.stack(frames), read(path))
    changes = changes_of(iter(frames))
    assert changes.shape == (LENGTH,) and changes[0] == 0 and changes[1:].min() > 0.5
    difference = frames[9].astype(float) - frames[8].astype(float)
    assert changes[9] == pytest.approx(np.abs(difference).mean(), rel=1e-5)


def test_what_cannot_be_used_is_reported_by_name(written):
    text = "\n".join(written[1])
    assert "rejected broken.mp4: " in text and "videos/broken" not in text
    assert "left out short.mp4: it has 100 frames, a window takes 128" in text
    assert "left out twin.mp4: it is a copy of moving_0.mp4" in text
    assert "resting.mp4: 0 of 5 windows are usable; left out are 5 in which nothing moves" in text
    assert "1 inputs are no videos by name and are left out, picture.png first" in text


def test_a_written_set_is_split_by_source_and_balanced(written):
    folder, _ = written
    rows = rows_of(folder)
    assert (folder / "classes.txt").read_text().split() == list(CLASSES)
    on_side = defaultdict(set)
    for split, count in (("train", 18), ("val", 12)):
        listed = (folder / f"{split}.csv").read_text().splitlines()
        labels = Counter(int(line.split(",")[1]) for line in listed)
        assert labels == {label: count // 6 for label in range(6)}
        own = [row for row in rows if split in row["file"]]
        assert [f"{row['file']},{row['label']}" for row in own] == listed
        for row in own:
            on_side[split] |= {row["source"], row["foreign_source"]} - {""}
            assert (row["foreign_source"] != "") == (CLASSES[row["label"]] == "foreign_frames")
            assert row["foreign_source"] != row["source"]
        for start in range(0, count, 6):
            group = own[start : start + 6]
            assert len({(r["source"], r["first"], r["at"], r["skip"]) for r in group}) == 1
    assert not on_side["train"] & on_side["val"] and len(on_side["val"]) >= 2
    assert all(name.startswith("moving_") for side in on_side.values() for name in side)


def test_clips_show_the_footage_that_their_truth_names(written, videos):
    folder, _ = written
    for row in rows_of(folder)[:6]:
        clip = read(folder / row["file"]).astype(float)
        assert len(clip) == NUM_FRAMES
        window = read(videos / row["source"])[row["first"] : row["first"] + WINDOW]
        foreign = window[:FOREIGN]
        if row["foreign_source"]:
            first = row["foreign_first"]
            foreign = read(videos / row["foreign_source"])[first : first + FOREIGN]
        order = frame_order(CLASSES[row["label"]], at=row["at"], skip=row["skip"])
        footage = np.concatenate([window, foreign]).astype(float)
        # H.264 at crf 16 changes some grey levels, neighbouring frames of this footage differ by
        # more: the nearest frame is the right one
        errors = np.abs(clip[:, None] - footage[None]).mean(axis=(2, 3, 4))
        assert np.mean(errors.argmin(axis=1) == order) > 0.95, row


def test_an_interrupted_set_is_completed_and_other_settings_are_refused(written, videos, tmp_path):
    folder = shutil.copytree(written[0], tmp_path / "set")
    arguments = {"num_train": 18, "num_val": 12, "workers": 1, "report": lambda line: None}
    inputs = list_inputs([videos], report=lambda line: None)
    kept, lost = (folder / "clips" / f"train_0000{i}.mp4" for i in (1, 3))
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    write_tempo(folder, inputs=inputs, size=SIZE, **arguments)
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content
    with pytest.raises(ValueError, match="holds clips of other settings.*size"):
        write_tempo(folder, inputs=inputs, size=SIZE, seed=1, **arguments)
    fewer = [item for item in inputs if item.source != "moving_3.mp4"]
    with pytest.raises(ValueError, match="holds clips of other settings.*digest of the videos"):
        write_tempo(folder, inputs=fewer, size=SIZE, **arguments)


def test_sides_of_choice(videos, tmp_path):
    moving = [list_inputs([videos / f"moving_{number}.mp4"])[0] for number in range(5)]
    arguments = {"num_train": 6, "num_val": 6, "size": SIZE, "workers": 1}
    write_tempo(tmp_path / "a", moving[2:], val_inputs=moving[:2], **arguments)
    for row in rows_of(tmp_path / "a"):
        is_val = row["source"] in ("moving_0.mp4", "moving_1.mp4")
        assert is_val == ("val" in row["file"])
    # a video that is named to validate on is not trained on as well
    write_tempo(tmp_path / "c", moving, val_inputs=moving[:2], **arguments)
    assert rows_of(tmp_path / "c") == rows_of(tmp_path / "a")
    picture = list_inputs([videos / "picture.png"])
    with pytest.raises(MissingData, match="0 usable validation videos"):
        write_tempo(tmp_path / "b", moving, val_inputs=picture, **arguments)
    with pytest.raises(MissingData, match="1 usable validation videos: tempo needs 2 on either"):
        write_tempo(tmp_path / "b", moving[1:], val_inputs=moving[:1], **arguments)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_train": 8}, "--num-train 8 is no multiple of 6"),
        ({"num_val": 0}, "--num-val 0 is no multiple of 6"),
        ({"size": 33}, "size is 33; it must be even"),
    ],
)
def test_counts_that_cannot_be_are_refused_before_anything_is_read(tmp_path, wrong, message):
    arguments = {"num_train": 6, "num_val": 6, **wrong}
    with pytest.raises(ValueError, match=message):
        write_tempo(tmp_path / "set", inputs=[], **arguments)
    assert not (tmp_path / "set").exists()


def test_real_videos_become_a_set(shared, tmp_path):
    names = ("h264_ntsc.mp4", "h264_no_bframes.mkv", "h264_320x180.mp4", "mpeg4.avi")
    inputs = list_inputs([shared / "videos" / name for name in (*names, "corrupted.mp4")])
    lines: list[str] = []
    write_tempo(tmp_path, inputs, num_train=6, num_val=6, workers=1, report=lines.append)
    rows = rows_of(tmp_path)
    assert len(rows) == 12 and {row["source"] for row in rows} <= set(names)
    assert any(line.startswith("rejected corrupted.mp4: decode: ") for line in lines)
    cut = next(line for line in lines if line.startswith("h264_320x180.mp4"))
    assert "in which nothing moves" in cut and "with a cut of their own" in cut
    for row in rows:
        assert read(tmp_path / row["file"], size=112).shape == (NUM_FRAMES, 112, 112, 3)
