"""Inputs -> shards: `python -m data_pipeline pack INPUT... --output DIR`.

Inputs (files, folders, text or CSV lists) become a fixed list of tasks; one task is one shard of
`samples_per_shard` inputs, built by `workers` child processes. A task whose record names the same
inputs and settings, and whose bytes are as recorded, is done and is skipped, so a killed run just
runs again and a damaged shard is repaired. Unusable inputs are rejected with a reason code,
counted, and listed in the record.
Cost: about 0.6 s per 224 px clip of 64 frames and core, a third of it the canonical stream.
"""

import csv
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..codec.decompose import DECOMPOSITION_VERSION
from ..codec.open_video import is_image, is_video
from ..errors import MissingData
from .isolation import SamplePool
from .manifest import Manifest, load_manifest, write_manifest
from .sample_builder import SampleConfig
from .schema import SCHEMA_VERSION
from .writer import file_sha256, index_text, write_shard

LIST_SUFFIXES = (".txt", ".csv")


@dataclass(frozen=True)
class PackConfig:
    """How a folder of shards is made. `wall_seconds` is the limit of one input."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    samples_per_shard: int = 1000
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    wall_seconds: float = 300.0
    name: str = "video"

    def __post_init__(self):
        for name in ("samples_per_shard", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")

    def settings(self) -> dict:
        """What decides the bytes of a shard; stored in its record."""
        return {
            "schema_version": SCHEMA_VERSION,
            "decomposition_version": DECOMPOSITION_VERSION,
            **asdict(self.sample),
            "samples_per_shard": self.samples_per_shard,
        }


def list_inputs(arguments: list[str | Path], report=print) -> list[tuple[Path, str]]:
    """Expand files, folders and lists into (path, name stored in the shard), in a stable order.

    Folders give their videos and images, sorted, named relative to the folder. Lists give the first
    column of every line, relative to the list's folder. Raises MissingData for an argument that
    does not exist or names nothing.
    """
    inputs: list[tuple[Path, str]] = []
    for argument in map(Path, arguments):
        if argument.is_dir():
            files = sorted(path for path in argument.rglob("*") if not path.is_dir())
            known = [path for path in files if is_video(path) or is_image(path)]
            inputs += [(path, path.relative_to(argument).as_posix()) for path in known]
            if len(known) < len(files):
                others = sorted(
                    {path.suffix or path.name for path in files} - {p.suffix for p in known}
                )
                report(
                    f"{len(files) - len(known)} files of {argument} are neither videos nor images "
                    f"by name and are left out: {', '.join(others[:10])}"
                )
        elif argument.suffix.lower() in LIST_SUFFIXES and argument.is_file():
            inputs += [(argument.parent / name, name) for name in _listed(argument)]
        elif argument.exists():
            inputs.append((argument, argument.name))
        else:
            raise MissingData(
                f"{argument} does not exist: give files, folders, or .txt/.csv lists of files"
            )
    if not inputs:
        raise MissingData(f"no video or image in {', '.join(map(str, arguments))}")
    return inputs


def _listed(path: Path) -> list[str]:
    """Names in a list: whole lines of a .txt, the first column of a .csv."""
    with open(path, newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines) if path.suffix.lower() == ".csv" else ([line] for line in lines)
        names = [row[0].strip() for row in rows if row]
    return [name for name in names if name]


def pack(
    inputs: list[tuple[Path, str]], output: Path, config: PackConfig, report=print
) -> Manifest:
    """Write all shards and the manifest; returns the manifest.
    `report` takes one progress line at a time.
    """
    output.mkdir(parents=True, exist_ok=True)
    size = config.samples_per_shard
    tasks = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    for stale in output.glob(".*.tmp"):
        stale.unlink(missing_ok=True)
    records = []
    with SamplePool(config.sample, config.workers, config.wall_seconds) as pool:
        for task, files in enumerate(tasks):
            records.append(_pack_task(pool, task, files, output, config))
            report(_progress_line(records, len(tasks)))
    write_manifest(output, records, config.settings())
    return load_manifest(output)


def _pack_task(pool, task: int, files, output: Path, config: PackConfig) -> dict:
    name = f"{config.name}-{task:06d}"
    settings = config.settings()
    inputs_sha256 = _inputs_sha256(files)
    done = _finished_record(output, name, inputs_sha256, settings)
    if done is not None:
        return done
    rejected: list[dict] = []

    def samples():
        for number, result in enumerate(pool.build_all(files)):
            if isinstance(result, dict):
                rejected.append(result)
                print(
                    f"rejected {result['source']}: {result['reason']}: {result['detail']}",
                    file=sys.stderr,
                )
            else:
                yield f"{task:06d}_{number:06d}", *result

    return write_shard(output, name, samples(), rejected, settings, inputs_sha256)


def _inputs_sha256(files) -> str:
    """Identity of a task: names, sizes and modification times of its inputs."""
    lines = []
    for path, source in files:
        status = path.stat() if path.exists() else None
        lines.append([source, *((status.st_size, status.st_mtime_ns) if status else (None, None))])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _finished_record(output: Path, name: str, inputs_sha256: str, settings: dict) -> dict | None:
    record_path, tar_path = output / f"{name}.json", output / f"{name}.tar"
    if not record_path.is_file() or not tar_path.is_file():
        return None
    record = json.loads(record_path.read_bytes())
    same = record["inputs_sha256"] == inputs_sha256 and record["settings"] == json.loads(
        json.dumps(settings)
    )
    index = output / f"{name}.tar.idx"
    whole = (
        tar_path.stat().st_size == record["size"]
        and file_sha256(tar_path) == record["sha256"]
        and index.is_file()
        and index.read_text() == index_text(record)
    )
    return record if same and whole else None


def _progress_line(records: list[dict], num_tasks: int) -> str:
    samples = sum(len(record["samples"]) for record in records)
    rejected = sum(len(record["rejected"]) for record in records)
    return f"packed shard {len(records)}/{num_tasks}: {samples} samples, {rejected} rejected"
