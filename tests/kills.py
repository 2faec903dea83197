"""On demand: every command that takes time is killed at random moments and started again; what it
leaves in the end must be, byte for byte, what an undisturbed one leaves.

    python tests/kills.py [--kills 40] [--seed 0] [--only pack probe] [--output DIR]

The stages are those of the way from clips to a judged encoder. Each runs undisturbed once, which
also says how long it takes; then it is struck by SIGKILL, with all its processes, at moments drawn
over that time, and started again with the same command until it ends by itself. Not collected by
pytest. With --output the undisturbed outputs stay there for a look.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

# What says when, where or how fast something ran, and is not what was computed.
PASSING = (
    "speed.jsonl",
    "run.json",  # number of starts
    "run.lock",
    "report.md",
    "throughput.png",
    "data_wait.png",
    "tensorboard/*",  # wall-clock times
    "checkpoints/*/manifest.json",  # hashes files whose metadata the library orders at random
)
PASSING_KEYS = ("wall_s", "encoder_s")


@dataclass(frozen=True)
class Stage:
    """One command: its arguments, with {name} for the output of a stage, its own or another's."""

    name: str
    arguments: tuple[str, ...]


SHAPE = ("--size", "112", "--gop", "64", "--budget", "98", "--full-frames", "8")
STAGES = (
    Stage(
        name="pack",
        arguments=(
            *("-m", "data_pipeline", "pack", "{clips}/clips", "--output", "{pack}"),
            *(*SHAPE, "--samples-per-shard", "4", "--workers", "2"),
        ),
    ),
    Stage(
        name="features",
        arguments=("-m", "data_pipeline", "features", "{pack}", "--output", "{features}"),
    ),
    Stage(
        name="cluster",
        arguments=(
            *("-m", "data_pipeline", "cluster", "{pack}", "--num-centroids", "12"),
            *("--iterations", "200", "--features", "{features}", "--output", "{cluster}"),
        ),
    ),
    Stage(
        name="label",
        arguments=(
            *("-m", "data_pipeline", "label", "{pack}", "--centroids", "{cluster}"),
            *("--features", "{features}", "--output", "{label}", "--num-labels", "4"),
        ),
    ),
    Stage(
        name="train",
        arguments=(
            *("-m", "training.train_univit", "--preset", "debug", "--output", "{train}"),
            *("--num_sampled_data", "1920", "--list_batch_size", "16", "--ckpt_interval", "10"),
        ),
    ),
    Stage(
        name="export",
        arguments=("-m", "training.export", "{train}", "--output", "{export}"),
    ),
    Stage(
        name="probe",
        arguments=(
            *("eval_encoder/attentive_probe.py", "--dataset", "motion_shapes"),
            *("--data_root", "{clips}/..", "--model_name", "llava_vit_tiny_ln"),
            *("--model_weight", "random", "--num_frames", "2", "--K_keep", "98"),
            *("--batch_size", "4", "--default_epoch", "3", "--input_size", "112"),
            *("--cache_dir", "{probe}/cache", "--save_report", "{probe}/report"),
        ),
    ),
)


def start(stage: Stage, places: dict[str, Path]) -> subprocess.Popen:
    """The stage's command in a session of its own, so that all its processes can be struck."""
    arguments = [part.format_map(places) for part in stage.arguments]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # last bits may depend on the number of threads
        "UNIVIT_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, stage: Stage) -> None:
    """Wait for the end; RuntimeError with what was printed where it is not a success."""
    _, printed = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{stage.name} ended with {process.returncode}:\n{printed[-4000:]}")


def strike(process: subprocess.Popen, after_s: float) -> bool:
    """SIGKILL to all processes of the command after a while; whether it was still running."""
    try:
        process.wait(after_s)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True


def contents(output: Path) -> dict[str, str]:
    """{relative path: digest} of what a finished stage is held to."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    return {
        path.relative_to(output).as_posix(): digest(path)
        for path in files
        if not any(fnmatch.fnmatch(path.as_posix(), f"*/{name}") for name in PASSING)
    }


def digest(path: Path) -> str:
    """Digest of a file; of JSON without what passes, of tensors without the order of their
    metadata, which the library does not fix."""
    if path.suffix == ".safetensors":
        parts = [
            f"{name} {tensor.dtype} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"
            for name, tensor in sorted(load_file(path).items())
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        kept = [json.dumps(lasting(json.loads(line)), sort_keys=True) for line in lines if line]
        data = "\n".join(kept).encode()
    return hashlib.sha256(data).hexdigest()


def lasting(value: object) -> object:
    """A JSON value without what passes."""
    if isinstance(value, dict):
        return {key: lasting(item) for key, item in value.items() if key not in PASSING_KEYS}
    if isinstance(value, list):
        return [lasting(item) for item in value]
    return value


def differences(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Paths whose contents differ or that only one side has."""
    names = sorted(first.keys() | second.keys())
    return [name for name in names if first.get(name) != second.get(name)]


def torture(stage: Stage, places: dict[str, Path], num_kills: int, rng: random.Random) -> dict:
    """Undisturbed once, then with kills, in the same place, since some files name it; what was
    found. The last output stays for the stages that follow."""
    output = places[stage.name]
    begun = time.monotonic()
    finish(start(stage, places), stage)
    duration = time.monotonic() - begun
    wanted = contents(output)
    shutil.move(output, places["work"] / f"{stage.name}_undisturbed")
    moments = []
    differing = set()
    while len(moments) < num_kills:
        after_s = rng.uniform(0.1, 1.0) * duration
        process = start(stage, places)
        if strike(process, after_s):
            moments.append(round(after_s / duration, 2))
            continue
        finish(process, stage)
        differing |= set(differences(wanted, contents(output)))
        shutil.rmtree(output)  # it came to its end: the next kill begins anew
    finish(start(stage, places), stage)
    differing |= set(differences(wanted, contents(output)))
    return {
        "stage": stage.name,
        "kills": len(moments),
        "seconds": round(duration, 1),
        "moments": moments,
        "files": len(wanted),
        "differing": sorted(differing),
    }


def main() -> int:
    """Strike, compare, report; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="in all, spread over the stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES])
    parser.add_argument("--output", type=Path, help="keep the undisturbed outputs here")
    args = parser.parse_args()
    work = args.output or Path(tempfile.mkdtemp(prefix="kills_"))
    work.mkdir(parents=True, exist_ok=True)
    places = {stage.name: work / stage.name for stage in STAGES}
    places |= {"clips": work / "motion_shapes", "work": work}
    from data_pipeline.embedded.motion_shapes import write_motion_shapes

    write_motion_shapes(places["clips"], num_train=24, num_val=8, workers=2)
    rng = random.Random(args.seed)
    named = args.only or [stage.name for stage in STAGES]
    share, rest = divmod(args.kills, len(named))
    bad = 0
    for stage in STAGES:
        if stage.name in named:
            place = named.index(stage.name)
            found = torture(stage, places, num_kills=share + (place < rest), rng=rng)
            bad += bool(found["differing"])
            print(json.dumps(found), flush=True)
        else:  # others need what it makes
            finish(start(stage, places), stage)
    if args.output is None:
        shutil.rmtree(work)
    return int(bad > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
