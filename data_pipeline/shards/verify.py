"""Reading every byte of a packed folder: does it still say what the manifest binds?"""

import numpy as np

from ..errors import CorruptShard, DataPipelineError
from ..loading.shard_reader import ShardReader
from .manifest import MANIFEST_NAME, Manifest, manifest_bytes
from .schema import SampleInfo, decode_array
from .writer import file_sha256, index_text


def verify(manifest: Manifest) -> list[str]:
    """Every problem found, one line each; an empty list means every byte is as it was written.

    Checks each shard's sha256, its index, and that every sample decodes by the schema with its
    stated counts.
    """
    problems = _manifest_problems(manifest)
    for shard in manifest.shards:
        tar = manifest.directory / f"{shard['name']}.tar"
        if file_sha256(tar) != shard["sha256"]:
            problems.append(f"{tar.name}: bytes changed since it was written (sha256 differs)")
        index = tar.with_suffix(".tar.idx")
        if not index.is_file() or index.read_bytes() != index_text(shard).encode():
            problems.append(f"{index.name}: missing, stale or of another shard")
    with ShardReader(manifest) as reader:
        for sample_id in range(len(manifest)):
            shard, sample = manifest.locate(sample_id)
            try:
                _check_sample(reader, sample_id, f"{shard['name']}/{sample['key']}")
            except DataPipelineError as error:
                problems.append(str(error))
    return problems


def _manifest_problems(manifest: Manifest) -> list[str]:
    """The manifest must be what its records make, and no other shard may lie beside them."""
    problems = []
    settings = manifest.shards[0]["settings"] if manifest.shards else manifest.settings
    path = manifest.directory / MANIFEST_NAME
    if path.read_bytes() != manifest_bytes(manifest.directory, list(manifest.shards), settings):
        problems.append(
            f"{path.name}: not what the shards' records make of it, pack again to write it anew"
        )
    known = {f"{shard['name']}.tar" for shard in manifest.shards}
    others = sorted(p.name for p in manifest.directory.glob("*.tar") if p.name not in known)
    return problems + [f"{name}: a shard that the manifest does not name" for name in others]


def _check_sample(reader, sample_id: int, name: str) -> None:
    info = SampleInfo.from_bytes(reader.read(sample_id, "json"), name)
    if info.kind == "image":
        reader.read(sample_id, "jpg")
        return
    positions = decode_array(reader.read(sample_id, "positions.npy"), "positions.npy", name)
    scores = decode_array(reader.read(sample_id, "scores.npy"), "scores.npy", name)
    if len(positions) != info.num_patches or len(scores) != info.num_patches:
        raise CorruptShard(
            f"{name}: {len(positions)} positions and {len(scores)} scores for {info.num_patches} "
            "patches"
        )
    if not np.isfinite(scores).all() or (positions[:, 1:] >= info.grid).any():
        raise CorruptShard(f"{name}: scores or positions out of range")
    for member in ("motion.npy", "tiles.jpg", "frames.jpg"):
        reader.read(sample_id, member)
