"""What a run costs on 8, 128 and 1024 GPUs: compute, memory, network, data, checkpoints, failures.

    python benchmarks/simulate_scale.py

Arithmetic of docs/scaling.md for large on clips of 2048 tokens with 2 million classes. Rates of
the hardware are assumptions, printed with the result; FLOPs, bytes and counts follow from the code.
Time lost to failures is also played through, event by event, and must agree with the formula.
"""

import argparse
import json
import random
from dataclasses import dataclass

from model_factory.registry import packing_config
from training.record.speed import encoder_flops, softmax_flops

GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419  # Llama 3 405B: 419 interruptions in 54 days
SHARD_BYTES_PER_CLIP = 160e3  # 2048 patches of 14 px, measured 142 to 172 KB


@dataclass(frozen=True)
class Setup:
    """Assumed hardware and the run. Rates in FLOP/s and bytes/s, times in seconds."""

    gpus: int
    clips_per_gpu: int = 16
    classes: int = 2_000_000
    sample_rate: float = 0.1
    labels: int = 8
    peak: float = 989e12
    mfu: float = 0.40
    node_network: float = 400e9 / 8  # one 400 Gbit/s card per GPU
    inside_node: float = 200e9
    storage: float = 5e9  # of the whole system, for checkpoints
    to_host: float = 20e9  # of one GPU, for staging
    restart: float = 180.0  # noticing, starting, loading, first step
    checkpoint_every: float = 1800.0


def parameters(config) -> int:
    """Weights of a packed encoder, biases and norms included."""
    width, depth, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    block = 4 * width * width + 2 * width * inner + 9 * width + inner
    head = 4 * width * width + 2 * width * inner + 8 * width + inner
    return depth * block + head + width * config.patch_dim


def costs(setup: Setup, tokens: int = 2048) -> dict[str, float]:
    """Seconds, bytes and shares of one optimizer step and one day."""
    config = packing_config("hf_llava_vit_packing_large_ln")
    rows, width = setup.gpus * setup.clips_per_gpu, config.hidden_size
    own = setup.clips_per_gpu
    flops = encoder_flops(config, own * tokens, own * tokens**2)
    sampled = setup.classes * setup.sample_rate / setup.gpus
    flops += softmax_flops(rows, width, sampled)
    compute = flops / setup.peak / setup.mfu
    weights = parameters(config)
    network = setup.inside_node if setup.gpus <= 8 else setup.node_network
    ring = 2 * (setup.gpus - 1) / setup.gpus
    gradients = ring * 4 * weights / network
    gathered = rows * (width + setup.labels + 1) * 4
    exchange = (gathered + rows * (setup.labels + 1) * 8 * 2 + rows * width * 4) / network
    state = 12 * (weights + setup.classes * width)
    own_state = 12 * (weights + setup.classes * width / setup.gpus)
    hidden = max(0.0, gradients - 2 / 3 * compute)  # beside the backward pass
    step = compute + hidden + exchange
    return {
        "step_s": step,
        "compute_s": compute,
        "gradients_s": gradients,
        "gradients_not_hidden_s": hidden,
        "partial_fc_exchange_s": exchange,
        "partial_fc_share_of_flops": softmax_flops(rows, width, sampled) / flops,
        "clips_per_s": rows / step,
        "shard_gb_per_s": rows / step * SHARD_BYTES_PER_CLIP / 1e9,
        "state_gb_per_gpu": (own_state + 4 * weights) / 1e9,
        "checkpoint_gb": state / 1e9,
        "checkpoint_wait_s": own_state / setup.to_host,
        "checkpoint_write_s": state / setup.storage,
        "hours_between_failures": GPU_HOURS_PER_FAILURE / setup.gpus,
    }


def lost_share(setup: Setup, cost: dict[str, float]) -> float:
    """Share of the time lost to saving and failures, by formula: staging per interval; per failure
    half an interval, what the last save was behind, and the restart."""
    between = 3600 * cost["hours_between_failures"]
    redone = setup.checkpoint_every / 2 + cost["checkpoint_write_s"]
    per_failure = redone + setup.restart
    return cost["checkpoint_wait_s"] / setup.checkpoint_every + per_failure / between


def played(setup: Setup, cost: dict[str, float], days: float = 4000.0, seed: int = 0) -> float:
    """The same share, from random failures played through for many days."""
    rng, now, useful = random.Random(seed), 0.0, 0.0
    end, between = days * 86400, 3600 * cost["hours_between_failures"]
    while now < end:
        alive = rng.expovariate(1 / between)
        period = setup.checkpoint_every + cost["checkpoint_wait_s"]
        saved = int(max(0.0, alive - cost["checkpoint_write_s"]) // period)
        useful += saved * setup.checkpoint_every
        now += alive + setup.restart
    return 1 - useful / now


def main() -> None:
    """Print a table for three sizes, and the assumptions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 128, 1024])
    args = parser.parse_args()
    report: dict = {}
    for gpus in args.gpus:
        setup = Setup(gpus)
        cost = costs(setup)
        cost |= {"lost_by_formula": lost_share(setup, cost), "lost_played": played(setup, cost)}
        report[str(gpus)] = {name: float(f"{value:.3g}") for name, value in cost.items()}
    fields = Setup.__dataclass_fields__.items()
    report["assumed"] = {name: field.default for name, field in fields if name != "gpus"}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
