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
from typing import Any

from model_factory.command_line.flags import add_flags, flag, flags_of
from model_factory.command_line.local_output import local_output

# Figures of the recipes are the published ones; where a published script and its text differ, those
# of the text (docs/llava.md).
_COMMON = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "model_max_length": 2048,
    "gradient_checkpointing": True,
    "logging_steps": 1,
}
# on eight GPUs these batches make the global batch without accumulation; elsewhere the accumulation
# follows from the global batch (stage.training_arguments)
_ALIGN = {"tune_mm_mlp_adapter": True, "per_device_train_batch_size": 32, "global_batch_size": 256}
_TUNE = {
    "version": "v1",
    "image_aspect_ratio": "pad",
    "group_by_modality_length": True,
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 16,
    "global_batch_size": 128,
}
# conversations from the first stage on, where llava15 begins with captions
_CONVLLAVA = {
    "version": "v1",
    "image_aspect_ratio": "pad",
    "group_by_modality_length": True,
    "mm_vision_select_layer": -1,
    "mm_vision_resolution": 768,
}
_VITSPLIT = {
    "mm_projector_type": "vitsplit",
    "mm_frozen_select_layer": -2,
    "mm_tuned_layers_num": 1,
}
_PLAIN = {"version": "plain", "image_aspect_ratio": "square"}

RECIPES: dict[str, list[dict[str, object]]] = {
    "llava15": [{**_ALIGN, **_PLAIN, "learning_rate": 1e-3}, _TUNE],
    "vitsplit": [
        {**_ALIGN, **_PLAIN, **_VITSPLIT, "learning_rate": 5e-4},
        {**_TUNE, **_VITSPLIT, "global_batch_size": 256},
    ],
    # one stage, which starts from what llava15 wrote
    "crossget": [{**_TUNE, "mm_reduction_r": 13, "alignment_weight": 1e-3, "data_fraction": 0.1}],
    "convllava": [
        {
            **_ALIGN,
            **_CONVLLAVA,
            "learning_rate": 3e-4,
            "tune_vit_from_layer": 5,
            "vision_add_five_stage": 6,
            "vision_five_stage_width": 3072,
        },
        {
            **_CONVLLAVA,
            "learning_rate": 2e-5,
            "tune_vit_from_layer": 3,
            "per_device_train_batch_size": 32,
            "global_batch_size": 256,
        },
        {**_TUNE, **_CONVLLAVA},
    ],
}
# what LLaVA's scripts, written for older releases of transformers, call flags of TrainingArguments;
# a warm-up below 1 is a share of all steps under the new name too
RENAMED = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}


