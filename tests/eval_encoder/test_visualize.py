"""The picture of clusters: both objectives are drawn, and centres gather their samples."""

import numpy as np
from forked import forked
from PIL import Image

from eval_encoder.visualize_clusters import animation, separation, train

SIZE = (776, 530)


def planted() -> tuple[np.ndarray, np.ndarray]:
    """120 unit rows around 6 directions that overlap."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 20)
    rows = rng.standard_normal((6, 12))[groups] + 0.8 * rng.standard_normal((120, 12))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), groups


def test_centres_gather_their_samples_and_drawings_are_seeded():
    rows, groups = planted()
    snapshots = train(rows, groups, "clusters", steps=200, every=100, seed=0)
    assert [snapshot.step for snapshot in snapshots] == [0, 100, 200]
    first, last = (separation(snapshots[i].embeddings, groups) for i in (0, -1))
    assert last > first + 0.4
    assert np.allclose(np.linalg.norm(snapshots[-1].centers, axis=1), 1, atol=1e-5)
    again = train(rows, groups, "clusters", steps=200, every=100, seed=0)
    assert np.array_equal(again[-1].embeddings, snapshots[-1].embeddings)
    contrast = train(rows, groups, "contrastive", steps=200, every=100, seed=0)
    assert contrast[-1].centers is None
    pictures = animation([contrast, snapshots], groups)
    assert len(pictures) == 3 and {picture.size for picture in pictures} == {SIZE}


def test_the_command_writes_a_gif_and_its_last_picture(packed, tmp_path):
    forked("-m", "data_pipeline", "features", packed / "train", "--output", tmp_path / "features")
    command = ("eval_encoder/visualize_clusters.py", "--features", tmp_path / "features")
    flags = ("--shards", packed / "train", "--truth", packed / "train.csv", "--steps", 40)
    done = forked(*command, *flags, "--output", tmp_path / "clusters.gif")
    assert "global centres: same minus other groups" in done.stdout
    with Image.open(tmp_path / "clusters.gif") as gif, Image.open(tmp_path / "clusters.png") as png:
        assert gif.n_frames == 3 and gif.size == png.size == SIZE
    done = forked(*command, "--shards", packed / "val", "--output", tmp_path / "x.gif", check=False)
    assert done.returncode == 1 and "another set" in done.stderr


def test_wrong_options_end_with_a_sentence(packed, tmp_path):
    forked("-m", "data_pipeline", "features", packed / "train", "--output", tmp_path / "features")
    command = ("eval_encoder/visualize_clusters.py", "--features", tmp_path / "features")
    command += ("--shards", packed / "train", "--output")
    wrong = {"--every": 0, "--steps": -1, "--clusters": 1, "--samples": 1}
    for flag, value in wrong.items():
        done = forked(*command, tmp_path / "x.gif", flag, value, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr, flag
    done = forked(*command, tmp_path / "x.png", check=False)
    assert done.returncode == 1 and "FILE.gif" in done.stderr
