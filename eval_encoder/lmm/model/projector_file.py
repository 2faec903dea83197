"""mm_projector.bin: a projector's tensors under LLaVA's names, `model.mm_projector.*`.

Read as tensors only, after a look at the checksums that lmm_probe.py leaves beside it. For
mlp2x_gelu, the one projector that transformers has as well, names are translated in both
directions.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import torch

from model_factory.backbone import named_tensors, read_tensors
from model_factory.command_line.reading import names_place
from model_factory.files import check_checksums, listing_of, write_atomically

from .lmm import LmmForConditionalGeneration

PROJECTOR_FILE = "mm_projector.bin"
OURS = "model.multi_modal_projector."
LLAVA = "model.mm_projector."
# layers of an mlp2x_gelu, a Sequential whose second entry is the activation
LAYERS = {"0": "linear_1", "2": "linear_2"}


def save_projector(
    model: LmmForConditionalGeneration,
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """mm_projector.bin of a model, or of its gathered tensors where they are sharded."""
    tensors = model.state_dict() if tensors is None else tensors
    projector = {
        LLAVA + name.removeprefix(OURS): tensor.cpu()
        for name, tensor in tensors.items()
        if name.startswith(OURS)
    }
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    # LLaVA's own format; `load_projector` reads it as tensors only
    torch.save(projector, stream)
    write_atomically(folder / PROJECTOR_FILE, stream.getvalue())
    model.config.save_pretrained(folder)


@names_place("path")
def load_projector(model: LmmForConditionalGeneration, path: Path) -> None:
    """Fill the projector from a file with LLaVA's names, whatever stands before `mm_projector.`.

    Raises ValueError for a file that is missing, differs from its checksum, holds anything but
    tensors or does not fit exactly.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the mm_projector.bin of stage 1")
    check_checksums(path.parent, names=[path.name], listing=listing_of(path))
    try:
        tensors = named_tensors(read_tensors(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    projector = {}
    for name, tensor in tensors.items():
        _, found, rest = name.partition("mm_projector.")
        if found:  # a file of LLaVA may hold other tensors beside the projector's
            projector[rest] = tensor
    try:
        model.projector.load_state_dict(projector, strict=True)
    except RuntimeError as error:
        kind = model.config.projector_type
        raise ValueError(f"{path} is no {kind} of this size: {error}") from error


def projector_to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of LLaVA's mlp2x_gelu -> those of transformers' LlavaMultiModalProjector."""
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.split("mm_projector.")[-1].partition(".")
        if layer not in LAYERS:
            raise ValueError(f"{name} is no tensor of an mlp2x_gelu, the one that transformers has")
        renamed[f"multi_modal_projector.{LAYERS[layer]}.{kind}"] = tensor
    return renamed


def projector_from_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The other way round; tensors that are not of the projector are left out."""
    llava_names = {theirs: llava for llava, theirs in LAYERS.items()}
    renamed = {}
    for name, tensor in tensors.items():
        if "multi_modal_projector." in name:
            layer, _, kind = name.split("multi_modal_projector.")[1].partition(".")
            renamed[f"{LLAVA}{llava_names[layer]}.{kind}"] = tensor
    return renamed
