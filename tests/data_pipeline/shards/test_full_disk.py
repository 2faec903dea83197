"""A disk without room, or an output that is removed: one line with the path, nothing half-written
that counts, nothing good lost, and the same command goes on.

The system itself refuses files above a size (RLIMIT_FSIZE), in this process and in its children.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE_S, ROOT
from PIL import Image

from data_pipeline.clustering.feature_sources import FeatureConfig
from data_pipeline.clustering.features import extract
from data_pipeline.clustering.pipeline import ClusterConfig, cluster, label
from data_pipeline.embedded.clips import write_clip
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig
from data_pipeline.verify_folder import verify_folder

FLAGS = "--size 64 --gop 64 --budget 64 --workers 1 --samples-per-shard 3".split()
CONFIG = PackConfig(SampleConfig(size=64, gop=64, budget=64), samples_per_shard=3, workers=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Folder in/ of six noisy pictures, three of them larger as files, and out/, their shards."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        noise = rng.integers(0, 256 if number > 2 else 32, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "in" / f"{number}.png")
    quietly(folder / "in", folder / "out")
    return folder


def quietly(source: Path | str, output: Path, report=lambda line: None):
    return pack(list_inputs([source]), output, CONFIG, report=report)


@contextlib.contextmanager
def files_up_to(size: int):
    """No file may grow beyond `size` bytes; Python ignores the signal, so writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def fails(size: int, work: Callable[[], object]) -> Path:
    """The file that could not be written."""
    with files_up_to(size), pytest.raises(OSError, match="File too large") as error:
        work()
    return Path(error.value.filename)


def test_pack_keeps_finished_shards_says_one_line_and_goes_on(pictures, tmp_path):
    sizes = [path.stat().st_size for path in sorted((pictures / "out").glob("*.tar"))]
    assert sizes[0] < sizes[1]
    command = [sys.executable, "-m", "data_pipeline", "pack", str(pictures / "in")]
    command += ["--output", str(tmp_path / "out"), *FLAGS]

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0], sizes[0]))

    done = subprocess.run(
        command,
        cwd=ROOT,
        preexec_fn=small_files,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 8
    (line,) = done.stderr.splitlines()
    assert "File too large" in line and str(tmp_path / "out" / ".video-000001.tar.tmp") in line
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["video-000000.json", "video-000000.tar", "video-000000.tar.idx"]
    written = (tmp_path / "out" / "video-000000.tar").stat().st_mtime_ns
    quietly(pictures / "in", tmp_path / "out")
    assert (tmp_path / "out" / "video-000000.tar").stat().st_mtime_ns == written
    assert contents(tmp_path / "out") == contents(pictures / "out")


def test_an_input_is_not_rejected_because_the_temporary_disk_is_full(pictures, tmp_path):
    """A child process fetches a remote input: it has no room, and the input is as good as ever."""
    source = f"file://{pictures / 'in' / '5.png'}"
    size = (pictures / "in" / "5.png").stat().st_size
    with files_up_to(size - 1), pytest.raises(OSError, match="File too large") as error:
        quietly(source, tmp_path / "out")
    assert "univit-" in error.value.filename
    assert list((tmp_path / "out").glob("video-*")) == []
    manifest = quietly(source, tmp_path / "out")
    assert len(manifest) == 1 and not manifest.rejected_by_reason()


def test_an_output_that_is_removed_is_named(pictures, tmp_path):
    def remove(line: str) -> None:
        if line.startswith("packed shard 1"):
            shutil.rmtree(tmp_path / "out")

    with pytest.raises(FileNotFoundError, match="removed while this command wrote") as error:
        quietly(pictures / "in", tmp_path / "out", report=remove)
    assert error.value.filename == str(tmp_path / "out")
    assert len(quietly(pictures / "in", tmp_path / "out")) == 6


@pytest.mark.parametrize("size", [60, 250, 500, 800])
def test_features_clusters_and_labels_leave_nothing_half_written_and_go_on(
    pictures, tmp_path, size
):
    """Whichever file does not fit any more: a record, the vectors, the centroids."""
    manifest = load_manifest(pictures / "out")

    def everything(output: Path) -> None:
        extract(manifest, FeatureConfig(), output / "features", report=lambda line: None)
        cluster(manifest, ClusterConfig(3), output)
        label(manifest, output, 2, output)

    everything(tmp_path / "straight")
    path = fails(size, lambda: everything(tmp_path / "full"))
    assert (tmp_path / "full") in path.parents
    assert not [name for name in contents(tmp_path / "full") if name.endswith("tmp")]
    everything(tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "straight")
    assert verify_folder(tmp_path / "full").problems == []


def test_a_clip_that_does_not_fit_leaves_no_part_of_it(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    path = fails(2000, lambda: write_clip(tmp_path / "a.mp4", frames))
    assert path.parent == tmp_path and os.listdir(tmp_path) == []
