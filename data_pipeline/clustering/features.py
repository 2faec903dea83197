"""Shards -> one vector per sample, from the codec descriptor, which needs no weights, from an
encoder of ours, or from a frozen public image encoder.

    FOLDER/features.json     what was read by what: manifest, settings, hash of the weights
    FOLDER/SHARD.npy         float32 [n, D], one row per sample of the shard
    FOLDER/SHARD.json        its sha256; written last, so a shard without it is not done

Work is cut by shards: finished ones are kept, several jobs share a folder by task numbers. Vectors
are stored as they come; `normalise` and the projection of clustering come after.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import CorruptShard, DataPipelineError, MissingData
from ..loading.shard_reader import ShardReader
from ..shards.manifest import Manifest
from ..shards.schema import SampleInfo, decode_array, decode_jpeg, frames_from_strip
from ..shards.writer import file_sha256, write_array, write_atomically
from .descriptor import codec_descriptor

RECORD_NAME = "features.json"


@dataclass(frozen=True)
class FeatureConfig:
    """Where vectors come from.

    encoder: None (codec descriptor), a Hugging Face folder of our packing model (codec view of
    clips, whole pictures; the pooled vector), or FAMILY:FOLDER of a frozen image encoder (mean
    patch token of each of `num_frames` frames; of that the first `keep_dims` numbers, normalised;
    then their mean, or side by side with `concat`).
    """

    encoder: str | None = None
    num_frames: int = 1
    concat: bool = False
    keep_dims: int | None = None

    def weights_sha256(self) -> str | None:
        """Hash of the encoder's weight files; MissingData when there are none."""
        if self.encoder is None:
            return None
        folder = Path(self.encoder.partition(":")[2] or self.encoder)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise MissingData(
                f"--encoder {self.encoder} has no .safetensors file: give a run's hf/, or "
                "FAMILY:FOLDER of a public image encoder"
            )
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def extract(
    manifest: Manifest,
    config: FeatureConfig,
    folder: Path,
    task_id: int = 0,
    num_tasks: int = 1,
    report=print,
) -> bool:
    """Write the vectors of shards task_id, task_id + num_tasks, ... that are not there yet; whether
    all shards are done now, by whomever.

    Raises DataPipelineError when the folder holds features of something else.
    """
    from tqdm import tqdm

    if len(manifest) == 0:
        raise MissingData(
            f"{manifest.directory} holds no sample: see `python -m data_pipeline stats`"
        )
    if not 0 <= task_id < num_tasks:
        raise ValueError(f"--task-id {task_id} must be 0 to {num_tasks - 1} with {num_tasks} tasks")
    identity = _identity(manifest, config)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / RECORD_NAME
    if record.is_file() and json.loads(record.read_bytes()) != identity:
        raise DataPipelineError(
            f"{folder} holds features of other samples, settings or weights: name another folder"
        )
    write_atomically(record, json.dumps(identity, indent=1, sort_keys=True).encode())
    todo = [
        place
        for place in range(task_id, len(manifest.shards), num_tasks)
        if manifest.shards[place]["samples"] and not _is_done(folder, manifest.shards[place])
    ]
    if todo:
        rows_of = _source(manifest, config)
        for place in tqdm(todo, desc="features", unit="shard", disable=None):
            name = manifest.shards[place]["name"]
            ids = range(int(manifest.starts[place]), int(manifest.starts[place + 1]))
            write_array(folder / f"{name}.npy", rows_of(ids))
            done = {"sha256": file_sha256(folder / f"{name}.npy"), "rows": len(ids)}
            write_atomically(folder / f"{name}.json", json.dumps(done).encode())
    missing = [s["name"] for s in manifest.shards if s["samples"] and not _is_done(folder, s)]
    if missing:
        report(f"{len(missing)} shards are still to be done by other tasks, {missing[0]} first")
    return not missing


def load_features(manifest: Manifest, folder: Path) -> tuple[np.ndarray, FeatureConfig]:
    """Vectors float32 [N, D] in the order of sample ids, and where they come from.

    Raises MissingData for unfinished folders, CorruptShard for changed files, DataPipelineError for
    features of another set.
    """
    record = folder / RECORD_NAME
    if not record.is_file():
        raise MissingData(
            f"{record} does not exist: make it with `python -m data_pipeline features`"
        )
    identity = json.loads(record.read_bytes())
    config = FeatureConfig(**identity["config"])
    if identity["manifest_sha256"] != manifest.sha256:
        raise DataPipelineError(f"{folder} holds features of another set than {manifest.directory}")
    parts = []
    for shard in manifest.shards:
        if not shard["samples"]:
            continue
        if not _is_done(folder, shard):
            raise MissingData(f"{folder}: {shard['name']} is not done, run `features` again")
        path = folder / f"{shard['name']}.npy"
        if file_sha256(path) != json.loads(path.with_suffix(".json").read_bytes())["sha256"]:
            raise CorruptShard(f"{path} changed since it was written: remove it and run again")
        parts.append(np.load(path, allow_pickle=False))
    return np.concatenate(parts), config


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm, float32; zero rows stay zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.maximum(norms, 1e-12)).astype(np.float32)


