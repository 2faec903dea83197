"""On demand: random kills every minute for N minutes on two ranks, then everything is compared.

    python tests/soak.py --minutes 10 [--every 60] [--seed 0]

A run of synthetic steps is killed (one rank or all, SIGKILL or SIGTERM) at random times and started
again, until the minutes are over; then it is let finish. Its record, its ledgers and its last
checkpoint must be those of an uninterrupted run, bit by bit; resident memory and open files of a
start must not grow. Not collected by pytest.
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def start(output: Path, steps: int) -> subprocess.Popen:
    """Two ranks in a session of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--preset", "debug", "--num_sampled_data", str(steps * 16), "--frequent", "50"]
    flags += ["--ckpt_interval", "200", "--output", str(output)]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "training.train_univit", *flags],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks of a launcher."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [c for c in children if "training.train_univit" in " ".join(c.cmdline())]
    except psutil.NoSuchProcess:
        return []


def strike(process: subprocess.Popen, rng: random.Random) -> str:
    """Kill a rank, all ranks, or ask the launcher to stop; waits until everything is gone."""
    ranks = workers(process)
    kind = rng.choice(["one rank", "all ranks", "SIGTERM"])
    if kind == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    for rank in ranks[: 1 if kind == "one rank" else len(ranks)] if kind != "SIGTERM" else ():
        rank.kill()
    process.wait(120)
    return kind


def watch(process: subprocess.Popen, seconds: float) -> list[tuple[int, int]]:
    """(resident bytes, open files) of rank 0 every second, for a while."""
    seen, until = [], time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        for rank in workers(process)[:1]:
            try:
                seen.append((rank.memory_info().rss, rank.num_fds()))
            except psutil.NoSuchProcess:
                continue
        time.sleep(1)
    return seen


def same(first: Path, second: Path, steps: int) -> list[str]:
    """What differs between two finished runs: lines of records, and tensors bit by bit (headers of
    safetensors files list their metadata in any order)."""
    names = ["metrics.jsonl", "consumed-00000.jsonl", "consumed-00001.jsonl"]
    differing = [n for n in names if (first / n).read_bytes() != (second / n).read_bytes()]
    left, right = (tensors(folder / f"checkpoints/step_{steps:08d}") for folder in (first, second))
    odd = left.keys() ^ right.keys()
    odd |= {name for name in left.keys() & right.keys() if not left[name].equal(right[name])}
    return differing + sorted(odd)


def tensors(folder: Path) -> dict:
    """All tensors of a checkpoint by file and name."""
    return {
        f"{file.name}/{name}": tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def main() -> int:
    """Soak, compare, report; exit code 1 when anything differs or grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=60, help="mean seconds between two kills")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp())
    killed, straight = folder / "killed", folder / "straight"
    until, kinds, seen = time.monotonic() + 60 * args.minutes, [], []
    process = start(killed, args.steps)
    while time.monotonic() < until and process.poll() is None:
        seen = watch(process, rng.uniform(0.5, 1.5) * args.every) or seen
        if process.poll() is None:
            kinds.append(strike(process, rng))
            process = start(killed, args.steps)
    seen = watch(process, 1e9) or seen
    start(straight, args.steps).wait()
    differing = same(killed, straight, args.steps)
    quarter = max(1, len(seen) // 4)
    # medians: a save in flight holds some files and memory more
    early, late = (
        [statistics.median(s[i] for s in part) for i in (0, 1)]
        for part in (seen[quarter : 2 * quarter], seen[-quarter:])
    )
    growth = [after / max(1, before) for before, after in zip(early, late, strict=True)]
    report = {
        "kills": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "differing": differing,
        "resident_growth": round(growth[0], 3),
        "open_files_growth": round(growth[1], 3),
        "watched_s": len(seen),
    }
    print(json.dumps(report, indent=1))
    shutil.rmtree(folder)
    return int(bool(differing) or growth[0] > 1.05 or growth[1] > 1.0)


if __name__ == "__main__":
    sys.exit(main())
