"""The encoder as a vision tower of LLaVA, in two classes over the same weights.

    LlavaViTVisionModel   a transformers vision model (images in, all hidden states out),
                          registered as `llava_vit_vision`, so that it can be the vision_config of
                          LlavaForConditionalGeneration; import this module before loading one
    LlavaViTVisionTower   the vision-tower contract of the original LLaVA and LLaVA-NeXT

To use the second, add two lines to multimodal_encoder/builder.py of those repositories, above the
name checks of build_vision_tower:

    from model_factory.llava_vision_tower import tower_or_none
    if (tower := tower_or_none(vision_tower, vision_tower_cfg, **kwargs)) is not None: return tower

There is no class token: `patch` and `cls_patch` are the same, a processor adds no token
(vision_feature_select_strategy "full", num_additional_image_tokens 0). Hidden state -1 is the
last block's output, or, with `post_norm`, what the pooling head was trained on: the normed one.

Shape legend: B images, N patches of each, D width, K selected patches of a clip, p patch size.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration import LlavaViTPackingConfig
from .model_folder import LOCAL, check_model_folder, model_type_of
from .packing import patchify
from .state_dict_adapter import raise_problems
from .vit_preview_v0_packing_hf import LlavaViTPackingModel

FEATURES = ("patch", "cls_patch")


class LlavaViTVisionConfig(LlavaViTPackingConfig):
    """Shape of the encoder, and whether its last hidden state is the normed one."""

    model_type = "llava_vit_vision"
    _auto_class = None  # the encoder's code travels with its folder; a tower's type is registered

    def __init__(self, post_norm: bool = True, **kwargs: Any):
        self.post_norm = post_norm
        super().__init__(**kwargs)

    @classmethod
    def of(cls, config: LlavaViTPackingConfig, post_norm: bool = True) -> "LlavaViTVisionConfig":
        """The same shape."""
        fields = {name: getattr(config, name) for name in config.own_fields()}
        return cls(post_norm, **fields)


class LlavaViTVisionModel(PreTrainedModel):
    """Hidden states [B, N, D] of normalised images [B, 3, H, W] whose sides are multiples of the
    patch size."""

    config_class = LlavaViTVisionConfig
    base_model_prefix = "vision"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["EncoderLayer"]

    def __init__(self, config: LlavaViTVisionConfig):
        super().__init__(config)
        names = LlavaViTPackingConfig.own_fields()
        shape = LlavaViTPackingConfig(**{name: getattr(config, name) for name in names})
        self.packing = LlavaViTPackingModel(shape)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """hidden_states has num_hidden_layers + 1 entries, all of them whatever is requested: the
        type of `output_hidden_states` (a bool, or layer numbers) differs between callers. Raises
        ValueError for sides that are no multiples of the patch size."""
        batch = len(pixel_values)
        height, width = pixel_values.shape[-2:]
        rows, columns = self.grid(height, width)
        patches = patchify(pixel_values, self.config.patch_size).flatten(0, 1)
        grid = torch.tensor([[1, rows, columns]] * batch)  # an image is a clip of one frame
        out = self.packing(patches, grid.to(patches.device), output_hidden_states=True)
        states = list(out.hidden_states)
        if self.config.post_norm:
            states[-1] = out.last_hidden_state
        # images are of one size here, so the pack's rows are cut evenly
        images = tuple(state.unflatten(0, (batch, -1)) for state in states)
        return BaseModelOutput(last_hidden_state=images[-1], hidden_states=images)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of height x width pixels."""
        side = self.config.patch_size
        if height % side or width % side:
            raise ValueError(
                f"a picture of {height}x{width} is no multiple of the patch size {side}: let the "
                "image processor resize it"
            )
        return height // side, width // side

    @classmethod
    def from_encoder(
        cls,
        encoder: LlavaViTPackingModel,
        post_norm: bool = True,
        origin: object = "the encoder",
    ) -> "LlavaViTVisionModel":
        """A vision model around an encoder, sharing its weights. ValueError, naming the `origin`,
        for one whose tokens are of several frames.
        """
        channels = encoder.config.num_channels
        if channels != 3:
            raise ValueError(
                f"{origin} has num_channels {channels}, tokens of {channels / 3:g} frames: a tower "
                "sees single images, so give an encoder that was trained with frames_per_token 1"
            )
        with torch.device("meta"):  # its weights are replaced
            model = cls(LlavaViTVisionConfig.of(encoder.config, post_norm))
        model.packing = encoder
        return model


def load_whole(model_class: Any, folder: str | Path, **options: Any) -> PreTrainedModel:
    """Model of a local folder in fp32, read by `model_class.from_pretrained`.

    Raises ValueError that names every tensor that is missing, left over or of another shape, as
    none may stay at its random start, and for what model_folder.py refuses.
    """
    check_model_folder(Path(folder), own_classes=model_class is LlavaViTVisionModel)
    model, info = model_class.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # listed with all other problems
        **LOCAL,
        **options,
    )
    problems = {}
    for kind in ("missing", "unexpected", "mismatched"):
        # mismatched ones are names, or tuples with shapes, by the release of transformers
        keys = info[f"{kind}_keys"]
        problems[kind] = sorted(map(str, keys))
    raise_problems(problems, origin=str(folder))
    return model


