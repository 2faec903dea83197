"""Problems of this machine, before a run meets them: python -m training.doctor --output DIR.

    ok     nothing to do        note   worth knowing        FIX    a run would fail or crawl

Alone it checks the machine as one process sees it; under torchrun, with the launcher's flags of the
run to come, also whether all ranks meet, agree on versions and clocks, and how fast they exchange.
Exit code 1 when anything needs fixing. Cost: seconds.
"""

import argparse
import importlib.util
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path

from .log import is_first_to_say

if TYPE_CHECKING:
    from .distributed import Ranks

OK = "ok"
NOTE = "note"
FIX = "FIX"
GIB = 1 << 30
SHM_PER_PROCESS = GIB // 4  # NCCL's and DALI's shared memory
EXCHANGED = 64 << 20  # bytes of the measured all-reduce, and of the file that is written
SLOW_DISK = 100e6  # bytes a second, of a spinning disk
SKEW_S = 5.0  # of clocks: more makes lines of several ranks' logs hard to order


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5} {self.subject:<16} {self.text}"


def check_python() -> Iterator[Finding]:
    """Versions of what a run imports, and what is missing."""
    from .run_folder import versions

    installed = [f"{name} {version}" for name, version in versions().items()]
    yield Finding(OK, "versions", ", ".join(installed))
    needed = {
        "nvidia.dali": "pip install -e .[cpu], or .[gpu] with a GPU: training reads through it",
        "faiss": "pip install -e .[cpu], or .[gpu] with a GPU: clustering needs it",
    }
    for name, cure in needed.items():
        if not _is_there(name):
            yield Finding(FIX, name, cure)


def check_gpus() -> Iterator[Finding]:
    """GPUs, their memory and drivers, and which attention kernels there are."""
    import torch

    if not torch.cuda.is_available():
        text = "none: computing on the CPU, good for the debug and demo presets"
        # a driver without a usable GPU is a fault, a machine without either is not
        level = NOTE if shutil.which("nvidia-smi") is None else FIX
        yield Finding(level, "GPU", text)
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        busy = free < 0.9 * total  # another process has memory there
        memory = f"{total / GIB:.0f} GiB, {free / GIB:.0f} GiB free"
        text = f"{facts.name}, {memory}"
        yield Finding(NOTE if busy else OK, f"GPU {number}", text)
        if facts.major < 8:  # Ampere was the first with bf16
            text = (
                f"compute capability {facts.major}.{facts.minor}: no bf16 kernels, use 8.0 or newer"
            )
            yield Finding(FIX, f"GPU {number}", text)
    nccl = [str(part) for part in torch.cuda.nccl.version()]
    yield Finding(OK, "NCCL", ".".join(nccl))


def check_memory() -> Iterator[Finding]:
    """Shared memory, host memory and limits of this process."""
    shm = Path("/dev/shm")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        need = SHM_PER_PROCESS * local
        text = f"{free / GIB:.1f} GiB free for {local} processes"
        if free >= need:
            yield Finding(OK, "/dev/shm", text)
        else:
            cure = "; start the container with --shm-size 32g, or mount a larger one"
            yield Finding(FIX, "/dev/shm", text + cure)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= 4096:
        yield Finding(OK, "open files", f"at most {soft}")
    else:
        yield Finding(NOTE, "open files", f"at most {soft}: raise it with `ulimit -n 65536`")
    cores = len(os.sched_getaffinity(0))
    text = f"{cores} for {local} processes"
    yield Finding(OK if cores >= local else FIX, "CPU cores", text)


