"""The training step: where its time goes, what a checkpoint costs, how long a lost rank is missed.

    step        demo preset on 2 ranks: shares of a step, MFU against the measured GEMM rate
    checkpoint  base with 100,000 classes: what the loop loses, and the rate of saving and checking
    recovery    SIGKILL of one rank of the demo preset to the next finished step
    gpu         large, bf16, 2048-token clips and 448 px pictures, 400,000 classes at rate 0.1:
                tokens/s, MFU, memory, with blocks compiled or not

Prints JSON. Run it alone on the machine.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("forward", "loss", "backward", "optimizer")


def torchrun(ranks: int, *command, restarts: int = 0, **environment) -> subprocess.Popen:
    """Start ranks of this project."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    launcher += ["--max_restarts", str(restarts), "tests/faulty.py", "-m", "training.train_univit"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    arguments = [sys.executable, *launcher, *map(str, command)]
    return subprocess.Popen(arguments, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)


def demo_data(folder: Path) -> Path:
    """A small motion_shapes set, packed, clustered and labelled."""
    from data_pipeline.datasets import prepare_embedded

    prepare_embedded(folder, 160, 16, report=lambda line: None)
    return folder / "train"


def demo(data: Path, output: Path, steps: int) -> list:
    """Arguments of a demo run."""
    arguments = ["--preset", "demo", "--list_datasets", data, "--output", output]
    return [*arguments, "--num_sampled_data", steps * 64, "--ckpt_interval", 50]


def bench_step(folder: Path) -> dict:
    """Medians over the log lines of a demo run but the first; MFU against the rate of matrix
    products that one thread has before the run, while nothing else computes."""
    import torch

    from training.record.speed import product_flops

    torch.set_num_threads(1)
    peak = 2 * product_flops(torch.device("cpu"), seconds=2.0)
    output = folder / "step"
    torchrun(2, *demo(demo_data(folder / "data"), output, 200)).wait()
    lines = [json.loads(line) for line in (output / "speed.jsonl").read_text().splitlines()][1:]
    lines = [{name: v for name, v in line.items() if v is not None} for line in lines]
    medians = {name: statistics.median(line[name] for line in lines) for name in lines[0]}
    parts = {name[5:-2]: s for name, s in medians.items() if name.startswith("time/")}
    whole = medians["step_s"]
    return {
        "step_ms": round(1e3 * whole, 2),
        "samples_per_s": round(medians["samples_per_s"], 1),
        "mfu": round(medians["model_flops_per_s"] / peak, 4),
        "shares": {name: round(s / whole, 4) for name, s in parts.items()},
        "outside_share": round(1 - sum(parts[name] for name in SHARED) / whole, 4),
    }


def bench_checkpoint(folder: Path, rounds: int = 3) -> dict:
    """What the loop waits for a save in the background, beside a step of the same model."""
    from data_pipeline.loading.loader import SyntheticStream
    from training.checkpoint.checkpointer import CheckpointConfig, Checkpointer
    from training.config.schema import ModelConfig
    from training.distributed import process_group
    from training.encoder import build_encoder
    from training.losses.partial_fc import PartialFC, PartialFCConfig
    from training.optimizer import (
        OptimizerConfig,
        build_optimizer,
        ensure_moments,
        global_grad_norm,
    )
    from training.parallel import ParallelConfig, ParallelEncoder

    with process_group() as ranks:
        model = build_encoder(ModelConfig(name="llava_vit_base_ln"), 0)
        encoder = ParallelEncoder(model, ParallelConfig(), ranks)
        head = PartialFC(100_000, 768, PartialFCConfig(), ranks)
        optimizer = build_optimizer(model, {"a": (head, 1.0)}, OptimizerConfig())
        ensure_moments(optimizer)
        facts = (model, {"a": head}, optimizer, CheckpointConfig(), logging.getLogger("bench"))
        saver = Checkpointer(folder / "checkpoint", ranks, *facts)
        batches = SyntheticStream(16, 196, 16, 100_000, 8, 0, 0)
        seconds, beside, waited, saves = [], [], [], []
        for number in range(1, 4 * rounds + 2):
            batch = next(batches)
            started = time.perf_counter()
            pooled = encoder(**batch.model_inputs())[: batch.num_samples]
            head(pooled, batch.labels, batch.weights, number).objective.backward()
            global_grad_norm(model, [head])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            (beside if saver._running is not None else seconds).append(
                time.perf_counter() - started
            )
            if number % 4 == 1 and number > 1:
                started = time.perf_counter()
                saver.save(number, {})
                waited.append(time.perf_counter() - started)
            if number % 4 == 3 and saver._running is not None:
                saver.wait()
                saves.append(saver.last)
        saver.wait()
        saver.close()
    step = statistics.median(seconds[1:])
    return {
        "gigabytes": round(saves[-1].num_bytes / 1e9, 3),
        "step_s": round(step, 3),
        "step_beside_a_save_s": round(statistics.median(beside), 3),
        "loop_waits_s": round(statistics.median(waited[1:]), 3),
        "first_wait_s": round(waited[0], 3),
        "waits_in_steps": round(statistics.median(waited[1:]) / step, 3),
        "save_and_check_s": round(statistics.median(s.seconds for s in saves), 3),
        "save_and_check_mb_per_s": round(
            statistics.median(s.num_bytes / 1e6 / s.seconds for s in saves), 1
        ),
    }


