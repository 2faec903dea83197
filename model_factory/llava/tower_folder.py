"""The folder of an eye of a LLaVA, of an encoder of ours or of a public vision model.

    tower/                   model.safetensors and config.json (ours: type llava_vit_vision; public
                             models: their own), preprocessor_config.json
    tower_legacy/            CLIP and SigLIP: the same, every tensor named `vision_model.*`, as
                             transformers 4 needs it, and with it the original LLaVA
    config.json              LlavaConfig: tower, language model, which state is read, token counts
    processor_config.json    LlavaProcessor's numbers; with a tokenizer the whole processor's files
    README.md                how to load it
    SHA256SUMS               here and in tower*/: of all but README.md, written last

Tensors are stored in fp32 whatever the source's dtype. config.json names no dtype for its two
halves, so that a model built from it has one. Cost: the weights, twice for CLIP and SigLIP, and
three pictures through the tower.

Shape legend: H x W pixels, T tokens of a picture (class token included), D width.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedModel,
)

from ..export_folder import image_processor_json
from ..hf_image_encoders import FAMILIES, load_image_encoder
from ..llava_vision_tower import LlavaViTVisionModel
from ..model_folder import LOCAL, check_model_folder, model_type_of, seal_folder
from ..open_encoder import Kind, locate_encoder, open_encoder
from ..packing import patchify
from ..published_folder import MODEL_TYPES
from ..vit_preview_v0_packing_hf import LlavaViTPackingConfig, LlavaViTPackingModel
from .tower_card import LEGACY_TYPES, tower_card
from .tower_check import FOUND, TOWERS, selected

OUR_TYPES = (LlavaViTPackingConfig.model_type, *MODEL_TYPES)
# what transformers' Llava runs as it is; of a whole CLIP or SigLIP model the picture half
NATIVE_TYPES = ("clip", "siglip", "dinov2", "dinov2_with_registers", "dinov3_vit")
OUR_LAYER, NATIVE_LAYER = -1, -2
LEGACY_PREFIX = "vision_model."
IMAGE_TOKEN = "<image>"
VOCABULARY_STEP = 64  # a vocabulary that has to grow grows to a multiple of this
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
PICTURE = (120, 240)  # rows and columns of the check's picture: no square, so that crops show


@dataclass(frozen=True)
class Eye:
    """A vision model and how a LLaVA looks through it.

    model        what tower/ holds, fp32, in evaluation mode
    encode       pictures [1, 3, H, W], normalised -> hidden state `layer` [1, T, D], said by the
                 source itself
    processor    text of preprocessor_config.json
    side         of the square pictures that it makes, in pixels
    layer        hidden state that a projector reads
    class_token  whether a class token stands before the patches, which is then left out
    """

    model: PreTrainedModel
    encode: Callable[[torch.Tensor], torch.Tensor]
    processor: str
    side: int
    layer: int
    class_token: bool

    @property
    def strategy(self) -> str:
        """vision_feature_select_strategy."""
        return "default" if self.class_token else "full"

    @property
    def num_tokens(self) -> int:
        """Tokens of one picture."""
        return (self.side // self.model.config.patch_size) ** 2

    @property
    def processor_fields(self) -> dict[str, int | str]:
        """From which LlavaProcessor derives the number of tokens."""
        return {
            "patch_size": self.model.config.patch_size,
            "num_additional_image_tokens": int(self.class_token),
            "vision_feature_select_strategy": self.strategy,
        }


def export_tower(
    source: Path, output: Path, language_model: Path | None = None, post_norm: bool = True
) -> list[str]:
    """Write the folder and verify it in a fresh process; returns one line per tower.

    Raises ValueError for an output that exists, what `read_eye` and `read_language` raise, and for
    a folder that does not load whole or differs from its source; then nothing is left behind.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists: name a new folder as --output_dir")
    text, tokenizer = read_language(language_model)
    eye = read_eye(source, post_norm)
    # a folder appears under its name only when it has passed
    unproven = output.with_name(f".{output.name}.{os.getpid()}.unproven")
    unproven.mkdir(parents=True)
    try:
        _write_towers(eye, unproven)
        config = _llava_config(eye, text, tokenizer)
        config.save_pretrained(unproven)
        _write_processor(eye, tokenizer, unproven)
        card = tower_card(config, eye.side, source, whole_processor=tokenizer is not None)
        (unproven / "README.md").write_text(card)
        for folder in (unproven, *(unproven / name for name in TOWERS)):
            if folder.is_dir():
                seal_folder(folder)
        lines = _verify(eye, unproven)
        unproven.rename(output)
    finally:
        shutil.rmtree(unproven, ignore_errors=True)
    return lines


