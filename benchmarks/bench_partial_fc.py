"""Partial FC against what it replaces, in ratios: `python benchmarks/bench_partial_fc.py`

    against    forward and backward of our loss, and of the reference: one softmax per label, each
               over positives and a fresh random tenth of the classes, logits materialised, centres
               gathered and normalised by autograd with dense gradients
    labels     time and memory with 1, 2, 4 and 8 labels per row
    classes    time and memory over numbers of classes at a fixed rate
    large      2 million classes of width 1024, rate 0.01, with the lazy optimizer step
    gpu        2 million classes of width 1024, 1024 rows, rate 0.1 (needs a CUDA device)

Memory is what the resident size grows by at most during a step, sampled every millisecond, each
measurement in a process of its own. Prints JSON. Some 5 minutes.
"""

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from queue import Empty

import psutil
import torch
import torch.nn.functional as F

from training.distributed import process_group
from training.losses.partial_fc import PartialFC, PartialFCConfig
from training.optimizer import OptimizerConfig, build_optimizer

MARGIN, SCALE, FILTER = 0.3, 64.0, 0.75


class Reference(torch.nn.Module):
    """One softmax per label column, as the public training computes it, on one process."""

    def __init__(self, num_classes: int, width: int, rate: float):
        super().__init__()
        self.centers = torch.nn.Parameter(torch.randn(num_classes, width) * 0.01)
        self.num_sample = int(rate * num_classes)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over the columns."""
        return torch.stack([self._column(embeddings, column) for column in labels.T]).mean()

    def _column(self, embeddings, labels):
        positive = labels.unique()
        scores = torch.rand(len(self.centers))
        scores[positive] = 2.0
        index = scores.topk(max(self.num_sample, len(positive)))[1].sort()[0]
        columns = torch.searchsorted(index, labels.contiguous())
        unit = F.normalize(self.centers[index])
        cosines = (F.normalize(embeddings) @ unit.T).clamp(-1, 1)
        target = F.one_hot(columns, len(index)).bool()
        cosines = torch.where(~target & (cosines > FILTER), 0.0, cosines)
        logits = SCALE * torch.where(target, cosines - MARGIN, cosines)
        return F.cross_entropy(logits, columns)


def batch(size: int, width: int, num_classes: int, num_labels: int):
    """Random embeddings [B, D] and labels [B, L]."""
    generator = torch.manual_seed(0)
    embeddings = torch.randn(size, width, generator=generator).requires_grad_()
    return embeddings, torch.randint(0, num_classes, (size, num_labels), generator=generator)


def our_step(shape: dict):
    """A function that runs forward and backward of our loss."""
    embeddings, labels = batch(shape["rows"], shape["width"], shape["classes"], shape["labels"])
    config = PartialFCConfig(shape["rate"], MARGIN, SCALE, FILTER)
    with torch.no_grad():
        head = PartialFC(1, shape["width"], config, shape["ranks"])
        head.num_classes, head.class_end = shape["classes"], shape["classes"]
        head.centers = torch.nn.Parameter(torch.empty(shape["classes"], shape["width"]).normal_())
    weights, steps = torch.ones(len(labels)), iter(range(10**6))

    def step():
        head.centers.grad = embeddings.grad = None
        head(embeddings, labels, weights, next(steps)).objective.backward()

    return step, head


def reference_step(shape: dict):
    """A function that runs forward and backward of the reference."""
    embeddings, labels = batch(shape["rows"], shape["width"], shape["classes"], shape["labels"])
    head = Reference(shape["classes"], shape["width"], shape["rate"])

    def step():
        head.centers.grad = embeddings.grad = None
        head(embeddings, labels).backward()

    return step, head


def added_memory(step) -> float:
    """Megabytes that the resident size grows by at most during one step."""
    process, stop, most = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch():
        while not stop.is_set():
            most[0] = max(most[0], process.memory_info().rss - before)
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    stop.set()
    watcher.join()
    return most[0] / 1e6


def measure(build, shape: dict, rounds: int, queue) -> None:
    """Median milliseconds and added megabytes of a step, put into a queue."""
    with process_group() as ranks:
        step, _ = build({**shape, "ranks": ranks})
        memory = added_memory(step)
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        queue.put((1e3 * statistics.median(seconds), memory))


def in_a_process(function, *args):
    """Result of a function in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*args, queue))
    process.start()
    while True:
        try:
            result = queue.get(timeout=1)
            break
        except Empty:
            if not process.is_alive():
                raise RuntimeError(f"a measurement ended with {process.exitcode}: {args}") from None
    process.join()
    return result


def shape_of(rows=64, width=768, classes=100_000, rate=0.1, labels=8) -> dict:
    """Sizes of one measurement."""
    return {"rows": rows, "width": width, "classes": classes, "rate": rate, "labels": labels}


