"""Fixtures shared by all tests: real clips, a packed and labelled set,
processes of a real group.
"""

import contextlib
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forked import ForkingRun, share_through

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Last bits of a matrix product depend on the number of threads on some processors, and many tests
# compare bits between this process and its children. Set here, before torch, NumPy or FAISS is
# imported, one number holds for both sides; shells/test_arithmetic.sh chooses another one.
NUM_THREADS = os.environ.get("UNIVIT_NUM_THREADS", "1")
for _variable in (
    "UNIVIT_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
):
    os.environ[_variable] = NUM_THREADS

# Seconds after which a process that should have ended, or a file that should have appeared, counts
# as a failure. Nothing waits so long unless it is broken: a slow machine beside other work is not.
PATIENCE_S = 900.0
POLL_S = 0.02

# Files whose tests compare computed numbers: what another processor may change (-m numeric).
NUMERIC = (
    "tests/data_pipeline/codec/test_selection.py",
    "tests/eval_encoder/probe/test_probe_heads.py",
    "tests/model_factory/test_attention.py",
    "tests/model_factory/test_conversion.py",
    "tests/model_factory/test_export_folder.py",
    "tests/model_factory/test_golden_vectors.py",
    "tests/model_factory/test_key_layouts.py",
    "tests/model_factory/test_packing_model.py",
    "tests/model_factory/test_rope.py",
    "tests/training/losses/test_losses.py",
    "tests/training/test_optimizer.py",
)


def _is_numeric(path: Path) -> bool:
    return path.relative_to(ROOT).as_posix() in NUMERIC


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m numeric ...`, don't import the files that have no such test: that takes longer than
    many tests do."""
    asked = config.option.markexpr.startswith("numeric") and collection_path.name.startswith(
        "test_"
    )
    return True if asked and not _is_numeric(collection_path) else None


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--soak`: the whole of every sweep (docs/testing.md)."""
    parser.addoption(
        "--soak",
        action="store_true",
        help="also the cases of sweeps of which the suite runs one or a few each",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of numeric files; leave the soak out; whole commands come first, so that the
    workers, who take a file at a time, come to their end together."""
    for item in items:
        if _is_numeric(item.path):
            item.add_marker(pytest.mark.numeric)
    if not config.option.soak:
        left_out = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    commands = Counter(item.path for item in items if item.get_closest_marker("e2e"))
    items.sort(key=lambda item: -commands[item.path])  # a stable sort


@pytest.fixture(scope="session")
def soak(pytestconfig) -> bool:
    """Whether every case of a sweep is asked for (`--soak`), where one test goes through many."""
    return pytestconfig.option.soak


@pytest.fixture(scope="session", autouse=True)
def shared_by_workers(tmp_path_factory) -> Path:
    """Folder of this run that all its workers see; what is made there is made once."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    share_through(folder)
    return folder


@pytest.fixture(scope="module")
def quick_tower_check():
    """The process in which an exported tower is checked is forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model_factory.llava.tower_folder.subprocess", ForkingRun)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real videos, images and golden vectors;
    tests that need it skip where it is absent.
    """
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real videos and golden vectors are not shipped")
    return SHARED


@contextlib.contextmanager
def alone():
    """The ranks of a group of one, left in good order after an error, too."""
    import torch.distributed as dist

    from training.distributed import process_group

    try:
        with process_group() as ranks:
            yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def listing(folder: Path) -> list[list]:
    """[path, size, time of change] of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


