"""How the encoder is distributed over the ranks; the only module that knows of DDP and FSDP2.

    ddp    every rank holds all weights and moments; gradients are averaged during backward
    fsdp   every rank holds 1/W of weights, gradients and moments; a block's weights are gathered
           when it runs. For encoders whose 16 bytes per parameter do not fit beside activations.

Either way master weights and moments are fp32 and a CUDA device computes in bf16. Class centres
are sharded by the heads themselves. Activation checkpointing costs one more forward pass and keeps
one tensor per block; compiling costs 18 s at the first step (debug preset, 2 CPU cores).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

from .distributed import Ranks

STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is distributed and computed.

    `strategy` is ddp or fsdp. Packs of several heads run in one forward pass while they hold at
    most `forward_tokens` together (0: each head has its own).
    """

    strategy: str = "ddp"
    compile_blocks: bool = False
    activation_checkpointing: bool = False
    forward_tokens: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"parallel.strategy {self.strategy!r}: choose one of {', '.join(STRATEGIES)}"
            )


class ParallelEncoder:
    """The encoder as the training step calls it. `module` is the model itself, whose parameters
    optimizer and checkpoints use; under fsdp they are DTensors.
    """

    def __init__(self, encoder: LlavaViTPackingModel, config: ParallelConfig, ranks: Ranks):
        self.module = encoder.to(ranks.device)
        self._ranks = ranks
        if config.activation_checkpointing:
            encoder.gradient_checkpointing_enable()
        if config.compile_blocks:
            encoder.compile_blocks()
        self._forward: nn.Module = encoder
        if config.strategy == "fsdp":
            self._shard()
        elif any(p.requires_grad for p in encoder.parameters()):  # DDP refuses a frozen encoder
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            self._forward = DistributedDataParallel(encoder, device_ids=devices)

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Pooled vectors fp32 [N, D] of one pack."""
        # whatever the blocks compute in, the loss computes in fp32
        device = self._ranks.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return self._forward(**inputs).pooler_output.float()

    @contextlib.contextmanager
    def accumulation(self, last: bool) -> Iterator[None]:
        """Around one micro step: ranks exchange gradients after the last one only."""
        if isinstance(self._forward, FSDPModule):
            self._forward.set_requires_gradient_sync(last)
        if isinstance(self._forward, DistributedDataParallel) and not last:
            with self._forward.no_sync():
                yield
        else:
            yield

    def whole(self) -> LlavaViTPackingModel | None:
        """The model with all of its weights, for exports, on rank 0; None on others. Called by all
        ranks."""
        if not isinstance(self._forward, FSDPModule):
            return self.module if self._ranks.is_main else None
        # gathering is a collective, so all ranks do it, though rank 0 alone has use for the result
        weights = {
            name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.cpu()
            for name, tensor in self.module.state_dict().items()
        }
        if not self._ranks.is_main:
            return None
        model = LlavaViTPackingModel(self.module.config)
        model.load_state_dict(weights)
        return model

    def _shard(self) -> None:
        """FSDP2 of every block, and of what is outside of blocks."""
        device = self._ranks.device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        precision = MixedPrecisionPolicy()
        if device == "cuda":
            # gradients are summed over the ranks in fp32, as under DDP
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        # blocks first: the call for the whole model takes the parameters that are left
        for layer in self.module.encoder.layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(self.module, mesh=mesh, mp_policy=precision)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
