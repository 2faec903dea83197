"""What the plan must know of every sample without reading it: its kind, its grid, what is stored.

Made from the manifest once, 17 bytes a sample.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import CorruptShard
from ..shards.manifest import Manifest


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
        samples = [sample for shard in manifest.shards for sample in shard["samples"]]
        try:
            columns = {
                "rows": [sample["grid"][0] for sample in samples],
                "columns": [sample["grid"][1] for sample in samples],
                "num_patches": [sample["num_patches"] for sample in samples],
                "num_frames": [sample["num_stored_frames"] for sample in samples],
            }
        except KeyError as error:
            raise CorruptShard(
                f"{manifest.directory}: the shards' records lack {error}, an older version wrote "
                "them: pack into another folder"
            ) from error
        is_image = np.array([sample["kind"] == "image" for sample in samples], dtype=bool)
        return cls(is_image, **{name: np.array(v, np.int32) for name, v in columns.items()})

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
