"""Arithmetic of a training step and what the device could do: the two halves of MFU.

Model FLOPs are those that the mathematics needs, two per multiply-add, backward twice the forward
(PaLM, appendix B): recomputation, padding and rejected work do not count, so MFU is the share of
the device that the training gets.

    per token    depth * (8 D^2 + 4 D I) + 2 P D + 4 D^2 (pooling)      D width, I MLP, P pixels
    per item     depth * 4 L^2 D + 4 L D                                L its tokens
    per row      2 D M                                                  M sampled classes
"""

import time

import torch

# dense peak of a device by a part of its name: tensor cores in bf16, from the makers' data sheets
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
GEMM = 1024  # side of the products that measure a device that is not in the table


def encoder_flops(config, tokens: int, squares: int) -> int:
    """Forward and backward of a packed encoder over items of `tokens` tokens in all, whose squared
    lengths sum to `squares`."""
    width, depth = config.hidden_size, config.num_hidden_layers
    per_token = depth * (8 * width**2 + 4 * width * config.intermediate_size)
    per_token += 2 * width * config.patch_dim + 4 * width**2 + 4 * width
    return 3 * (tokens * per_token + squares * depth * 4 * width)


def softmax_flops(rows: int, width: int, sampled: float) -> int:
    """Forward and backward of the products of Partial FC: rows of the global batch with the
    sampled classes of all ranks."""
    return int(3 * 2 * rows * width * sampled)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that a GPU could do: the data sheet's for a known one, else the measured rate of its
    matrix products. None for a CPU: what it could do changes with its clock and with whatever runs
    beside, so that a rate measured at one time is no bound for another."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, peak in PEAKS.items():
        if part in name:
            return peak
    return product_flops(device)


def product_flops(device: torch.device, seconds: float = 0.2) -> float:
    """FLOP/s of the best matrix product within `seconds` (bf16 on a GPU, fp32 on a CPU with as many
    threads as this process has)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = right = torch.ones(GEMM, GEMM, device=device, dtype=dtype)
    left @ right
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        (left @ right)[0, 0].item()
        best = max(best, 2 * GEMM**3 / (time.perf_counter() - before))
    return best
