"""On demand: random bits are flipped in every kind of file that the system writes; no flip may
change what is trained, exported or reported without a message.

    python tests/flips.py [--flips 2000] [--seed 0] [--only NAME] [--folder DIR] [--output FILE]

The commands of kills.py make the files once (with --folder they stay, and are used again). Then a
bit of a file is flipped, what reads this kind of file reads it, and the bit is put back. Outcomes:

    refused    an error of one of our kinds, which names the file or its folder
    told       the log names it, and what was read is as before: made again, or an older one used
    harmless   what was read is as before, and nothing depends on the bit
    SILENT     what was read differs, and nobody said so
    CRASH      an error that is no answer to damaged files, or one that names nothing

Not collected by pytest. Exit code 1 when there is one of the last two.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from kills import ROOT, STAGES, finish, start

OUTCOMES = ("refused", "told", "harmless", "SILENT", "CRASH")


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and what reads them: a function to a text that stands for all that it
    read. Problems that it returns as lines, as verify does, it raises as Found."""

    name: str
    files: list[Path]
    read: Callable[[], str]


class Found(ValueError):
    """Problems that a reader lists instead of raising."""


class Lines(logging.Handler):
    """What was logged since it was cleared."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.lines.append(record.getMessage())


def digest_of(*parts: object) -> str:
    """sha256 over tensors, arrays, mappings of them, and what else has a text."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            part = digest_of(*(item for pair in sorted(part.items()) for item in pair))
        if isinstance(part, torch.Tensor):
            part = part.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(str(part).encode())
    return digest.hexdigest()


def make_files(folder: Path) -> dict[str, Path]:
    """Run the commands once; {stage: its output}."""
    from data_pipeline.embedded.motion_shapes import write_motion_shapes

    places = {stage.name: folder / stage.name for stage in STAGES}
    places |= {"clips": folder / "motion_shapes", "work": folder}
    done = folder / "made"
    if not done.is_file():
        write_motion_shapes(places["clips"], num_train=24, num_val=8, workers=2)
        for stage in STAGES:
            finish(start(stage, places), stage)
        done.touch()
    return places


def files_below(folder: Path, *patterns: str) -> list[Path]:
    """Files of a folder that match, sorted."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def shards(places: dict[str, Path]) -> list[Kind]:
    """A packed folder: as training reads it, and as `verify` does."""
    from data_pipeline.loading.samples import sequential_batches
    from data_pipeline.shards.manifest import load_manifest
    from data_pipeline.shards.verify import verify

    packed = places["pack"]

    def read_all() -> str:
        manifest = load_manifest(packed)
        parts = []
        for batch in sequential_batches(manifest, range(len(manifest)), 8, "codec"):
            parts += [batch.pixels, batch.patch_positions, batch.cu_seqlens, batch.sample_ids]
        return digest_of(manifest.settings, manifest.sources(), *parts)

    def verify_all() -> str:
        problems = verify(load_manifest(packed))
        if problems:
            raise Found("\n".join(problems))
        return "as written"

    read_by_training = files_below(packed, "*.tar", "video-*.json", "manifest.json")
    return [
        Kind("shards, read", read_by_training, read_all),
        Kind("shards, verify", files_below(packed, "*"), verify_all),
    ]


def clusters(places: dict[str, Path]) -> list[Kind]:
    """Features, centroids and labels."""
    from data_pipeline.clustering.labels import load_labels
    from data_pipeline.clustering.pipeline import label
    from data_pipeline.shards.manifest import load_manifest

    manifest = load_manifest(places["pack"])
    again = places["work"] / "labelled_again"

    def label_again() -> str:
        found = label(
            manifest,
            centroids_folder=places["cluster"],
            num_labels=4,
            output=again,
            features_folder=places["features"],
        )
        return digest_of(found)

    def read_labels() -> str:
        labels, num_classes = load_labels(places["label"], manifest)
        return digest_of(labels, num_classes)

    return [
        Kind("features", files_below(places["features"], "*"), label_again),
        Kind("centroids", files_below(places["cluster"], "*.npy", "*.json"), label_again),
        Kind("labels", files_below(places["label"], "labels.*"), read_labels),
    ]


def progress_of_clustering(places: dict[str, Path]) -> list[Kind]:
    """What a killed `cluster` goes on from."""
    from data_pipeline.clustering.progress import SavedProgress

    folder = places["work"] / "half_clustered"
    identity = {"manifest_sha256": "0" * 64, "seed": 1}
    rows = np.random.default_rng(0).normal(size=(12, 16)).astype(np.float32)
    SavedProgress(folder, identity).save(rows, 5)

    def go_on() -> str:
        centroids, iterations = SavedProgress(folder, identity).centroids()
        return digest_of(centroids if centroids is not None else "anew", iterations)

    return [Kind("progress of cluster", files_below(folder, "**/*"), go_on)]


def checkpoints(places: dict[str, Path]) -> list[Kind]:
    """A run's checkpoints, as a start and as an export read them."""
    from training.checkpoint.folder import read_state, verify_checkpoint
    from training.export import read_encoder

    run = places["train"]
    newest = max((run / "checkpoints").glob("step_*"))

    def resume() -> str:
        problems = verify_checkpoint(newest)
        if problems:
            raise Found(f"{newest}: {'; '.join(problems)}")
        return digest_of(read_state(newest))

    def export() -> str:
        encoder, _, step = read_encoder(newest)
        return digest_of(dict(encoder.state_dict()), encoder.config.to_dict(), step)

    files = files_below(newest, "*")
    return [Kind("checkpoint, resume", files, resume), Kind("checkpoint, export", files, export)]


