"""Shards -> one vector per sample, from the codec descriptor, which needs no weights, from an
encoder of ours, or from a frozen public image encoder.

    FOLDER/features.json     what was read by what: manifest, settings, hash of the weights
    FOLDER/SHARD.npy         float32 [n, D], one row per sample of the shard
    FOLDER/SHARD.json        its sha256 and what it was made of; written last, so a shard without it
                             is not done

Work is cut by shards: finished ones are kept, several jobs share a folder by task numbers. Vectors
are stored as they come; `normalise` and the projection of clustering come after.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from model_factory.files import file_sha256, write_atomically
from model_factory.quiet import quiet_libraries

from ..errors import CorruptShard, DataPipelineError, MissingData
from ..loading.shard_reader import ShardReader
from ..records import read_record
from ..shards.manifest import Manifest
from ..shards.schema import SampleInfo, decode_array, decode_jpeg, frames_from_strip
from ..shards.writer import write_array
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

    def identity(self) -> dict:
        """What decides the vectors: a folder counts by its weights, not by its path."""
        fields = asdict(self)
        if self.encoder is not None:
            family, separator, _ = self.encoder.partition(":")
            fields["encoder"] = family if separator else "ours"
        return {**fields, "weights_sha256": self.weights_sha256()}


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
    origin = {"manifest_sha256": manifest.sha256, **config.identity()}
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / RECORD_NAME
    if not is_of(folder, origin):
        raise DataPipelineError(
            f"{folder} holds features of other samples, settings or weights: name another folder, "
            "or remove it"
        )
    whole = {"config": asdict(config), "origin": origin}
    write_atomically(record, json.dumps(whole, indent=1, sort_keys=True).encode())
    done = _Done(folder, origin)
    todo = [
        place
        for place in range(task_id, len(manifest.shards), num_tasks)
        if manifest.shards[place]["samples"] and not done.has(manifest.shards[place])
    ]
    if todo:
        rows_of = _source(manifest, config)
        for place in tqdm(todo, desc="features", unit="shard", disable=None):
            ids = range(int(manifest.starts[place]), int(manifest.starts[place + 1]))
            done.add(manifest.shards[place], _finite(rows_of(ids), manifest, ids))
    missing = [s["name"] for s in manifest.shards if s["samples"] and not done.has(s)]
    if missing:
        report(f"{len(missing)} shards are still to be done by other tasks, {missing[0]} first")
    return not missing


def is_of(folder: Path, origin: dict) -> bool:
    """Whether a folder may take features of this origin: it holds none, or such."""
    record = folder / RECORD_NAME
    return not record.is_file() or read_record(record, "origin")["origin"] == origin


def load_features(manifest: Manifest, folder: Path) -> tuple[np.ndarray, FeatureConfig]:
    """Vectors float32 [N, D] in the order of sample ids, and where they come from; errors as of
    feature_pieces."""
    pieces = list(feature_pieces(manifest, folder))
    return np.concatenate(pieces), features_config(manifest, folder)


def features_config(manifest: Manifest, folder: Path) -> FeatureConfig:
    """Where the vectors of a folder come from; MissingData or DataPipelineError when they are not
    there, or of another set."""
    record = folder / RECORD_NAME
    if not record.is_file():
        raise MissingData(
            f"{record} does not exist: make it with `python -m data_pipeline features`"
        )
    whole = read_record(record, "config", "origin")
    if whole["origin"]["manifest_sha256"] != manifest.sha256:
        raise DataPipelineError(f"{folder} holds features of another set than {manifest.directory}")
    return FeatureConfig(**whole["config"])


def feature_pieces(manifest: Manifest, folder: Path) -> Iterator[np.ndarray]:
    """Vectors float32 [n, D] of one shard after the other.

    Raises MissingData for unfinished folders, CorruptShard for changed files, DataPipelineError for
    features of another set.
    """
    features_config(manifest, folder)
    done = _Done(folder, read_record(folder / RECORD_NAME, "origin")["origin"])
    for shard in manifest.shards:
        if shard["samples"]:
            yield done.read(shard)


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm, float32; zero rows stay zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.maximum(norms, 1e-12)).astype(np.float32)


class _Done:
    """Shards of one origin in a folder."""

    def __init__(self, folder: Path, origin: dict):
        self._folder = folder
        text = json.dumps(origin, sort_keys=True)
        self._origin = hashlib.sha256(text.encode()).hexdigest()

    def has(self, shard: dict) -> bool:
        """Whether a shard's vectors are there."""
        record = self._folder / f"{shard['name']}.json"
        if not record.is_file() or not record.with_suffix(".npy").is_file():
            return False
        found = read_record(record, "rows", "origin", "sha256")
        return found["rows"] == len(shard["samples"]) and found["origin"] == self._origin

    def add(self, shard: dict, rows: np.ndarray) -> None:
        """Write a shard's vectors."""
        path = self._folder / f"{shard['name']}.npy"
        write_array(path, rows)
        facts = {"sha256": file_sha256(path), "rows": len(rows), "origin": self._origin}
        write_atomically(path.with_suffix(".json"), json.dumps(facts).encode())

    def read(self, shard: dict) -> np.ndarray:
        """A shard's vectors, checked."""
        path = self._folder / f"{shard['name']}.npy"
        if not self.has(shard):
            raise MissingData(f"{self._folder}: {shard['name']} is not done, run `features` again")
        if file_sha256(path) != read_record(path.with_suffix(".json"))["sha256"]:
            raise CorruptShard(f"{path} changed since it was written: remove it and run again")
        return np.load(path, allow_pickle=False)


def _finite(rows: np.ndarray, manifest: Manifest, ids: range) -> np.ndarray:
    """Rows as they are; DataPipelineError names the first sample whose row is not finite."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        sample = ids[int(bad[0])]
        raise DataPipelineError(
            f"the vector of sample {sample} ({manifest.sources()[sample]}) is not finite: look at "
            "the sample and at the encoder's weights"
        )
    return rows


def _source(manifest: Manifest, config: FeatureConfig) -> Callable[[range], np.ndarray]:
    """The function from sample ids to rows float32 [n, D]."""
    if config.encoder is None:
        return lambda ids: descriptor_rows(manifest, ids)
    quiet_libraries()
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

    from model_factory.reading import reading
    from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

    from ..loading.sequential import sequential_batches

    with reading(folder):
        model = LlavaViTPackingModel.from_pretrained(folder, local_files_only=True).eval()
    if manifest.settings["patch_size"] != model.config.patch_size:
        raise DataPipelineError(
            f"{folder} takes patches of {model.config.patch_size}, {manifest.directory} "
            f"was packed with {manifest.settings['patch_size']}: pack again with --patch-size "
            f"{model.config.patch_size} into another --output"
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