def bench_against(rounds: int) -> dict:
    """Both settings of the comparison; ours and the reference take turns."""
    report = {}
    for name, shape in {
        "B 64, rate 0.1": shape_of(),
        "B 256, rate 1.0": shape_of(rows=256, rate=1.0),
    }.items():
        times, memory = {"ours": [], "reference": []}, {}
        turns = [("ours", our_step, rounds), ("reference", reference_step, 2)]
        for who, build, count in [*turns, turns[0]]:
            milliseconds, megabytes = in_a_process(measure, build, shape, count)
            times[who].append(milliseconds)
            memory[who] = max(megabytes, memory.get(who, 0.0))
        ours, reference = (statistics.median(times[who]) for who in ("ours", "reference"))
        report[name] = {
            "ours_ms": round(ours, 1),
            "reference_ms": round(reference, 1),
            "reference_over_ours": round(reference / ours, 1),
            "ours_mb": round(memory["ours"], 1),
            "reference_mb": round(memory["reference"], 1),
            "memory_ours_over_reference": round(memory["ours"] / memory["reference"], 3),
        }
    return report


def bench_table(shapes: dict, rounds: int) -> dict:
    """Milliseconds and megabytes of our loss for named shapes, medians of three processes."""
    report = {}
    for name, shape in shapes.items():
        runs = [in_a_process(measure, our_step, shape, rounds) for _ in range(3)]
        milliseconds, megabytes = (statistics.median(values) for values in zip(*runs, strict=True))
        report[name] = {"ms": round(milliseconds, 1), "mb": round(megabytes, 1)}
    return report


def large_run(queue) -> None:
    """Steps with the optimizer at 2 million classes: the first ones, and those after every row has
    been trained, which is how a long run ends up."""
    with process_group() as ranks:
        step, head = our_step({**shape_of(64, 1024, 2_000_000, 0.01), "ranks": ranks})
        config = OptimizerConfig(centers_mean="bfloat16")
        optimizer = build_optimizer(torch.nn.Linear(1, 1), {"a": (head, 1.0)}, config)
        report = {"resident_gb_before": resident_gb()}
        report["first"] = steps_of(step, head, optimizer)
        for start in range(0, head.num_classes, 100_000):
            rows = torch.arange(start, min(start + 100_000, head.num_classes))
            grad = torch.full((len(rows), 1024), 1e-6)
            shape = head.centers.shape
            options = {"is_coalesced": True, "check_invariants": False}
            head.centers.grad = torch.sparse_coo_tensor(rows[None], grad, shape, **options)
            optimizer.step()
        del grad
        head.centers.grad = None
        report["all_rows_trained"] = steps_of(step, head, optimizer)
        queue.put(report)


def steps_of(step, head, optimizer) -> dict:
    """Medians of six steps, and what is resident after them."""
    forward, update = [], []
    for _ in range(6):
        started = time.perf_counter()
        step()
        middle = time.perf_counter()
        head.centers.grad = head.centers.grad.coalesce()
        optimizer.step()
        forward.append(middle - started)
        update.append(time.perf_counter() - middle)
    return {
        "forward_backward_ms": round(1e3 * statistics.median(forward[1:]), 1),
        "optimizer_ms": round(1e3 * statistics.median(update[1:]), 1),
        "resident_gb": resident_gb(),
        "rows_with_moments": int((optimizer.state[head.centers]["step"] > 0).sum()),
    }


def resident_gb() -> float:
    """Resident size of this process, and of its fresh pages."""
    return round(psutil.Process().memory_info().rss / 1e9, 2)


def gpu_run(rounds: int) -> dict:
    """Milliseconds and memory of a step at 2 million classes on a GPU, with the optimizer."""
    with process_group() as ranks:
        config = PartialFCConfig(0.1, MARGIN, SCALE, FILTER)
        head = PartialFC(2_000_000, 1024, config, ranks)
        optimizer = build_optimizer(torch.nn.Linear(1, 1), {"a": (head, 1.0)}, OptimizerConfig())
        embeddings, labels = batch(1024, 1024, 2_000_000, 8)
        embeddings = embeddings.detach().to(ranks.device).requires_grad_()
        labels, weights = labels.to(ranks.device), torch.ones(1024, device=ranks.device)
        before, seconds = torch.cuda.memory_allocated(), []
        for number in range(rounds + 2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            head.centers.grad = None
            head(embeddings, labels, weights, number).objective.backward()
            optimizer.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return {
            "ms": round(1e3 * statistics.median(seconds[2:]), 2),
            "added_gb": round((torch.cuda.max_memory_allocated() - before) / 1e9, 2),
        }


def main() -> None:
    """Parse arguments, run the parts, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["against", "labels", "classes", "large", "gpu"]
    parser.add_argument("--parts", nargs="+", choices=known, default=known[:4])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    report = {}
    if "against" in args.parts:
        report["against"] = bench_against(args.rounds)
    if "labels" in args.parts:
        shapes = {str(count): shape_of(labels=count) for count in (1, 2, 4, 8)}
        report["labels"] = bench_table(shapes, 5 * args.rounds)
    if "classes" in args.parts:
        counts = (10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000)
        shapes = {f"{count} at 0.1": shape_of(classes=count) for count in counts}
        shapes["1000000 at 0.01"] = shape_of(classes=1_000_000, rate=0.01)
        report["classes"] = bench_table(shapes, 5)
    if "large" in args.parts:
        report["large"] = in_a_process(large_run)
    if "gpu" in args.parts:
        report["gpu"] = gpu_run(args.rounds)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
