"""Shape of the packed encoder: every field that config.json stores, checked when it is set."""

import inspect
from typing import Any

from transformers import PretrainedConfig

from .rope import ROPE_PAIRINGS

NORM_TYPES = ("layer_norm", "rms_norm")
_NO_FIELDS = ("self", "kwargs")  # parameters of the constructor
_POSITIVE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "layer_norm_eps",
    "rope_theta",
    "rope_position_scale",
)


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
        **kwargs: Any,
    ):
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
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:  # NaN fails too
                raise ValueError(f"{name} is {getattr(self, name)}, must be greater than 0")
        # 32 = 2 * (4 + 6 + 6): channels of the smallest head whose pairs split 4:6:6
        if self.hidden_size % (32 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_attention_heads "
                f"{self.num_attention_heads} must be a multiple of 32: the rotary split is 4:6:6"
            )
        for name, choices in (("rope_pairing", ROPE_PAIRINGS), ("layer_norm_type", NORM_TYPES)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of the fields that this class adds to those of every transformers model."""
        return [
            name for name in inspect.signature(cls.__init__).parameters if name not in _NO_FIELDS
        ]

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch row."""
        return self.num_channels * self.patch_size**2
