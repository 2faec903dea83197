"""Flags and recipes of the two-stage probe: LLaVA's own flag names, with its tables as presets.

    --recipe NAME --stage N    puts the flags of a published stage before those that are typed, so
                               that a typed flag wins
    every other flag           of transformers.TrainingArguments is accepted too

    recipe      stage  learns                                lr     batch  source
    llava15     1      projector                             1e-3   256    LLaVA-1.5 pretraining
                2      projector, language model             2e-5   128    LLaVA-1.5 finetuning
    vitsplit    1      ViT-Split                             5e-4   256
                2      ViT-Split, language model             2e-5   256
    crossget    1      cross tokens, projector, language m.  2e-5   128    from a llava15 stage 2,
                                                                           a tenth of its data
    convllava   1      projector, fifth stage of the tower   3e-4   256
                2      projector, stages 3-5, language model 2e-5   256
                3      projector, language model             2e-5   128

All: one epoch, AdamW, cosine to zero after 3 % warm-up, no weight decay, bf16 on a GPU.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from model_factory.command_line.local_output import local_output

_COMMON = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "model_max_length": 2048,
    "gradient_checkpointing": True,
    "logging_steps": 1,
}
_ALIGN = {"tune_mm_mlp_adapter": True, "per_device_train_batch_size": 32, "global_batch_size": 256}
_TUNE = {
    "version": "v1",
    "image_aspect_ratio": "pad",
    "group_by_modality_length": True,
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 16,
    "global_batch_size": 128,
}
_CONV = {"version": "v1", "image_aspect_ratio": "pad", "group_by_modality_length": True}
_CONV |= {"mm_vision_select_layer": -1, "mm_vision_resolution": 768}
_VITSPLIT = {"mm_projector_type": "vitsplit", "mm_frozen_select_layer": -2}
_VITSPLIT |= {"mm_tuned_layers_num": 1}
_PLAIN = {"version": "plain", "image_aspect_ratio": "square"}

RECIPES: dict[str, list[dict]] = {
    "llava15": [{**_ALIGN, **_PLAIN, "learning_rate": 1e-3}, _TUNE],
    "vitsplit": [
        {**_ALIGN, **_PLAIN, **_VITSPLIT, "learning_rate": 5e-4},
        {**_TUNE, **_VITSPLIT, "global_batch_size": 256},
    ],
    "crossget": [{**_TUNE, "mm_reduction_r": 13, "alignment_weight": 1e-3, "data_fraction": 0.1}],
    "convllava": [
        {**_ALIGN, **_CONV, "learning_rate": 3e-4, "tune_vit_from_layer": 5}
        | {"vision_add_five_stage": 6, "vision_five_stage_width": 3072},
        {**_CONV, "learning_rate": 2e-5, "tune_vit_from_layer": 3}
        | {"per_device_train_batch_size": 32, "global_batch_size": 256},
        {**_TUNE, **_CONV},
    ],
}
# flags of other releases of transformers, by their present name
RENAMED = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}


@dataclass(frozen=True)
class LmmArguments:
    """Flags beside those of TrainingArguments; names, defaults and help in FLAGS."""

    recipe: str | None
    stage: int
    model_name_or_path: str
    vision_tower: str | None
    pretrain_mm_mlp_adapter: str | None
    version: str
    data_path: str
    image_folder: str
    data_fraction: float
    image_aspect_ratio: str
    video_view: str
    video_size: int | None
    num_frames: int
    K_keep: int
    blind: bool
    feature_cache: str | None
    tune_mm_mlp_adapter: bool
    freeze_mm_mlp_adapter: bool
    freeze_backbone: bool
    tune_vit_from_layer: int | None
    mm_projector_type: str
    mm_vision_select_layer: list[int]
    mm_vision_select_feature: str
    mm_frozen_num: int
    mm_frozen_select_layer: list[int]
    mm_tuned_layers_num: int
    keep_extra_tokens: bool
    mm_reduction_r: list[int] | None
    mm_reduction_rule: str
    mm_reduction_weights: str
    mask_cross_token: bool
    alignment_weight: float
    alignment_direction: str
    vision_add_five_stage: int
    vision_five_stage_width: int
    mm_vision_resolution: int | None
    mm_projector_lr: float | None
    vision_tower_lr: float | None
    group_by_modality_length: bool
    global_batch_size: int | None
    model_max_length: int
    bits: int
    double_quant: bool
    quant_type: str
    lora_enable: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_bias: str
    mm_use_im_start_end: bool
    mm_use_im_patch_token: bool
    mm_patch_merge_type: str
    lazy_preprocess: bool
    is_multimodal: bool
    cache_dir: str | None
    typed: frozenset[str] = frozenset()  # names of flags in the command line or the recipe

    @property
    def trains_language_model(self) -> bool:
        """Whether the language model learns; LoRA's additions count."""
        return not (self.tune_mm_mlp_adapter or self.freeze_backbone)


