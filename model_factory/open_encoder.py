"""The one way from what a user names to an encoder.

    random                      untrained weights of a registered name
    RUN                         its export RUN/hf, else its newest checkpoint
    RUN/checkpoints/step_N      a checkpoint
    FOLDER                      a Hugging Face folder: of ours, a published one, or another vision
                                model; FOLDER/tower where export_llava_tower.py wrote FOLDER
    FILE                        backbone.pt or .safetensors, with its .json beside it or without;
                                model.safetensors beside a config.json stands for its folder
    FAMILY:FOLDER               a public image encoder (registry.IMAGE_FAMILIES)

`locate_encoder` decides which of these a name is and needs no torch. `open_encoder` reads the
encoders of ours, `hf_image_encoders.load_image_encoder` the public image encoders. Callers word an
error of their own only where their advice differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line.reading import reading
from .files import CHECKSUMS_NAME, read_checksums
from .model_folder import model_type_of
from .registry import IMAGE_FAMILIES, packing_config, packing_name

if TYPE_CHECKING:
    from .vit_preview_v0_packing_hf import LlavaViTPackingModel

RANDOM = "random"


class Kind(Enum):
    """What a name stands for."""

    RANDOM = "untrained weights"
    IMAGE = "a public image encoder, named with its family"
    FOLDER = "a Hugging Face folder"
    RUN = "a training run or checkpoint without an export"
    WEIGHTS = "a file of tensors"
    NOTHING = "nothing that holds an encoder"


@dataclass(frozen=True)
class EncoderLocation:
    """Kind of a name, the file or folder to read, and the family that was named with it."""

    kind: Kind
    path: Path
    family: str | None = None

    @property
    def model_type(self) -> str | None:
        """Model type in a folder's config.json; None without one."""
        return model_type_of(self.path)

    @property
    def families(self) -> list[str]:
        """Families of public image encoders that a folder may be of."""
        base = str(self.model_type).removesuffix("_vision_model")
        return [name for name, types in IMAGE_FAMILIES.items() if base in types]

    @property
    def is_described(self) -> bool:
        """Whether a file of weights has its configuration beside it."""
        return self.path.with_suffix(".json").is_file()


def locate_encoder(name: str | Path | None) -> EncoderLocation:
    """What a name stands for; None is `random`. Reads descriptions only, no weights.

    Raises ValueError for a config.json or SHA256SUMS that cannot be parsed.
    """
    if name is None or name == RANDOM:
        return EncoderLocation(Kind.RANDOM, Path(RANDOM))
    path = Path(name)
    family, separator, folder = str(name).partition(":")
    # a path that exists may contain a colon itself
    if separator and not path.exists():
        return EncoderLocation(Kind.IMAGE, Path(folder), family)
    if path.name == "model.safetensors" and (path.parent / "config.json").is_file():
        path = path.parent
    if path.is_file():
        return EncoderLocation(Kind.WEIGHTS, path)
    for candidate in (path / "tower", path / "hf", path):
        if _is_export(candidate):
            return EncoderLocation(Kind.FOLDER, candidate)
    # before config.json alone: a run has one too, which describes the run
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        return EncoderLocation(Kind.RUN, path)
    if model_type_of(path) is not None:
        return EncoderLocation(Kind.FOLDER, path)
    return EncoderLocation(Kind.NOTHING, path)


def _is_export(folder: Path) -> bool:
    """Whether a folder holds a model with weights, or held one by its checksums: an export that
    lost a file is an error of its reader, and no reason to look elsewhere."""
    if not folder.is_dir():
        return False
    # a .bin is found too, so that its reader can refuse it by its name
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if weights and (folder / "config.json").is_file():
        return True
    listed = read_checksums(folder / CHECKSUMS_NAME) or {}
    return any(name.endswith(".safetensors") for name in listed)


def open_encoder(
    location: EncoderLocation,
    model_name: str | None = None,
    rope_pairing: str = "legacy",
    seed: int = 0,
    read_run: Callable[[Path], LlavaViTPackingModel] | None = None,
    dtype: str = "float32",
    num_channels: int = 3,
) -> LlavaViTPackingModel:
    """An encoder of ours.

    model_name, rope_pairing  of random weights, and of a file that no .json beside it describes
    seed, num_channels        for random weights
    read_run                  reads a run's newest checkpoint, or a checkpoint: training.export has
                              it, which this layer may not import
    dtype                     in which a Hugging Face folder is loaded: torch's name, or `auto` (as
                              stored); all other kinds are float32

    Raises ValueError, naming the path, for another model, for nothing that holds an encoder, for
    tensors that do not all fit and for what model_folder.py refuses.
    """
    import torch

    from .backbone import load_backbone
    from .vit_preview_v0_packing_hf import LlavaViTPackingModel

    path = location.path
    with reading(path):
        if location.kind is Kind.RANDOM:
            if model_name is None:
                raise ValueError("random weights need the name of a model: list_models() names all")
            # of the process, as the layers' initialisation takes no generator
            torch.manual_seed(seed)
            config = packing_config(
                packing_name(model_name),
                rope_pairing=rope_pairing,
                num_channels=num_channels,
            )
            return LlavaViTPackingModel(config)
        if location.kind is Kind.FOLDER:
            _check_is_ours(location)
            return LlavaViTPackingModel.from_pretrained(path, dtype=dtype, local_files_only=True)
        if location.kind is Kind.RUN and read_run is not None:
            return read_run(path)
        if location.kind is Kind.WEIGHTS:
            # the name is an assumption, which a configuration beside the weights overrules
            assumed_name = None if location.is_described else model_name
            return load_backbone(path, model_name=assumed_name, rope_pairing=rope_pairing)
    raise ValueError(_refusal(location))


def _check_is_ours(location: EncoderLocation) -> None:
    """Raise ValueError for a folder of a model type that is neither ours nor published."""
    from .configuration import LlavaViTPackingConfig
    from .published_folder import MODEL_TYPES

    ours = (LlavaViTPackingConfig.model_type, *MODEL_TYPES)
    # a lost config.json is left to the folder's reader, which compares the checksums
    if (location.path / "config.json").is_file() and location.model_type not in ours:
        raise ValueError(
            f"{location.path} is a {location.model_type} model, and no encoder of ours: give a "
            "run, its hf/, a backbone.pt, or a folder of the type " + " or ".join(ours)
        )


def _refusal(location: EncoderLocation) -> str:
    if location.kind is Kind.IMAGE:
        return f"{location.family}:{location.path} is no encoder of ours, which this needs"
    if location.kind is Kind.RUN:
        return (
            f"{location.path} has no export yet: python -m training.export {location.path} "
            "--output DIR, then give DIR/hf"
        )
    return (
        f"{location.path} is no Hugging Face folder, no training run or checkpoint and no weights "
        "file"
    )
