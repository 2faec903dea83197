"""One cell of the experiment after the other, by the project's own commands.

    OUTPUT/sets/SET             clips, lists and, where there are events, events.jsonl
    OUTPUT/packed/PACKING/SET   lists, and packed shards of both splits with the classes as labels
    OUTPUT/cells/CELL.json      what a cell found: among it a digit per validation clip, how many of
                                the probe's heads are right; a cell that is there is not run again

Everything else of a cell (its checkpoints, its probe) is removed when it is done.
"""

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.evidence_plan import SIZE, Cell, Packing
from data_pipeline.embedded.clips import check_settings
from model_factory.files import json_line, write_atomically, write_json
from model_factory.registry import packing_config, packing_name
from training.record.speed import encoder_flops

MODEL = "llava_vit_tiny_ln"


@dataclass(frozen=True)
class Recipe:
    """How every cell learns: clips, steps, and the flags of the training."""

    num_train: int = 3200
    num_val: int = 480
    steps: int = 800
    batch: int = 64
    lr: float = 1e-3
    margin: float = 0.2
    scale: float = 16.0
    probe_epochs: int = 20
    probe_seeds: int = 3  # at most 9, since hits are digits
    ranks: int = 2
    scene: str = "mixed"  # of brief_events
    difficulty: str = "easy"  # of motion_shapes


