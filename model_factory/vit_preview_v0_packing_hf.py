"""The packed ViT: any mixture of images, clips and sparse codec selections
in one sequence of patch rows.

`hidden_states` are raw pixel rows [S, 3*p*p]; each item attends to itself only; positions enter
through 3-D RoPE. An item may be a full (t, h, w) grid or any subset of patches with explicit
positions; boundaries are `cu_seqlens`. Cost per forward: linear in S for the matmuls, sum over
items of length^2 for attention.

Shape legend: S packed tokens, N items, D width.
"""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .layers import (
    AttentionPoolingHead,
    EncoderLayer,
    PackContext,
    PatchEmbed,
    ProbeAttention,
    build_norm,
)
from .packing import (
    CLIP_MEAN,
    CLIP_STD,
    compute_patch_positions_from_grid_thw,
    cu_seqlens_from_grid,
)
from .rope import ROPE_PAIRINGS, rope_tables


class LlavaViTPackingConfig(PretrainedConfig):
    """Shape of the encoder; every field is stored in config.json.

    A config.json without `rope_pairing` is a public one, so the field's default is "legacy".
    """

    model_type = "llava_vit_packing"

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 448,
        patch_size: int = 16,
        layer_norm_type: str = "layer_norm",
        layer_norm_eps: float = 1e-6,
        head_norm_eps: float | None = 1e-6,
        rope_theta: float = 10000.0,
        rope_pairing: str = "legacy",
        rope_position_scale: float = 1.0,
        use_head: bool = True,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads "
                f"{num_attention_heads}"
            )
        if rope_pairing not in ROPE_PAIRINGS:
            raise ValueError(
                f"rope_pairing is {rope_pairing!r}; choose one of {', '.join(ROPE_PAIRINGS)}"
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.layer_norm_type = layer_norm_type
        self.layer_norm_eps = layer_norm_eps
        self.head_norm_eps = head_norm_eps
        self.rope_theta = rope_theta
        self.rope_pairing = rope_pairing
        self.rope_position_scale = rope_position_scale
        self.use_head = use_head
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch row."""
        return self.num_channels * self.patch_size**2


class PackedEncoder(nn.Module):
    """The stack of blocks (a module of its own because the key layout says `encoder.layers.i`)."""

    def __init__(self, config: LlavaViTPackingConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.layer_norm_type,
                config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )


class LlavaViTPackingModel(PreTrainedModel):
    """Packed encoder with optional attention-pooling head; see `forward` for the contract."""

    config_class = LlavaViTPackingConfig
    base_model_prefix = "llava_vit"
    main_input_name = "hidden_states"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True  # the spelling of transformers 4
    _no_split_modules = ["EncoderLayer"]

    def __init__(self, config: LlavaViTPackingConfig):
        super().__init__(config)
        self.patch_embed = PatchEmbed(config.patch_size, config.hidden_size, config.num_channels)
        self.layernorm_pre = build_norm(
            config.layer_norm_type, config.hidden_size, config.layer_norm_eps
        )
        self.encoder = PackedEncoder(config)
        self.layernorm_post = self.head = None
        if config.use_head:
            self.layernorm_post = build_norm(
                config.layer_norm_type, config.hidden_size, config.layer_norm_eps
            )
            self.head = AttentionPoolingHead(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.head_norm_eps,
            )
        self.attention_backend: str | None = (
            None  # override of the automatic choice, see attention.varlen_attention
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ProbeAttention):
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
    ):
        """Encode one pack.

        hidden_states: float [S, 3*p*p] patch rows; grid_thw: integer [N, 3]; patch_positions: [S,
        3] (t, h, w), by default the grid's own; cu_seqlens: int32 [N+1] boundaries, the truth for
        sparse items that fill no grid; max_seqlen: longest item as a host integer. A caller that
        passes cu_seqlens and max_seqlen (as our packer does) is trusted and never waits for the
        device. Returns last_hidden_state [S, D] (post-normed), pooler_output [N, D] when the model
        has a head, and on request hidden_states, a tuple of num_hidden_layers + 1 entries before
        the post norm. Raises ValueError, naming the argument and both numbers, when shapes or
        totals disagree.
        """
        cu_seqlens, max_seqlen = self._boundaries(
            hidden_states, grid_thw, patch_positions, cu_seqlens, max_seqlen
        )
        if patch_positions is None:
            patch_positions = compute_patch_positions_from_grid_thw(grid_thw)
        config = self.config
        cos, sin = rope_tables(
            patch_positions.to(hidden_states.device),
            config.hidden_size // config.num_attention_heads,
            config.rope_pairing,
            config.rope_theta,
            config.rope_position_scale,
        )
        context = PackContext(cu_seqlens, max_seqlen, cos, sin, self.attention_backend)
        x = self.layernorm_pre(self.patch_embed(hidden_states))
        states = (x,) if output_hidden_states else None
        for layer in self.encoder.layers:
            x = layer(x, context)
            states = (*states, x) if output_hidden_states else None
        pooled = None
        if self.head is not None:
            x = self.layernorm_post(x)
            pooled = self.head(x, cu_seqlens, max_seqlen, self.attention_backend)
        if return_dict is False:
            return x, pooled, states
        return BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=pooled, hidden_states=states
        )

    def _boundaries(self, hidden_states, grid_thw, patch_positions, cu_seqlens, max_seqlen):
        num_tokens = hidden_states.shape[0]
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.config.patch_dim:
            raise ValueError(
                f"hidden_states must have shape [S, {self.config.patch_dim}] (3 * patch_size ** "
                "2), "
                f"got {list(hidden_states.shape)}"
            )
        if patch_positions is not None and tuple(patch_positions.shape) != (num_tokens, 3):
            raise ValueError(
                f"patch_positions must have shape [{num_tokens}, 3] like hidden_states' rows, "
                f"got {list(patch_positions.shape)}"
            )
        if cu_seqlens is None:
            if grid_thw is None:
                raise ValueError(
                    "give grid_thw [N, 3] or cu_seqlens [N + 1]: neither names the items of the "
                    "pack"
                )
            if bool((grid_thw <= 0).any()):
                raise ValueError(
                    f"grid_thw must be positive, got the smallest entry {int(grid_thw.min())}"
                )
            cu_seqlens = cu_seqlens_from_grid(grid_thw.to(hidden_states.device))
        elif patch_positions is None and grid_thw is None:
            raise ValueError(
                "cu_seqlens alone places no patch: give patch_positions [S, 3] or grid_thw [N, 3] "
                "too"
            )
        if max_seqlen is None:
            lengths = cu_seqlens.diff()
            max_seqlen = int(lengths.max())
            if int(cu_seqlens[-1]) != num_tokens or int(lengths.min()) <= 0:
                raise ValueError(
                    f"the items of the pack hold {int(cu_seqlens[-1])} patches (shortest "
                    f"{int(lengths.min())}), "
                    f"hidden_states has {num_tokens} rows"
                )
        return cu_seqlens, max_seqlen


def save_encoder_folder(model: LlavaViTPackingModel, folder: str | Path) -> None:
    """Write a Hugging Face folder: weights, config, modelling code for AutoModel,
    and the image processor's settings.

    The processor is CLIP's at the model's image size; written as its JSON, so that no image library
    is needed here.
    """
    folder = Path(folder)
    LlavaViTPackingConfig.register_for_auto_class()
    LlavaViTPackingModel.register_for_auto_class("AutoModel")
    model.save_pretrained(folder)
    size = model.config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
