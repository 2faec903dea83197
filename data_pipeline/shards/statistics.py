"""What a packed folder holds, counted from its records alone: no sample is read.

Cost: one pass over the records in memory.
"""

import json
from collections import Counter

import numpy as np

from .manifest import Manifest


def statistics(manifest: Manifest) -> dict:
    """Counts, sizes, token budgets, motion, static share and rejects of a packed folder."""
    samples = [sample for shard in manifest.shards for sample in shard["samples"]]
    videos = [sample for sample in samples if sample["kind"] == "video"]
    static = sum(sample["is_static"] for sample in videos)
    size = sum(shard["size"] for shard in manifest.shards)
    # absent in records of older packings
    digests = [sample["source_sha256"] for sample in samples if sample.get("source_sha256")]
    # a note without its numbers: "salvaged 60 of 90 frames" is one kind
    all_notes = [note for sample in samples for note in sample.get("notes", ())]
    notes = Counter(note.split()[0] for note in all_notes)
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
        "duplicate_sources": len(digests) - len(set(digests)),
        "static_videos": static,
        "static_share": round(static / max(len(videos), 1), 4),
        "notes": dict(notes),
        "rejected": dict(manifest.rejected_by_reason()),
        "settings": manifest.settings,
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Smallest, 5 %, median, mean, 95 % and largest of a list; empty for an empty one."""
    if not values:
        return {}
    # percentiles beside the extremes, which one odd clip decides
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    spread = {
        "min": min(values),
        "p5": low,
        "median": middle,
        "mean": np.mean(values),
        "p95": high,
        "max": max(values),
    }
    return {name: round(float(value), 3) for name, value in spread.items()}


def statistics_table(stats: dict) -> str:
    """The same as lines of text."""
    lines = []
    for key, value in stats.items():
        below: list[str] = []
        if key in ("notes", "rejected"):
            text = sum(value.values())
            counts = Counter(value).most_common()
            below = [f"{'':>16}  {name}: {count}" for name, count in counts]
        elif key == "settings":
            text = json.dumps(value)
        elif isinstance(value, dict):
            numbers = [f"{name} {number:g}" for name, number in value.items()]
            text = "  ".join(numbers) or "-"
        else:
            text = value
        lines += [f"{key:>16}  {text}", *below]
    return "\n".join(lines)