def records(places: dict[str, Path], ranks, log: logging.Logger) -> list[Kind]:
    """metrics.jsonl and consumed-*.jsonl at a resume."""
    from training.checkpoint.resume import find_commit
    from training.record.files import restore_records

    run = places["train"]
    copy = places["work"] / "resumed"
    names = ("metrics.jsonl", "consumed-00000.jsonl")

    def resume() -> str:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        commit = find_commit(copy, "auto", ranks, log)
        restore_records(copy, commit, ranks, log)
        return digest_of(*((copy / name).read_bytes() for name in names))

    return [Kind("records of a run", [run / name for name in names], resume)]


def exports(places: dict[str, Path]) -> list[Kind]:
    """hf/, backbone.pt and a LLaVA tower, as our own loaders read them."""
    from eval_encoder.lmm.model.open import open_tower
    from model_factory.backbone import load_backbone
    from model_factory.llava.tower_folder import export_tower
    from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

    exported = places["export"]
    tower = places["work"] / "tower"
    if not tower.exists():
        export_tower(exported / "hf", tower)
    ours = tower / "tower"  # what open_tower reads of it

    def described(model) -> str:
        fields = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
        return digest_of(dict(model.state_dict()), json.dumps(fields, sort_keys=True, default=str))

    def open_hf() -> str:
        return described(LlavaViTPackingModel.from_pretrained(exported / "hf"))

    def open_backbone() -> str:
        return described(load_backbone(exported / "backbone.pt", None))

    def open_llava() -> str:
        model, processor = open_tower(tower)
        return digest_of(described(model), processor.to_dict())

    weights = ("config.json", "*.safetensors", "SHA256SUMS")
    return [
        Kind("hf", files_below(exported / "hf", *weights), open_hf),
        Kind("backbone", files_below(exported, "backbone*", "SHA256SUMS"), open_backbone),
        Kind(
            "LLaVA tower",
            files_below(ours, *weights, "preprocessor_config.json"),
            open_llava,
        ),
    ]


def caches(places: dict[str, Path]) -> list[Kind]:
    """Stored features of the probe (fp16) and of the multimodal probe (int16)."""
    from eval_encoder.feature_cache import FeatureCache

    kinds = []
    for name, dtype in (("probe", torch.float16), ("multimodal", torch.int16)):
        folder = places["work"] / f"cache_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(-999, 999, (8, 6, 16), generator=generator).to(dtype)

        def read(folder=folder, rows=rows) -> str:
            cache = FeatureCache(folder, {"key": 1}, memory_bytes=0, identity=str)
            found = []
            for number, row in enumerate(rows):
                stored = cache.get(number, comes_again=False)
                if stored is None:  # as a probe does: made again
                    cache.put(number, row, comes_again=False)
                    stored = row
                found.append(stored)
            return digest_of(*found)

        read()
        kinds.append(Kind(f"cache, {name}", files_below(folder, "*/*/*.npy"), read))
    return kinds


