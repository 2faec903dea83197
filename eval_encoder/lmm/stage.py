"""From flags to what a stage trains with: data, reading of pictures, TrainingArguments."""

import argparse
import contextlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import deepspeed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from model_factory.command_line.local_output import local_output
from model_factory.files import parse_json

from .config import LmmArguments
from .data.conversation import Sample
from .data.dataset import ConversationDataset, TextConfig
from .data.features import FeatureStore
from .data.visuals import VisualReader
from .generate import visual_config
from .model.open import Lmm

# packages that are not called as transformers calls what they report to
REPORT_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def training_arguments(arguments: LmmArguments, others: list[str]) -> TrainingArguments:
    """transformers' own flags, with the accumulation that gives the global batch.

    Raises ValueError for unknown flags, for a --report_to whose package is not installed, for a
    global batch that the ranks cannot make, and what `check_cache` raises.
    """
    import torch

    others = list(others)
    if "--report_to" not in others:
        others += ["--report_to", "tensorboard"]
    if not torch.cuda.is_available():
        others += ["--use_cpu", "True", "--dataloader_pin_memory", "False"]
    elif not any(part.startswith(("--bf16", "--fp16")) for part in others):
        others += ["--bf16", "True"]
    check_deepspeed(others)
    args = _parse(others)
    check_reports(args)
    if arguments.feature_cache is not None:
        check_cache(args)
    wanted = arguments.global_batch_size
    if wanted is None:
        return args
    once = args.per_device_train_batch_size * args.world_size
    if wanted % once:
        raise ValueError(
            f"--global_batch_size {wanted} is no multiple of {args.world_size} ranks x "
            f"{args.per_device_train_batch_size} samples: change --per_device_train_batch_size"
        )
    if "--gradient_accumulation_steps" in others:
        if args.gradient_accumulation_steps * once != wanted:
            raise ValueError(
                f"--gradient_accumulation_steps {args.gradient_accumulation_steps} makes a batch "
                f"of {args.gradient_accumulation_steps * once}, --global_batch_size asks for "
                f"{wanted}: give one of them"
            )
        return args
    # parsed again, as DeepSpeed's settings are filled in from the flags
    return _parse([*others, "--gradient_accumulation_steps", str(wanted // once)])


def _parse(flags: list[str]) -> TrainingArguments:
    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
    (args, unknown) = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    if unknown:
        raise ValueError(
            f"{' '.join(unknown)}: flags of neither lmm_probe.py nor transformers' "
            "TrainingArguments; see --help"
        )
    local_output(args.output_dir)
    args.remove_unused_columns = False
    return args


def check_deepspeed(others: Sequence[str]) -> None:
    """Raises ValueError for a --deepspeed that cannot be served: without the library, or with a
    file that is no JSON object. A JSON text in its place is transformers' to read."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--deepspeed", nargs="?")
    given = first.parse_known_args(others)[0].deepspeed
    if given is None:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "--deepspeed needs DeepSpeed, which is not installed: pip install -e .[lmm]"
        )
    if not given.lstrip().startswith("{"):
        parse_json(Path(given).read_bytes(), name=given)


def check_reports(args: TrainingArguments) -> None:
    """Raises ValueError for a --report_to that nothing installed can serve, with what to install:
    transformers finds out when the model is loaded and the data is read."""
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report_to {name}: choose among {known}, or none")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        # its constructors ask for their packages, and raise either of these without
        except (RuntimeError, ImportError) as error:
            package = REPORT_PACKAGES.get(name, name)
            raise ValueError(
                f"--report_to {name} needs a package that is not installed: pip install {package}, "
                "or give --report_to none"
            ) from error


@contextlib.contextmanager
def whole_on_every_rank(args: TrainingArguments):
    """Parts are loaded whole and sharded by DeepSpeed afterwards: under ZeRO-3 transformers would
    load them in slices, and blocks could not be copied. Costs host memory for the whole model on
    every rank."""
    if args.deepspeed is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(args.hf_deepspeed_config)


def check_cache(args: TrainingArguments) -> None:
    """Raises ValueError for stored features under ZeRO-3, where every process must run the same
    modules: one that reads what another computes would wait for ever."""
    sharded = args.deepspeed is not None and args.hf_deepspeed_config.is_zero3()
    if sharded:
        raise ValueError("--feature_cache does not go with ZeRO-3: take shells/zero2.json, or DDP")


def build_reader(arguments: LmmArguments, lmm: Lmm) -> VisualReader:
    """How pictures and clips are read for a model's tower."""
    lmm.model.config.video = {
        "video_view": arguments.video_view,
        "video_size": arguments.video_size or lmm.model.config.vision_config.image_size,
        "num_frames": arguments.num_frames,
        "num_tokens": arguments.K_keep,
    }
    config = replace(visual_config(lmm), aspect=arguments.image_aspect_ratio)
    return VisualReader(config, lmm.image_processor, arguments.image_folder)


def build_dataset(
    arguments: LmmArguments,
    samples: Sequence[Sample],
    lmm: Lmm,
    reader: VisualReader,
    store: FeatureStore | None,
) -> ConversationDataset:
    """The samples of lmm_samples.stage_samples, as the model takes them."""
    config = lmm.model.config
    text = TextConfig(arguments.version, config.image_token_id, arguments.model_max_length)
    return ConversationDataset(samples, lmm.tokenizer, text, reader, lmm.model.tokens_for, store)
