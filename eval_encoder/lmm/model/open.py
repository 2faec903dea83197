"""Loading of a multimodal model, its tokenizer and its image processor from folders.

    language model    any causal language model of transformers
    vision tower      a run, checkpoint or export of ours, or a transformers vision model, ConvNeXt
                      included
    whole model       output of a later stage of this probe: univit_lmm with all weights
    mm_projector.bin  output of stage 1 (projector_file.py); parts.json beside it names the two
                      folders above

Everything is read from local folders, as safetensors or as tensors only, after
model_factory/model_folder.py has checked their checksums and refused what could run code.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    BitsAndBytesConfig,
    CLIPImageProcessor,
    ConvNextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from model_factory.backbone import read_tensors
from model_factory.command_line.reading import names_place
from model_factory.export_folder import image_processor_json
from model_factory.files import check_fields, write_atomically
from model_factory.hf_image_encoders import load_image_encoder
from model_factory.llava.convnext import ConvNextVisionModel, grow_stage
from model_factory.llava.tower_folder import VOCABULARY_STEP
from model_factory.llava_vision_tower import LlavaViTVisionModel
from model_factory.model_folder import LOCAL, check_model_folder, json_object, pickled_weights
from model_factory.open_encoder import locate_encoder, open_encoder
from training.export import read_encoder

from ..config import LmmArguments
from ..data.conversation import IMAGE
from .lmm import LmmConfig, LmmForConditionalGeneration, add_lora
from .projector_file import PROJECTOR_FILE, load_projector

PARTS_FILE = "parts.json"


@dataclass
class Lmm:
    """A model with the tokenizer and the image processor of its inputs."""

    model: LmmForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    has_parts: bool = False  # tower and language model lie in folders of their own

    def save_processors(self, folder: Path) -> None:
        """Write tokenizer and image processor beside a model."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


