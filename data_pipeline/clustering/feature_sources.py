"""Samples -> vectors: from the codec descriptor, which needs no weights, from an encoder of
ours, or from a frozen public image encoder.

Vectors are as they come; `normalise` and the projection of clustering come after.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import numpy as np

from model_factory.command_line.quiet import quiet_libraries
from model_factory.files import check_fields, file_sha256
from model_factory.open_encoder import EncoderLocation, Kind, locate_encoder, open_encoder

from ..errors import DataPipelineError, MissingData
from ..loading.shard_reader import ShardReader
from ..shards.manifest import Manifest
from ..shards.schema import SampleInfo, decode_array, decode_frames, frames_member
from .descriptor import codec_descriptor


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
        files = sorted(locate_encoder(self.encoder).path.glob("*.safetensors"))
        if not files:
            raise MissingData(
                f"--encoder {self.encoder} has no .safetensors file: give a run's hf/, or "
                "FAMILY:FOLDER of a public image encoder"
            )
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()

    def identity(self, weights_sha256: str | None) -> dict:
        """What decides the vectors: a folder counts by its weights, not by its path."""
        values = asdict(self)
        if self.encoder is not None:
            values["encoder"] = locate_encoder(self.encoder).family or "ours"
        return {**values, "weights_sha256": weights_sha256}

    def flags(self) -> str:
        """The flags of `features` that are not as by default, but for the encoder."""
        words = "" if self.num_frames == 1 else f" --num-frames {self.num_frames}"
        words += " --concat" if self.concat else ""
        return words + ("" if self.keep_dims is None else f" --keep-dims {self.keep_dims}")

    @classmethod
    def of(cls, values: dict, name: str) -> "FeatureConfig":
        """Settings as a record of the file `name` states them; DamagedFile for others."""
        check_fields(values, fields=CONFIG_FIELDS, name=name)
        return cls(**{field.name: values[field.name] for field in fields(cls)})


CONFIG_FIELDS: dict[str, type | tuple[type, ...]] = {
    "encoder": (str, type(None)),
    "num_frames": int,
    "concat": bool,
    "keep_dims": (int, type(None)),
}


def source_of(manifest: Manifest, config: FeatureConfig) -> Callable[[range], np.ndarray]:
    """The function from sample ids to rows float32 [n, D]."""
    if config.encoder is None:
        return lambda ids: descriptor_rows(manifest, ids)
    quiet_libraries()
    location = locate_encoder(config.encoder)
    if location.kind is Kind.IMAGE:
        return _image_encoder_rows(manifest, config, location)
    return _packing_model_rows(manifest, location)


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
    name = sample["key"]
    info = SampleInfo.from_bytes(reader.read(sample_id, "json"), name)
    frames = decode_frames(info, reader.read(sample_id, frames_member(info.kind)), name)
    if info.kind == "image" or not with_motion:
        return frames, None
    data = reader.read(sample_id, "motion.npy")
    return frames, decode_array(data, "motion.npy", name)


def _packing_model_rows(
    manifest: Manifest, location: EncoderLocation
) -> Callable[[range], np.ndarray]:
    import torch

    from ..loading.samples import sequential_batches

    model = open_encoder(location, dtype="auto").eval()
    if manifest.settings["patch_size"] != model.config.patch_size:
        raise DataPipelineError(
            f"{location.path} takes patches of {model.config.patch_size}, {manifest.directory} "
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
    manifest: Manifest, config: FeatureConfig, location: EncoderLocation
) -> Callable[[range], np.ndarray]:
    import torch

    from model_factory.hf_image_encoders import load_image_encoder

    from ..loading.views import choose_frames

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_image_encoder(str(location.family), location.path).to(device)

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


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm, float32; zero rows stay zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.maximum(norms, 1e-12)).astype(np.float32)
