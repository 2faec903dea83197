"""The process group and its collectives; the only reader of RANK, WORLD_SIZE and LOCAL_RANK.

NCCL on GPUs, gloo on CPUs, and a group of one without a launcher, so that no other module asks
whether a group exists. All collectives here move equal shapes from every rank.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """Who this process is, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

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
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    yield Ranks(rank, world_size, local_rank, device)
    # not after an exception: leaving in good order would wait for peers inside a collective
    dist.destroy_process_group()


def wrap_encoder(encoder: torch.nn.Module, ranks: Ranks) -> torch.nn.Module:
    """Replicate the encoder: its gradients are averaged over the ranks during backward."""
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(encoder, device_ids=devices)


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """[b, ...] of every rank -> [W * b, ...] in rank order, without gradient."""
    gathered = rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))
    _single("all_gather")(gathered, rows.contiguous())
    return gathered


def reduce_scatter_rows(rows: torch.Tensor) -> torch.Tensor:
    """[W * b, ...] of every rank -> sum over the ranks of this rank's [b, ...]."""
    own = rows.new_empty((rows.shape[0] // dist.get_world_size(), *rows.shape[1:]))
    _single("reduce_scatter")(own, rows.contiguous())
    return own


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
