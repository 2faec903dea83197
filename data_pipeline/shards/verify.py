"""Reading every byte of the shards: do they still say what the manifest binds?"""

import re
import tarfile

from model_factory.files import DIGEST_KEY, file_sha256

from ..arrays import check_array
from ..errors import CorruptShard, DataPipelineError
from ..loading.shard_reader import ShardReader
from .existing import read_shard_record
from .jpeg import check_jpeg, read_jpeg_header
from .manifest import MANIFEST_NAME, Manifest, manifest_bytes
from .schema import SampleInfo, check_positions, decode_array, mosaic_size, strip_size
from .writer import index_text


def verify(manifest: Manifest) -> list[str]:
    """Every problem found, one line each; an empty list means every byte is as it was written.

    Checks each shard's sha256, its index, that its tar holds the recorded members and nothing
    else, and that every sample decodes by the schema with its stated counts. Pictures are checked
    by their headers.
    """
    problems = _manifest_problems(manifest)
    for shard in manifest.shards:
        tar = manifest.directory / f"{shard['name']}.tar"
        if file_sha256(tar) != shard["sha256"]:
            problems.append(f"{tar.name}: bytes changed since it was written (sha256 differs)")
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
                _check_sample(reader, sample_id, name, sample)
            except DataPipelineError as error:
                problems.append(str(error))
            except Exception as error:  # whatever hostile bytes do to a parser, they get a name
                problems.append(f"{name}: {type(error).__name__}: {error}")
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


def _tar_problems(path, shard: dict) -> list[str]:
    """What a tar holds that the writer never writes: foreign, linked, sparse or repeated members,
    names that other readers split differently."""
    places = {
        f"{sample['key']}.{extension}": tuple(place[:2])
        for sample in shard["samples"]
        for extension, place in sample["members"].items()
    }
    problems, seen = [], set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                problem = _member_problem(member, places, seen)
                seen.add(member.name)
                if problem:
                    problems.append(f"{path.name}: member {member.name!r} {problem}")
    except (tarfile.TarError, OSError) as error:
        problems.append(f"{path.name}: no readable plain tar ({error})")
    missing = sorted(places.keys() - seen)
    return problems + [f"{path.name}: no member {name}" for name in missing]


def _member_problem(member: tarfile.TarInfo, places: dict, seen: set[str]) -> str | None:
    if not member.isreg() or member.issparse():
        return "is no regular file"
    if member.name in seen:
        return "is there twice"
    if member.name not in places:
        return "is not in the record"
    if not re.fullmatch(r"[a-z0-9_]+\.[a-z.]+", member.name) or member.pax_headers:
        return "has a name or header that readers disagree on"
    if (member.offset_data, member.size) != places[member.name]:
        return "lies elsewhere than its record says"
    return None


def _check_picture(reader, sample_id: int, extension: str, name: str, size) -> None:
    data = reader.read(sample_id, extension)
    check_jpeg(data, size=size, name=f"{name}.{extension}")
    components = read_jpeg_header(data, name).components
    if components != 3:
        raise CorruptShard(f"{name}.{extension} has {components} colour component, expected 3")


def _check_sample(reader, sample_id: int, name: str, record: dict) -> None:
    info = SampleInfo.from_bytes(reader.read(sample_id, "json"), name)
    said = {key: record.get(key) for key in ("kind", "source", "grid", "num_patches")}
    found = {"kind": info.kind, "source": info.source, "grid": list(info.grid)}
    said["num_stored_frames"] = record.get("num_stored_frames")
    found |= {"num_patches": info.num_patches, "num_stored_frames": len(info.frame_times)}
    if said != found:
        raise CorruptShard(f"{name}: the shard's record says {said}, the sample {found}")
    if info.kind == "image":
        _check_picture(reader, sample_id, "jpg", name, (info.height, info.width))
        return
    positions = decode_array(reader.read(sample_id, "positions.npy"), "positions.npy", name)
    check_positions(positions, count=info.num_patches, grid=info.grid, name=name)
    scores = decode_array(reader.read(sample_id, "scores.npy"), "scores.npy", name)
    check_array(scores, shape=(info.num_patches,), name=f"{name}.scores.npy")
    motion = decode_array(reader.read(sample_id, "motion.npy"), "motion.npy", name)
    if len(motion) != info.num_frames:
        raise CorruptShard(f"{name}: motion of {len(motion)} frames, there are {info.num_frames}")
    tiles = mosaic_size(info.num_patches, info.patch_size)
    _check_picture(reader, sample_id, "tiles.jpg", name, tiles)
    _check_picture(reader, sample_id, "frames.jpg", name, strip_size(info))