def _identity(manifest: Manifest, config: FeatureConfig) -> dict:
    return {
        "manifest_sha256": manifest.sha256,
        "config": asdict(config),
        "weights_sha256": config.weights_sha256(),
    }


def _is_done(folder: Path, shard: dict) -> bool:
    record = folder / f"{shard['name']}.json"
    if not record.is_file() or not record.with_suffix(".npy").is_file():
        return False
    return json.loads(record.read_bytes())["rows"] == len(shard["samples"])


def _source(manifest: Manifest, config: FeatureConfig) -> Callable[[range], np.ndarray]:
    """The function from sample ids to rows float32 [n, D]."""
    if config.encoder is None:
        return lambda ids: descriptor_rows(manifest, ids)
    family, separator, folder = config.encoder.partition(":")
    if separator and not Path(config.encoder).exists():
        return _image_encoder_rows(manifest, config, family, folder)
    return _packing_model_rows(manifest, config.encoder)


def descriptor_rows(manifest: Manifest, ids) -> np.ndarray:
    """Codec descriptors of samples, float32 [n, D], neither centred nor scaled."""
    rows = []
    with ShardReader(manifest) as reader:
        for sample_id in ids:
            frames, motion = _frames(reader, manifest, sample_id, with_motion=True)
            rows.append(codec_descriptor(motion, frames[0]))
    return np.stack(rows)


def _frames(reader: ShardReader, manifest: Manifest, sample_id: int, with_motion: bool = False):
    """(stored frames uint8 [M, H, W, 3], coarse motion or None) of a clip or a picture."""
    _, sample = manifest.locate(sample_id)
    if sample["kind"] == "image":
        return decode_jpeg(reader.read(sample_id, "jpg"))[None], None
    info = SampleInfo.from_bytes(reader.read(sample_id, "json"), sample["key"])
    frames = frames_from_strip(decode_jpeg(reader.read(sample_id, "frames.jpg")), info.height)
    if not with_motion:
        return frames, None
    data = reader.read(sample_id, "motion.npy")
    return frames, decode_array(data, "motion.npy", sample["key"])


def _packing_model_rows(manifest: Manifest, folder: str) -> Callable[[range], np.ndarray]:
    import torch

    from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

    from ..loading.sequential import sequential_batches

    model = LlavaViTPackingModel.from_pretrained(folder, local_files_only=True).eval()
    if manifest.settings["patch_size"] != model.config.patch_size:
        raise DataPipelineError(
            f"{folder} takes patches of {model.config.patch_size}, {manifest.directory} "
            f"was packed with {manifest.settings['patch_size']}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)

    @torch.inference_mode()
    def rows_of(ids: range) -> np.ndarray:
        rows = []
        for batch in sequential_batches(manifest, ids, 32, "codec"):
            pooled = model(**batch.to(device).model_inputs()).pooler_output
            rows.append(pooled[: batch.num_samples].float().cpu().numpy())
        return np.concatenate(rows)

    return rows_of


def _image_encoder_rows(
    manifest: Manifest, config: FeatureConfig, family: str, folder: str
) -> Callable[[range], np.ndarray]:
    import torch

    from model_factory.hf_image_encoders import load_image_encoder

    from ..loading.views import choose_frames

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_image_encoder(family, folder).to(device)

    @torch.inference_mode()
    def vector(frames: np.ndarray) -> np.ndarray:
        chosen = choose_frames(len(frames), config.num_frames, None)  # a picture stands for each
        pixels = torch.from_numpy(frames[chosen]).movedim(-1, 1).to(device)
        means = encoder.encode(pixels).mean(dim=1).float().cpu().numpy()[:, : config.keep_dims]
        each = normalise(means)
        return each.reshape(-1) if config.concat else each.mean(axis=0)

    def rows_of(ids: range) -> np.ndarray:
        with ShardReader(manifest) as reader:
            return np.stack([vector(_frames(reader, manifest, i)[0]) for i in ids])

    return rows_of
