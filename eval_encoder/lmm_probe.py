"""Entry point of the two-stage multimodal probe, one stage per call:

    torchrun eval_encoder/lmm_probe.py --recipe llava15 --stage 1 --model_name_or_path LLM \
        --vision_tower RUN --data_path align.json --image_folder images --output_dir OUT
    deepspeed eval_encoder/lmm_probe.py --deepspeed shells/zero2.json ...

    conversations -> parts or an earlier stage -> Trainer -> OUT

The list is read and checked first: a wrong path ends before any weights are loaded.

OUT holds what the stage trained (mm_projector.bin, or a whole model), record.json, metrics.jsonl,
TensorBoard's runs, checkpoint-*; the same call again goes on from the last of these. SHA256SUMS, of
all that a reader of OUT reads, is written last. Run by path, so this file holds no definition that
another module needs.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from eval_encoder.lmm.config import build_parser, parse_arguments
from eval_encoder.lmm.data.samples import stage_samples
from model_factory.command_line.command import run_command
from model_factory.command_line.launcher_watch import watched_launcher
from model_factory.command_line.plain_text import PlainFormatter
from model_factory.command_line.quiet import quiet_libraries
from model_factory.files import DamagedFile, read_json, write_json
from training.log import is_first_to_say

LOG = logging.getLogger("univit")


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code."""
    return run_command(parse=_parse, work=_stage, argv=argv, is_heard=is_first_to_say)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """`arguments` of ours, `others` of transformers', and `output_dir` of these."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        build_parser().parse_args(["--help"])
    arguments, others = parse_arguments(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--output_dir")
    known, _ = first.parse_known_args(others)
    return argparse.Namespace(arguments=arguments, others=others, output_dir=known.output_dir)


@watched_launcher()
def _stage(parsed: argparse.Namespace) -> None:
    arguments = parsed.arguments
    quiet_libraries(uses_deepspeed=any(flag.startswith("--deepspeed") for flag in parsed.others))
    samples = stage_samples(arguments)
    from training.distributed import naming_peers

    with naming_peers():
        _run(arguments, parsed.others, samples)


def _run(arguments, others: list[str], samples) -> None:
    import torch
    import torch.distributed as dist
    from transformers import set_seed

    from eval_encoder.lmm.data.features import FeatureStore
    from eval_encoder.lmm.model.open import compose
    from eval_encoder.lmm.stage import (
        build_dataset,
        build_reader,
        training_arguments,
        whole_on_every_rank,
    )

    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    args = training_arguments(arguments, others)
    set_seed(args.seed)
    with whole_on_every_rank(args):
        dtype = torch.bfloat16 if args.bf16 and args.deepspeed else torch.float32
        lmm = compose(arguments, dtype)
    lmm.model.train_parts(
        projector=not arguments.freeze_mm_mlp_adapter,
        language_model=arguments.trains_language_model,
        tower_from=arguments.tune_vit_from_layer,
    )
    reader, store = build_reader(arguments, lmm), None
    if arguments.feature_cache is not None:
        lmm.model.tower.to(args.device)
        store = FeatureStore(Path(arguments.feature_cache), lmm.model, reader)
    dataset = build_dataset(arguments, samples=samples, lmm=lmm, reader=reader, store=store)
    if store is not None:
        mine = dataset.visuals[args.process_index :: args.world_size]
        LOG.info("features of %d pictures and clips computed and stored", store.fill(mine))
        if dist.is_initialized():  # a batch is read from the store, or not at all
            dist.barrier()
    _train(arguments, args, lmm, dataset)
    if dist.is_initialized():  # nobody leaves while another still needs the group
        dist.barrier()
        dist.destroy_process_group()


def _train(arguments, args, lmm, dataset) -> None:
    from eval_encoder.lmm.model.open import PARTS_FILE, write_parts
    from eval_encoder.lmm.trainer import LmmTrainer
    from model_factory.model_folder import seal_folder

    trainer = LmmTrainer(lmm, arguments, args, dataset)
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
    done = any(output.glob("checkpoint-*")) and args.resume_from_checkpoint is None
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=done or args.resume_from_checkpoint)
    trainer.save_model(str(output))
    if args.should_save:
        trainer.save_state()
        _write_record(output, record, time.monotonic() - started)
        if lmm.has_parts:
            write_parts(output, arguments)
        seal_folder(output, also=[PARTS_FILE])


def _record(arguments, model) -> dict:
    """What lmm_table.py puts into its table, and all flags."""
    side = model.config.vision_config.image_size
    grid = model.tower.patches_of(side, side)
    parameters = list(model.parameters())
    return {
        "tokens_per_picture": model.tokens_for(grid, grid[1] * grid[2]),
        "parameters": sum(p.numel() for p in parameters),
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


if __name__ == "__main__":
    sys.exit(main())
