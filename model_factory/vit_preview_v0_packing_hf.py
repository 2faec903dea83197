"""The packed ViT: any mixture of images, clips and sparse codec selections in one sequence of patch
rows.

`hidden_states` are normalised pixel rows [S, 3*p*p]. Each item attends to itself only; positions
enter through 3-D RoPE. An item may be a full (t, h, w) grid or any subset of patches with explicit
positions; boundaries are `cu_seqlens`. Cost per forward: linear in S for the matmuls, sum over
items of length^2 for attention.

Shape legend: S packed tokens, N items, D width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

# transformers 4 loads a folder's code with the files that this one names, not with those that they
# name in turn: every sibling in use is named here
from .attention import BACKENDS
from .configuration import LlavaViTPackingConfig
from .files import DamagedFile  # noqa: F401
from .grouped_attention import grouped_sdpa  # noqa: F401
from .layers import (
    AttentionPoolingHead,
    EncoderLayer,
    PackContext,
    PatchEmbed,
    ProbeAttention,
    build_norm,
)
from .model_folder import check_model_folder
from .pack_layout import PackLayout, resolve_layout
from .packing import compute_patch_positions_from_grid_thw
from .published_folder import published_model_type, read_published_folder
from .rope import rope_tables
from .state_dict_adapter import raise_problems

__all__ = [
    "LlavaViTPackingConfig",
    "LlavaViTPackingModel",
    "compute_patch_positions_from_grid_thw",  # the public contract offers it here
]


class PackedEncoder(nn.Module):
    """The stack of blocks (a module of its own, as the key layout has `encoder.layers.i`).

    With `gradient_checkpointing` (set by `model.gradient_checkpointing_enable()`) a block keeps
    only its input for the backward pass and runs again there.
    """

    # set by transformers together with `gradient_checkpointing`
    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(self, config: LlavaViTPackingConfig):
        super().__init__()
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(
            EncoderLayer(
                width=config.hidden_size,
                hidden=config.intermediate_size,
                num_heads=config.num_attention_heads,
                norm_type=config.layer_norm_type,
                eps=config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )

    def forward(
        self, x: torch.Tensor, context: PackContext, output_hidden_states: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Tokens [S, D] after the last block, and on request those before and after every block."""
        states = [x]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, context)
            else:
                x = layer(x, context)
            if output_hidden_states:
                states.append(x)
        return x, tuple(states) if output_hidden_states else None


