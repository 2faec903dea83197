"""The process group and its collectives; the only reader of RANK, WORLD_SIZE and LOCAL_RANK.

NCCL on GPUs, gloo on CPUs, and a group of one without a launcher, so that no other module asks
whether a group exists. All collectives here move equal shapes from every rank.
"""

import itertools
import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from model_factory.command_line.launcher_watch import LauncherWatch, watched_launcher

from .errors import PeerFailed

JOIN_TIMEOUT = timedelta(minutes=5)  # for all ranks of a start to appear
NUM_THREADS = "UNIVIT_NUM_THREADS"
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
DONE = "done"
POLL_S = 0.1  # between two looks into the store of a rank that waits, maybe for hours
JOIN_POLL_S = 0.01  # the same while ranks meet, which is a matter of moments
_CALLS = itertools.count()  # of on_main, the same on every rank


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None  # shared by all ranks; None: a group that others made
    restarted: bool = False  # by the launcher or the scheduler, after an earlier start of this job
    launcher: LauncherWatch | None = None  # None: a group that others made

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and logs."""
        return self.rank == 0


@contextmanager
def process_group(timeout_s: float = 600.0) -> Iterator[Ranks]:
    """Join the group that torchrun describes in the environment, leave it at the end. A collective
    that a rank does not come to within `timeout_s` fails on the others. A rank whose launcher is
    killed ends at once.

    Raises PeerFailed when the meeting point cannot be reached, ValueError for UNIVIT_NUM_THREADS
    that is no number.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # a GPU of its own for every process of this node, or none for any
    cuda = torch.cuda.device_count() >= local_world
    if torch.cuda.is_available() and not cuda and rank == 0:
        warnings.warn(
            f"{local_world} processes, {torch.cuda.device_count()} GPUs: computing on the CPU",
            stacklevel=2,
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(_num_threads(local_world))
    with watched_launcher() as launcher:
        store = _meeting_point(rank, world_size)
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        yield Ranks(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=device,
            store=dist.PrefixStore("univit", store),
            restarted=_restarted(),
            launcher=launcher,
        )
        # not after an exception: leaving in good order would wait for peers inside a collective
        dist.destroy_process_group()


def _num_threads(local_world: int) -> int:
    """Threads of this rank on a CPU: UNIVIT_NUM_THREADS where it is set, else this rank's share of
    the cores. OMP_NUM_THREADS is not read, since torchrun sets it to 1 whatever the machine."""
    given = os.environ.get(NUM_THREADS)
    if given is None:
        return max(1, (os.cpu_count() or 1) // local_world)
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{NUM_THREADS} is {given!r}: give a number of threads from 1 on")
    return int(given)


def _meeting_point(rank: int, world_size: int) -> dist.Store:
    """A store that all ranks of this start share, and no earlier start wrote to."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    try:
        store = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))[0]
        session = _session(store, rank=rank, world_size=world_size)
        return dist.PrefixStore(session, store)
    except (dist.DistNetworkError, dist.DistStoreError, OSError, ValueError) as error:
        port = os.environ.get("MASTER_PORT", "?")
        address = f"{os.environ['MASTER_ADDR']}:{port}"
        raise PeerFailed(
            f"rank {rank} could not meet the others at {address}: {error}; check "
            "that the name resolves on every node, that the port is free on the first and open to "
            "the others, or use --standalone on one node"
        ) from error


def _session(store: dist.Store, rank: int, world_size: int) -> str:
    """A prefix for this start's keys that only processes alive now know.

    torchrun keeps its store over restarts, with the addresses of processes that are gone. So every
    other rank writes a token of its own and waits for an answer to just that token; rank 0 answers
    all tokens that it finds, old ones included, until all ranks have acknowledged the session.
    """
    if rank:
        token = uuid.uuid4().hex
        store.set(f"hello/{rank}", token)
        session = _await(store, key=f"welcome/{token}", at_most_s=JOIN_TIMEOUT.total_seconds())
        store.set(f"thanks/{session}/{rank}", DONE)
        return session
    session = uuid.uuid4().hex
    answered = set()
    missing = set(range(1, world_size))
    until = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"thanks/{session}/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]):
                # of a process that is gone, maybe, until its successor writes over it
                token = store.get(f"hello/{other}").decode()
                if token not in answered:
                    store.set(f"welcome/{token}", session)
                    answered.add(token)
        if missing and time.monotonic() > until:
            raise dist.DistStoreError(f"ranks {sorted(missing)} did not come")
        if missing:
            time.sleep(JOIN_POLL_S)
    return session


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error means that another rank is gone, or did not come to a collective."""
    if isinstance(error, (PeerFailed, dist.DistBackendError, dist.DistNetworkError)):
        return True
    # gloo's and some of NCCL's errors are plain RuntimeErrors that name their library
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)


@contextmanager
def naming_peers() -> Iterator[None]:
    """Raise PeerFailed, with what to do, for the error of a collective whose peer is gone."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PeerFailed) or not is_peer_loss(error):
            raise
        raise PeerFailed(
            f"{type(error).__name__}: {error}; another rank is gone or hangs: see its own message, "
            "then start again with the same command"
        ) from error


def _restarted() -> bool:
    """Whether any rank of this start is not the job's first."""
    counts = [int(os.environ.get(name, "0")) for name in RESTART_COUNTS]
    restarts = torch.tensor(sum(counts))
    # summed over the ranks: all of them must decide alike
    dist.all_reduce(restarts)
    return bool(restarts)


def on_main(ranks: Ranks, work: Callable[[], object]) -> None:
    """Once all ranks are here, run `work` on rank 0 while the others wait, for hours if need be: no
    collective is open meanwhile, so none can time out.

    Raises PeerFailed with rank 0's error on the others where it fails.
    """
    store = ranks.store
    if store is None:
        raise RuntimeError("on_main needs the store that process_group makes")
    # ranks make the same calls in the same order, so a counter names each of them
    key = f"on_main/{next(_CALLS)}"
    if not ranks.is_main:
        store.set(f"{key}/{ranks.rank}", DONE)
        outcome = _await(store, key)
        if outcome != DONE:
            raise PeerFailed(f"rank 0 stopped: {outcome}")
        return
    for rank in range(1, ranks.world_size):
        _await(store, f"{key}/{rank}")
    try:
        work()
    except BaseException as error:
        # whatever it is, the others must not wait for an answer that never comes
        store.set(key, f"{type(error).__name__}: {error}")
        raise
    store.set(key, DONE)


def _await(store: dist.Store, key: str, at_most_s: float = math.inf) -> str:
    """The value of a key once it is set; DistStoreError when that takes too long."""
    until = time.monotonic() + at_most_s
    while not store.check([key]):
        if time.monotonic() > until:
            raise dist.DistStoreError(f"nobody answered within {at_most_s:.0f} s")
        time.sleep(POLL_S)
    return store.get(key).decode()


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """[b, ...] of every rank -> [W * b, ...] in rank order, without gradient."""
    total = dist.get_world_size(group) * rows.shape[0]
    gathered = rows.new_empty((total, *rows.shape[1:]))
    _single("all_gather")(gathered, rows.contiguous(), group=group)
    return gathered


def reduce_scatter_rows(rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    """[W * b, ...] of every rank -> sum over the ranks of this rank's [b, ...], under way: calling
    the result waits for it.
    """
    count = rows.shape[0] // dist.get_world_size()
    own = rows.new_empty((count, *rows.shape[1:]))
    work = _single("reduce_scatter")(own, rows.contiguous(), async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return own

    return wait


def _single(name: str) -> Callable:
    """A collective on one tensor, under its newer name where torch has it."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}
    newer = getattr(dist, f"{name}_single", None)
    return newer or getattr(dist, older[name])


def broadcast_object(value: Any) -> Any:
    """Rank 0's JSON-like value on every rank. It travels as JSON text, so nothing is unpickled."""
    text = json.dumps(value).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    # the others need the length first, to have memory of that size
    length = torch.tensor([len(data)])
    dist.broadcast(length, 0)
    if dist.get_rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


def all_gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's JSON-like value, in rank order, on every rank."""
    # collectives move equal shapes, and JSON may be padded with blanks
    data = json.dumps(value).encode()
    lengths = all_gather_rows(torch.tensor([len(data)]), group)
    longest = int(lengths.max())
    # a bytearray, since torch warns of memory that it may not write to
    padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
    gathered = all_gather_rows(padded[None], group)
    return [json.loads(bytes(row.tolist())) for row in gathered]