def check_output(output: Path) -> Iterator[Finding]:
    """Whether the output folder can be written to, how much fits and how fast."""
    probe = output / f".doctor-{os.getpid()}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with open(probe, "wb") as file:
            # random bytes: a file system that compresses would write zeros at no cost
            file.write(os.urandom(EXCHANGED))
            file.flush()
            os.fsync(file.fileno())
        rate = EXCHANGED / max(time.monotonic() - started, 1e-9)
        probe.unlink()
    except OSError as error:
        yield Finding(FIX, "output", f"{output} cannot be written to: {error.strerror}")
        return
    free = shutil.disk_usage(output).free
    level = NOTE if rate < SLOW_DISK else OK
    yield Finding(level, "output", f"{output}: {rate / 1e6:.0f} MB/s")
    text = f"{free / GIB:.0f} GiB free; a checkpoint of large with 2 million classes takes 27"
    yield Finding(OK if free > 100 * GIB else NOTE, "disk", text)


def check_clock() -> Iterator[Finding]:
    """Whether the clock can be right: TensorBoard and logs carry it, nothing is decided by it."""
    year = time.gmtime().tm_year
    level = OK if 2024 <= year < 2100 else FIX
    yield Finding(level, "clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def check_ranks(ranks: "Ranks") -> Iterator[Finding]:
    """Whether all ranks see the same versions and time, and how fast they exchange."""
    import torch
    import torch.distributed as dist

    from .distributed import all_gather_json
    from .run_folder import versions

    dist.barrier()
    facts = {"time": time.time(), "node": platform.node(), "versions": versions()}
    everywhere = all_gather_json(facts)
    times = [of_rank["time"] for of_rank in everywhere]
    skew = max(times) - min(times)
    nodes = len({of_rank["node"] for of_rank in everywhere})
    text = f"{ranks.world_size} on {nodes} nodes, clocks within {skew:.2f} s"
    yield Finding(NOTE if skew > SKEW_S else OK, "ranks", text)
    first = everywhere[0]["versions"]
    odd = [rank for rank, of_rank in enumerate(everywhere) if of_rank["versions"] != first]
    if odd:
        text = f"ranks {odd} have other versions than rank 0: install the same image everywhere"
        yield Finding(FIX, "versions", text)
    if ranks.world_size == 1:
        text = "one rank exchanges nothing: start this under torchrun as the run will be"
        yield Finding(NOTE, "exchange", text)
        return
    data = torch.ones(EXCHANGED // 4, device=ranks.device)  # fp32: four bytes each
    dist.all_reduce(data)  # the first one connects, so it is not measured
    started = time.monotonic()
    for _ in range(5):
        dist.all_reduce(data)
    data.sum().item()  # waits for the device
    seconds = (time.monotonic() - started) / 5
    text = f"{EXCHANGED >> 20} MB summed over all ranks in {1e3 * seconds:.1f} ms"
    gb_per_s = EXCHANGED / seconds / 1e9
    yield Finding(OK, "exchange", f"{text}, {gb_per_s:.2f} GB/s")


def examine(output: Path, ranks: "Ranks") -> list[Finding]:
    """All findings of this rank; a check that fails is a finding itself. Called by all ranks."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python,
        check_gpus,
        check_memory,
        check_clock,
        lambda: check_output(output),
        lambda: check_ranks(ranks),
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            findings.append(Finding(FIX, "check", text))
    return findings


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of "nvidia.dali", `nvidia` itself is looked for first
        return False


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.doctor", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--output", type=output_path, default=Path("output"), help="folder of runs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the findings of rank 0, and what needs fixing on other ranks; returns the exit
    code."""
    return run_command(
        parse=build_parser().parse_args, work=_diagnose, argv=argv, should_print=is_first_to_say
    )


def _diagnose(args: argparse.Namespace) -> int:
    from .distributed import all_gather_json, naming_peers, process_group

    with naming_peers(), process_group(60.0) as ranks:
        findings = examine(args.output, ranks)
        everywhere = all_gather_json([str(finding) for finding in findings if finding.level == FIX])
    num_broken = sum(len(lines) for lines in everywhere)
    if ranks.is_main:
        print("\n".join(map(str, findings)))
        for rank, lines in enumerate(everywhere[1:], 1):
            for line in lines:
                print(f"{line} (rank {rank})")
        print(f"{num_broken} to fix, see FIX above" if num_broken else "nothing needs fixing")
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
