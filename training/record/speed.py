"""How fast a run is: time per section of a step, model FLOPs, slow ranks, a trace; and loss spikes.

Model FLOPs are those that the mathematics needs, two per multiply-add, backward twice the forward
(PaLM, appendix B): recomputation, padding and rejected work do not count, so MFU is the share of
the device that the training gets.

    per token    depth * (8 D^2 + 4 D I) + 2 P D + 4 D^2 (pooling)      D width, I MLP, P 3 p^2
    per item     depth * 4 L^2 D + 4 L D                                L its tokens
    per row      2 D M                                                  M sampled classes

p is a patch's side in pixels. Neglected: what the pooling head computes once per item (the
projection of its query, its output and its MLP), norms, and rotary positions.
"""

import contextlib
import logging
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

import torch

from model_factory.configuration import LlavaViTPackingConfig

from ..distributed import Ranks, all_gather_json

# sections whose work runs on the device, so on CUDA their time is measured there
DEVICE = ("forward", "loss", "backward", "optimizer")
# sections with collectives, in which a rank waits for the others, by parallel.strategy
SHARED = {
    "ddp": ("agree", "loss", "backward", "optimizer"),
    # forward gathers the weights of each block
    "fsdp": ("agree", "forward", "loss", "backward", "optimizer"),
}

SLOW = 1.5  # a rank is slow from this multiple of the median of all ranks on,
SLOW_S = 0.02  # if it takes at least so many seconds a step more: less is noise

WINDOW = 200  # recent losses that a new one is compared with
# A spike is so many median absolute deviations above their median. A choice: of normally
# distributed noise that is 6.7 standard deviations.
SPIKE = 10.0

# Dense peak of a device by a part of its name: tensor cores in bf16, from the makers' data sheets
# (half of the figure "with sparsity"). The first part that fits counts, so longer names come first.
# None: another device than the one whose name it contains, with a peak that is not known here, so
# that it is measured.
PEAKS: dict[str, float | None] = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090 Laptop": None,
    "RTX 4090 D": None,
    "RTX 4090": 165e12,
}
# Side of the products that measure a device. On CUDA one takes about a millisecond on the fastest
# devices, so that starting it (about 10 us) does not count; on a CPU 1024 takes some 10 ms.
CUDA_GEMM = 8192
CPU_GEMM = 1024
QUEUED = 8  # products per measurement

WARMUP = 3  # steps before a trace: they compile, allocate and fill queues


class StepClock:
    """Seconds per section of the step since the last `take`, without making the device wait.

    A section is wall time, but sections of DEVICE on CUDA: there it is the time between two events
    on the stream, read only when `take` is called. Sections of SHARED need other ranks, so a slow
    rank shows in the rest of its step while the sections of SHARED grow on all ranks. Cost: two
    clock reads, or two events.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Measure the block inside; sections do not nest."""
        if self._cuda and name in DEVICE:
            first = torch.cuda.Event(enable_timing=True)
            last = torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """{section: seconds} since the last call, with `total`, the wall time, and `other`, the
        part of it outside of all sections."""
        if self._events:
            self._events[-1][2].synchronize()  # the last event of the stream: all others are past
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1e3  # milliseconds
        now = time.perf_counter()
        taken = dict(self._seconds)
        total = now - self._since
        # On CUDA sections of the host overlap those of the device, so that their sum may exceed the
        # wall time, and `other` is a lower bound.
        taken["other"] = max(0.0, total - sum(taken.values()))
        taken["total"] = total
        self._seconds.clear()
        self._events.clear()
        self._since = now
        return taken


def compare_ranks(
    taken: dict[str, float], steps: int, logger: logging.Logger, strategy: str = "ddp"
) -> list[float]:
    """Seconds of a step that each rank spent on its own, in rank order; ranks far above the median
    are logged.

    Called by all ranks with what their clocks took over `steps` steps; `strategy` of parallel.py
    decides in which sections they wait for each other. Cost: one gather of a few numbers per log
    line, on the host.
    """
    per_step = {name: seconds / max(steps, 1) for name, seconds in taken.items()}
    ranks = all_gather_json(per_step)
    waiting = (*SHARED[strategy], "total")
    own: list[float] = []
    for of_rank in ranks:
        alone = [seconds for name, seconds in of_rank.items() if name not in waiting]
        own.append(sum(alone))
    # the lower of two in the middle: of two ranks the slow one is compared with the other
    median = statistics.median_low(own)
    for rank, seconds in enumerate(own):
        if seconds > SLOW * median and seconds > median + SLOW_S:
            sections = sorted(ranks[rank].items(), key=lambda section: -section[1])
            parts = [f"{name} {s:.3f} s" for name, s in sections if name != "total"]
            logger.warning(
                "rank %d is slow: %.3f s a step on its own, the median rank %.3f s (%s)",
                rank,
                seconds,
                median,
                ", ".join(parts),
            )
    return own


