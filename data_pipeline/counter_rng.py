"""Counter-based randomness: every draw is a pure function of (seed, purpose, counters).

No generator lives longer than one draw, so resuming, the number of workers and the world size
cannot disturb it. Cost: about 15 microseconds to build a generator.
"""

import zlib

import numpy as np


def counter_rng(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A fresh generator for one draw, e.g. counter_rng(seed, "view", epoch, sample_id)."""
    words = [seed, zlib.crc32(purpose.encode()), *counters]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