@contextlib.contextmanager
def made_once(shared_by_workers: Path, name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A folder that the first worker to come makes and all read; AssertionError in the end where a
    test has changed it for the others."""
    folder, record = shared_by_workers / name, shared_by_workers / f"{name}.json"
    with open(shared_by_workers / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            make(folder)
            record.write_text(json.dumps(listing(folder)))
    yield folder
    assert listing(folder) == json.loads(record.read_text()), f"a test has changed {folder}"


@pytest.fixture(scope="session")
def clips(packed) -> Path:
    """Folder of 24 training and 8 validation clips of motion_shapes with their lists."""
    return packed


@pytest.fixture(scope="session")
def packed(shared_by_workers) -> Iterator[Path]:
    """Those clips packed (98 tokens each, shards of 10), clustered and labelled:
    folders train/ and val/. To be read only.
    """
    with made_once(shared_by_workers, "motion_shapes", _pack_clips) as folder:
        yield folder


def _pack_clips(clips: Path) -> None:
    from data_pipeline.clustering.pipeline import ClusterConfig, cluster, label
    from data_pipeline.embedded.motion_shapes import write_motion_shapes
    from data_pipeline.shards.inputs import list_inputs
    from data_pipeline.shards.pack import PackConfig, pack
    from data_pipeline.shards.sample_builder import SampleConfig

    write_motion_shapes(clips, num_train=24, num_val=8, workers=2)
    config = PackConfig(
        SampleConfig(size=112, gop=64, budget=98, num_full_frames=8),
        samples_per_shard=10,
        workers=2,
    )
    for split in ("train", "val"):
        manifest = pack(list_inputs([clips / f"{split}.csv"]), clips / split, config)
        cluster(manifest, ClusterConfig(8), clips / "centroids" / split)
        label(manifest, clips / "centroids" / split, 4, clips / split)


@pytest.fixture(scope="session")
def mixed(clips, shared_by_workers) -> Iterator[Path]:
    """Packed folder of 12 clips and 28 pictures of many sizes (shards of 5), with 100 labels each
    of which most are -1, as long lists of words have. To be read only.
    """
    with made_once(shared_by_workers, "mixed", partial(_pack_mixture, clips=clips)) as folder:
        yield folder / "packed"


def _pack_mixture(folder: Path, clips: Path) -> None:
    from PIL import Image

    from data_pipeline.clustering.labels import save_labels
    from data_pipeline.shards.inputs import list_inputs
    from data_pipeline.shards.pack import PackConfig, pack
    from data_pipeline.shards.sample_builder import SampleConfig

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(28):
        side = int(rng.integers(40, 200))
        picture = rng.integers(0, 256, (side, int(rng.integers(40, 200)), 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"picture_{number:02d}.png")
    sources = [*sorted((clips / "clips").glob("train_000[01]*.mp4"))[:12], folder]
    config = PackConfig(
        SampleConfig(size=112, gop=64, budget=98, num_full_frames=8, fit="area"),
        samples_per_shard=5,
        workers=2,
    )
    manifest = pack(list_inputs(sources), folder / "packed", config)
    labels = np.full((len(manifest), 100), -1)
    for row, count in zip(labels, rng.integers(1, 12, len(manifest)), strict=True):
        row[:count] = rng.integers(0, 500, count)
    save_labels(folder / "packed", labels, manifest, 500, {})


def run(
    *command: str | Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command of ours to its end, output captured; a failure shows it."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    if check and done.returncode:
        raise AssertionError(
            f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
    return done


def call(main: Callable, *argv: str | Path) -> None:
    """Call a command's `main` in this process; where it fails, SystemExit has what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main([str(word) for word in argv])
    sys.stderr.write(said.getvalue())
    if code:
        raise SystemExit(said.getvalue())


def launcher(num_ranks: int) -> tuple[str, ...]:
    """torchrun on a free port of this machine."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks))


def torchrun(num_ranks: int, *command: str | Path, check: bool = True):
    """Run a command of ours on real gloo ranks."""
    return run(*launcher(num_ranks), *command, check=check)


def start_torchrun(num_ranks: int, *command: str | Path) -> subprocess.Popen:
    """Start ranks in a session of their own, to be killed with kill_group."""
    return subprocess.Popen(
        [sys.executable, *launcher(num_ranks), *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        start_new_session=True,
    )


def wait_until(
    reached: Callable[[], object], process: subprocess.Popen | None = None, what: str = "it"
) -> None:
    """Poll until `reached` is true; AssertionError where `process` ends before, or never comes to
    it."""
    until = time.monotonic() + PATIENCE_S
    while not reached():
        assert process is None or process.poll() is None, f"the process ended before {what}"
        assert time.monotonic() < until, f"{what} did not come within {PATIENCE_S:.0f} s"
        time.sleep(POLL_S)


def last_step(consumed: Path) -> int:
    """The last whole step in a rank's record of consumed samples; 0 without one."""
    lines = consumed.read_text().splitlines(keepends=True) if consumed.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL the launcher and every process it started."""
    import psutil

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


def write_video(
    path,
    pictures,
    codec="libx264",
    times=None,
    setup=None,
    pix_fmt="yuv420p",
    container_options=None,
    **options,
):
    """Encode RGB pictures or ready av frames; `times` in thirtieths of a second."""
    import av

    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        first = pictures[0]
        height, width = (
            first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
        )
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.codec_context.time_base = Fraction(1, 30)
        if setup:
            setup(stream)
        for number, picture in enumerate(pictures):
            frame = picture
            if isinstance(picture, np.ndarray):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
