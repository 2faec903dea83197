"""What a probe leaves behind: one line of results.jsonl, and the public one-line text report."""

import json
from dataclasses import asdict
from pathlib import Path

from .probe_config import ProbeConfig
from .probe_trainer import Accuracy


def write_results(
    config: ProbeConfig,
    history: list[list[Accuracy]],
    num_clips: dict[str, int],
    unreadable: dict[str, str],
) -> dict:
    """Append to REPORT_DIR/results.jsonl and report_attentive_probe_<weights>.txt;
    returns the record.

    The headline is the last epoch of the best learning rate; the best epoch, which is picked on the
    validation set, is stored beside it.
    """
    last = max((scores[-1] for scores in history), key=lambda accuracy: accuracy.top1)
    best = max(
        (score for scores in history for score in scores), key=lambda accuracy: accuracy.top1
    )
    record = {
        "dataset": config.dataset,
        "family": config.family,
        "weight": config.model_weight,
        "model": config.model_name,
        "num_frames": config.num_frames,
        "num_tokens": config.num_tokens,
        "seed": config.seed,
        "last_epoch": asdict(last),
        "best_epoch": asdict(best),
        "by_lr": [asdict(scores[-1]) for scores in history],
        "clips": num_clips,
        "unreadable": unreadable,
    }
    config.report_dir.mkdir(parents=True, exist_ok=True)
    with open(config.report_dir / "results.jsonl", "a") as stream:
        stream.write(json.dumps(record) + "\n")
    weights = Path(config.model_weight).name
    with open(config.report_dir / f"report_attentive_probe_{weights}.txt", "a") as stream:
        stream.write(f"{config.dataset} {last.top1:.2f}\n")
    return record
