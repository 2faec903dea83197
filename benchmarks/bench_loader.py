"""Speed of the loader, as ratios of one run: `python benchmarks/bench_loader.py VIDEO...`

    clips    codec clips of 2048 tokens (224 px, patch 14) from shards: read, checked, decoded,
             packed, and normalised by the consumer; against the bare DALI decode of the same bytes
             from memory, and against decoding 64 frames at 224 px of the same videos with PyAV and
             decord
    frames   the same for the frame view
    images   the same for 256 px pictures, frames of the videos
    fill     share of the token budget that a mixture of pictures and clips takes, whole epoch
    plan     time and memory of a plan over 100 million samples
    wait     share of its time that a step of the demo preset waits for data, on one rank

Loader and reference take turns, medians over the rounds. Prints JSON. Some 4 minutes.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

from data_pipeline.clustering.labels import save_labels
from data_pipeline.datasets import Dataset
from data_pipeline.loading.config import StreamConfig, ViewConfig
from data_pipeline.loading.dali_pipeline import PictureDecoder
from data_pipeline.loading.loader import MixtureLoader
from data_pipeline.loading.plan import EpochPlan, SampleOrder
from data_pipeline.loading.samples import MEMBER_OF_VIEW
from data_pipeline.loading.shard_reader import ShardReader
from data_pipeline.loading.stream import HeadStream
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig

CLIP = SampleConfig(size=224, patch_size=14)
VIEWS = {
    "clips": (0, ViewConfig(codec_ratio=1.0, frame_ratio=0.0)),
    "frames": (1, ViewConfig(codec_ratio=0.0, frame_ratio=1.0)),
    "images": (3, ViewConfig()),
}


def quietly(_line: str) -> None:
    """Packing has nothing to say here."""


def pack_clips(paths: list[Path], folder: Path, args) -> Dataset:
    """The videos packed again and again until there are `--clips` samples, in four shards."""
    inputs = (list_inputs(paths) * args.clips)[: args.clips]
    config = PackConfig(CLIP, samples_per_shard=-(-args.clips // 4), workers=args.threads)
    return dataset(pack(inputs, folder / "clips", config, report=quietly))


def pack_images(paths: list[Path], folder: Path, args) -> Dataset:
    """Frames of the videos as 256 px pictures."""
    from PIL import Image

    from data_pipeline.codec.decode import decode_video
    from data_pipeline.codec.framing import Framing

    source = folder / "pictures"
    source.mkdir()
    for path in paths:
        for number, frame in enumerate(
            decode_video(path, Framing(args.images // len(paths), 256, 16)).frames
        ):
            Image.fromarray(frame).save(source / f"{path.stem}_{number:04d}.png")
    sample = SampleConfig(size=256, patch_size=16)
    config = PackConfig(sample, samples_per_shard=200, workers=args.threads)
    return dataset(pack(list_inputs([source]), folder / "images", config, report=quietly))


def dataset(manifest) -> Dataset:
    """A packed folder with labels that mean nothing."""
    labels = np.zeros((len(manifest), 10), np.int32)
    save_labels(manifest.directory, labels, manifest, 2, {})
    return Dataset(manifest.directory.name, load_manifest(manifest.directory), labels, 2)


def rate(source, batches: int, use) -> float:
    """Samples per second of `batches` batches; the first two are not counted."""
    for _ in range(2):
        use(next(source))
    started, samples = time.perf_counter(), 0
    for _ in range(batches):
        samples += use(next(source))
    return samples / (time.perf_counter() - started)


def bench_view(data: Dataset, name: str, batch_size: int, batches: int, args) -> dict:
    """Loader against bare decoding of the same bytes, in the same batches and threads."""
    view, config = VIEWS[name]
    with ShardReader(data.manifest) as reader:
        encoded = [
            np.frombuffer(reader.read(i, MEMBER_OF_VIEW[view]), np.uint8)
            for i in range(len(data.manifest))
        ]

    def bare() -> float:
        def fetch(number):
            return [encoded[(number * batch_size + i) % len(encoded)] for i in range(batch_size)]

        return rate(PictureDecoder(fetch, batch_size, args.threads), batches, len)

    def loader(use) -> float:
        stream = StreamConfig(batch_size, view=config, dali_num_threads=args.threads)
        with MixtureLoader({"a": HeadStream(data, stream, seed=0)}) as made:
            return rate(made, batches, lambda step: use(step["a"]))

    def packed(batch) -> int:
        return batch.num_samples

    def normalised(batch) -> int:
        batch.hidden_states()
        return batch.num_samples

    rounds = [(bare(), loader(packed), loader(normalised)) for _ in range(args.rounds)]
    bare_rates, packed_rates, normalised_rates = zip(*rounds, strict=True)
    return {
        "bare_per_s": round(statistics.median(bare_rates)),
        "packed_per_s": round(statistics.median(packed_rates)),
        "normalised_per_s": round(statistics.median(normalised_rates)),
        "packed_over_bare": round(statistics.median(p / b for b, p, _ in rounds), 2),
        "normalised_over_bare": round(statistics.median(n / b for b, _, n in rounds), 2),
    }


def bench_video(paths: list[Path], clips_per_s: float, args) -> dict:
    """64 frames at 224 px of each video, one after another on all cores, against the loader."""
    report = {}
    for path in paths:
        readers = {"av": with_av, "decord": with_decord}
        for name, read in readers.items():
            with contextlib.suppress(ImportError):
                read(path)
                seconds = []
                for _ in range(args.rounds):
                    started = time.perf_counter()
                    read(path)
                    seconds.append(time.perf_counter() - started)
                per_s = 1 / statistics.median(seconds)
                report[f"{path.name} {name}"] = {
                    "clips_per_s": round(per_s, 2),
                    "loader_over_it": round(clips_per_s / per_s, 1),
                }
    return report


def with_av(path: Path) -> np.ndarray:
    """uint8 [64, 224, 224, 3] by PyAV with its frame threads: decode all, scale 64."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = list(container.decode(stream))
        chosen = np.linspace(0, len(frames) - 1, 64).astype(int)
        scaled = (frames[i].reformat(width=224, height=224, format="rgb24") for i in chosen)
        return np.stack([frame.to_ndarray() for frame in scaled])


