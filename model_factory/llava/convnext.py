"""ConvLLaVA's encoder: ConvNeXt with a fifth stage, so that large pictures make few tokens.

A picture of H x W pixels becomes H/64 x W/64 tokens, row by row: 768, 1024 and 1536 px make 144,
256 and 576. The network is transformers' own ConvNext; the fifth stage starts as its downsampling
alone, as layer scales start at 1e-6. What a projector receives is the last stage without a norm.

    tower = ConvNextTower(grow_stage(ConvNextModel.from_pretrained(folder)))

ConvNextVisionModel is the same as a transformers vision model, registered as `convnext_vision`, so
that it can be the vision_config of LlavaForConditionalGeneration (vision_feature_layer -1, strategy
"full", a processor's patch_size the stride); import this module before loading one.
"""

import copy

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, ConvNextConfig, ConvNextModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

FIRST_STRIDE = 4
STAGE_WIDTH, STAGE_DEPTH = 3072, 6  # of the released fifth stage


class ConvNextTower(nn.Module):
    """Any number of stages of a transformers ConvNextModel, as tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def stride(self) -> int:
        """Pixels of a token's side."""
        return FIRST_STRIDE * 2 ** (len(self.model.config.hidden_sizes) - 1)

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.model.config.hidden_sizes[-1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a picture's tokens. Raises ValueError for sides that are no multiple
        of the stride, of which a convolution would silently leave out the rest."""
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"a picture of {height}x{width} is no multiple of {self.stride}: pad or resize it"
            )
        return height // self.stride, width // self.stride

    def tokens_for(self, height: int, width: int) -> int:
        """Tokens of a picture; ValueError as `grid`."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def stages(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Maps [B, C, h, w] of pictures [B, 3, H, W]: the stem's, then every stage's."""
        self.grid(*pixel_values.shape[-2:])
        maps = [self.model.embeddings(pixel_values)]
        for stage in self.model.encoder.stages:
            maps.append(stage(maps[-1]))
        return maps

    def forward(self, pixel_values: torch.Tensor | list[torch.Tensor]):
        """Tokens [B, N, C] of pictures [B, 3, H, W]; of a list of [3, H, W], a list of
        [1, N, C]."""
        if isinstance(pixel_values, list):
            return [self(picture[None]) for picture in pixel_values]
        return self.stages(pixel_values)[-1].flatten(2).transpose(1, 2)

    def train_from(self, stage: int | None) -> None:
        """Let the stages from `stage` on learn (1 is the first; None: nothing), with their
        downsampling, and freeze all that is before them."""
        self.model.requires_grad_(False)
        for number, module in enumerate(self.model.encoder.stages, start=1):
            module.requires_grad_(stage is not None and number >= stage)


class ConvNextVisionConfig(ConvNextConfig):
    """ConvNextConfig with the width that a projector asks for."""

    model_type = "convnext_vision"

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        """None but the last map is a hidden state."""
        return 0


class ConvNextVisionModel(PreTrainedModel):
    """Pictures [B, 3, H, W], already normalised, to tokens [B, N, C]; one hidden state."""

    config_class = ConvNextVisionConfig
    base_model_prefix = "vision"
    main_input_name = "pixel_values"

    def __init__(self, config: ConvNextVisionConfig):
        super().__init__(config)
        fields = {**config.to_dict(), "model_type": ConvNextConfig.model_type}
        self.network = ConvNextModel(ConvNextConfig.from_dict(fields))
        self.network.layernorm = nn.Identity()  # of the pooled vector, which nobody asks for
        self.post_init()

    def tower(self) -> ConvNextTower:
        """The same weights as a ConvNextTower."""
        return ConvNextTower(self.network)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        """hidden_states has one entry, whatever is asked for."""
        tokens = self.tower()(pixel_values)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    @classmethod
    def from_network(cls, network: ConvNextModel) -> "ConvNextVisionModel":
        """A vision model around a network, sharing its weights."""
        fields = {**network.config.to_dict(), "model_type": ConvNextVisionConfig.model_type}
        with torch.device("meta"):
            model = cls(ConvNextVisionConfig.from_dict(fields))
        network.layernorm = nn.Identity()
        model.network = network
        return model


AutoConfig.register(ConvNextVisionConfig.model_type, ConvNextVisionConfig)
AutoModel.register(ConvNextVisionConfig, ConvNextVisionModel)


def grow_stage(model: nn.Module, width: int = STAGE_WIDTH, depth: int = STAGE_DEPTH) -> nn.Module:
    """A ConvNextModel with one stage more, its other weights those of `model`.

    Raises ValueError when anything but the new stage (and the final norm, which is not used) would
    start anew.
    """
    config = copy.deepcopy(model.config)
    config.hidden_sizes = [*config.hidden_sizes, width]
    config.depths = [*config.depths, depth]
    config.num_stages = len(config.depths)
    config.stage_names = ["stem", *(f"stage{i}" for i in range(1, config.num_stages + 1))]
    config.out_features = [config.stage_names[-1]]
    grown = type(model)(config)
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("layernorm.")
    }
    missing, unexpected = grown.load_state_dict(weights, strict=False)
    new = (f"encoder.stages.{config.num_stages - 1}.", "layernorm.")
    strange = [name for name in missing if not name.startswith(new)] + unexpected
    if strange:
        raise ValueError(f"weights that do not fit a grown ConvNext: {', '.join(strange)}")
    return grown