def truth(text: str) -> bool:
    """True or False, as LLaVA's scripts write them."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def truth_flag(default: bool, help: str) -> Any:
    """A field whose flag takes True or False; the flag alone stands for True."""
    return flag(default=default, help=help, parse=truth, nargs="?", const=True)


@dataclass(frozen=True, kw_only=True)
class LmmArguments:
    """Flags beside those of TrainingArguments, under LLaVA's names."""

    recipe: str | None = flag(default=None, help=f"preset: {', '.join(RECIPES)}")
    stage: int = flag(default=1, help="stage of the recipe, from 1")
    model_name_or_path: str = flag(
        help="folder of a language model, or of a model this probe wrote"
    )
    vision_tower: str | None = flag(
        default=None,
        help="run, export, or folder of a transformers vision model (default: the model's own)",
    )
    pretrain_mm_mlp_adapter: str | None = flag(
        default=None, help="mm_projector.bin of an earlier stage"
    )
    version: str = flag(default="v1", help="conversation template: plain, v1, llava_v1")
    data_path: str = flag(help="conversations: JSON list or JSONL")
    image_folder: str = flag(default=".", help="folder that paths in the list begin at")
    data_fraction: float = flag(default=1.0, help="share of the list, evenly spread")
    image_aspect_ratio: str = flag(
        default="square", help="pad: to a square with the mean colour; square: crop"
    )
    video_view: str = flag(default="frame", help="what is seen of clips: frame or codec")
    video_size: int | None = flag(
        default=None, help="side of clips in pixels (default: that of images)"
    )
    num_frames: int = flag(default=8, help="frames of a clip")
    K_keep: int = flag(default=1568, help="patches of a clip with --video_view codec")
    blind: bool = truth_flag(
        default=False, help="take all images and clips away: the text-only baseline"
    )
    feature_cache: str | None = flag(
        default=None, help="folder where a frozen tower's features are kept", parse=local_output
    )
    tune_mm_mlp_adapter: bool = truth_flag(default=False, help="stage 1: only the projector learns")
    freeze_mm_mlp_adapter: bool = truth_flag(default=False, help="the projector does not learn")
    freeze_backbone: bool = truth_flag(
        default=False, help="the language model and its head do not learn"
    )
    tune_vit_from_layer: int | None = flag(
        default=None,
        help="first stage of a ConvNeXt that learns, from 1 (published scripts count from 0)",
    )
    mm_projector_type: str = flag(
        default="mlp2x_gelu", help="linear, mlp{n}x_gelu, identity, spatial_merge, ..."
    )
    mm_vision_select_layer: list[int] = flag(
        default=(-2,), help="hidden state that the projector reads (not vitsplit)", nargs="*"
    )
    mm_vision_select_feature: str = flag(
        default="patch", help="patch: without class and register tokens"
    )
    mm_frozen_num: int = flag(
        default=4, help="accepted, no effect: the list of frozen layers counts"
    )
    mm_frozen_select_layer: list[int] = flag(
        default=(-2,), help="vitsplit: hidden states of the prior head", nargs="*"
    )
    mm_tuned_layers_num: int = flag(default=1, help="vitsplit: copied blocks of the task head")
    keep_extra_tokens: bool = truth_flag(
        default=True, help="vitsplit: copied blocks see class and register tokens"
    )
    mm_reduction_r: list[int] | None = flag(
        default=None,
        help="crossget: tokens taken away in every layer of the tower, or one number per layer",
        nargs="*",
    )
    mm_reduction_rule: str = flag(
        default="complete_graph", help="crossget: complete_graph, or bipartite (ToMe)"
    )
    mm_reduction_weights: str = flag(
        default="guided_normalised", help="guided, guided_normalised or size"
    )
    mask_cross_token: bool = truth_flag(
        default=False, help="crossget: nobody but itself sees the cross token"
    )
    alignment_weight: float = flag(default=0.0, help="crossget: weight of the alignment loss")
    alignment_direction: str = flag(default="published", help="published or jensen_shannon")
    vision_add_five_stage: int = flag(
        default=0, help="convllava: blocks of a stage that is added (0: none)"
    )
    vision_five_stage_width: int = flag(default=3072, help="convllava: its channels")
    mm_vision_resolution: int | None = flag(
        default=None, help="side of images in pixels (default: the tower's)"
    )
    mm_projector_lr: float | None = flag(
        default=None, help="learning rate of the projector (default: --learning_rate)"
    )
    vision_tower_lr: float | None = flag(default=None, help="learning rate of the tower, likewise")
    group_by_modality_length: bool = truth_flag(
        default=False, help="like kinds and lengths in one batch"
    )
    global_batch_size: int | None = flag(
        default=None, help="samples of a step over all ranks; sets the accumulation"
    )
    model_max_length: int = flag(default=2048, help="tokens of a sample, visuals included")
    bits: int = flag(default=16, help="4 or 8: language model quantised by bitsandbytes")
    double_quant: bool = truth_flag(default=True, help="with --bits 4: quantise the constants too")
    quant_type: str = flag(default="nf4", help="with --bits 4: nf4 or fp4")
    lora_enable: bool = truth_flag(
        default=False, help="learn low-rank additions to the language model only"
    )
    lora_r: int = flag(default=64, help="their rank")
    lora_alpha: int = flag(default=16, help="their scale")
    lora_dropout: float = flag(default=0.05, help="their dropout")
    lora_bias: str = flag(default="none", help="must stay none: biases do not learn with it")
    mm_use_im_start_end: bool = truth_flag(
        default=False, help="must stay False: adds nothing but two tokens"
    )
    mm_use_im_patch_token: bool = truth_flag(
        default=False, help="must stay False: adds a token that is never used"
    )
    mm_patch_merge_type: str = flag(
        default="flat", help="must stay flat: tiles of one image are not supported"
    )
    lazy_preprocess: bool = truth_flag(
        default=True, help="accepted, no effect: samples are always read when needed"
    )
    is_multimodal: bool = truth_flag(default=True, help="accepted, no effect")
    cache_dir: str | None = flag(default=None, help="accepted, no effect: nothing is downloaded")
    # names of flags that stand in the command line or the recipe, whatever their values
    typed: frozenset[str] = frozenset()

    @property
    def trains_language_model(self) -> bool:
        """Whether the language model learns; LoRA's additions count."""
        return not (self.tune_mm_mlp_adapter or self.freeze_backbone)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults, but for flags that have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """Command line of lmm_probe.py, without TrainingArguments."""
    parser = argparse.ArgumentParser(
        prog="lmm_probe.py", description=__doc__, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    add_flags(parser, LmmArguments)
    return parser


def parse_arguments(argv: Sequence[str]) -> tuple[LmmArguments, list[str]]:
    """(our flags, those left for TrainingArguments) of a command line, recipe included.

    Raises ValueError for an unknown recipe or stage and for values that cannot be served.
    """
    words = _without_equals(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--stage", type=int, default=1)
    chosen, _ = first.parse_known_args(words)
    # argparse takes the last of two equal flags, so a typed one wins over the recipe's
    words = [*recipe_flags(chosen), *words]
    parsed, others = build_parser().parse_known_args(words)
    values: dict[str, Any] = {}
    for declared in flags_of(LmmArguments):
        value = getattr(parsed, declared.destination)
        # defaults are tuples, as a dataclass has it; configurations of transformers hold lists
        values[declared.path] = list(value) if isinstance(value, tuple) else value
    typed = frozenset(name for name in values if f"--{name}" in words)
    arguments = LmmArguments(**values, typed=typed)
    _check(arguments)
    renamed = {}
    for old, new in RENAMED.items():
        renamed[f"--{old}"] = f"--{new}"
    return arguments, [renamed.get(word, word) for word in others]


def _without_equals(argv: Sequence[str]) -> list[str]:
    """The same words, with `--name=value` as two."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words += [name, value] if equals and name.startswith("--") else [word]
    return words


def recipe_flags(chosen: argparse.Namespace) -> list[str]:
    """The command line that a recipe's stage stands for."""
    if chosen.recipe is None:
        return []
    if chosen.recipe not in RECIPES:
        raise ValueError(f"--recipe {chosen.recipe!r}: choose one of {', '.join(RECIPES)}")
    stages = RECIPES[chosen.recipe]
    if not 1 <= chosen.stage <= len(stages):
        raise ValueError(f"--recipe {chosen.recipe} has the stages 1 to {len(stages)}")
    words = []
    for name, value in {**_COMMON, **stages[chosen.stage - 1]}.items():
        words += [f"--{name}", str(value)]
    return words


def _check(arguments: LmmArguments) -> None:
    # flags of LLaVA's scripts for what this model does not have: no other value is supported
    fixed = {
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "mm_vision_select_feature": "patch",
        "lora_bias": "none",
    }
    for name, value in fixed.items():
        given = getattr(arguments, name)
        if given != value:
            raise ValueError(f"--{name} {given} is not supported: {value} is")
    if not 0 < arguments.data_fraction <= 1:
        raise ValueError(f"--data_fraction {arguments.data_fraction}: above 0, at most 1")
    if arguments.bits not in (4, 8, 16):
        raise ValueError(f"--bits {arguments.bits}: 4, 8 or 16")
    if arguments.mm_projector_type != "vitsplit" and len(arguments.mm_vision_select_layer) != 1:
        raise ValueError(
            f"--mm_vision_select_layer {arguments.mm_vision_select_layer}: one number, but for "
            "vitsplit, which names its layers by --mm_frozen_select_layer"
        )