class LlavaViTPackingModel(PreTrainedModel):
    """Packed encoder with optional attention-pooling head; see `forward` for the contract.

    Attention runs on the best kernel present (see attention.py). `attn_implementation="eager"` or
    `"flash_attention_2"` asks for that one, and `model.choose_attention(NAME)` for any.
    """

    config_class = LlavaViTPackingConfig
    base_model_prefix = "llava_vit"
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True  # the spelling of transformers 4
    _no_split_modules = ["EncoderLayer"]

    def __init__(self, config: LlavaViTPackingConfig):
        super().__init__(config)
        self.patch_embed = PatchEmbed(
            config.patch_size,
            width=config.hidden_size,
            channels=config.num_channels,
        )
        self.layernorm_pre = build_norm(
            config.layer_norm_type,
            width=config.hidden_size,
            eps=config.layer_norm_eps,
        )
        self.encoder = PackedEncoder(config)
        self.layernorm_post: nn.Module | None = None
        self.head: AttentionPoolingHead | None = None
        if config.use_head:
            self.layernorm_post = build_norm(
                config.layer_norm_type,
                width=config.hidden_size,
                eps=config.layer_norm_eps,
            )
            self.head = AttentionPoolingHead(
                width=config.hidden_size,
                hidden=config.intermediate_size,
                num_heads=config.num_attention_heads,
                norm_eps=config.head_norm_eps,
            )
        self.attention_backend: str | None = None  # see choose_attention
        self._blocks_compiled = False
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Model of a folder of ours, or of a published one in the split-qkv layout (model types
        llava_vit and onevision_encoder: config.json and safetensors).

        Keyword arguments are those of transformers. Raises ValueError that lists every missing,
        unexpected or misshapen tensor, as no weight may stay at its random start, and for a folder
        that differs from its SHA256SUMS or holds what could run code (model_folder.py).
        """
        folder: str | Path | None = pretrained_model_name_or_path
        subfolder = kwargs.get("subfolder") or ""
        inside = Path(str(folder)) / subfolder
        check_model_folder(inside, own_classes=True)
        kwargs.setdefault("use_safetensors", True)
        if published_model_type(inside) is not None:
            kwargs.pop("subfolder", None)
            fields, weights = read_published_folder(inside)
            config = kwargs.pop("config", None)
            if config is None:
                config, kwargs = cls.config_class.from_dict(
                    fields, return_unused_kwargs=True, **kwargs
                )
            kwargs.update(config=config, state_dict=weights)
            # the second is transformers 4's name; "auto" is the dtype that the fields state
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype", "auto"))
            folder = None  # transformers then reads no file, as the weights are given
        want_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("ignore_mismatched_sizes", True)  # listed below with all other problems
        model, info = super().from_pretrained(
            folder, *model_args, output_loading_info=True, **kwargs
        )
        _check_complete(info, config=model.config, origin=str(pretrained_model_name_or_path))
        return (model, info) if want_info else model

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding, where adapters hook in."""
        return self.patch_embed

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None
    ) -> None:
        """Recompute blocks in the backward pass; non-reentrant unless asked otherwise, as the
        reentrant kind gives no gradients behind a frozen patch embedding."""
        super().gradient_checkpointing_enable(
            gradient_checkpointing_kwargs or {"use_reentrant": False}
        )

    def choose_attention(self, backend: str | None) -> None:
        """Override the choice of kernel: one of attention.BACKENDS, None for the fastest one here.

        Raises ValueError for another name; whether it can run shows at the next forward pass.
        """
        if backend not in (None, *BACKENDS):
            raise ValueError(f"attention back end {backend!r}; choose one of {', '.join(BACKENDS)}")
        self.attention_backend = backend

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile every block in place; all share one graph per token count S.

        Parameter names do not change. `options` go to torch.compile. Costs some 20 s at the first
        step (measured on 2 CPU cores), nothing when the boundaries of a pack change.
        """
        for layer in self.encoder.layers:
            layer.compile(fullgraph=True, **options)
        self._blocks_compiled = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.ones_(module.weight)
            bias = getattr(module, "bias", None)  # RMSNorm has none
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, ProbeAttention):
            # as torch's MultiheadAttention, whose parameter names it has
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, AttentionPoolingHead):
            nn.init.normal_(module.probe)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_thw: torch.Tensor | None = None,
        patch_positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode one pack.

        hidden_states: float [S, 3*p*p] patch rows; grid_thw: integer [N, 3]; patch_positions: [S,
        3] (t, h, w), by default the grid's own; cu_seqlens: int32 [N+1] boundaries, the truth for
        sparse items that fill no grid; max_seqlen: longest item as a host integer. On a GPU, a
        caller that gives patch_positions, cu_seqlens and max_seqlen (as our packer does) is trusted
        with the values and nothing waits for the device. Returns last_hidden_state [S, D], after
        the post norm when the model has a head and else the last block's output; pooler_output [N,
        D] when the model has a head; and on request hidden_states, a tuple of num_hidden_layers + 1
        entries before the post norm. Raises ValueError, naming the argument and both numbers, when
        shapes or totals disagree.
        """
        config = self.config
        layout = resolve_layout(
            hidden_states,
            patch_dim=config.patch_dim,
            grid_thw=grid_thw,
            patch_positions=patch_positions,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        context = self.pack_context(layout)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        x = self.layernorm_pre(self.patch_embed(hidden_states))
        x, states = self.encoder(x, context, output_hidden_states)
        pooled = None
        if self.head is not None and self.layernorm_post is not None:
            x = self.layernorm_post(x)
            pooled = self.head(x, context.cu_seqlens, context.max_seqlen, context.backend)
        if return_dict is None:
            return_dict = config.return_dict
        if not return_dict:
            return x, pooled, states
        return BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=pooled, hidden_states=states
        )

    def pack_context(self, layout: PackLayout) -> PackContext:
        """What all blocks of one forward share: `EncoderLayer` takes it beside the tokens."""
        config = self.config
        rope = rope_tables(
            layout.positions,
            head_dim=config.hidden_size // config.num_attention_heads,
            pairing=config.rope_pairing,
            theta=config.rope_theta,
            position_scale=config.rope_position_scale,
        )
        # transformers' default, "sdpa", asks for nothing: the fastest kernel is taken
        by_implementation = {"eager": "eager", "flash_attention_2": "flash"}
        asked = by_implementation.get(config._attn_implementation)
        longest = torch.empty(0, layout.max_seqlen)
        if self._blocks_compiled:
            # sizes that change from pack to pack: one graph for all of them
            torch._dynamo.maybe_mark_dynamic(layout.cu_seqlens, 0)
            torch._dynamo.maybe_mark_dynamic(longest, 1)
        return PackContext(
            cu_seqlens=layout.cu_seqlens,
            longest=longest,
            rope=rope,
            backend=self.attention_backend or asked,
        )


def _check_complete(info: dict, config: LlavaViTPackingConfig, origin: str) -> None:
    """Raise ValueError unless a folder held exactly the model's tensors. A model without a head
    may leave out the folder's."""
    unexpected = [
        key
        for key in info["unexpected_keys"]
        if config.use_head or not key.startswith(("head.", "layernorm_post."))
    ]
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(unexpected),
        # names, or (name, shape, shape), by the release of transformers
        "of another shape": sorted(
            entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]
        ),
    }
    raise_problems(problems, origin)
