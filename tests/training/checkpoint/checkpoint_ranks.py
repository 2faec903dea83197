"""Runs on W ranks: saves, or loads and checks, a head of 11 classes and a small encoder with their
moments. Every number follows from its name and its global place, so any W must find the same.
"""

import logging
import sys
from pathlib import Path

import torch
from torch import nn

from data_pipeline.random import counter_normal
from training.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from training.checkpoint.resume import find_commit
from training.distributed import process_group
from training.losses.partial_fc import PartialFC, PartialFCConfig
from training.optimizer import OptimizerConfig, build_optimizer, ensure_moments

CLASSES, WIDTH = 11, 8


def expected(name: str, rows: torch.Tensor, shape) -> torch.Tensor:
    """Numbers of a tensor's rows."""
    values = counter_normal(rows, WIDTH, 0, name)
    return values if len(shape) == 2 else values[:, 0]


def check_or_fill(tensors: dict[str, torch.Tensor], head: PartialFC, fill: bool) -> None:
    """Write the expected numbers into a checkpointer's tensors, or compare."""
    classes = torch.arange(head.class_start, head.class_end)
    for name, tensor in tensors.items():
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        rows = classes if name.endswith("centers") else torch.arange(max(1, len(own.reshape(-1))))
        if own.ndim == 0:
            want = torch.tensor(float(len(name)))
        else:
            want = expected(name, rows, own.shape)[: len(own)]
            want = want if own.ndim == 1 else want[:, : own.shape[1]]
        if fill:
            own.copy_(want)
        else:
            assert torch.equal(own, want.to(own.dtype)), name


def main() -> None:
    """save|load FOLDER [sparse]."""
    action, folder = sys.argv[1], Path(sys.argv[2])
    rate = 0.5 if "sparse" in sys.argv else 1.0
    with process_group() as ranks, torch.no_grad():
        encoder = nn.Linear(WIDTH, 3)
        head = PartialFC(CLASSES, WIDTH, PartialFCConfig(sample_rate=rate), ranks)
        optimizer = build_optimizer(encoder, {"a": (head, 1.0)}, OptimizerConfig())
        ensure_moments(optimizer)
        facts = (encoder, {"a": head}, optimizer, CheckpointConfig(every=1), logging.getLogger())
        checkpointer = Checkpointer(folder, ranks, *facts)
        if action == "save":
            check_or_fill(checkpointer._tensors(), head, fill=True)
            state = {"data": {}, "fingerprint": {}, "word": "kept"}
            checkpointer.save(7, state, wait=True)
            check_or_fill(checkpointer._tensors(), head, fill=False)
        else:
            commit = find_commit(folder, "auto", ranks, logging.getLogger())
            assert commit.state["step"] == 7 and commit.state["word"] == "kept"
            checkpointer.start(commit)
            check_or_fill(checkpointer._tensors(), head, fill=False)
        checkpointer.close()
        print(f"{action} ok", flush=True)


main()