def results(places: dict[str, Path]) -> list[Kind]:
    """What a probe reports."""
    from eval_encoder.probe.compare import read_results

    report = places["probe"] / "report"

    def read() -> str:
        return digest_of(json.dumps(read_results(report), sort_keys=True))

    return [Kind("results of a probe", [report / "results.jsonl"], read)]


def outcome_of(kind: Kind, path: Path, wanted: str, log: Lines) -> tuple[str, str]:
    """(outcome, what was said) of reading a kind of files of which one is flipped."""
    names = (path.name, path.parent.name, path.stem)
    log.lines.clear()
    try:
        found = kind.read()
    except (ValueError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
        return ("refused" if any(name in said for name in names) else "CRASH"), said
    except Exception as error:
        return "CRASH", f"{type(error).__name__}: {error}"
    said = "\n".join(log.lines)
    is_named = any(name in said for name in names)
    if found != wanted:
        return ("told" if is_named else "SILENT"), said
    return ("told" if is_named else "harmless"), said


def flip(kind: Kind, rng: random.Random, wanted: str, log: Lines) -> tuple[str, str]:
    """Flip one bit, read, put it back; (outcome, where and what was said)."""
    path = rng.choice(kind.files)
    whole = path.read_bytes()
    bit = rng.randrange(8 * len(whole))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    stamp = path.stat()
    path.write_bytes(flipped)
    try:
        outcome, said = outcome_of(kind, path, wanted, log)
    finally:
        path.write_bytes(whole)
        # caches know a file by its time of change
        with contextlib.suppress(OSError):
            os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    return outcome, f"{path.name} byte {bit // 8} bit {bit % 8}: {said:.300}"


def table(counts: dict[str, Counter]) -> str:
    """Markdown: kinds by outcomes."""
    lines = [f"| kind | flips | {' | '.join(OUTCOMES)} |", f"| --- |{' ---: |' * 6}"]
    total = Counter()
    for name, found in counts.items():
        total += found
        cells = " | ".join(str(found[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {name} | {found.total()} | {cells} |")
    cells = " | ".join(str(total[outcome]) for outcome in OUTCOMES)
    return "\n".join([*lines, f"| all | {total.total()} | {cells} |"]) + "\n"


def main() -> int:
    """Flip, read, report; exit code 1 when a flip was silent or crashed a reader."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=2000, help="in all, spread over the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds whose name has this in it")
    parser.add_argument("--folder", type=Path, help="where the files are made, and stay")
    parser.add_argument("--output", type=Path, help="write the table here as well")
    args = parser.parse_args()
    from training.distributed import process_group

    folder = args.folder or Path(tempfile.mkdtemp(prefix="flips_"))
    folder.mkdir(parents=True, exist_ok=True)
    log = Lines()
    univit = logging.getLogger("univit")
    univit.addHandler(log)
    univit.propagate = False
    places = make_files(folder)
    with process_group(600.0) as ranks:
        kinds = [
            *shards(places),
            *clusters(places),
            *progress_of_clustering(places),
            *checkpoints(places),
            *records(places, ranks, univit),
            *exports(places),
            *caches(places),
            *results(places),
        ]
        kinds = [kind for kind in kinds if args.only is None or args.only in kind.name]
        counts = strike(kinds, args.flips, random.Random(args.seed), log)
    text = table(counts)
    print(text)
    if args.output is not None:
        args.output.write_text(text)
    if args.folder is None:
        shutil.rmtree(folder)
    return int(any(found["SILENT"] or found["CRASH"] for found in counts.values()))


def strike(kinds: list[Kind], num_flips: int, rng: random.Random, log: Lines) -> dict[str, Counter]:
    """{kind: {outcome: how often}}; what is silent or crashes is printed as it happens."""
    share, rest = divmod(num_flips, len(kinds))
    counts = {}
    for place, kind in enumerate(kinds):
        wanted = kind.read()
        found = Counter()
        for _ in range(share + (place < rest)):
            outcome, said = flip(kind, rng=rng, wanted=wanted, log=log)
            found[outcome] += 1
            if outcome in ("SILENT", "CRASH"):
                print(f"{outcome} {kind.name}: {said}", flush=True)
        if kind.read() != wanted:
            raise RuntimeError(f"{kind.name}: files are not as they were before the flips")
        counts[kind.name] = found
        print(f"{kind.name}: {dict(found)}", flush=True)
    return counts


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
