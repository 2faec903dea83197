"""Counter-based randomness: every draw is a pure function of (seed, purpose, counters).

No generator lives longer than one draw, so resuming, the number of workers and the world size
cannot disturb it.

    counter_rng        a NumPy generator for one draw; about 15 microseconds to build one
    counter_uniform    one number per id, on any device; about ten integer operations per number
    counter_normal     one row per id, likewise

torch is imported by the functions that need it: packing workers use `counter_rng` alone, and
importing torch takes seconds in each of them.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# constants of SplitMix64 (Steele, Lea, Flood 2014) as signed numbers, since torch has no uint64
_INCREMENT = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_PIECE = 1 << 15  # numbers at a time on a CPU, so that they stay in its cache (256 KB)
_INIT_ROWS = 1 << 14  # rows drawn at a time, to bound memory


def counter_rng(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A fresh generator for one draw, e.g. counter_rng(seed, "view", epoch, sample_id)."""
    words = [seed, zlib.crc32(purpose.encode()), *counters]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def counter_uniform(ids: torch.Tensor, seed: int, purpose: str, *counters: int) -> torch.Tensor:
    """Uniform float32 in [0, 1) for every int64 id; equal arguments give equal numbers on every
    device and for every world size."""
    import torch

    state = torch.zeros((), dtype=torch.int64, device=ids.device)
    for word in (seed, zlib.crc32(purpose.encode()), *counters):
        state = _mix(state ^ word)
    if ids.is_cuda or ids.numel() <= _PIECE:
        return _uniform(ids, state)
    pieces = [_uniform(piece, state) for piece in ids.reshape(-1).split(_PIECE)]
    return torch.cat(pieces).view(ids.shape)


def counter_normal(rows: torch.Tensor, width: int, seed: int, purpose: str) -> torch.Tensor:
    """Standard normal float32 [len(rows), width]; row i depends only on rows[i] (Box-Muller)."""
    import torch

    normal = []
    columns = torch.arange(width, device=rows.device)
    for piece in rows.split(_INIT_ROWS):
        ids = piece[:, None] * width + columns
        # log1p of the negative: uniform numbers reach 0, never 1
        uniform = counter_uniform(ids, seed, purpose, 0)
        radius = (-2 * torch.log1p(-uniform)).sqrt()
        angle = 2 * math.pi * counter_uniform(ids, seed, purpose, 1)
        normal.append(radius * torch.cos(angle))
    return torch.cat(normal)


def _uniform(ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    # 24 bits, as many as a float32 holds exactly
    return _shift(_mix(ids ^ state), 40).float() * 2.0**-24


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x + _INCREMENT
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
