"""The process group and its collectives; the only reader of RANK, WORLD_SIZE and LOCAL_RANK.

NCCL on GPUs, gloo on CPUs, and a group of one without a launcher, so that no other module asks
whether a group exists. All collectives here move equal shapes from every rank.
"""

import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
DONE = "done"
POLL_S = 0.1
_CALLS = itertools.count()  # of on_main, the same on every rank


class PeerFailed(RuntimeError):
    """Another rank stopped while this one waited for it."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None  # shared by all ranks; None: a group that others made

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the group that torchrun describes in the environment, leave it at the end."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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
        # as many threads as this rank's share of the cores, the same on every rank
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    launched = "MASTER_ADDR" in os.environ
    store = next(dist.rendezvous("env://"))[0] if launched else dist.HashStore()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    yield Ranks(rank, world_size, local_rank, device, dist.PrefixStore("univit", store))
    # not after an exception: leaving in good order would wait for peers inside a collective
    dist.destroy_process_group()


def wrap_encoder(encoder: torch.nn.Module, ranks: Ranks) -> torch.nn.Module:
    """Replicate the encoder: its gradients are averaged over the ranks during backward."""
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(encoder, device_ids=devices)


def on_main(ranks: Ranks, work: Callable[[], None]) -> None:
    """Once all ranks are here, rank 0 works while the others wait, for hours if need be: no
    collective is open meanwhile, so none can time out. A failure of rank 0 ends the others with
    its text.
    """
    key = f"on_main/{next(_CALLS)}"
    if not ranks.is_main:
        ranks.store.set(f"{key}/{ranks.rank}", DONE)
        outcome = _await(ranks.store, key)
        if outcome != DONE:
            raise PeerFailed(f"rank 0 stopped: {outcome}")
        return
    for rank in range(1, ranks.world_size):
        _await(ranks.store, f"{key}/{rank}")
    try:
        work()
    except BaseException as error:
        ranks.store.set(key, f"{type(error).__name__}: {error}")
        raise
    ranks.store.set(key, DONE)


def _await(store: dist.Store, key: str) -> str:
    """The value of a key, however long it takes to be set."""
    while not store.check([key]):
        time.sleep(POLL_S)
    return store.get(key).decode()


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """[b, ...] of every rank -> [W * b, ...] in rank order, without gradient."""
    gathered = rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))
    _single("all_gather")(gathered, rows.contiguous())
    return gathered


def reduce_scatter_rows(rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    """[W * b, ...] of every rank -> sum over the ranks of this rank's [b, ...], under way: calling
    the result waits for it.
    """
    own = rows.new_empty((rows.shape[0] // dist.get_world_size(), *rows.shape[1:]))
    work = _single("reduce_scatter")(own, rows.contiguous(), async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return own

    return wait


def _single(name: str):
    """A collective on one tensor, under its newer name where torch has it."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}
    return getattr(dist, f"{name}_single", None) or getattr(dist, older[name])


def broadcast_object(value):
    """Rank 0's JSON-like value on every rank. It travels as JSON text, so nothing is unpickled."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    dist.broadcast(length, 0)
    if dist.get_rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


def all_gather_json(value) -> list:
    """Every rank's JSON-like value, in rank order, on every rank;
    as JSON text padded to equal length.
    """
    data = json.dumps(value).encode()
    lengths = all_gather_rows(torch.tensor([len(data)]))
    padded = torch.frombuffer(bytearray(data.ljust(int(lengths.max()))), dtype=torch.uint8)
    return [json.loads(bytes(row.tolist())) for row in all_gather_rows(padded[None])]