class SpikeWatch:
    """Warns once when a loss jumps above its recent values, and again after it was back among
    them."""

    def __init__(self, logger: logging.Logger):
        self._recent: dict[str, deque[float]] = {}
        self._outside: set[str] = set()
        self._logger = logger

    def look(self, step: int, name: str, value: float) -> None:
        """Compare one loss with the recent ones, and add it to them."""
        recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
        if len(recent) >= WINDOW // 4:  # fewer have no stable median
            median = statistics.median(recent)
            spread = statistics.median(abs(past - median) for past in recent)
            # a loss that has converged hardly spreads: a rise by a hundredth of it is no spike
            limit = median + SPIKE * max(spread, 1e-3 * abs(median))
            if value <= limit:
                self._outside.discard(name)
            elif name not in self._outside:
                self._outside.add(name)
                text = "step %d: %s jumped to %.4f, the median of the last %d is %.4f"
                self._logger.warning(text, step, name, value, len(recent), median)
        recent.append(value)


def encoder_flops(config: LlavaViTPackingConfig, tokens: int, squares: int) -> int:
    """FLOPs, forward and backward, of a packed encoder over items of `tokens` tokens in all, whose
    squared lengths sum to `squares`."""
    width = config.hidden_size
    depth = config.num_hidden_layers
    # query, key, value and output are four products of width D; the MLP has two of D and I
    blocks = depth * (8 * width**2 + 4 * width * config.intermediate_size)
    embedding = 2 * width * config.patch_dim
    # keys and values of the probe's one query; its scores and its sum are 4 D a token
    pooling = 4 * width**2 + 4 * width
    per_token = blocks + embedding + pooling
    return 3 * (tokens * per_token + squares * depth * 4 * width)


def softmax_flops(rows: int, width: int, num_sampled_classes: float) -> int:
    """FLOPs, forward and backward, of the products of Partial FC: rows of the global batch with the
    sampled classes of all ranks, of which the expected number is given."""
    return int(3 * 2 * rows * width * num_sampled_classes)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that a GPU could do: the data sheet's for a known one, else the measured rate of its
    matrix products.

    None for a CPU: its peak changes with its clock and with whatever runs beside, so that a rate
    measured at one time is no bound for another.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # in the order of the table: "H100 PCIe" comes before "H100", which is a part of it
    for part, peak in PEAKS.items():
        if part in name and peak is None:
            break
        if part in name:
            return peak
    return product_flops(device)


def product_flops(device: torch.device, seconds: float = 0.2) -> float:
    """FLOP/s of the best matrix product within `seconds` (bf16 on a GPU, fp32 on a CPU with as many
    threads as this process has)."""
    cuda = device.type == "cuda"
    side = CUDA_GEMM if cuda else CPU_GEMM
    queued = QUEUED if cuda else 1
    dtype = torch.bfloat16 if cuda else torch.float32
    ones = torch.ones(side, side, device=device, dtype=dtype)
    product = ones @ ones  # the first product loads kernels
    product[0, 0].item()  # reading a number waits for the device
    best = 0.0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        # several before one wait, so that the device never waits for the host between them
        for _ in range(queued):
            torch.mm(ones, ones, out=product)
        product[0, 0].item()
        elapsed = time.perf_counter() - before
        best = max(best, queued * 2 * side**3 / elapsed)
    return best


def trace(output: Path, steps: int, ranks: Ranks) -> torch.profiler.profile | None:
    """A context manager that writes OUTPUT/trace.json, for chrome://tracing or Perfetto, of `steps`
    steps of rank 0; None where nothing is to be traced."""
    if not steps or not ranks.is_main:
        return None
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=WARMUP - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(output / "trace.json")),
    )