@names_place("path")
def open_tower(
    path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """(vision model in evaluation mode, image processor) of anything that open_encoder.py names, or
    of a vision model's folder.

    Raises ValueError for any other folder, for missing weights and for what model_folder.py
    refuses.
    """
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist: name a run, an export or a vision model's folder")
    location = locate_encoder(path)
    tower_classes = (ConvNextModel, ConvNextVisionModel, LlavaViTVisionModel)
    classes = {tower.config_class.model_type: tower for tower in tower_classes}
    if location.model_type in classes:
        model = _read_tower(classes[location.model_type], path=location.path, dtype=dtype)
    elif location.families:
        # families that share a model type are read by the same class
        family = location.families[0]
        model = load_image_encoder(family, folder=location.path, dtype=dtype).model
    else:
        encoder = open_encoder(location, read_run=lambda run: read_encoder(run)[0])
        encoder = encoder.to(dtype)
        size = encoder.config.image_size
        processor = CLIPImageProcessor.from_dict(json.loads(image_processor_json(size)))
        return LlavaViTVisionModel.from_encoder(encoder, origin=path).eval(), processor
    return model.eval(), AutoImageProcessor.from_pretrained(location.path, **LOCAL)


def _read_tower(tower_class: Any, path: Path, dtype: torch.dtype) -> PreTrainedModel:
    check_model_folder(path)
    model, info = tower_class.from_pretrained(
        path, output_loading_info=True, use_safetensors=True, dtype=dtype, **LOCAL
    )
    # the norm of ConvNeXt's pooled vector, which is not used
    missing = [name for name in info["missing_keys"] if not name.startswith("layernorm.")]
    if missing:
        raise ValueError(f"{path} lacks the weights {', '.join(sorted(missing))}")
    return model


def set_resolution(model: PreTrainedModel, processor: BaseImageProcessor, side: int) -> None:
    """Set the side of the images in pixels, for towers that take any size: ConvNeXt and ours."""
    model.config.image_size = side
    processor.crop_size = {"height": side, "width": side}
    processor.size = {"shortest_edge": side}


@names_place("folder")
def open_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer with an image token and a padding token. Raises ValueError for one that brings
    code, and for files that differ from their checksums."""
    check_model_folder(Path(folder), weights=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def compose(arguments: LmmArguments, dtype: torch.dtype = torch.float32) -> Lmm:
    """A new model from a language model's and a tower's folder, or the whole model of an earlier
    stage with the changes that the flags make. Raises ValueError for parts that are missing or do
    not fit."""
    folder = Path(arguments.model_name_or_path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder / 'config.json'} does not exist: give a language model's folder")
    if json_object(folder / "config.json").get("model_type") == LmmConfig.model_type:
        lmm = open_lmm(folder, dtype=dtype, changes=_changes(arguments))
        _check_whole(arguments, lmm)
    else:
        lmm = _from_parts(arguments, folder=folder, dtype=dtype)
    if arguments.pretrain_mm_mlp_adapter is not None:
        load_projector(lmm.model, Path(arguments.pretrain_mm_mlp_adapter))
    return lmm


@names_place("folder")
def open_lmm(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    changes: dict[str, Any] | None = None,
) -> Lmm:
    """A model that the probe wrote: a whole one, or a projector with the parts it names.

    changes: fields of its configuration to set; cross tokens may then be new and start at zero, no
    other weights. Raises ValueError for weights that are missing or left over, and for files that
    differ from what was written.
    """
    folder = Path(folder)
    check_model_folder(folder, allows_pickles=True, also=[PARTS_FILE])
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder / 'config.json'} does not exist: give what lmm_probe.py wrote")
    if (folder / PROJECTOR_FILE).is_file() and (folder / PARTS_FILE).is_file():
        return _with_projector(folder, dtype)
    config = LmmConfig.from_pretrained(folder, **LOCAL)
    changes = dict(changes or {})
    # LoRA's additions are in no file yet, so they are put in after the weights have been read; a
    # model that has them already is built with them
    lora = changes.pop("lora", None) if config.lora is None else None
    for name, value in changes.items():
        setattr(config, name, value)
    model, info = LmmForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **LOCAL,
    )
    new = []
    if changes:
        new = [name for name in info["missing_keys"] if "cross_tokens" in name]
    for name in new:  # transformers leaves missing weights undefined
        torch.nn.init.zeros_(model.get_parameter(name))
    problems = [name for name in info["missing_keys"] if name not in new]
    problems += [*info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if problems:
        raise ValueError(f"{folder} does not fit its configuration: {', '.join(sorted(problems))}")
    if lora is not None:
        model.config.lora = lora
        add_lora(model.model.language_model, lora)
    processor = AutoImageProcessor.from_pretrained(folder, **LOCAL)
    return Lmm(model.eval(), tokenizer=open_tokenizer(folder), image_processor=processor)


def write_parts(folder: Path, arguments: LmmArguments) -> None:
    """Write parts.json: the folders of a projector's frozen parts."""
    assert arguments.vision_tower is not None, "a model with parts was made from a tower's folder"
    # absolute, since the folder may be opened from another working directory
    parts = {
        "model_name_or_path": str(Path(arguments.model_name_or_path).resolve()),
        "vision_tower": str(Path(arguments.vision_tower).resolve()),
    }
    write_atomically(folder / PARTS_FILE, json.dumps(parts, indent=1).encode())


def _check_whole(arguments: LmmArguments, lmm: Lmm) -> None:
    """Raise ValueError for typed flags whose values a whole model has already; set a resolution."""
    config = lmm.model.config
    trained_with = {
        "mm_projector_type": config.projector_type,
        "mm_vision_select_layer": [config.vision_feature_layer],
        "mm_frozen_select_layer": config.frozen_layers,
        "mm_tuned_layers_num": config.tuned_layers,
        "keep_extra_tokens": config.keep_extra_tokens,
        # quantising, and adding a stage, are done to parts alone
        "bits": 16,
        "vision_add_five_stage": 0,
        "vision_tower": None,
    }
    for name, value in trained_with.items():
        if name in arguments.typed and getattr(arguments, name) != value:
            raise ValueError(
                f"--{name} {getattr(arguments, name)}: {arguments.model_name_or_path} is a whole "
                f"model, trained with {value}; leave the flag out, or start from its parts"
            )
    if arguments.mm_vision_resolution is not None:
        set_resolution(
            lmm.model.tower.model,
            processor=lmm.image_processor,
            side=arguments.mm_vision_resolution,
        )
        config.vision_config.image_size = arguments.mm_vision_resolution


def _changes(arguments: LmmArguments) -> dict[str, Any]:
    """Fields of an earlier stage's configuration that a later stage sets."""
    changes: dict[str, Any] = {
        "version": arguments.version,
        "image_aspect_ratio": arguments.image_aspect_ratio,
        "lora": None,
    }
    if arguments.lora_enable:
        changes["lora"] = {
            "r": arguments.lora_r,
            "alpha": arguments.lora_alpha,
            "dropout": arguments.lora_dropout,
            "bias": arguments.lora_bias,
        }
    r = arguments.mm_reduction_r
    if r is not None:
        changes["reduction"] = {
            "r": r[0] if len(r) == 1 else r,
            "rule": arguments.mm_reduction_rule,
            "weights": arguments.mm_reduction_weights,
            "mask_cross_token": arguments.mask_cross_token,
        }
        changes["alignment_weight"] = arguments.alignment_weight
        changes["alignment_direction"] = arguments.alignment_direction
    return changes


def _from_parts(arguments: LmmArguments, folder: Path, dtype: torch.dtype) -> Lmm:
    if arguments.vision_tower is None:
        raise ValueError("--vision_tower is missing: name a run, an export or a vision model")
    tokenizer = open_tokenizer(folder)
    language_model = _language_model(arguments, folder=folder, dtype=dtype)
    # a vocabulary that is padded already may have a row for the image token
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        steps = -(-len(tokenizer) // VOCABULARY_STEP)  # rounded up
        grow_vocabulary(language_model, steps * VOCABULARY_STEP)
    tower, processor = open_tower(arguments.vision_tower, dtype)
    if arguments.vision_add_five_stage and isinstance(tower, ConvNextModel):
        tower = grow_stage(
            tower,
            width=arguments.vision_five_stage_width,
            depth=arguments.vision_add_five_stage,
        ).to(dtype)
    if isinstance(tower, ConvNextModel):
        tower = ConvNextVisionModel.from_network(tower)
    if arguments.mm_vision_resolution is not None:
        set_resolution(tower, processor=processor, side=arguments.mm_vision_resolution)
    fields = {
        "projector_type": arguments.mm_projector_type,
        "frozen_layers": arguments.mm_frozen_select_layer,
        "tuned_layers": max(arguments.mm_tuned_layers_num, 0),
        "keep_extra_tokens": arguments.keep_extra_tokens,
        **_changes(arguments),
    }
    config = LmmConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=(arguments.mm_vision_select_layer or [-1])[0],
        # our projectors take class and register tokens off; transformers must not again
        vision_feature_select_strategy="full",
        **fields,
    )
    model = LmmForConditionalGeneration.from_parts(
        config, tower=tower, language_model=language_model
    )
    return Lmm(model, tokenizer=tokenizer, image_processor=processor, has_parts=True)


def grow_vocabulary(language_model: PreTrainedModel, rows: int) -> None:
    """Resize the vocabulary; new rows are drawn from a fixed seed, as parts are loaded again for
    every evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language_model.resize_token_embeddings(rows)


@names_place("folder")
def _language_model(arguments: LmmArguments, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    options = {}
    if arguments.bits in (4, 8):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"--bits {arguments.bits} needs bitsandbytes: pip install it")
        if arguments.trains_language_model and not arguments.lora_enable:
            raise ValueError(f"weights of {arguments.bits} bits cannot learn: add --lora_enable")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=arguments.bits == 4,
            load_in_8bit=arguments.bits == 8,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=arguments.double_quant,
            bnb_4bit_quant_type=arguments.quant_type,
        )
    return read_language_model(folder, dtype, **options)


def read_language_model(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """A causal language model of transformers, from safetensors or, where a folder has none, from
    .bin files that hold nothing but tensors. Raises ValueError for what model_folder.py refuses."""
    check_model_folder(folder, allows_pickles=True)
    for path in pickled_weights(folder):
        try:  # transformers would unpickle it without a check
            # on the meta device, a check takes no memory for the weights
            read_tensors(path, device="meta")
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **LOCAL, **options)


def _with_projector(folder: Path, dtype: torch.dtype) -> Lmm:
    """The model of a projector's folder, from the parts that it names."""
    parts = json_object(folder / PARTS_FILE)
    check_fields(
        parts,
        fields={"model_name_or_path": str, "vision_tower": str},
        name=str(folder / PARTS_FILE),
    )
    config = LmmConfig.from_pretrained(folder, **LOCAL)
    language_model = read_language_model(Path(parts["model_name_or_path"]), dtype)
    rows = config.text_config.vocab_size
    # the language model's folder is as it was before stage 1 added the image token
    if rows != language_model.get_input_embeddings().num_embeddings:
        grow_vocabulary(language_model, rows)
    tower, _ = open_tower(parts["vision_tower"], dtype)
    model = LmmForConditionalGeneration.from_parts(
        config, tower=tower, language_model=language_model
    )
    load_projector(model, folder / PROJECTOR_FILE)
    processor = AutoImageProcessor.from_pretrained(folder, **LOCAL)
    return Lmm(model.eval(), tokenizer=open_tokenizer(folder), image_processor=processor)
