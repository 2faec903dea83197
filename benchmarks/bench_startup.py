"""What a training reads before its first batch: `python benchmarks/bench_startup.py`

    load     manifest, records, labels and the plan of 100,000 samples in 1,000 shards, in seconds
             of processor time; with --against TREE the code of another checkout takes turns with
             this one, each on a folder of its own format, and the ratio is printed
    sample   checks of one sample in microseconds: the header of its picture, the places of its
             patches

Records are those of clips of 2048 patches, tars are holes of the right size, since nothing here
reads them. Processor time, medians over the rounds: other work on the machine counts little.
Prints JSON. Some 3 minutes.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = {
    "json": 2_100,
    "tiles.jpg": 310_000,
    "positions.npy": 12_416,
    "scores.npy": 4_224,
    "motion.npy": 24_704,
    "frames.jpg": 260_000,
}


def sample_record(key: str, number: int, offset: int, rng) -> tuple[dict, int]:
    """A clip's part of a shard's record, as the writer makes it, and where the next one starts."""
    members = {}
    for extension, size in MEMBERS.items():
        members[extension] = [offset + 512, size, rng.getrandbits(32)]
        offset += 512 + -(-size // 512) * 512
    record = {
        "key": key,
        "kind": "video",
        "source": f"part_{number % 97:02d}/video_{number:08d}.mp4",
        "source_sha256": f"{rng.getrandbits(64):016x}",
        "num_patches": 2048,
        "num_stored_frames": 16,
        "grid": [16, 16],
        "is_static": False,
        "mean_motion": round(rng.random(), 3),
        "mean_residual": round(rng.random(), 3),
        "notes": [],
        "members": members,
    }
    return record, offset


def make(folder: Path, args) -> None:
    """A packed and labelled folder in the format of the code that is imported."""
    from data_pipeline.clustering.labels import save_labels
    from data_pipeline.shards.manifest import load_manifest, write_manifest
    from model_factory import files

    rng = random.Random(0)
    settings = {"schema_version": 1, "patch_size": 14, "size": 224}
    records = []
    for shard in range(args.shards):
        samples, offset = [], 0
        for place in range(args.samples):
            number = shard * args.samples + place
            sample, offset = sample_record(f"{shard:06d}_{place:06d}", number, offset, rng)
            samples.append(sample)
        name = f"video-{shard:06d}"
        record = {
            "schema_version": 1,
            "name": name,
            "size": offset,
            "sha256": f"{shard:064x}",
            "samples": samples,
            "settings": settings,
            "inputs_sha256": f"{shard:064x}",
            "inputs": [[s["source"], [9, 10**18 + 7], s["source_sha256"]] for s in samples],
            "rejected": [],
        }
        data = json.dumps(record, sort_keys=True).encode()
        if hasattr(files, "open_seal"):
            data = files.json_bytes(record, indent=None)
        (folder / f"{name}.json").write_bytes(data)
        with open(folder / f"{name}.tar", "wb") as tar:
            tar.truncate(offset)
        records.append(json.loads(data))
    write_manifest(folder, records, settings)
    total = args.shards * args.samples
    labels = np.arange(10 * total, dtype=np.int32).reshape(total, 10) % 1000
    save_labels(folder, labels, load_manifest(folder), 1000, {"centroids_sha256": "0"})


def measure(folder: Path) -> float:
    """Processor seconds of one start."""
    from data_pipeline.clustering.labels import load_labels
    from data_pipeline.loading.choices import SampleTable
    from data_pipeline.loading.plan import EpochPlan, SampleOrder
    from data_pipeline.shards.manifest import load_manifest

    started = time.process_time()
    manifest = load_manifest(folder)
    load_labels(folder, manifest)
    SampleTable.of(manifest)
    plan = EpochPlan(SampleOrder(np.diff(manifest.starts), 0, 16), 1024)
    plan.batch(0, 0)
    return time.process_time() - started


def in_tree(tree: Path, *words: str) -> str:
    """Output of this script with the packages of a checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def bench_load(args) -> dict:
    """Starts of each tree, one after the other."""
    trees = {"this": ROOT}
    if args.against is not None:
        trees["other"] = args.against.resolve()
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    sizes = ["--shards", str(args.shards), "--samples", str(args.samples)]
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in trees.items():
            (Path(folder) / name).mkdir()
            in_tree(tree, "--make", str(Path(folder) / name), *sizes)
        for _ in range(args.rounds):
            for name, tree in trees.items():
                seconds[name].append(float(in_tree(tree, "--measure", str(Path(folder) / name))))
    report = {f"{name}_s": round(statistics.median(each), 3) for name, each in seconds.items()}
    if args.against is not None:
        pairs = zip(seconds["this"], seconds["other"], strict=True)
        report["this_over_other"] = round(statistics.median(a / b for a, b in pairs), 3)
    return report


def bench_sample(args) -> dict:
    """Checks of one clip of 224 px in patches of 14."""
    import io

    from PIL import Image

    from data_pipeline.shards.jpeg import check_jpeg
    from data_pipeline.shards.schema import check_positions

    rng = np.random.default_rng(0)
    stream = io.BytesIO()
    noise = rng.integers(0, 256, (1024, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", quality=90, subsampling="4:4:4")
    data = stream.getvalue()
    places = rng.permutation(64 * 16 * 16)[:2048]
    positions = np.stack(np.unravel_index(places, (64, 16, 16)), -1).astype(np.uint16)

    def pillow() -> None:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
            assert picture.size == (512, 1024)

    checks = {
        "jpeg_header_us": lambda: check_jpeg(data, (1024, 512), "x"),
        "jpeg_header_by_pillow_us": pillow,
        "positions_us": lambda: check_positions(positions, 2048, (16, 16), "x"),
    }
    return {name: round(1e6 * _seconds_of(check, args), 1) for name, check in checks.items()}


def _seconds_of(check, args) -> float:
    each = []
    for _ in range(args.rounds):
        started = time.process_time()
        for _ in range(1000):
            check()
        each.append((time.process_time() - started) / 1000)
    return statistics.median(each)


def main() -> None:
    """Parse arguments, run the parts, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["load", "sample"])
    parser.add_argument("--against", type=Path, help="another checkout, to take turns with")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=100, help="of each shard")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make is not None:
        return make(args.make, args)
    if args.measure is not None:
        return print(measure(args.measure))
    report = {}
    if "load" in args.parts:
        report["load"] = bench_load(args)
    if "sample" in args.parts:
        report["sample"] = bench_sample(args)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
