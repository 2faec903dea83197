"""One stage of the multimodal probe, from flags to a written folder.

    checked samples -> TrainingArguments -> composed model -> reader of visuals, cached features
      -> dataset -> LmmTrainer -> OUT

OUT holds what the stage trained (mm_projector.bin, or a whole model), record.json, metrics.jsonl,
TensorBoard's runs, checkpoint-*; the same call again goes on from the last of these. SHA256SUMS, of
all that a reader of OUT reads, is written last.
"""

import argparse
import contextlib
import importlib.util
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.integrations import deepspeed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from model_factory.command_line.local_output import local_output
from model_factory.command_line.plain_text import PlainFormatter
from model_factory.files import DamagedFile, parse_json, read_json, write_json
from model_factory.model_folder import seal_folder

from .config import LmmArguments
from .data.conversation import Sample
from .data.dataset import ConversationDataset, TextConfig
from .data.features import FeatureStore
from .data.visuals import VisualReader
from .generate import visual_config
from .model import open as model_open
from .model.lmm import LmmForConditionalGeneration
from .model.open import Lmm
from .trainer import LmmTrainer

LOG = logging.getLogger("univit")

# packages that are not called as transformers calls what they report to
REPORT_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def run_stage(arguments: LmmArguments, others: Sequence[str], samples: Sequence[Sample]) -> None:
    """Train one stage. `others` are flags of TrainingArguments; raises what these functions do."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    args = training_arguments(arguments, others)
    # before the model is composed: a new projector starts from random weights
    set_seed(args.seed)
    # DeepSpeed keeps fp32 copies of its own; without it, autocast computes in bf16 on fp32 weights
    dtype = torch.bfloat16 if args.bf16 and args.deepspeed else torch.float32
    with whole_on_every_rank(args):
        lmm = model_open.compose(arguments, dtype)
    lmm.model.train_parts(
        projector=not arguments.freeze_mm_mlp_adapter,
        language_model=arguments.trains_language_model,
        tower_from=arguments.tune_vit_from_layer,
    )
    reader = build_reader(arguments, lmm)
    store = None
    if arguments.feature_cache is not None:
        lmm.model.tower.to(args.device)
        store = FeatureStore(Path(arguments.feature_cache), model=lmm.model, reader=reader)
    dataset = build_dataset(arguments, samples=samples, lmm=lmm, reader=reader, store=store)
    if store is not None:
        # every rank computes its share, and reads all of it from the common folder
        share = dataset.visuals[args.process_index :: args.world_size]
        LOG.info("features of %d images and clips computed and stored", store.fill(share))
        if dist.is_initialized():  # a batch is read from the store, or not at all
            dist.barrier()
    _train(arguments, args=args, lmm=lmm, dataset=dataset)
    if dist.is_initialized():  # no rank leaves while another still needs the group
        dist.barrier()
        dist.destroy_process_group()


def _train(
    arguments: LmmArguments, args: TrainingArguments, lmm: Lmm, dataset: ConversationDataset
) -> None:
    trainer = LmmTrainer(lmm, arguments=arguments, args=args, dataset=dataset)
    record = _record(arguments, lmm.model)  # before DeepSpeed shards the parameters
    LOG.info(
        "%s stage %d: %d samples, batch %d = %d ranks x %d x %d accumulated; "
        "%.2f M of %.2f M parameters learn",
        arguments.recipe,
        arguments.stage,
        len(dataset),
        args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        args.world_size,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        record["learning"] / 1e6,
        record["parameters"] / 1e6,
    )
    output = Path(args.output_dir)
    has_checkpoints = any(output.glob("checkpoint-*"))
    resume = args.resume_from_checkpoint or has_checkpoints
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output))
    if args.should_save:
        trainer.save_state()
        _write_record(output, record=record, seconds=time.monotonic() - started)
        if lmm.has_parts:
            model_open.write_parts(output, arguments)
        seal_folder(output, also=[model_open.PARTS_FILE])


def _record(arguments: LmmArguments, model: LmmForConditionalGeneration) -> dict:
    """What scoring/table.py puts into its table, and all flags."""
    side = model.config.vision_config.image_size
    grid = model.tower.grid_of(side, side)
    parameters = list(model.parameters())
    return {
        "tokens_per_picture": model.tokens_for(grid, grid[1] * grid[2]),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "learning": sum(p.numel() for p in parameters if p.requires_grad),
        "arguments": {**asdict(arguments), "typed": sorted(arguments.typed)},
    }


def _write_record(output: Path, record: dict, seconds: float) -> None:
    """Seconds add up over the starts of a stage."""
    path = output / "record.json"
    before = 0.0
    if path.is_file():
        try:
            before = read_json(path, {"seconds": float})["seconds"]
        except DamagedFile as error:  # not worth the stage that has just ended
            LOG.warning("%s; written anew, with the seconds of this start alone", error)
    write_json(path, {**record, "seconds": round(before + seconds, 1)})


def training_arguments(arguments: LmmArguments, others: Sequence[str]) -> TrainingArguments:
    """transformers' own flags, with the accumulation that gives the global batch.

    Raises ValueError for unknown flags, for a --report_to whose package is not installed, for a
    global batch that the ranks cannot make, and what `check_cache` raises.
    """
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
    per_pass = args.per_device_train_batch_size * args.world_size
    if wanted % per_pass:
        raise ValueError(
            f"--global_batch_size {wanted} is no multiple of {args.world_size} ranks x "
            f"{args.per_device_train_batch_size} samples: change --per_device_train_batch_size"
        )
    if "--gradient_accumulation_steps" in others:
        if args.gradient_accumulation_steps * per_pass != wanted:
            raise ValueError(
                f"--gradient_accumulation_steps {args.gradient_accumulation_steps} makes a batch "
                f"of {args.gradient_accumulation_steps * per_pass}, --global_batch_size asks for "
                f"{wanted}: give one of them"
            )
        return args
    # parsed again, as DeepSpeed's settings are filled in from the flags
    return _parse([*others, "--gradient_accumulation_steps", str(wanted // per_pass)])


def _parse(flags: list[str]) -> TrainingArguments:
    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
    args, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    if unknown:
        raise ValueError(
            f"{' '.join(unknown)}: flags of neither lmm_probe.py nor transformers' "
            "TrainingArguments; see --help"
        )
    local_output(args.output_dir)
    # examples are objects of ours, without columns that transformers could remove
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
def whole_on_every_rank(args: TrainingArguments) -> Iterator[None]:
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
    """How images and clips are read for a model's tower; its configuration records it."""
    lmm.model.config.video = {
        "video_view": arguments.video_view,
        "video_size": arguments.video_size or lmm.model.config.vision_config.image_size,
        "num_frames": arguments.num_frames,
        "num_tokens": arguments.K_keep,
    }
    config = replace(visual_config(lmm), aspect=arguments.image_aspect_ratio)
    return VisualReader(config, image_processor=lmm.image_processor, folder=arguments.image_folder)


def build_dataset(
    arguments: LmmArguments,
    samples: Sequence[Sample],
    lmm: Lmm,
    reader: VisualReader,
    store: FeatureStore | None,
) -> ConversationDataset:
    """The samples of `stage_samples`, as the model takes them."""
    config = lmm.model.config
    text = TextConfig(
        version=arguments.version,
        image_token_id=config.image_token_id,
        max_length=arguments.model_max_length,
    )
    return ConversationDataset(
        samples,
        tokenizer=lmm.tokenizer,
        text=text,
        reader=reader,
        tokens_for=lmm.model.tokens_for,
        store=store,
    )