def with_decord(path: Path) -> np.ndarray:
    """The same by decord, which seeks."""
    import decord

    reader = decord.VideoReader(str(path), width=224, height=224, num_threads=0)
    return reader.get_batch(np.linspace(0, len(reader) - 1, 64).astype(int)).asnumpy()


def bench_fill(args) -> dict:
    """Token budgets over epochs of packs of 16384 tokens: pictures of many sizes and clips."""
    rng = np.random.default_rng(0)
    sides = rng.integers(8, 33, (20_000, 2))
    tokens = np.where(rng.random(20_000) < 0.5, sides.prod(axis=1), 2048)
    tokens = np.where(rng.random(20_000) < 0.2, 1568, tokens)
    order = SampleOrder(np.full(200, 100), 0, 16)
    plan = EpochPlan(order, 8, lambda ids, stages, epoch: tokens[ids], 16384)
    used = held = index = 0
    while (batch := plan.batch(0, index)) is not None:
        used += int((tokens[batch.sample_ids] * batch.weights).sum())
        held += 16384 * 8
        index += 1
    return {"fill": round(used / held, 4), "batches": index, "mean_tokens": round(tokens.mean())}


def bench_plan(args) -> dict:
    """A plan over 100,000 shards of 1,000 samples, and a batch in its middle."""
    sizes = np.full(100_000, 1000)
    started = time.perf_counter()
    plan = EpochPlan(SampleOrder(sizes, 0, 16), 4096)
    plan.batch(1, 12_000)
    seconds = time.perf_counter() - started
    tracemalloc.start()
    plan = EpochPlan(SampleOrder(sizes, 0, 16), 4096)
    plan.batch(1, 12_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"seconds": round(seconds, 3), "megabytes": round(peak / 1e6, 1)}


def bench_wait(folder: Path, args) -> dict:
    """The demo preset on one rank: waiting / all time, first ten steps left out."""
    from training import train_univit

    log = io.StringIO()
    flags = ["--preset", "demo", "--output", str(folder / "run"), "--frequent", "20"]
    flags += ["--num_sampled_data", str(32 * 60), "--set", "embedded_clips=[200,8]"]
    with contextlib.redirect_stderr(log), contextlib.redirect_stdout(io.StringIO()):
        train_univit.main(flags)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    shares = {event.step: event.value for event in events.Scalars("data_wait")}
    return {"data_wait_share_by_step": {str(k): round(v, 4) for k, v in shares.items()}}


def main() -> None:
    """Parse arguments, run the parts, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--parts", nargs="+", default=["clips", "images", "fill", "plan", "wait"])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(1)  # as torchrun does; DALI has its own threads
    report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "clips" in args.parts:
            clips = pack_clips(args.videos, folder, args)
            report["clips"] = bench_view(clips, "clips", 16, 20, args)
            report["frames"] = bench_view(clips, "frames", 16, 20, args)
            report["video"] = bench_video(args.videos, report["clips"]["normalised_per_s"], args)
        if "images" in args.parts:
            images = pack_images(args.videos, folder, args)
            report["images"] = bench_view(images, "images", 128, 30, args)
        if "fill" in args.parts:
            report["fill"] = bench_fill(args)
        if "plan" in args.parts:
            report["plan"] = bench_plan(args)
        if "wait" in args.parts:
            report["wait"] = bench_wait(folder, args)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
