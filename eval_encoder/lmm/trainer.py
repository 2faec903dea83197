"""transformers' Trainer for an LmmForConditionalGeneration: what it does not do by itself.

    order      group_by_modality_length, or shuffled, from (seed, epoch) alone
    lr         one for the projector and one for the tower, where asked for
    saving     a stage that trains the projector alone saves nothing else, and resumes from it
    record     metrics.jsonl, a line per logged step
    checksums  SHA256SUMS of every checkpoint; one that differs is passed over at a resume

Everything else (DDP, DeepSpeed, accumulation, schedule, checkpoints, TensorBoard) is transformers'.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from model_factory.files import (
    CHECKSUMS_NAME,
    DamagedFile,
    check_checksums,
    parse_json,
    write_atomically,
    write_checksums,
)
from model_factory.llava.crossget import CrossGetTower
from model_factory.llava.projectors import SpatialMerge
from model_factory.llava.vit_split import ViTSplit

from .config import LmmArguments
from .data.dataset import Collator, ConversationDataset
from .data.sampler import ModalityLengthSampler, ShuffledSampler
from .model.lmm import LmmForConditionalGeneration, Visuals
from .model.open import Lmm
from .model.projector_file import PROJECTOR_FILE, load_projector, save_projector

LOG = logging.getLogger("univit")
GENERATORS = "rng_state_"  # how files of one process among several begin
# parts of parameters' names
PROJECTOR = ".multi_modal_projector."
TOWER = ".vision_tower."


class LmmTrainer(Trainer):
    """Trains what `lmm.model` lets learn."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        lmm: Lmm,
        arguments: LmmArguments,
        args: TrainingArguments,
        dataset: ConversationDataset,
    ) -> None:
        """Raises ValueError where nothing learns."""
        super().__init__(
            model=lmm.model,
            args=args,
            train_dataset=dataset,
            data_collator=Collator(lmm.tokenizer.pad_token_id, store=dataset.store),
            processing_class=lmm.tokenizer,
            callbacks=[_Record(Path(args.output_dir) / "metrics.jsonl")],
        )
        self._lmm = lmm
        self._arguments = arguments
        learning = [
            f".{name}" for name, value in lmm.model.named_parameters() if value.requires_grad
        ]
        if not learning:
            raise ValueError("nothing learns: take one of the --freeze flags away")
        # of a whole model no part is left out, since no other folder holds it
        self._projector_only = lmm.has_parts and all(PROJECTOR in name for name in learning)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, **options: Any
    ) -> TrainOutput:
        """As transformers' own. True resumes from the newest checkpoint that is whole, and from
        none where there is none; DamagedFile for a named one that differs from its checksums."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(Path(self.args.output_dir))
        elif resume_from_checkpoint:
            # named by the user, so another one is not taken in its place
            check_checksums(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **options)

    def _get_train_sampler(
        self, train_dataset: ConversationDataset | None = None
    ) -> ShuffledSampler | ModalityLengthSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self._arguments.group_by_modality_length:
            return ShuffledSampler(len(dataset), seed=self.args.seed)
        return ModalityLengthSampler(
            dataset.lengths,
            batch_size=self.args.per_device_train_batch_size,
            batches_per_step=self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' own, with ValueError for a loss that is not finite: transformers would
        log a loss of zero and go on."""
        if self.is_deepspeed_enabled and self.args.hf_deepspeed_config.is_zero3():
            check_one_size(self._lmm.model, inputs.get("visuals"))
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}: lower "
                "--learning_rate, or look at the pictures and answers of that step"
            )
        return result

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over up to six groups: projector, tower and the rest, with and without decay."""
        model = self.model if model is None else model
        if self.optimizer is not None:
            return self.optimizer
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = None
            # a dot in front, so that a name may also begin with the part
            if PROJECTOR in f".{name}":
                rate = self._arguments.mm_projector_lr
            elif TOWER in f".{name}":
                rate = self._arguments.vision_tower_lr
            rate = self.args.learning_rate if rate is None else rate
            decay = self.args.weight_decay if name in decayed else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        # every group has a rate of its own
        options.pop("lr", None)
        optimizer = optimizer_class(
            [
                {"params": parameters, "lr": rate, "weight_decay": decay}
                for (rate, decay), parameters in groups.items()
            ],
            **options,
        )
        self.optimizer = optimizer
        return optimizer

    def _save(
        self,
        output_dir: str | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not self._projector_only:
            super()._save(str(folder), state_dict)
        elif self.args.should_save:
            save_projector(self._lmm.model, folder=folder, tensors=state_dict)
        if self.args.should_save:
            self._lmm.save_processors(folder)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; see record.json

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self._projector_only:
            load_projector(self._lmm.model, Path(resume_from_checkpoint) / PROJECTOR_FILE)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def newest_whole(output: Path) -> str | None:
    """The newest checkpoint of a stage that is as it was written; others are named in the log."""
    by_step = {}
    for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        # sorted by number: as a text, checkpoint-1000 comes before checkpoint-200
        step = path.name.rpartition("-")[2]
        if path.is_dir() and step.isdigit():
            by_step[int(step)] = path
    for _, path in sorted(by_step.items(), reverse=True):
        try:
            # the trainer's state is what transformers writes last; older versions wrote no sums
            names = [name for name in _bound_names(path) if not name.startswith(CHECKSUMS_NAME)]
            if check_checksums(path, names) or (path / TRAINER_STATE_NAME).is_file():
                return str(path)
            problem = "its save did not come to an end"
        except (DamagedFile, OSError) as error:
            problem = str(error)
        LOG.warning("checkpoint passed over: %s: %s", path, problem)
    return None


def check_one_size(model: LmmForConditionalGeneration, visuals: Visuals | None) -> None:
    """Raises ValueError for a batch of several sizes where each size is a pass of its own: under
    ZeRO-3 the processes would wait for each other for ever."""
    inputs = None if visuals is None else visuals.inputs
    if inputs is None or inputs.lengths is None or inputs.grids is None:
        return
    # CrossGET reduces items of one length at a time, these projectors work on one grid at a time
    if isinstance(model.tower, CrossGetTower):
        sizes = inputs.lengths[:, None].unique(dim=0)
    elif isinstance(model.projector, ViTSplit | SpatialMerge):
        sizes = inputs.grids[:, 1:].unique(dim=0)
    else:
        return
    if len(sizes) > 1:
        raise ValueError(
            f"pictures and clips of {sizes.tolist()} patches in one batch under "
            "ZeRO-3: take shells/zero2.json, give clips another --video_size or --num_frames, or "
            "choose mlp2x_gelu"
        )


def _bound_names(folder: Path) -> list[str]:
    """Files of a checkpoint that its checksums bind: other processes write the states of their own
    generators while they are computed."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return [name for name in names if not name.startswith(GENERATORS)]


def _read_line(line: bytes) -> dict | None:
    """A line of a stage's record; None for a damaged one, or one that a kill has cut."""
    try:
        record = parse_json(line, "line")
    except DamagedFile:
        return None
    is_whole = line.endswith(b"\n") and isinstance(record.get("step"), int)
    return record if is_whole else None


class _Record(TrainerCallback):
    """Writes every logged line and the checksums of checkpoints; lines beyond the step that a run
    resumes from are cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not self._path.is_file():
            return
        # steps behind the checkpoint are run again, and would be in the file twice
        lines = []
        for line in self._path.read_bytes().splitlines(keepends=True):
            record = _read_line(line)
            if record is None:
                LOG.warning("%s: a damaged line is left out: %r", self._path, line[:80])
            elif record["step"] <= state.global_step:
                lines.append(line)
        write_atomically(self._path, b"".join(lines))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            with open(self._path, "a") as stream:
                record = {"step": state.global_step, **logs}
                stream.write(json.dumps(record) + "\n")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_checksums(folder, _bound_names(folder))
