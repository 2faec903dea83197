"""What a packed folder holds, counted from its records alone: no sample is read.

Cost: one pass over the records in memory.
"""

import json
from collections import Counter

import numpy as np

from .manifest import Manifest

QUANTILES = (0.05, 0.5, 0.95)


def statistics(manifest: Manifest) -> dict:
    """Counts, sizes, token budgets, motion, static share and rejects of a packed folder."""
    samples = [sample for shard in manifest.shards for sample in shard["samples"]]
    videos = [sample for sample in samples if sample["kind"] == "video"]
    static = sum(sample["is_static"] for sample in videos)
    size = sum(shard["size"] for shard in manifest.shards)
    return {
        "shards": len(manifest.shards),
        "samples": len(samples),
        "videos": len(videos),
        "images": len(samples) - len(videos),
        "bytes": size,
        "bytes_per_sample": round(size / max(len(samples), 1)),
        "tokens": _spread([sample["num_patches"] for sample in samples]),
        "mean_motion": _spread([sample.get("mean_motion", 0.0) for sample in videos]),
        "mean_residual": _spread([sample.get("mean_residual", 0.0) for sample in videos]),
        "duplicate_sources": _repeated([s.get("source_sha256") for s in samples]),
        "static_videos": static,
        "static_share": round(static / max(len(videos), 1), 4),
        "notes": dict(Counter(_kind(note) for s in samples for note in s.get("notes", ()))),
        "rejected": dict(manifest.rejected_by_reason()),
        "settings": manifest.settings,
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Smallest, 5 %, median, mean, 95 % and largest of a list; empty for an empty one."""
    if not values:
        return {}
    low, middle, high = np.quantile(values, QUANTILES)
    named = (min(values), low, middle, np.mean(values), high, max(values))
    return {
        name: round(float(value), 3)
        for name, value in zip(("min", "p5", "median", "mean", "p95", "max"), named, strict=True)
    }


def _repeated(digests: list[str | None]) -> int:
    """Samples whose source has the bytes of an earlier one."""
    known = [digest for digest in digests if digest]
    return len(known) - len(set(known))


def _kind(note: str) -> str:
    """A note without its numbers: "salvaged 60 of 90 frames" is one kind."""
    return note.split()[0]


def statistics_table(stats: dict) -> str:
    """The same as lines of text."""
    lines = []
    for key, value in stats.items():
        if key in ("notes", "rejected"):
            lines.append(f"{key:>16}  {sum(value.values())}")
            counts = Counter(value).most_common()
            lines += [f"{'':>16}  {name}: {count}" for name, count in counts]
        elif key == "settings":
            lines.append(f"{key:>16}  {json.dumps(value)}")
        elif isinstance(value, dict):
            cells = "  ".join(f"{name} {number:g}" for name, number in value.items())
            lines.append(f"{key:>16}  {cells or '-'}")
        else:
            lines.append(f"{key:>16}  {value}")
    return "\n".join(lines)