class Runner:
    """Runs cells below one folder, all of one recipe: ValueError for the folder of another."""

    def __init__(self, output: Path, recipe: Recipe, videos: list[Path]):
        output.mkdir(parents=True, exist_ok=True)
        self._output = output
        self._recipe = recipe
        check_settings(
            output / "recipe.json",
            settings=list(asdict(recipe).values()),
            names=", ".join(asdict(recipe)),
        )
        self._videos = videos

    def result(self, cell: Cell) -> Path:
        """Where a cell's figures are."""
        return self._output / "cells" / f"{cell.name}.json"

    def run(self, cell: Cell) -> None:
        """Make what the cell needs, train, probe, write the figures."""
        shards = self._packed(cell.packing)
        work = self._output / "work" / cell.name
        shutil.rmtree(work, ignore_errors=True)
        started = time.perf_counter()
        self._train(cell, shards / cell.dataset / "train", work)
        trained = time.perf_counter()
        record = self._probe(cell, shards, work)
        clips, hits = _hits(work / "probe" / record["predictions"])
        listing = hashlib.sha256("\n".join(clips).encode()).hexdigest()
        facts = {
            "cell": asdict(cell),
            "recipe": asdict(self._recipe),
            "tokens": cell.tokens,
            "gflops": round(_gflops(cell.tokens), 3),
            "top1": record["last_epoch"]["top1"],
            "clips_sha256": listing,
            "hits": "".join(map(str, hits)),  # right heads of each clip, of probe_seeds
            "seconds_training": round(trained - started, 1),
            "seconds_probe": round(time.perf_counter() - trained, 1),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
        }
        self.result(cell).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.result(cell), facts)
        shutil.rmtree(work)

    def _train(self, cell: Cell, shards: Path, work: Path) -> None:
        recipe = self._recipe
        view = {"codec_ratio": 1, "frame_ratio": 0, "max_tokens": cell.budget}
        if cell.frames is not None:
            view = {"codec_ratio": 0, "frame_ratio": 1, "max_tokens": cell.budget}
            view |= {"max_frames": cell.frames.count, "scale": cell.frames.scale}
        settings = {f"heads.0.stream.view.{name}": value for name, value in view.items()}
        # each clip has one class
        settings |= {
            "heads.0.stream.label_width": 1,
            "heads.0.stream.labels_per_step": 1,
            "heads.0.loss.margin": recipe.margin,
            "heads.0.loss.scale": recipe.scale,
            "checkpoint.every": recipe.steps,
        }
        flags = [word for pair in settings.items() for word in ("--set", f"{pair[0]}={pair[1]}")]
        _run(
            *_launcher(recipe.ranks),
            *("-m", "training.train_univit", "--preset", "demo", "--list_datasets", shards),
            *("--list_batch_size", recipe.batch // recipe.ranks),
            *("--num_sampled_data", recipe.steps * recipe.batch),
            *("--lr", recipe.lr, "--seed", cell.seed, "--output", work / "run", *flags),
        )

    def _probe(self, cell: Cell, shards: Path, work: Path) -> dict:
        flags = ["--model_family", "llava_vit_codec", "--K_keep", cell.budget]
        if cell.frames is not None:
            flags = ["--num_frames", cell.frames.count, "--frame_scale", cell.frames.scale]
        _run(
            *_launcher(self._recipe.ranks),
            *("eval_encoder/attentive_probe.py", "--dataset", cell.dataset),
            *("--data_root", shards, "--model_weight", work / "run", "--model_name", MODEL),
            *("--default_epoch", self._recipe.probe_epochs, "--default_lr_list", "0.001"),
            *("--num_seeds", self._recipe.probe_seeds, "--output", work / "probe", *flags),
        )
        (line,) = (work / "probe" / "results.jsonl").read_text().splitlines()
        return json.loads(line)

    def _packed(self, packing: Packing) -> Path:
        """The folder of a packing, which is made if it is not there."""
        folder = self._output / "packed" / packing.name
        target = folder / packing.dataset
        if (target / "packed").is_file():
            return folder
        clips = self._clips(packing.dataset)
        num_classes = len((clips / "classes.txt").read_text().splitlines())
        for split in ("train", "val"):
            shards = target / split
            # what a killed run left is gone on with
            _run("-m", "data_pipeline", "pack", clips / f"{split}.csv", "--output", shards,
                    "--workers", os.cpu_count(), *packing.flags)  # fmt: skip
            labels = _write_labels(clips / f"{split}.csv", target / f"{split}_labels.jsonl")
            _run("-m", "data_pipeline", "label", shards, "--from", labels, "--num-labels", 1,
                 "--num-classes", num_classes)  # fmt: skip
            shutil.copyfile(clips / f"{split}.csv", target / f"{split}.csv")
        (target / "packed").touch()
        return folder

    def _clips(self, dataset: str) -> Path:
        """The folder of a set, which is made if it is not there."""
        recipe = self._recipe
        folder = self._output / "sets" / dataset
        counts = ("--num-train", recipe.num_train, "--num-val", recipe.num_val, "--size", SIZE)
        if dataset == "brief_events":
            words = ["brief-events", folder, *counts, "--scene", recipe.scene]
        elif dataset == "motion_shapes":
            words = ["motion-shapes", folder, *counts, "--difficulty", recipe.difficulty]
        else:
            words = ["tempo", folder, *self._videos, *counts]
        _run("-m", "data_pipeline", *words)
        return folder


def _write_labels(clips: Path, output: Path) -> Path:
    """Labels of a list as `label --from` reads them."""
    with open(clips, newline="", encoding="utf-8") as stream:
        lines = [
            json_line({"source": name, "labels": [int(label)]})
            for name, label in csv.reader(stream)
        ]
    write_atomically(output, b"".join(lines))
    return output


def _hits(predictions: Path) -> tuple[list[str], list[int]]:
    """Clips of a probe, and how many of its heads are right on each."""
    with open(predictions, newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))[1:]
    return [row[0] for row in rows], [row[2:].count(row[1]) for row in rows]


def _gflops(tokens: int) -> float:
    """Of encoding a clip: the forward third of a step."""
    config = packing_config(packing_name(MODEL))
    return encoder_flops(config, tokens=tokens, squares=tokens**2) / 3e9


def _launcher(ranks: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))


def _run(*words: object) -> None:
    """Run this Python with these words; its error output is shown where it fails."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
