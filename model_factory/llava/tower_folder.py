"""Export of a vision tower for LLaVA, from an encoder of ours or a public vision model.

    tower/                   model.safetensors and config.json (ours: type llava_vit_vision; public
                             models: their own), preprocessor_config.json
    tower_legacy/            CLIP and SigLIP: the same, every tensor named `vision_model.*`, as
                             transformers 4 needs it, and with it the original LLaVA
    config.json              LlavaConfig: tower, language model, which state is read, token counts
    processor_config.json    LlavaProcessor's numbers; with a tokenizer the whole processor's files
    README.md                how to load it
    SHA256SUMS               here and in tower*/: of all but README.md, written last

Tensors are stored in fp32 whatever the source's dtype. config.json names no dtype for its two
halves, so that a model built from it has a single one. Cost: the weights on disk, twice for CLIP
and SigLIP, and three images through the tower.

Shape legend: H x W pixels, T tokens of an image (class token included), D width.
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
    BaseImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
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
# what transformers' Llava runs as it is; of a whole CLIP or SigLIP model the image half
NATIVE_TYPES = ("clip", "siglip", "dinov2")
# the same without register tokens only: a model of these types may be configured to have none
REGISTER_TYPES = ("dinov2_with_registers", "dinov3_vit")
# hidden state that a projector reads: LLaVA's choice for CLIP, and the last one of ours
NATIVE_LAYER = -2
OUR_LAYER = -1
LEGACY_PREFIX = "vision_model."
IMAGE_TOKEN = "<image>"
VOCABULARY_STEP = 64  # rows of a grown vocabulary are a multiple of this
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
CHECK_IMAGE = (120, 240)  # rows and columns; no square, so that a wrong crop shows


@dataclass(frozen=True)
class TowerSource:
    """A vision model and how a LLaVA reads it.

    model        content of tower/, fp32, in evaluation mode
    encode       hidden state `layer` [1, T, D] of normalised images [1, 3, H, W], as the source
                 itself computes it
    processor    text of preprocessor_config.json
    side         of the square images that the processor makes, in pixels
    layer        hidden state that a projector reads
    class_token  whether a class token precedes the patches; it is then left out
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
        """Patch tokens of one image."""
        return (self.side // self.model.config.patch_size) ** 2

    @property
    def processor_fields(self) -> dict[str, int | str]:
        """Fields from which LlavaProcessor derives the number of tokens."""
        return {
            "patch_size": self.model.config.patch_size,
            "num_additional_image_tokens": int(self.class_token),
            "vision_feature_select_strategy": self.strategy,
        }


def export_tower(
    source: Path, output: Path, language_model: Path | None = None, post_norm: bool = True
) -> list[str]:
    """Write the folder and verify it in a fresh process; returns one line per tower.

    Raises ValueError for an existing output, for what `read_source` and `read_language` refuse, and
    for a folder that does not load whole or differs from its source; then nothing is left behind.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists: name a new folder as --output_dir")
    text, tokenizer = read_language(language_model)
    tower = read_source(source, post_norm)
    # a folder appears under its name only when it has passed
    unproven = output.with_name(f".{output.name}.{os.getpid()}.unproven")
    unproven.mkdir(parents=True)
    try:
        _write_towers(tower, unproven)
        config = _llava_config(tower, text=text, tokenizer=tokenizer)
        config.save_pretrained(unproven)
        _write_processor(tower, tokenizer=tokenizer, folder=unproven)
        card = tower_card(
            config,
            side=tower.side,
            source=source,
            whole_processor=tokenizer is not None,
        )
        (unproven / "README.md").write_text(card)
        for folder in (unproven, *(unproven / name for name in TOWERS)):
            if folder.is_dir():
                seal_folder(folder)
        lines = _verify(tower, unproven)
        unproven.rename(output)
    finally:
        shutil.rmtree(unproven, ignore_errors=True)
    return lines


def read_source(source: Path, post_norm: bool = True) -> TowerSource:
    """The vision model of a folder or of a backbone file.

    Raises ValueError for a source that is missing, damaged, incomplete or of a type that cannot be
    a tower, for register tokens, and for `post_norm` False with a public model.
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
        return _our_source(open_encoder(location), post_norm=post_norm, origin=location.path)
    model_type = str(location.model_type)
    try:
        return _native_source(location.path, model_type=model_type, post_norm=post_norm)
    except (SafetensorError, RuntimeError) as error:  # unreadable file, tensors of other shapes
        raise ValueError(f"{location.path} cannot be read as a {model_type}: {error}") from error


def read_language(
    folder: Path | None,
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | None]:
    """(configuration, tokenizer or None) of a language model's folder; without a folder, Llama's
    configuration.

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


def _our_source(encoder: LlavaViTPackingModel, post_norm: bool, origin: Path) -> TowerSource:
    encoder.eval()
    side = encoder.config.image_size
    p = encoder.config.patch_size

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        height, width = pixels.shape[-2:]
        grid = torch.tensor([[1, height // p, width // p]])
        out = encoder(patchify(pixels, p)[0], grid, output_hidden_states=True)
        state = out.last_hidden_state if post_norm else out.hidden_states[-1]
        return state[None]

    model = LlavaViTVisionModel.from_encoder(encoder, post_norm=post_norm, origin=origin).eval()
    return TowerSource(
        model,
        encode=encode,
        processor=image_processor_json(side),
        side=side,
        layer=OUR_LAYER,
        class_token=False,
    )


def _native_source(folder: Path, model_type: str, post_norm: bool) -> TowerSource:
    base = model_type.removesuffix("_vision_model")
    if base not in (*NATIVE_TYPES, *REGISTER_TYPES):
        raise ValueError(
            f"{folder / 'config.json'} is a {model_type} model; a tower can be one of "
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

    return TowerSource(
        encoder.model,
        encode=encode,
        processor=described.read_text(),
        side=encoder.preprocessing.crop,
        layer=NATIVE_LAYER,
        class_token=encoder.kind.class_token,
    )


def _write_towers(source: TowerSource, folder: Path) -> None:
    tower, legacy = (folder / name for name in TOWERS)
    # one file: transformers 4.37, which the original LLaVA pins, reads that too
    source.model.save_pretrained(tower, max_shard_size="1TB")
    (tower / "preprocessor_config.json").write_text(source.processor)
    if source.model.config.model_type not in LEGACY_TYPES:
        return
    legacy.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(tower / name, legacy / name)
    weights = load_file(tower / "model.safetensors")
    prefixed = {}
    for key, tensor in weights.items():
        # whether names have the prefix depends on the release of transformers that saved them
        bare = key.removeprefix(LEGACY_PREFIX)
        prefixed[LEGACY_PREFIX + bare] = tensor
    save_file(prefixed, legacy / "model.safetensors", metadata={"format": "pt"})


def _llava_config(
    source: TowerSource, text: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> LlavaConfig:
    """The configuration; a vocabulary that has no room for the image token grows."""
    # without a tokenizer the image token gets the first number behind the vocabulary
    index = text.vocab_size if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if index >= text.vocab_size:
        text.vocab_size = (index // VOCABULARY_STEP + 1) * VOCABULARY_STEP
    config = LlavaConfig(
        vision_config=type(source.model.config).from_dict(source.model.config.to_dict()),
        text_config=text,
        image_token_index=index,
        image_seq_length=source.num_tokens,
        vision_feature_layer=source.layer,
        vision_feature_select_strategy=source.strategy,
    )
    for part in (config.vision_config, config.text_config):
        part.dtype = None  # a model built from two halves of different dtypes would mix them
        part._name_or_path = ""  # a path of this machine
    return config


def _write_processor(
    source: TowerSource, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    if tokenizer is None:
        text = json.dumps(source.processor_fields, indent=2)
        (folder / "processor_config.json").write_text(text + "\n")
        return
    processor = LlavaProcessor(_image_processor(folder), tokenizer, **source.processor_fields)
    processor.save_pretrained(folder)


def _image_processor(folder: Path) -> BaseImageProcessor:
    return AutoImageProcessor.from_pretrained(folder / "tower", **LOCAL)


def _verify(source: TowerSource, folder: Path) -> list[str]:
    """Runs tower_check in a fresh process; returns its report lines. Raises ValueError with its
    errors."""
    generator = torch.Generator().manual_seed(0)
    shape = (*CHECK_IMAGE, 3)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy()
    pixels = _image_processor(folder)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = selected(source.encode(pixels), source.strategy)
    with tempfile.TemporaryDirectory() as temporary:
        reference = Path(temporary) / "reference.safetensors"
        expected = {"pixel_values": pixels.contiguous(), "features": features.contiguous()}
        save_file(expected, reference)
        check = [sys.executable, "-m", f"{__package__}.tower_check", folder, reference]
        command = [str(part) for part in check]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        # the messages alone; without any, the whole standard error, such as a traceback
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise ValueError("; ".join(errors).replace("error: ", "") or done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith(FOUND)]
    assert lines, done.stdout
    return lines
