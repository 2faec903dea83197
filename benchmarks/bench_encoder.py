"""Speed of the packed encoder as ratios measured in one run: `python benchmarks/bench_encoder.py`.

    clip         one clip of 2048 tokens, forward + backward, small model: against materialised
                 (eager) attention, and as a share of the machine's fp32 GEMM rate
    mixed        a pack of images (64-1024 tokens) and clips (512-2048) against the same items
                 padded into a batch with a key mask
    many_items   256 items of 8 tokens against one item of 2048, and 256 items of 1 to 15 tokens
    gpu          large model, bf16, packs of 8 x 2048: model FLOP utilisation, every kernel side by
                 side, peak memory; "missing" where there is no CUDA GPU

Rivals take turns within a round, so a slow moment of the machine hits all of them; figures are the
medians over the rounds. Prints JSON. Some 5 minutes on 2 CPU cores.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

from model_factory.attention import available_backends
from model_factory.registry import create_model
from model_factory.rope import apply_rope, rope_tables

GEMM_SIDE, GEMM_REPEATS = 2048, 8
MIXED_LENGTHS = (64, 144, 256, 256, 400, 576, 1024, 512, 1024, 2048)
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, vendor data sheets


def encoder_flops(config, lengths, executed: bool = False) -> float:
    """Floating point operations of forward + backward of a pack.

    Matrix products only: 2 per weight and token forward, twice that backward; attention 4 * L^2 * D
    per layer forward, twice that backward, or 2.5 times with the recomputed scores of a fused
    kernel (`executed`).
    """
    width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, items = sum(lengths), len(lengths)
    block = 4 * width**2 + 2 * width * hidden
    linear = tokens * (config.patch_dim * width + layers * block + 2 * width**2)
    linear += items * (2 * width**2 + 2 * width * hidden)
    attention = layers * 4 * width * sum(length**2 for length in lengths)
    attention += 4 * width * tokens  # pooling: one query per item
    embedding = 2 * tokens * config.patch_dim * width  # pixels need no gradient
    return 6 * linear - embedding + attention * (3.5 if executed else 3)


def make_pack(config, lengths, device="cpu", dtype=torch.float32) -> dict:
    """Random rows and positions of items with these lengths."""
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "hidden_states": torch.randn(tokens, config.patch_dim, device=device, dtype=dtype),
        "patch_positions": torch.randint(0, 32, (tokens, 3), device=device),
        "cu_seqlens": bounds.to(device),
        "max_seqlen": max(lengths),
    }


def train_step(model, pack, backend=None):
    """Forward and backward of one pack."""
    model.choose_attention(backend)
    model.zero_grad(set_to_none=True)
    model(**pack).pooler_output.square().mean().backward()


def padded_step(model, rows, positions, keep, masked: bool = True):
    """The same items as a padded batch [B, L]: every layer computes the padding too.

    Without the mask items attend to their padding: wrong numbers, but the fastest padded batch.
    """
    config, (batch, length) = model.config, keep.shape
    model.zero_grad(set_to_none=True)
    head_dim = config.hidden_size // config.num_attention_heads
    tables = rope_tables(positions.flatten(0, 1), head_dim, config.rope_pairing)
    mask = keep[:, None, None, :] if masked else None

    def attend(q, k, v):
        q, k, v = (t.unflatten(0, (batch, length)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)

    x = model.layernorm_pre(model.patch_embed(rows.flatten(0, 1)))
    for layer in model.encoder.layers:
        attention = layer.self_attn
        qkv = attention.qkv(layer.layer_norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        q, k, v = qkv.unbind(1)
        q, k = apply_rope(q, tables), apply_rope(k, tables)
        x = x + attention.proj(attend(q, k, v).flatten(1))
        x = x + layer.mlp(layer.layer_norm2(x))
    tokens = model.layernorm_post(x)[keep.flatten()]
    bounds = F.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    model.head(tokens, bounds, length).square().mean().backward()


def timed_rounds(rivals: dict, rounds: int, synchronise=lambda: None) -> dict[str, list[float]]:
    """Seconds of every rival in every round, after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, action in rivals.items():
            synchronise()
            start = time.perf_counter()
            action()
            synchronise()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, slow: str, fast: str) -> float:
    """Median over the rounds of how many times longer `slow` takes than `fast`."""
    pairs = zip(seconds[slow], seconds[fast], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def medians(seconds) -> dict[str, float]:
    """Median seconds of every rival."""
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def bench_clip(model, rounds: int) -> dict:
    """One clip of 2048 tokens; see the module's text."""
    lengths = [2048]
    pack = make_pack(model.config, lengths)
    a, b = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
    gemm = {"gemm": lambda: [a @ b for _ in range(GEMM_REPEATS)]}
    # rivals of very different memory use disturb each other, so eager has a contest of its own
    pace = timed_rounds({**gemm, "packed": lambda: train_step(model, pack)}, rounds)
    contest = timed_rounds(
        {
            "packed": lambda: train_step(model, pack),
            "eager": lambda: train_step(model, pack, "eager"),
        },
        rounds,
    )
    gemm_rate = GEMM_REPEATS * 2 * GEMM_SIDE**3 / statistics.median(pace["gemm"])
    shares = {}
    for name, executed in (("model", False), ("executed", True)):
        rate = encoder_flops(model.config, lengths, executed) / statistics.median(pace["packed"])
        shares[f"share_of_gemm_{name}_flops"] = round(rate / gemm_rate, 3)
    return {
        "eager_over_packed": ratio(contest, "eager", "packed"),
        "gemm_gflops": round(gemm_rate / 1e9, 1),
        **shares,
        "seconds": {**medians(contest), **medians(pace)},
    }


def bench_mixed(model, rounds: int) -> dict:
    """A mixed pack against the padded batch."""
    pack = make_pack(model.config, MIXED_LENGTHS)
    shape = (len(MIXED_LENGTHS), max(MIXED_LENGTHS))
    rows, positions = torch.zeros(*shape, model.config.patch_dim), torch.zeros(*shape, 3)
    keep = torch.arange(shape[1]) < torch.tensor(MIXED_LENGTHS)[:, None]
    rows[keep], positions[keep] = pack["hidden_states"], pack["patch_positions"].float()
    seconds = timed_rounds(
        {
            "packed": lambda: train_step(model, pack),
            "padded": lambda: padded_step(model, rows, positions, keep),
            "unmasked": lambda: padded_step(model, rows, positions, keep, masked=False),
        },
        rounds,
    )
    return {
        "lengths": MIXED_LENGTHS,
        "padded_over_packed": ratio(seconds, "padded", "packed"),
        "padded_without_mask_over_packed": ratio(seconds, "unmasked", "packed"),
        "largest_gradient_difference": gradient_difference(model, pack, rows, positions, keep),
        "seconds": medians(seconds),
    }


def gradient_difference(model, pack, rows, positions, keep) -> float:
    """Largest difference of a gradient between the two rivals: they compute the same."""
    train_step(model, pack)
    packed = [p.grad.clone() for p in model.parameters()]
    padded_step(model, rows, positions, keep)
    pairs = zip(packed, model.parameters(), strict=True)
    return max(float((a - p.grad).abs().max()) for a, p in pairs)


def bench_many_items(model, rounds: int) -> dict:
    """Many short items against one long one."""
    uneven = [length for length in range(1, 16) for _ in range(17)] + [8]
    packs = {
        "one_item_of_2048": make_pack(model.config, [2048]),
        "256_items_of_8": make_pack(model.config, [8] * 256),
        "256_items_of_1_to_15": make_pack(model.config, uneven),
    }
    steps = {name: lambda p=pack: train_step(model, p) for name, pack in packs.items()}
    seconds = timed_rounds(steps, rounds)
    names = list(packs)
    return {
        "equal_items_over_one": ratio(seconds, names[1], names[0]),
        "uneven_items_over_one": ratio(seconds, names[2], names[0]),
        "seconds": medians(seconds),
    }


def bench_gpu(rounds: int) -> dict | str:
    """Large model in bf16 on a CUDA GPU, compiled and not, one row per kernel."""
    if not torch.cuda.is_available():
        return "missing: no CUDA GPU on this machine"
    device, lengths = torch.device("cuda"), [2048] * 8
    model = create_model("hf_llava_vit_packing_large_ln", rope_pairing="rotary")
    model = model.to(device, torch.bfloat16).train()
    pack = make_pack(model.config, lengths, device, torch.bfloat16)
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in BF16_PEAK.items() if key in name), None)
    flops, rows = encoder_flops(model.config, lengths), {}
    kernels = available_backends(torch.empty(1, device=device, dtype=torch.bfloat16))
    for compiled in (False, True):
        if compiled:
            model.compile_blocks()
        for kernel in kernels:
            torch.cuda.reset_peak_memory_stats()
            step = {kernel: lambda k=kernel: train_step(model, pack, k)}
            row = f"{kernel}{', compiled' if compiled else ''}"
            try:
                seconds = statistics.median(
                    timed_rounds(step, rounds, torch.cuda.synchronize)[kernel]
                )
            except torch.OutOfMemoryError:
                rows[row] = "out of memory"
                continue
            rows[row] = {
                "seconds": round(seconds, 5),
                "tflops": round(flops / seconds / 1e12, 1),
                "utilisation": round(flops / seconds / peak, 3) if peak else None,
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            }
        kernels = kernels[:-1]  # materialised scores do not compile to one graph
    return {"device": name, "rows": rows}


def main() -> None:
    """Run the chosen parts and print their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = {"clip": bench_clip, "mixed": bench_mixed, "many_items": bench_many_items}
    parser.add_argument("--parts", nargs="+", default=[*parts, "gpu"], choices=[*parts, "gpu"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="hf_llava_vit_packing_small_ln", help="of the CPU parts")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = create_model(args.model, rope_pairing="rotary").train()
    report = {"model": args.model, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for part in args.parts:
        report[part] = bench_gpu(args.rounds) if part == "gpu" else parts[part](model, args.rounds)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