def read_eye(source: Path, post_norm: bool = True) -> Eye:
    """The eye of a folder or of a backbone file.

    Raises ValueError for a source that is missing, damaged, incomplete or of a type that cannot be
    an eye, for register tokens, and for `post_norm` False with a public model.
    """
    location = locate_encoder(source)
    if location.kind is Kind.NOTHING:
        raise ValueError(
            f"{source / 'config.json'} does not exist: give RUN/hf, a backbone.pt, or a local "
            "folder of a public vision model"
        )
    if location.kind is Kind.WEIGHTS and not location.is_described:
        raise ValueError(
            f"{source.with_suffix('.json')} does not exist: without its configuration beside it, "
            f"convert {source.name} with convert_llava_vit_packing_to_hf.py first"
        )
    is_public = location.kind is Kind.FOLDER and location.model_type not in OUR_TYPES
    if not is_public:
        return _our_eye(open_encoder(location), post_norm)
    model_type = str(location.model_type)
    try:
        return _native_eye(location.path, model_type, post_norm)
    except (SafetensorError, RuntimeError) as error:  # unreadable file, tensors of other shapes
        raise ValueError(f"{location.path} cannot be read as a {model_type}: {error}") from error


def read_language(folder: Path | None):
    """(configuration, tokenizer or None) of a language model's folder; without one Llama's own.

    Raises ValueError for a folder without config.json, for a type that transformers does not know,
    for what is no language model and for what model_folder.py refuses.
    """
    if folder is None:
        return LlamaConfig(), None
    check_model_folder(folder, weights=False)
    model_type = model_type_of(folder)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder / 'config.json'} is absent or of a type that transformers does not know "
            f"({model_type}): give the folder of a language model"
        )
    text = AutoConfig.from_pretrained(folder, **LOCAL)
    if not isinstance(getattr(text, "vocab_size", None), int):
        raise ValueError(
            f"{folder / 'config.json'} is a {model_type} model without vocab_size: give the folder "
            "of a language model alone"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return text, None
    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return text, tokenizer


def _our_eye(encoder: LlavaViTPackingModel, post_norm: bool) -> Eye:
    encoder.eval()
    side, p = encoder.config.image_size, encoder.config.patch_size

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        grid = torch.tensor([[1, pixels.shape[-2] // p, pixels.shape[-1] // p]])
        out = encoder(patchify(pixels, p)[0], grid, output_hidden_states=True)
        return (out.last_hidden_state if post_norm else out.hidden_states[-1])[None]

    model = LlavaViTVisionModel.from_encoder(encoder, post_norm).eval()
    return Eye(model, encode, image_processor_json(side), side, OUR_LAYER, class_token=False)


def _native_eye(folder: Path, model_type: str, post_norm: bool) -> Eye:
    base = model_type.removesuffix("_vision_model")
    if base not in NATIVE_TYPES:
        raise ValueError(
            f"{folder / 'config.json'} is a {model_type} model; an eye can be one of "
            f"{', '.join(NATIVE_TYPES)}, or of ours: {', '.join(OUR_TYPES)}"
        )
    if not post_norm:
        raise ValueError(
            f"--no-post_norm is for encoders of ours; of a {model_type} model hidden state "
            f"{NATIVE_LAYER} is read, which no norm follows"
        )
    family = next(name for name, types in FAMILIES.items() if base in types)
    encoder = load_image_encoder(family, folder)
    registers = encoder.num_extra_tokens - encoder.kind.class_token
    if registers:
        raise ValueError(
            f"{folder} has {registers} register tokens, which Llava would hand to the language "
            "model as patches, since it leaves out one token at most: take a tower without "
            "registers, or wrap it in a registered model type that leaves them out"
        )
    described = folder / "preprocessor_config.json"
    if not described.is_file():
        raise ValueError(
            f"{described} does not exist: put the model's image processor there, as it says how "
            "pictures are scaled, cropped and normalised"
        )

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return encoder.model(pixels, output_hidden_states=True).hidden_states[NATIVE_LAYER]

    return Eye(
        encoder.model,
        encode,
        described.read_text(),
        encoder.preprocessing.crop,
        NATIVE_LAYER,
        encoder.kind.class_token,
    )


def _write_towers(eye: Eye, folder: Path) -> None:
    tower, legacy = (folder / name for name in TOWERS)
    eye.model.save_pretrained(tower, max_shard_size="1TB")  # one file, as 4.37 reads it too
    (tower / "preprocessor_config.json").write_text(eye.processor)
    if eye.model.config.model_type not in LEGACY_TYPES:
        return
    legacy.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(tower / name, legacy / name)
    weights = load_file(tower / "model.safetensors")
    prefixed = {LEGACY_PREFIX + key.removeprefix(LEGACY_PREFIX): t for key, t in weights.items()}
    save_file(prefixed, legacy / "model.safetensors", metadata={"format": "pt"})


def _llava_config(eye: Eye, text, tokenizer) -> LlavaConfig:
    """The configuration; a vocabulary without room for the image token gets it."""
    index = text.vocab_size if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if index >= text.vocab_size:
        text.vocab_size = (index // VOCABULARY_STEP + 1) * VOCABULARY_STEP
    config = LlavaConfig(
        vision_config=type(eye.model.config).from_dict(eye.model.config.to_dict()),
        text_config=text,
        image_token_index=index,
        image_seq_length=eye.num_tokens,
        vision_feature_layer=eye.layer,
        vision_feature_select_strategy=eye.strategy,
    )
    for part in (config.vision_config, config.text_config):
        part.dtype, part._name_or_path = None, ""
    return config


def _write_processor(eye: Eye, tokenizer, folder: Path) -> None:
    if tokenizer is None:
        text = json.dumps(eye.processor_fields, indent=2)
        (folder / "processor_config.json").write_text(text + "\n")
        return
    LlavaProcessor(_image_processor(folder), tokenizer, **eye.processor_fields).save_pretrained(
        folder
    )


def _image_processor(folder: Path):
    return AutoImageProcessor.from_pretrained(folder / "tower", **LOCAL)


def _verify(eye: Eye, folder: Path) -> list[str]:
    """Lines of the check of a fresh process; ValueError with what it complained of."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (*PICTURE, 3), dtype=torch.uint8, generator=generator).numpy()
    pixels = _image_processor(folder)(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = selected({eye.layer: eye.encode(pixels)}, eye.layer, eye.strategy)
    with tempfile.TemporaryDirectory() as place:
        reference = Path(place) / "reference.safetensors"
        wanted = {"pixel_values": pixels.contiguous(), "features": features.contiguous()}
        save_file(wanted, reference)
        check = [sys.executable, "-m", f"{__package__}.tower_check", folder, reference]
        done = subprocess.run(list(map(str, check)), capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise ValueError("; ".join(said).replace("error: ", "") or done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith(FOUND)]
    assert lines, done.stdout
    return lines
