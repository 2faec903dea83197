"""Reading every byte of the shards: are they still what the manifest binds?"""

import re
import tarfile
from pathlib import Path

import numpy as np

from model_factory.files import DIGEST_KEY, file_sha256

from ..errors import CorruptShard, DataPipelineError
from ..loading.shard_reader import ShardReader
from ..side_files import check_array
from .existing import read_shard_record
from .jpeg import check_jpeg
from .manifest import MANIFEST_NAME, Manifest, manifest_bytes
from .schema import SampleInfo, check_positions, decode_array, mosaic_size, strip_size
from .writer import index_text

# lower case, one dot: what webdataset, DALI and tarfile split into key and extension alike
MEMBER_NAME = re.compile(r"[a-z0-9_]+\.[a-z.]+")


def verify(manifest: Manifest) -> list[str]:
    """Every problem found, one line each; an empty list means every byte is as it was written.

    Checks each shard's sha256, its index, that its tar holds the recorded members and nothing
    else, and that every sample decodes by the schema with its stated counts. Images are checked by
    their headers.
    """
    problems = _manifest_problems(manifest)
    for shard in manifest.shards:
        tar = manifest.directory / f"{shard['name']}.tar"
        if file_sha256(tar) != shard["sha256"]:
            problems.append(f"{tar.name}: bytes changed since it was written (sha256 differs)")
        # older records have no digest, but the manifest's hash of their bytes was checked already
        if DIGEST_KEY in shard and read_shard_record(tar.with_suffix(".json")) is None:
            problems.append(f"{shard['name']}.json: its digest is not that of its content")
        index = tar.with_suffix(".tar.idx")
        if not index.is_file() or index.read_bytes() != index_text(shard).encode():
            problems.append(f"{index.name}: missing, stale or of another shard")
        problems += _tar_problems(tar, shard)
    with ShardReader(manifest) as reader:
        for sample_id in range(len(manifest)):
            shard, sample = manifest.locate(sample_id)
            name = f"{shard['name']}/{sample['key']}"
            try:
                _check_sample(reader, sample_id, name=name, record=sample)
            except DataPipelineError as error:
                problems.append(str(error))
            except Exception as error:  # whatever hostile bytes do to a parser, they get a name
                problems.append(f"{name}: {type(error).__name__}: {error}")
    return problems


def _manifest_problems(manifest: Manifest) -> list[str]:
    """The manifest must be what its records make, and no other shard may lie beside them."""
    problems = []
    # `pack` writes the settings of the first shard into the manifest
    settings = manifest.shards[0]["settings"] if manifest.shards else manifest.settings
    written = manifest_bytes(manifest.directory, list(manifest.shards), settings=settings)
    if (manifest.directory / MANIFEST_NAME).read_bytes() != written:
        problems.append(
            f"{MANIFEST_NAME}: not what the shards' records make of it, pack again to write it anew"
        )
    known = {shard["name"] for shard in manifest.shards}
    for tar in sorted(manifest.directory.glob("*.tar")):
        if tar.stem not in known:
            problems.append(f"{tar.name}: a shard that the manifest does not name")
    return problems


def _tar_problems(tar: Path, shard: dict) -> list[str]:
    """What a tar holds that the writer never writes: foreign, linked, sparse or repeated members,
    names that other readers split differently."""
    # offset and size by member name, as recorded
    places = {
        f"{sample['key']}.{extension}": tuple(place[:2])
        for sample in shard["samples"]
        for extension, place in sample["members"].items()
    }
    problems = []
    seen: set[str] = set()
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                problem = _member_problem(member, places=places, seen=seen)
                seen.add(member.name)
                if problem:
                    problems.append(f"{tar.name}: member {member.name!r} {problem}")
    except (tarfile.TarError, OSError) as error:
        problems.append(f"{tar.name}: no readable plain tar ({error})")
    absent = sorted(places.keys() - seen)
    return problems + [f"{tar.name}: no member {name}" for name in absent]


def _member_problem(member: tarfile.TarInfo, places: dict, seen: set[str]) -> str | None:
    # a sparse member's bytes are not those at its offset, a link has none
    if not member.isreg() or member.issparse():
        return "is no regular file"
    if member.name in seen:
        return "is there twice"
    if member.name not in places:
        return "is not in the record"
    if not MEMBER_NAME.fullmatch(member.name) or member.pax_headers:
        return "has a name or header that readers disagree on"
    if (member.offset_data, member.size) != places[member.name]:
        return "lies elsewhere than its record says"
    return None


def _check_sample(reader: ShardReader, sample_id: int, name: str, record: dict) -> None:
    """Decode a sample's members and compare them with its entry in the shard's record;
    CorruptShard names what is wrong."""

    def array(member: str) -> np.ndarray:
        return decode_array(reader.read(sample_id, member), member, name=name)

    def check_image(member: str, size: tuple[int, int]) -> None:
        label = f"{name}.{member}"
        header = check_jpeg(reader.read(sample_id, member), size=size, name=label)
        if header.components != 3:
            raise CorruptShard(f"{label} has {header.components} colour component, expected 3")

    info = SampleInfo.from_bytes(reader.read(sample_id, "json"), name=name)
    found = {
        "kind": info.kind,
        "source": info.source,
        "grid": list(info.grid),
        "num_patches": info.num_patches,
        "num_stored_frames": len(info.frame_times),
    }
    stated = {key: record.get(key) for key in found}
    if stated != found:
        raise CorruptShard(f"{name}: the shard's record says {stated}, the sample {found}")
    if info.kind == "image":
        check_image("jpg", (info.height, info.width))
        return
    check_positions(array("positions.npy"), count=info.num_patches, grid=info.grid, name=name)
    check_array(array("scores.npy"), shape=(info.num_patches,), name=f"{name}.scores.npy")
    num_frames = len(array("motion.npy"))
    if num_frames != info.num_frames:
        raise CorruptShard(f"{name}: motion of {num_frames} frames, there are {info.num_frames}")
    check_image("tiles.jpg", mosaic_size(info.num_patches, info.patch_size))
    check_image("frames.jpg", strip_size(info))
