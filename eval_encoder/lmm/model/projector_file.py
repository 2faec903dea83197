"""mm_projector.bin: a projector's tensors under LLaVA's names, `model.mm_projector.*`.

Read as tensors only, after a look at the checksums that lmm_probe.py leaves beside it. For
mlp2x_gelu, the one projector that transformers has as well, names are translated in both
directions.
"""

from pathlib import Path

import torch

from model_factory.backbone import named_tensors, read_tensors
from model_factory.command_line.reading import names_place
from model_factory.files import check_checksums, listing_of

from .lmm import LmmForConditionalGeneration

PROJECTOR_FILE = "mm_projector.bin"
OURS, LLAVA = "model.multi_modal_projector.", "model.mm_projector."


def save_projector(model: LmmForConditionalGeneration, folder: Path, tensors: dict | None = None):
    """mm_projector.bin of a model, or of its gathered tensors where they are sharded."""
    tensors = model.state_dict() if tensors is None else tensors
    kept = {LLAVA + n[len(OURS) :]: t.cpu() for n, t in tensors.items() if n.startswith(OURS)}
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{PROJECTOR_FILE}.tmp"
    torch.save(kept, beside)
    beside.replace(folder / PROJECTOR_FILE)
    model.config.save_pretrained(folder)


@names_place("path")
def load_projector(model: LmmForConditionalGeneration, path: Path) -> None:
    """Fill the projector from a file with LLaVA's names, whatever stands before `mm_projector.`.

    Raises ValueError for a file that is missing, differs from its checksum, holds anything but
    tensors or does not fit exactly.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the mm_projector.bin of stage 1")
    check_checksums(path.parent, [path.name], listing_of(path))
    try:
        tensors = named_tensors(read_tensors(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    own = {n.split("mm_projector.")[1]: t for n, t in tensors.items() if "mm_projector." in n}
    try:
        model.projector.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} is no {model.config.projector_type} of this size: {error}") from (
            error
        )


def projector_to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of LLaVA's mlp2x_gelu -> those of transformers' LlavaMultiModalProjector."""
    halves = {"0": "linear_1", "2": "linear_2"}
    renamed = {}
    for name, tensor in tensors.items():
        number, _, kind = name.split("mm_projector.")[-1].partition(".")
        if number not in halves:
            raise ValueError(f"{name} is no tensor of an mlp2x_gelu, the one that transformers has")
        renamed[f"multi_modal_projector.{halves[number]}.{kind}"] = tensor
    return renamed


def projector_from_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The other way round; tensors that are not of the projector are left out."""
    halves = {"linear_1": "0", "linear_2": "2"}
    renamed = {}
    for name, tensor in tensors.items():
        if "multi_modal_projector." in name:
            half, _, kind = name.split("multi_modal_projector.")[1].partition(".")
            renamed[f"{LLAVA}{halves[half]}.{kind}"] = tensor
    return renamed
