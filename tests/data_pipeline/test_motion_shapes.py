"""The labelled set: only the motion tells the class."""

import numpy as np
import pytest

from data_pipeline.codec.decompose import decompose_frames
from data_pipeline.motion_shapes import CLASSES, render_clip, write_motion_shapes


def test_a_clip_is_a_pure_function_of_its_arguments():
    first, second = (render_clip(2, 0, 5, "hard", size=64, frames=6) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, render_clip(2, 1, 5, "hard", size=64, frames=6))


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