def bench_recovery(folder: Path) -> dict:
    """Seconds from a SIGKILL of one rank to the first step that is finished after it."""
    output, saved, killed = folder / "recovery", 50, 75
    arguments = demo(demo_data(folder / "data"), output, 120)
    process = torchrun(2, *arguments, restarts=1, FAULT=f"step.begin@{killed}#1:kill")
    while last_step(output) < killed - 1 and process.poll() is None:
        time.sleep(0.02)
    died = time.monotonic()  # rank 1 is gone by the time that rank 0 has written this line
    while last_step(output) >= killed - 1 and process.poll() is None:
        time.sleep(0.02)
    while last_step(output) < saved + 2 and process.poll() is None:
        time.sleep(0.02)
    seconds = time.monotonic() - died
    ended = process.poll() is not None
    process.kill()
    if ended:
        raise SystemExit("the run ended before it came back")
    return {"killed_at_step": killed, "checkpoint_at": saved, "seconds": round(seconds, 2)}


def last_step(output: Path) -> int:
    """The last whole line's step in rank 0's ledger."""
    ledger = output / "consumed-00000.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def bench_gpu(rounds: int, compiled: bool) -> dict:
    """Whole steps of large on one GPU."""
    from data_pipeline.loading.loader import SyntheticStream
    from data_pipeline.loading.packing import joined_inputs
    from training.config.schema import ModelConfig
    from training.distributed import process_group
    from training.encoder import build_encoder
    from training.losses.partial_fc import PartialFC, PartialFCConfig
    from training.optimizer import (
        OptimizerConfig,
        build_optimizer,
        clip_gradients,
        global_grad_norm,
    )
    from training.parallel import ParallelConfig, ParallelEncoder
    from training.record.speed import encoder_flops, peak_flops, softmax_flops

    with process_group() as ranks:
        model = build_encoder(ModelConfig(name="llava_vit_large_ln"), 0)
        encoder = ParallelEncoder(model, ParallelConfig(compile_blocks=compiled), ranks)
        head = PartialFC(400_000, 1024, PartialFCConfig(), ranks)
        optimizer = build_optimizer(model, {"a": (head, 1.0)}, OptimizerConfig())
        clips = SyntheticStream(16, 2048, 14, 400_000, 8, 0, 0)
        pictures = SyntheticStream(16, 1024, 14, 400_000, 8, 1, 0)
        seconds, tokens, flops = [], 0, 0
        for number in range(rounds + 5):
            batches = [next(stream).to(ranks.device) for stream in (clips, pictures)]
            torch.cuda.synchronize()
            started = time.perf_counter()
            pooled = encoder(**joined_inputs(batches))
            labels = torch.cat([batch.labels for batch in batches])
            weights = torch.cat([batch.weights for batch in batches])
            head(pooled, labels, weights, number).objective.backward()
            norm = global_grad_norm(model, [head])
            clip_gradients([*model.parameters(), *head.parameters()], norm, 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            tokens = sum(len(batch.pixels) for batch in batches)
            squares = 16 * 2048**2 + 16 * 1024**2
            flops = encoder_flops(model.config, tokens, squares)
            flops += softmax_flops(32, 1024, 40_000)
        step = statistics.median(seconds[5:])
        return {
            "device": torch.cuda.get_device_name(),
            "compiled": compiled,
            "step_ms": round(1e3 * step, 2),
            "tokens_per_s": round(tokens / step),
            "mfu": round(flops / step / peak_flops(ranks.device), 4),
            "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }


def main() -> None:
    """Run the parts that were asked for and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["step", "checkpoint", "recovery", "gpu", "gpu_compiled"]
    parser.add_argument("--parts", nargs="+", choices=known, default=known[:3])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "step": lambda: bench_step(folder),
            "checkpoint": lambda: bench_checkpoint(folder),
            "recovery": lambda: bench_recovery(folder),
            "gpu": lambda: bench_gpu(args.rounds, False),
            "gpu_compiled": lambda: bench_gpu(args.rounds, True),
        }
        for part in args.parts:
            report[part] = parts[part]()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
