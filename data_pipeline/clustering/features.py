"""Shards -> one feature per sample: from the codec descriptor, which needs no weights,
or from an encoder.
"""

from pathlib import Path

import numpy as np

from ..errors import DataPipelineError, MissingData
from ..loading.shard_reader import ShardReader
from ..shards.manifest import Manifest
from ..shards.schema import SampleInfo, decode_array, decode_jpeg, frames_from_strip
from .descriptor import codec_descriptor


def descriptor_features(manifest: Manifest) -> np.ndarray:
    """Codec descriptors of all samples, float32 [N, D], neither centred nor scaled."""
    rows = []
    with ShardReader(manifest) as reader:
        for sample_id in range(len(manifest)):
            _, sample = manifest.locate(sample_id)
            if sample["kind"] == "image":
                rows.append(codec_descriptor(None, decode_jpeg(reader.read(sample_id, "jpg"))))
                continue
            info = SampleInfo.from_bytes(reader.read(sample_id, "json"), sample["key"])
            motion = decode_array(reader.read(sample_id, "motion.npy"), "motion.npy", sample["key"])
            first = frames_from_strip(
                decode_jpeg(reader.read(sample_id, "frames.jpg")), info.height
            )[0]
            rows.append(codec_descriptor(motion, first))
    return np.stack(rows)


def encoder_features(manifest: Manifest, encoder_folder: str, batch_size: int = 32) -> np.ndarray:
    """Pooled vectors of all samples, float32 [N, D], L2-normalised,
    from a Hugging Face folder of our packing model.

    Videos are seen through their codec view, images whole.
    """
    import torch

    from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

    from ..loading.sequential import sequential_batches

    model = LlavaViTPackingModel.from_pretrained(encoder_folder, local_files_only=True).eval()
    if manifest.settings["patch_size"] != model.config.patch_size:
        raise DataPipelineError(
            f"{encoder_folder} takes patches of {model.config.patch_size}, {manifest.directory} "
            f"was packed with {manifest.settings['patch_size']}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    rows = []
    with torch.inference_mode():
        for batch in sequential_batches(manifest, range(len(manifest)), batch_size, "codec"):
            pooled = model(**batch.to(device).model_inputs()).pooler_output
            rows.append(pooled[: batch.num_samples].float().cpu().numpy())
    return normalise(np.concatenate(rows))


def encoder_weights(encoder_folder: str) -> Path:
    """The weights file of a local Hugging Face folder; MissingData when it is none."""
    weights = Path(encoder_folder) / "model.safetensors"
    if not weights.is_file():
        raise MissingData(f"--encoder {encoder_folder} has no {weights.name}: give a run's hf/")
    return weights


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm, float32; zero rows stay zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.maximum(norms, 1e-12)).astype(np.float32)
