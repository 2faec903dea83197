"""What the plan must know of every sample without reading it: its kind, its grid, what is stored.

Made from the manifest once, 17 bytes a sample.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import CorruptShard, MissingData
from ..shards.manifest import Manifest, how_to_repack
from ..shards.schema import MAX_PATCHES


@dataclass(frozen=True)
class SampleTable:
    """Columns over sample ids: is_image bool, and int32 patch rows and columns of one frame, kept
    patches, stored whole frames.
    """

    is_image: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    num_patches: np.ndarray
    num_frames: np.ndarray

    @classmethod
    def of(cls, manifest: Manifest) -> "SampleTable":
        """Read off the shards' records; CorruptShard for records of an older writer."""
        if not len(manifest):
            raise MissingData(f"{manifest.directory} holds no sample: see `stats` on it")
        # no pairs in between: new objects by the hundred thousand wake the garbage collector
        rows = [
            _numbers(sample, shard, manifest)
            for shard in manifest.shards
            for sample in shard["samples"]
        ]
        kinds = (sample["kind"] for shard in manifest.shards for sample in shard["samples"])
        is_image = np.fromiter((kind == "image" for kind in kinds), bool, len(manifest))
        return cls(is_image, *np.array(rows, np.int32).T)

    def scaled_grid(self, ids, scale: float):
        """(rows, columns) of one frame of samples after shrinking."""
        return scaled_grid(self.rows[ids], self.columns[ids], scale)

    def scaled_tokens(self, scale: float) -> np.ndarray:
        """Tokens of one frame of every sample after shrinking, int64 [N]."""
        rows, columns = self.scaled_grid(slice(None), scale)
        return rows * columns


def scaled_grid(rows, columns, scale: float):
    """Patch rows and columns of a frame after shrinking to whole patches, at least one."""
    shrunk = [np.floor(np.asarray(side) * scale + 0.5).astype(np.int64) for side in (rows, columns)]
    return np.maximum(shrunk[0], 1), np.maximum(shrunk[1], 1)


def _numbers(sample: dict, shard: dict, manifest: Manifest) -> tuple[int, int, int, int]:
    """(rows, columns, patches, stored frames) of a record's sample, checked."""
    try:
        rows, columns = sample["grid"]
        numbers = (rows, columns, sample["num_patches"], sample["num_stored_frames"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptShard(
            f"{manifest.directory}: the record of {sample.get('source')} lacks {error}; an older "
            f"version wrote it; {how_to_repack(shard['name'])}"
        ) from error
    if not all(type(number) is int and 0 < number < MAX_PATCHES for number in numbers):
        raise CorruptShard(
            f"{manifest.directory}: the record of {sample['source']} says grid {rows}x{columns}, "
            f"{numbers[2]} patches, {numbers[3]} frames: no sample is like that; "
            f"{how_to_repack(shard['name'])}"
        )
    return numbers
