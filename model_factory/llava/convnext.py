"""ConvLLaVA's encoder: ConvNeXt with a fifth stage, so that large images make few tokens.

An image of H x W pixels becomes H/64 x W/64 tokens, row by row: 768, 1024 and 1536 px make 144, 256
and 576. The network is transformers' own ConvNext; the fifth stage starts as its downsampling
alone, as layer scales start at 1e-6. A projector receives the last stage without a norm.

    network = grow_stage(ConvNextModel.from_pretrained(folder))
    tower = ConvNextVisionModel.from_network(network)

The vision model is registered with transformers as `convnext_vision`, so that it can be the
vision_config of LlavaForConditionalGeneration (vision_feature_layer -1, strategy "full", a
processor's patch_size the stride); import this module before loading one.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, ConvNextConfig, ConvNextModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

FIRST_STRIDE = 4  # of the stem; every stage after the first halves its map
# of the released fifth stage
STAGE_WIDTH = 3072
STAGE_DEPTH = 6


class ConvNextVisionConfig(ConvNextConfig):
    """ConvNextConfig with the width that a projector asks for."""

    model_type = "convnext_vision"

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        """0: only the last map is a hidden state."""
        return 0


class ConvNextVisionModel(PreTrainedModel):
    """Tokens [B, N, C] of normalised images [B, 3, H, W], by a ConvNeXt of any number of stages."""

    config_class = ConvNextVisionConfig
    base_model_prefix = "vision"
    main_input_name = "pixel_values"

    def __init__(self, config: ConvNextVisionConfig):
        super().__init__(config)
        fields = {**config.to_dict(), "model_type": ConvNextConfig.model_type}
        self.network = ConvNextModel(ConvNextConfig.from_dict(fields))
        self.network.layernorm = nn.Identity()  # of the pooled vector, which is not used
        self.post_init()

    @property
    def stride(self) -> int:
        """Side of a token in pixels."""
        return FIRST_STRIDE * 2 ** (len(self.config.hidden_sizes) - 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of an image's tokens. Raises ValueError for sides that are no multiple
        of the stride: a convolution would silently leave out the rest."""
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"a picture of {height}x{width} is no multiple of {self.stride}: pad or resize it"
            )
        return height // self.stride, width // self.stride

    def stages(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Maps [B, C, h, w] of images [B, 3, H, W]: the stem's, then every stage's. Raises
        ValueError as `grid` does."""
        self.grid(*pixel_values.shape[-2:])
        maps = [self.network.embeddings(pixel_values)]
        for stage in self.network.encoder.stages:
            maps.append(stage(maps[-1]))
        return maps

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """hidden_states has one entry, whatever is requested."""
        last_map = self.stages(pixel_values)[-1]
        tokens = last_map.flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    def train_from(self, stage: int | None) -> None:
        """Train the stages from `stage` on (1 is the first; None: nothing) with their downsampling,
        and freeze everything before them."""
        self.network.requires_grad_(False)
        for number, module in enumerate(self.network.encoder.stages, start=1):
            module.requires_grad_(stage is not None and number >= stage)

    @classmethod
    def from_network(cls, network: ConvNextModel) -> "ConvNextVisionModel":
        """A vision model around a network, sharing its weights."""
        fields = {**network.config.to_dict(), "model_type": ConvNextVisionConfig.model_type}
        with torch.device("meta"):  # its weights are replaced
            model = cls(ConvNextVisionConfig.from_dict(fields))
        network.layernorm = nn.Identity()
        model.network = network
        return model


AutoConfig.register(ConvNextVisionConfig.model_type, ConvNextVisionConfig)
AutoModel.register(ConvNextVisionConfig, ConvNextVisionModel)


def grow_stage(
    model: ConvNextModel, width: int = STAGE_WIDTH, depth: int = STAGE_DEPTH
) -> ConvNextModel:
    """A ConvNextModel with one more stage; all other weights are those of `model`.

    Raises ValueError when anything but the new stage (and the final norm, which is not used) would
    have random weights.
    """
    config = copy.deepcopy(model.config)  # the given model keeps its own
    config.hidden_sizes = [*config.hidden_sizes, width]
    config.depths = [*config.depths, depth]
    config.num_stages = len(config.depths)
    stages = [f"stage{number}" for number in range(1, config.num_stages + 1)]
    config.stage_names = ["stem", *stages]
    config.out_features = [config.stage_names[-1]]
    grown = type(model)(config)
    # the final norm has the width of the last stage, which is another one now
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("layernorm.")
    }
    missing, unexpected = grown.load_state_dict(weights, strict=False)
    new = (f"encoder.stages.{config.num_stages - 1}.", "layernorm.")
    problems = [name for name in missing if not name.startswith(new)] + unexpected
    if problems:
        raise ValueError(f"weights that do not fit a grown ConvNext: {', '.join(problems)}")
    return grown