AutoConfig.register(LlavaViTVisionConfig.model_type, LlavaViTVisionConfig)
AutoModel.register(LlavaViTVisionConfig, LlavaViTVisionModel)


class LlavaViTVisionTower(nn.Module):
    """The vision-tower contract of LLaVA, frozen; `video` adds packed clips. `vision_tower_name` is
    a folder as a training run or `convert_llava_vit_packing_to_hf.py` writes it, or `tower/` of
    `export_llava_tower.py`."""

    vision_tower: LlavaViTVisionModel

    def __init__(self, vision_tower_name: str, args: Any, delay_load: bool = False):
        """args: mm_vision_select_layer (an integer) and, where given, mm_vision_select_feature and
        unfreeze_mm_vision_tower. Raises ValueError for another feature, and for a folder that
        model_folder.py refuses."""
        super().__init__()
        self.vision_tower_name = vision_tower_name
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in FEATURES:
            raise ValueError(
                f"mm_vision_select_feature {self.select_feature!r}: choose {' or '.join(FEATURES)}"
            )
        self.is_loaded = False
        # LLaVA's builder looks at it before load_model
        self.vision_tower = None  # type: ignore[assignment]
        self.image_processor = None
        # the weights are compared with their checksums when they are read
        check_model_folder(Path(vision_tower_name), weights=False, own_classes=True)
        config_class = LlavaViTVisionConfig if self._is_exported() else LlavaViTPackingConfig
        self.cfg_only = config_class.from_pretrained(vision_tower_name, local_files_only=True)
        if not delay_load or getattr(args, "unfreeze_mm_vision_tower", False):
            self.load_model()

    def load_model(self, device_map: str | dict[str, Any] | None = None) -> None:
        """Read weights and image processor; a second call does nothing."""
        if self.is_loaded:
            return
        if self._is_exported():
            model = load_whole(LlavaViTVisionModel, self.vision_tower_name)
        else:
            encoder = LlavaViTPackingModel.from_pretrained(
                self.vision_tower_name, dtype=torch.float32, local_files_only=True
            )
            model = LlavaViTVisionModel.from_encoder(encoder, origin=self.vision_tower_name)
        model = model.eval()
        if device_map is not None:
            # a map {"": device}, which is how transformers names one device for a whole model
            device = device_map if isinstance(device_map, str) else device_map[""]
            model = model.to(device)
        self.image_processor = AutoImageProcessor.from_pretrained(self.vision_tower_name, **LOCAL)
        self.vision_tower = model.requires_grad_(False)
        self.is_loaded = True

    def _is_exported(self) -> bool:
        """Whether the folder was written by export_llava_tower.py, not by a training run."""
        return model_type_of(self.vision_tower_name) == LlavaViTVisionConfig.model_type

    @torch.no_grad()
    def forward(
        self, images: torch.Tensor | list[torch.Tensor]
    ) -> torch.Tensor | list[torch.Tensor]:
        """Features [B, N, D] of images [B, 3, H, W]; of a list of [3, H, W], a list of [1, N, D].
        In the dtype of the images."""
        if isinstance(images, list):
            # one by one, as images of a list may differ in size
            return [self(image[None]) for image in images]
        states = self.vision_tower(images.to(self.device, self.dtype)).hidden_states
        return states[self.select_layer].to(images.dtype)

    @torch.no_grad()
    def video(
        self, patches: torch.Tensor, patch_positions: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> list[torch.Tensor]:
        """Normed features [K_i, D] of every clip of a pack.

        patches: normalised rows [S, 3*p*p] of whole frames or of codec patches, with positions
        int64 [S, 3] and boundaries int32 [N + 1].
        """
        out = self.vision_tower.packing(
            patches.to(self.device, self.dtype),
            patch_positions=patch_positions.to(self.device),
            cu_seqlens=cu_seqlens.to(self.device),
            max_seqlen=int(cu_seqlens.diff().max()),
        )
        lengths = cu_seqlens.diff().tolist()
        return list(out.last_hidden_state.to(patches.dtype).split(lengths))

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros [1, D]."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; the tower must be loaded."""
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights; the tower must be loaded."""
        return self.vision_tower.device

    @property
    def config(self) -> LlavaViTPackingConfig:
        """Of the encoder, loaded or not."""
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        """Width that the projector sees."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Of a square image of the processor's size."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Tokens of such an image."""
        return self.num_patches_per_side**2


def tower_or_none(name: str, args: SimpleNamespace, **kwargs: Any) -> LlavaViTVisionTower | None:
    """The tower of a folder of ours, None for any other name; for LLaVA's builder."""
    ours = (LlavaViTPackingConfig.model_type, LlavaViTVisionConfig.model_type)
    if model_type_of(name) not in ours:
        return None
    return LlavaViTVisionTower(name, args, delay_load=kwargs.get("delay_load", False))
