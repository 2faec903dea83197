"""Feature vectors of samples: by the codec descriptor, which needs no weights, by an encoder of
ours, or by a frozen public image encoder.

Vectors are neither scaled nor projected here; clustering does both later.
"""

import hashlib
from collections.abc import Callable, Iterable
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
    """Source of the vectors.

    encoder     None (codec descriptor); an encoder of ours, as model_factory/open_encoder.py names
                it (pooled vector of a clip's codec view, of its whole frames where tokens are
                tubes, or of a whole image); or FAMILY:FOLDER of a frozen image encoder (mean patch
                token of each frame, normalised)
    num_frames  of a clip, for image encoders
    concat      whether vectors of frames are concatenated; otherwise their mean is taken
    keep_dims   leading dimensions of a frame's vector that are used; None: all
    """

    encoder: str | None = None
    num_frames: int = 1
    concat: bool = False
    keep_dims: int | None = None

    def weights_sha256(self) -> str | None:
        """Hash of the encoder's weight files; MissingData when there are none. The path does not
        enter, so that a moved folder is the same encoder."""
        if self.encoder is None:
            return None
        # sorted: a folder lists its files in any order, and the hash depends on it
        files = sorted(locate_encoder(self.encoder).path.glob("*.safetensors"))
        if not files:
            raise MissingData(
                f"--encoder {self.encoder} has no .safetensors file: give a run's hf/, or "
                "FAMILY:FOLDER of a public image encoder"
            )
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()

    def identity(self, weights_sha256: str | None) -> dict[str, object]:
        """Everything that the vectors depend on; a folder stands by its weights, not by its
        path."""
        values = asdict(self)
        if self.encoder is not None:
            values["encoder"] = locate_encoder(self.encoder).family or "ours"
        return {**values, "weights_sha256": weights_sha256}

    def flags(self) -> str:
        """Flags of the command `features` that differ from the defaults, the encoder apart."""
        flags = ""
        if self.num_frames != 1:
            flags += f" --num-frames {self.num_frames}"
        if self.concat:
            flags += " --concat"
        if self.keep_dims is not None:
            flags += f" --keep-dims {self.keep_dims}"
        return flags

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
    """The function that maps n sample ids to vectors float32 [n, D]."""
    if config.encoder is None:
        return lambda ids: descriptor_rows(manifest, ids)
    # only here: the descriptor needs neither torch nor transformers
    quiet_libraries()
    location = locate_encoder(config.encoder)
    if location.kind is Kind.IMAGE:
        return _image_encoder_rows(manifest, config=config, location=location)
    return _packing_model_rows(manifest, location)


def descriptor_rows(manifest: Manifest, ids: Iterable[int]) -> np.ndarray:
    """Codec descriptors of samples, float32 [n, D], neither centred nor scaled."""
    rows = []
    with ShardReader(manifest) as reader:
        for sample_id in ids:
            frames, motion = _frames(
                reader,
                manifest=manifest,
                sample_id=sample_id,
                with_motion=True,
            )
            rows.append(codec_descriptor(motion, frames[0]))
    return np.stack(rows)


def _frames(
    reader: ShardReader, manifest: Manifest, sample_id: int, with_motion: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """(stored frames uint8 [M, H, W, 3], coarse motion or None) of a clip or an image, whose motion
    is None."""
    _, sample = manifest.locate(sample_id)
    name = sample["key"]
    info = SampleInfo.from_bytes(reader.read(sample_id, "json"), name)
    data = reader.read(sample_id, frames_member(info.kind))
    frames = decode_frames(info, member=data, name=name)
    if info.kind == "image" or not with_motion:
        return frames, None
    data = reader.read(sample_id, "motion.npy")
    return frames, decode_array(data, member="motion.npy", name=name)


def _packing_model_rows(
    manifest: Manifest, location: EncoderLocation
) -> Callable[[range], np.ndarray]:
    import torch

    from ..loading.config import ViewConfig
    from ..loading.samples import sequential_batches

    model = open_encoder(location, dtype="auto").eval()
    if manifest.settings["patch_size"] != model.config.patch_size:
        raise DataPipelineError(
            f"{location.path} takes patches of {model.config.patch_size}, {manifest.directory} "
            f"was packed with {manifest.settings['patch_size']}: pack again with --patch-size "
            f"{model.config.patch_size} into another --output"
        )
    # the process's own GPU: under torchrun commands.features has chosen it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)

    # patches of the codec are of single frames; an encoder of tubes sees whole ones
    frames = model.config.num_channels // 3
    view_name = "codec" if frames == 1 else "frame"
    view_config = ViewConfig()
    if frames > 1:
        most = view_config.max_frames // frames * frames or frames
        view_config = ViewConfig(
            codec_ratio=0.0, frame_ratio=1.0, max_frames=most, frames_per_token=frames
        )

    @torch.inference_mode()
    def rows_of(ids: range) -> np.ndarray:
        rows = []
        batches = sequential_batches(
            manifest, ids, batch_size=32, view_name=view_name, view_config=view_config
        )
        for batch in batches:
            pooled = model(**batch.to(device).model_inputs()).pooler_output
            # rows behind the samples are padding of the last batch
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
        # an image has one frame, which is then chosen `num_frames` times
        chosen = choose_frames(len(frames), count=config.num_frames, draw=None)
        images = torch.from_numpy(frames[chosen]).movedim(-1, 1)  # [M, 3, H, W]
        pixels = images.to(device)
        means = encoder.encode(pixels).mean(dim=1)  # of the patch tokens of each frame
        vectors = means.float().cpu().numpy()[:, : config.keep_dims]
        # each frame counts alike, however long its vector is
        each = normalise(vectors)
        return each.reshape(-1) if config.concat else each.mean(axis=0)

    def rows_of(ids: range) -> np.ndarray:
        with ShardReader(manifest) as reader:
            rows = []
            for sample_id in ids:
                frames, _ = _frames(reader, manifest=manifest, sample_id=sample_id)
                rows.append(vector(frames))
            return np.stack(rows)

    return rows_of


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm, float32; zero rows stay zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    # the floor of torch.nn.functional.normalize
    return (features / np.maximum(norms, 1e-12)).astype(np.float32)
