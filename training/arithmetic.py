"""What the last bits of a run depend on besides its configuration and data.

The same command gives the same bits where all of this is the same; elsewhere sums are taken in
another order or by other instructions, and results agree within rounding only. It is in run.json
and in the state of every checkpoint, so that a resume can name what has changed.
"""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from .distributed import Ranks, all_gather_json

PACKAGES = ("torch", "numpy", "transformers", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
# each chooses other kernels on the same machine: of torch, oneDNN (two names), MKL, cuBLAS
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
)


def arithmetic(ranks: Ranks) -> dict[str, object]:
    """Facts by name, the same on every rank; where ranks have different values, the list of them in
    rank order, each once. Called by all ranks."""
    everywhere = all_gather_json(_own_arithmetic(ranks))
    merged = {}
    for name in everywhere[0]:
        values = list(dict.fromkeys(facts[name] for facts in everywhere))
        merged[name] = values[0] if len(values) == 1 else values
    return merged


def versions() -> dict[str, str]:
    """Python, platform and the packages that decide numbers."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _own_arithmetic(ranks: Ranks) -> dict[str, object]:
    known = versions()
    facts = {
        "device": ranks.device.type,
        "processor": _processor(),
        # the instruction set that torch dispatches to, which is not always the processor's best
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": ranks.world_size,
    }
    if ranks.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(ranks.device)
    facts |= {name: known.get(name) for name in PACKAGES}
    return facts | {name: os.environ.get(name) for name in VARIABLES}


def _processor() -> str:
    """Model of the processor as Linux names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
