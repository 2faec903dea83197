"""Speed, memory and fidelity of packing, as ratios of one run:
`python benchmarks/bench_decompose.py VIDEO...`

    decompose   whole decomposition (64 frames, 224 px, patch 14) against PyAV decoding the same
                file, both on one thread, taking turns
    tiles       bytes per 2048 patches of 14 px and their PSNR against the decoded frames
    workers     packing the given files with two processes against one
    memory      resident memory of one worker over `--clips` samples: after a tenth and at the end

Prints JSON. Some 3 minutes with the two files of the record.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.codec.decompose import decompose_video
from data_pipeline.codec.selection import cut_patches
from data_pipeline.shards.inputs import Input, list_inputs
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig, SamplePool, build_sample
from data_pipeline.shards.schema import SampleInfo, decode_array, decode_patches

SAMPLE = SampleConfig(size=224, patch_size=14)


def decode_only(path: Path) -> int:
    """Decode every frame with PyAV on one thread, and nothing else."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def bench_decompose(paths: list[Path], args) -> dict:
    """Per file: decomposition / decoding, medians over the rounds."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # both on one core
    report = {}
    for path in paths:
        pairs = []
        for _ in range(args.rounds + 1):
            start = time.perf_counter()
            decode_only(path)
            middle = time.perf_counter()
            decompose_video(path, SAMPLE.framing)
            pairs.append((middle - start, time.perf_counter() - middle))
        ratios = [whole / decode for decode, whole in pairs[1:]]
        report[path.name] = {
            "decomposition_over_decoding": round(statistics.median(ratios), 2),
            "seconds_decoding": round(statistics.median(p[0] for p in pairs[1:]), 3),
            "seconds_decomposition": round(statistics.median(p[1] for p in pairs[1:]), 3),
        }
    return report


def bench_tiles(paths: list[Path], args) -> dict:
    """Per file: size of the tiles and their RGB PSNR."""
    report = {}
    for path in paths:
        members, info = build_sample(path, path.name, SAMPLE)
        info = SampleInfo.from_bytes(members["json"], path.name)
        positions = decode_array(members["positions.npy"], "positions.npy", path.name).astype(int)
        tiles = decode_patches(info, members["tiles.jpg"], path.name)
        clip = decompose_video(path, SAMPLE.framing)
        positions[:, 0] = np.searchsorted(clip.times, positions[:, 0])
        want = cut_patches(clip.frames, positions, SAMPLE.patch_size)
        error = ((tiles.astype(float) - want) ** 2).mean()
        report[path.name] = {
            "patches": info.num_patches,
            "tile_kilobytes": round(len(members["tiles.jpg"]) / 1000, 1),
            "sample_kilobytes": round(sum(map(len, members.values())) / 1000, 1),
            "psnr_db": round(float(10 * np.log10(255**2 / error)), 2),
        }
    return report


def bench_workers(paths: list[Path], args) -> dict:
    """Two worker processes against one, on the same files."""
    inputs = list_inputs(paths) * args.repeats
    seconds = {}
    for workers in (1, 2, 1, 2):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            config = PackConfig(SAMPLE, samples_per_shard=len(inputs), workers=workers)
            pack(inputs, Path(folder), config, report=lambda line: None)
            seconds.setdefault(workers, []).append(time.perf_counter() - start)
    return {
        "clips": len(inputs),
        "one_over_two": round(min(seconds[1]) / min(seconds[2]), 2),
        "seconds": {str(n): [round(s, 2) for s in values] for n, values in seconds.items()},
    }


def bench_memory(paths: list[Path], args) -> dict:
    """Resident megabytes of a worker while it builds many samples."""
    import psutil

    sizes = []
    with SamplePool(SAMPLE, num_workers=1, wall_seconds=300) as pool:
        for number in range(args.clips):
            path = paths[number % len(paths)]
            pool.build(Input(str(path), path.name))
            (worker,) = psutil.Process().children()
            sizes.append(worker.memory_info().rss / 1e6)
    return {
        "clips": args.clips,
        "megabytes_after_a_tenth": round(max(sizes[: max(1, args.clips // 10)])),
        "megabytes_at_the_end": round(sizes[-1]),
        "megabytes_at_most": round(max(sizes)),
    }


PARTS = {
    "tiles": bench_tiles,
    "workers": bench_workers,
    "memory": bench_memory,
    "decompose": bench_decompose,  # last: it binds the process to one core
}


def main() -> None:
    """Run the chosen parts and print their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=16, help="of every file, part workers")
    parser.add_argument("--clips", type=int, default=200, help="samples built, part memory")
    args = parser.parse_args()
    report = {part: PARTS[part](args.videos, args) for part in PARTS if part in args.parts}
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