def truth(text: str) -> bool:
    """True or False, as LLaVA's scripts write them."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


# name: (type, default, help); a list of numbers has the type [int]
FLAGS: dict[str, tuple] = {
    "recipe": (str, None, f"preset: {', '.join(RECIPES)}"),
    "stage": (int, 1, "stage of the recipe, from 1"),
    "model_name_or_path": (str, None, "folder of a language model, or of a model this probe wrote"),
    "vision_tower": (
        str,
        None,
        "run, export, or folder of a transformers vision model (default: the model's own)",
    ),
    "pretrain_mm_mlp_adapter": (str, None, "mm_projector.bin of an earlier stage"),
    "version": (str, "v1", "conversation template: plain, v1, llava_v1"),
    "data_path": (str, None, "conversations: JSON list or JSONL"),
    "image_folder": (str, ".", "folder that paths in the list begin at"),
    "data_fraction": (float, 1.0, "share of the list, evenly spread"),
    "image_aspect_ratio": (str, "square", "pad: to a square with the mean colour; square: crop"),
    "video_view": (str, "frame", "what is seen of clips: frame or codec"),
    "video_size": (int, None, "side of clips in pixels (default: that of pictures)"),
    "num_frames": (int, 8, "frames of a clip"),
    "K_keep": (int, 1568, "patches of a clip with --video_view codec"),
    "blind": (bool, False, "take all pictures and clips away: the text-only baseline"),
    "feature_cache": (local_output, None, "folder where a frozen tower's features are kept"),
    "tune_mm_mlp_adapter": (bool, False, "stage 1: only the projector learns"),
    "freeze_mm_mlp_adapter": (bool, False, "the projector does not learn"),
    "freeze_backbone": (bool, False, "the language model and its head do not learn"),
    "tune_vit_from_layer": (
        int,
        None,
        "first stage of a ConvNeXt that learns, counted from 1 (published scripts count from 0)",
    ),
    "mm_projector_type": (str, "mlp2x_gelu", "linear, mlp{n}x_gelu, identity, spatial_merge, ..."),
    "mm_vision_select_layer": ([int], [-2], "hidden state that the projector reads (not vitsplit)"),
    "mm_vision_select_feature": (str, "patch", "patch: without class and register tokens"),
    "mm_frozen_num": (int, 4, "accepted, no effect: the list of frozen layers counts"),
    "mm_frozen_select_layer": ([int], [-2], "vitsplit: hidden states of the prior head"),
    "mm_tuned_layers_num": (int, 1, "vitsplit: copied blocks of the task head"),
    "keep_extra_tokens": (bool, True, "vitsplit: copied blocks see class and register tokens"),
    "mm_reduction_r": (
        [int],
        None,
        "crossget: tokens taken away in every layer of the tower, or one number per layer",
    ),
    "mm_reduction_rule": (str, "complete_graph", "crossget: complete_graph, or bipartite (ToMe)"),
    "mm_reduction_weights": (str, "guided_normalised", "guided, guided_normalised or size"),
    "mask_cross_token": (bool, False, "crossget: nobody but itself sees the cross token"),
    "alignment_weight": (float, 0.0, "crossget: weight of the alignment loss"),
    "alignment_direction": (str, "published", "published or jensen_shannon"),
    "vision_add_five_stage": (int, 0, "convllava: blocks of a stage that is added (0: none)"),
    "vision_five_stage_width": (int, 3072, "convllava: its channels"),
    "mm_vision_resolution": (int, None, "side of pictures in pixels (default: the tower's)"),
    "mm_projector_lr": (float, None, "learning rate of the projector (default: --learning_rate)"),
    "vision_tower_lr": (float, None, "learning rate of the tower, likewise"),
    "group_by_modality_length": (bool, False, "like kinds and lengths in one batch"),
    "global_batch_size": (int, None, "samples of a step over all ranks; sets the accumulation"),
    "model_max_length": (int, 2048, "tokens of a sample, visuals included"),
    "bits": (int, 16, "4 or 8: language model quantised by bitsandbytes"),
    "double_quant": (bool, True, "with --bits 4: quantise the constants too"),
    "quant_type": (str, "nf4", "with --bits 4: nf4 or fp4"),
    "lora_enable": (bool, False, "learn low-rank additions to the language model only"),
    "lora_r": (int, 64, "their rank"),
    "lora_alpha": (int, 16, "their scale"),
    "lora_dropout": (float, 0.05, "their dropout"),
    "lora_bias": (str, "none", "must stay none: biases do not learn with it"),
    "mm_use_im_start_end": (bool, False, "must stay False: adds nothing but two tokens"),
    "mm_use_im_patch_token": (bool, False, "must stay False: adds a token that is never used"),
    "mm_patch_merge_type": (str, "flat", "must stay flat: tiles of one picture are not supported"),
    "lazy_preprocess": (bool, True, "accepted, no effect: samples are always read when needed"),
    "is_multimodal": (bool, True, "accepted, no effect"),
    "cache_dir": (str, None, "accepted, no effect: nothing is downloaded"),
}
REQUIRED = ("model_name_or_path", "data_path")


def build_parser() -> argparse.ArgumentParser:
    """Command line of lmm_probe.py, without TrainingArguments."""
    parser = argparse.ArgumentParser(
        prog="lmm_probe.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, (kind, default, text) in FLAGS.items():
        shown = text if default is None else f"{text} (default: {default})"
        options = {"help": shown.replace("%", "%%"), "default": default}
        if isinstance(kind, list):
            parser.add_argument(f"--{name}", type=kind[0], nargs="*", **options)
        elif kind is bool:
            parser.add_argument(f"--{name}", type=truth, nargs="?", const=True, **options)
        else:
            parser.add_argument(f"--{name}", type=kind, required=name in REQUIRED, **options)
    return parser


def parse_arguments(argv: Sequence[str]) -> tuple[LmmArguments, list[str]]:
    """(our flags, those left for TrainingArguments) of a command line, recipe included.

    Raises ValueError for an unknown recipe or stage and for values that cannot be served.
    """
    argv = [part for text in argv for part in _apart(text)]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--stage", type=int, default=1)
    chosen, _ = first.parse_known_args(argv)
    given = [*recipe_flags(chosen), *argv]
    known, others = build_parser().parse_known_args(given)
    typed = frozenset(name for name in FLAGS if f"--{name}" in given)
    arguments = LmmArguments(**{name: getattr(known, name) for name in FLAGS}, typed=typed)
    _check(arguments)
    return arguments, _present_names(others)


def _apart(text: str) -> list[str]:
    """--name=value as two words."""
    name, equals, value = text.partition("=")
    return [name, value] if equals and name.startswith("--") else [text]


def recipe_flags(chosen: argparse.Namespace) -> list[str]:
    """The command line that a recipe's stage stands for."""
    if chosen.recipe is None:
        return []
    if chosen.recipe not in RECIPES:
        raise ValueError(f"--recipe {chosen.recipe!r}: choose one of {', '.join(RECIPES)}")
    stages = RECIPES[chosen.recipe]
    if not 1 <= chosen.stage <= len(stages):
        raise ValueError(f"--recipe {chosen.recipe} has the stages 1 to {len(stages)}")
    flags = {**_COMMON, **stages[chosen.stage - 1]}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def _present_names(others: list[str]) -> list[str]:
    """--old value -> --new value, for flags that transformers has renamed."""
    renamed = {f"--{old}": f"--{new}" for old, new in RENAMED.items()}
    return [renamed.get(part, part) for part in others]


def _check(arguments: LmmArguments) -> None:
    fixed = {"mm_use_im_start_end": False, "mm_use_im_patch_token": False}
    fixed |= {"mm_patch_merge_type": "flat", "mm_vision_select_feature": "patch"}
    fixed |= {"lora_bias": "none"}
    for name, value in fixed.items():
        if getattr(arguments, name) != value:
            raise ValueError(f"--{name} {getattr(arguments, name)} is not supported: {value} is")
    if not 0 < arguments.data_fraction <= 1:
        raise ValueError(f"--data_fraction {arguments.data_fraction}: above 0, at most 1")
    if arguments.bits not in (4, 8, 16):
        raise ValueError(f"--bits {arguments.bits}: 4, 8 or 16")
    if arguments.mm_projector_type != "vitsplit" and len(arguments.mm_vision_select_layer) != 1:
        raise ValueError(
            f"--mm_vision_select_layer {arguments.mm_vision_select_layer}: one number, but for "
            "vitsplit, which names its layers by --mm_frozen_select_layer"
        )
