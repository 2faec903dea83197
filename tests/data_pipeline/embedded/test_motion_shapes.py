"""The labelled set: only the motion tells the class."""

import hashlib

import numpy as np
import pytest

from data_pipeline.codec.decompose import decompose_frames
from data_pipeline.embedded.drawing import Appearance
from data_pipeline.embedded.motion_shapes import CLASSES, render_clip, write_motion_shapes


def test_a_clip_is_a_pure_function_of_its_arguments():
    first, second = (render_clip(2, 0, 5, "hard", size=64, frames=6) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, render_clip(2, 1, 5, "hard", size=64, frames=6))


@pytest.mark.parametrize(
    "label, seed, index, difficulty, digest",
    [
        (0, 0, 0, "easy", "64efe58a3661cb7c"),
        (3, 1, 5, "medium", "69ab7f8681e218a9"),
        (6, 2, 7, "hard", "97fe873de31d14bc"),
    ],
)
def test_clips_are_those_of_the_first_version_to_the_last_bit(
    label, seed, index, difficulty, digest
):
    clip = render_clip(label, seed, index, difficulty, size=64, frames=8)
    assert hashlib.sha256(clip.tobytes()).hexdigest().startswith(digest)


def test_an_appearance_changes_the_looks_of_the_shape_and_nothing_else():
    label = CLASSES.index("left")
    looks = (None, Appearance("red", 5), Appearance("white", 3))
    clips = [render_clip(label, 0, 4, "easy", frames=8, appearance=look) for look in looks]
    shapes = np.any([clip.max(axis=-1) > 125 for clip in clips], axis=0)
    steps = [(y, x) for y in range(-3, 4) for x in range(-3, 4)]  # pixels of a soft edge
    around = ~np.any([np.roll(shapes, step, axis=(1, 2)) for step in steps], axis=0)
    assert 0.5 < around.mean() < 1.0
    for clip in clips[1:]:
        assert np.array_equal(clip[around], clips[0][around])
        assert not np.array_equal(clip, clips[0])


def test_an_unknown_appearance_is_refused():
    with pytest.raises(ValueError, match="colour is 'pink'; choose one of red, green"):
        Appearance("pink", 3)
    with pytest.raises(ValueError, match="corners is 7; choose one of 3, 4, 5"):
        Appearance("red", 7)


def test_no_single_frame_tells_the_class():
    """The same draws under another class start from the same picture distribution:
    a nearest neighbour on single frames stays at chance (12.5 %).
    """
    frames, labels = [], []
    for index in range(160):
        clip = render_clip(index % 8, 0, index, "easy", size=48, frames=16)
        frames.append(clip[(5 * index) % 16].astype(np.float32).ravel())
        labels.append(index % 8)
    frames, labels = np.stack(frames), np.array(labels)
    distances = ((frames[:, None] - frames[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    accuracy = (labels[distances.argmin(1)] == labels).mean()
    assert accuracy < 0.25


def test_translation_classes_move_their_way():
    expected = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for name, direction in expected.items():
        clip = decompose_frames(render_clip(CLASSES.index(name), 0, 3, "easy"), gop=64)
        moving = clip.motion[1:]
        camera = np.median(moving, axis=(1, 2), keepdims=True)
        total = (moving - camera).sum(axis=(0, 1, 2))
        assert np.dot(total, direction) > 0.8 * np.linalg.norm(total), name


def test_an_interrupted_set_is_completed_not_rewritten(tmp_path):
    write_motion_shapes(tmp_path, num_train=8, num_val=8, size=64)
    kept = tmp_path / "clips" / "train_00001.mp4"
    before = kept.stat().st_mtime_ns
    bytes_of_second = (tmp_path / "clips" / "train_00002.mp4").read_bytes()
    (tmp_path / "clips" / "train_00002.mp4").unlink()
    write_motion_shapes(tmp_path, num_train=8, num_val=8, size=64)
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "clips" / "train_00002.mp4").read_bytes() == bytes_of_second
    lines = (tmp_path / "train.csv").read_text().splitlines()
    assert lines[3] == "clips/train_00003.mp4,3" and len(lines) == 8


def test_clips_of_other_settings_do_not_mix(tmp_path):
    write_motion_shapes(tmp_path, num_train=8, num_val=8, size=64)
    with pytest.raises(ValueError, match="holds clips of other settings"):
        write_motion_shapes(tmp_path, num_train=8, num_val=8, size=64, difficulty="hard")
