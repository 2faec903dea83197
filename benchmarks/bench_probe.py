"""The probe: what a bank of heads costs beside one head, and what stored features save.

    bank    one epoch over raw clips, base encoder, 8 frames of 196 tokens: 12 heads against 1
    cache   epochs after the first with stored features against epochs without, same encoder
    read    clips per second of the packer's reader against decord's, 8 frames of 224 px of the
            files that `--videos` names, both in two child processes, taking turns

Prints JSON; ratios are of runs in this process, one after the other. Run it alone on the machine.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.embedded.motion_shapes import write_motion_shapes
from eval_encoder.clip_views import Look
from eval_encoder.probe.benchmarks import LabelledList, read_lists
from eval_encoder.probe.clips import RawClips
from eval_encoder.probe.config import build_config, build_parser
from eval_encoder.probe.encoders import build_encoder
from eval_encoder.probe.features import ClipFeatures
from eval_encoder.probe.trainer import ProbeTrainer
from training.distributed import process_group

TWELVE = ("--default_lr_list", "1e-4", "3e-4", "1e-3", "3e-3", "--num_seeds", "3")


class Bench:
    """Clips, encoder and a group of one process."""

    def __init__(self, root: Path, clips: int, ranks):
        self._root, self._ranks = root, ranks
        write_motion_shapes(root / "motion_shapes", num_train=clips, num_val=1, workers=2)
        flags = ["--dataset", "motion_shapes", "--data_root", str(root), "--model_weight", "random"]
        flags += ["--num_frames", "8", "--input_size", "224", "--batch_size", "4"]
        self._flags = [*flags, "--feature_cache_gb", "0", "--holdout", "0.01"]
        config = self.config()
        self.encoder = build_encoder(config.input, config.model_name, "random", 0).to(ranks.device)

    def config(self, *flags: str):
        """Probe configuration with further flags."""
        return build_config(build_parser().parse_args([*self._flags, *flags]))

    def epochs(self, *flags: str) -> list[float]:
        """Seconds of each epoch of a probe, judging included."""
        config = self.config(*flags)
        lists = read_lists(config.dataset, config.data_root)
        train, val = (ClipFeatures(c, config, self.encoder, self._ranks.device) for c in lists)
        probe = ProbeTrainer(
            config, self.encoder.width, train, val, self._ranks, logging.getLogger("bench")
        )
        ends = [0.0, *(epoch.seconds for epoch in probe.run().epochs)]
        return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def bench_bank(bench: Bench) -> dict:
    """One epoch each, after one to warm up; the better of two."""
    bench.epochs("--default_epoch", "1")
    one = min(bench.epochs("--default_epoch", "2"))
    twelve = min(bench.epochs("--default_epoch", "2", *TWELVE))
    return {
        "one_head_s": round(one, 2),
        "twelve_heads_s": round(twelve, 2),
        "ratio": round(twelve / one, 3),
    }


def bench_cache(bench: Bench, folder: Path) -> dict:
    """Medians of the epochs after the first, twelve heads and one."""
    report = {}
    for name, heads in (("one_head", ()), ("twelve_heads", TWELVE)):
        plain = ("--train_views", "1", "--default_epoch", "3", *heads)
        without = statistics.median(bench.epochs(*plain)[1:])
        stored = bench.epochs(*plain, "--cache_dir", str(folder / name))
        after = statistics.median(stored[1:])
        report[name] = {
            "epoch_without_s": round(without, 2),
            "first_epoch_s": round(stored[0], 2),
            "later_epoch_s": round(after, 3),
            "ratio": round(without / after, 1),
        }
    return report


def bench_read(videos: list[Path], repeats: int) -> dict:
    """Clips per second by reader and file, the best of `repeats` turns."""
    report = {}
    for video in videos:
        names = [video.name] * 8  # a batch of one file, so that ratios of files can be told apart
        clips = LabelledList(video.parent, "train", names, np.zeros(len(names), np.int64), 1)
        seconds: dict[str, list[float]] = {"av": [], "decord": []}
        readers = {}
        for decoder in seconds:
            flags = [
                "--decoder",
                decoder,
                "--dali_py_num_workers",
                "2",
                "--decord_num_threads",
                "1",
            ]
            config = build_config(build_parser().parse_args(flags))
            readers[decoder] = RawClips(clips, config.input, size=224, patch_size=16)
        looks = [Look(number) for number in range(len(names))]
        for turn in range(repeats + 1):
            for decoder, reader in readers.items():
                started = time.perf_counter()
                for _ in reader.packs(looks, batch_size=4):
                    pass
                if turn:  # the first one starts the child processes
                    seconds[decoder].append(time.perf_counter() - started)
        rates = {decoder: len(names) / min(taken) for decoder, taken in seconds.items()}
        report[video.name] = {
            "ours_per_s": round(rates["av"], 1),
            "decord_per_s": round(rates["decord"], 1),
            "ratio": round(rates["av"] / rates["decord"], 2),
        }
    return report


def main() -> None:
    """Run the parts that were asked for and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("bank", "cache", "read")
    parser.add_argument("--parts", nargs="+", choices=parts, default=["bank", "cache"])
    parser.add_argument("--videos", nargs="+", type=Path, default=[], help="files of part read")
    parser.add_argument("--clips", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, process_group() as ranks:
        bench = Bench(Path(name), args.clips, ranks)
        report = {"clips": args.clips, "device": str(ranks.device)}
        if "bank" in args.parts:
            report["bank"] = bench_bank(bench)
        if "cache" in args.parts:
            report["cache"] = bench_cache(bench, Path(name) / "features")
        if "read" in args.parts:
            report["read"] = bench_read(args.videos, repeats=5)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
