"""A vision tower, a projector and a language model: transformers' Llava with any of our towers.

    images, packed clips, or stored states
      -> tower (model_factory/llava/towers.py, with CrossGET's reduction where asked for)
      -> projector (model_factory/llava/projectors.py)
      -> in place of the placeholder tokens, one each
      -> language model -> loss, plus CrossGET's alignment loss where its weight is not zero

Importing this module registers `univit_lmm` with transformers' AutoConfig and
AutoModelForImageTextToText; a folder written by save_pretrained loads after that import. Needs
transformers 5. Cost: that of its parts; a frozen tower runs without a graph.

Shape legend: B samples, T tokens of a sample, N items (images and clips) of the batch, H width of
the language model, L its layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Cache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from model_factory.llava.crossget import CrossGetTower, CrossTokens, alignment_loss
from model_factory.llava.projectors import build_projector, layers_of, project, tokens_after
from model_factory.llava.token_reduction import ReductionConfig
from model_factory.llava.towers import (
    Grid,
    PackedTower,
    TowerStates,
    VisionTower,
    VisualInputs,
    tower_from_config,
    tower_of,
)
from model_factory.llava.vit_split import ViTSplit, ViTSplitConfig

from .cross_tokens import TextCrossTokens


class LmmConfig(LlavaConfig):
    """LlavaConfig with fields of our towers, projectors and training.

    projector_type     of model_factory.llava.projectors.PROJECTORS
    frozen_layers, tuned_layers, keep_extra_tokens    of ViT-Split
    reduction          {"r", "rule", "weights", "mask_cross_token"} of CrossGET; None: no reduction
    alignment_weight   of the alignment loss; its direction: see crossget.alignment_loss
    version            conversation template that the model was trained with
    image_aspect_ratio `pad` to a square before resizing, or `square`: crop
    video              how clips are shown: {"video_view", "video_size", "num_frames",
                       "num_tokens"}; None: the defaults of visuals.VisualConfig
    lora               {"r", "alpha", "dropout", "bias"} of peft's additions to the language model
    """

    model_type = "univit_lmm"

    projector_type: str = "mlp2x_gelu"
    frozen_layers: list[int] = field(default_factory=lambda: [-2])
    tuned_layers: int = 1
    keep_extra_tokens: bool = True
    reduction: dict | None = None
    alignment_weight: float = 0.0
    alignment_direction: str = "published"
    version: str = "v1"
    image_aspect_ratio: str = "pad"
    video: dict | None = None
    lora: dict | None = None


@dataclass(frozen=True)
class Visuals:
    """Inputs of the tower for a batch, or `states` that it computed earlier; `samples` int64 [N]:
    the row of the batch that each item belongs to."""

    inputs: VisualInputs | None
    samples: torch.Tensor
    states: TowerStates | None = None

    def to(self, device: torch.device, **_options: object) -> "Visuals":
        """The same on a device; transformers' Trainer moves batches with it."""
        inputs = None if self.inputs is None else self.inputs.to(device)
        states = None if self.states is None else self.states.to(device)
        return Visuals(inputs=inputs, samples=self.samples, states=states)


class LmmModel(LlavaModel):
    """LlavaModel with our tower and projector under its names."""

    def __init__(self, config: LmmConfig, tower: VisionTower | None = None) -> None:
        # not LlavaModel's own, which would build CLIP and a projector of its own
        LlavaPreTrainedModel.__init__(self, config)
        tower = tower_from_config(config.vision_config) if tower is None else tower
        self.multi_modal_projector = _projector(config, tower)
        self.vision_tower = _reduced(config, tower)
        self.language_model = AutoModel.from_config(config.text_config)
        self.text_cross_tokens = None
        if config.reduction is not None:
            text = config.text_config
            self.text_cross_tokens = CrossTokens(text.num_hidden_layers, text.hidden_size)
        self.post_init()
        add_lora(self.language_model, config.lora)

    def get_input_embeddings(self) -> nn.Module:
        """Of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Of the language model."""
        self.language_model.set_input_embeddings(value)


class LmmForConditionalGeneration(LlavaForConditionalGeneration):
    """See the module's text. `generate` is transformers' own: give it `mm_encoder_outputs` from
    `encode`."""

    config_class = LmmConfig
    config: LmmConfig

    def __init__(self, config: LmmConfig, tower: VisionTower | None = None) -> None:
        # not LlavaModel's own, which would build CLIP and a projector of its own
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LmmModel(config, tower)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_parts(
        cls, config: LmmConfig, tower: nn.Module, language_model: PreTrainedModel
    ) -> "LmmForConditionalGeneration":
        """A model around a loaded vision model and a loaded causal language model; projector and
        cross tokens start anew, ViT-Split's blocks as copies of the tower's."""
        # parts are replaced below, so none of them is worth memory or an initialisation
        with torch.device("meta"):
            model = cls(config)
        vision_tower = tower_of(tower)
        model.model.multi_modal_projector = _projector(config, vision_tower)
        model.model.vision_tower = _reduced(config, vision_tower)
        model.model.language_model = language_model.get_decoder()
        add_lora(model.model.language_model, config.lora)
        model.lm_head = language_model.get_output_embeddings()
        if config.reduction is not None:
            text = config.text_config
            cross = CrossTokens(text.num_hidden_layers, text.hidden_size)
            model.model.text_cross_tokens = cross
        model.generation_config.update(**language_model.generation_config.to_diff_dict())
        return model

    @property
    def tower(self) -> VisionTower:
        """Vision tower, with CrossGET's reduction where asked for."""
        return self.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        """Module between the tower and the language model."""
        return self.model.multi_modal_projector

    @property
    def select_layer(self) -> int:
        """Absolute index of the hidden state that projectors of one state read."""
        return self.tower.absolute(self.config.vision_feature_layer)

    @property
    def needed_layers(self) -> list[int]:
        """Absolute indices of all hidden states that the projector reads."""
        return layers_of(
            self.projector,
            tower=self.tower,
            select_layer=self.config.vision_feature_layer,
        )

    def tokens_for(self, grid: Grid | None, patches: int) -> int:
        """Number of placeholders of an item: the tokens that the language model receives for it."""
        tower = self.tower
        if isinstance(tower, CrossGetTower):
            # reduction leaves no grid, so projectors here keep the number of tokens
            return tower.tokens_of(grid, patches=patches, layer=self.config.vision_feature_layer)
        return tokens_after(self.projector, grid=grid, tokens=patches)

    def encode(self, visuals: Visuals) -> dict[str, BaseModelOutputWithPooling]:
        """Tokens of every item [count, H], as transformers' `mm_encoder_outputs`."""
        return self._encode(visuals)[0]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        visuals: Visuals | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Logits and, with labels, the loss; `visuals` or, already encoded, `mm_encoder_outputs`.

        In training a batch without visuals sends a gray image through tower and projector and
        multiplies it with zero, so that every rank runs the same modules and has all gradients.
        Raises ValueError when placeholders and tokens of the items do not agree.
        """
        states = None
        unused = None  # tokens of the gray image
        if visuals is not None:
            mm_encoder_outputs, states = self._encode(visuals)
        elif self.training and mm_encoder_outputs is None:
            side = self.config.vision_config.image_size
            # zero after normalisation
            pixels = torch.zeros(1, 3, side, side, device=self.device)
            samples = torch.zeros(1, dtype=torch.int64)
            visuals = Visuals(inputs=VisualInputs(pixels), samples=samples)
            encoded, states = self._encode(visuals)
            unused = encoded["image"].pooler_output[0]
        # cross tokens act once; later passes find them in the cache
        prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        with TextCrossTokens(
            self.model, attention_mask=attention_mask, prefill=prefill
        ) as text_cross:
            out = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                past_key_values=past_key_values,
                mm_encoder_outputs=mm_encoder_outputs,
                **kwargs,
            )
        if out.loss is None:
            return out
        if unused is not None:
            # zero, but part of the graph: its parameters get gradients, of zero
            out.loss = out.loss + 0 * unused.sum()
        if self.config.alignment_weight and states is not None and visuals is not None:
            share: torch.Tensor | float = 0.0
            if unused is None and labels is not None:
                share = _share(labels, kwargs.get("num_items_in_batch"))
            alignment = self._alignment(states, text=text_cross.seen, samples=visuals.samples)
            out.loss = out.loss + share * alignment
        return out

    def _encode(
        self, visuals: Visuals
    ) -> tuple[dict[str, BaseModelOutputWithPooling], TowerStates]:
        """(tokens of every item, hidden states of the tower)."""
        if visuals.states is None:
            states = self.tower(visuals.inputs, self.needed_layers)
        else:
            states = self.tower.with_call(visuals.states.to(self.device, self.dtype))
        tokens, counts = project(self.projector, states=states, layer=self.needed_layers[-1])
        items = list(tokens.split(counts))
        return {"image": BaseModelOutputWithPooling(pooler_output=items)}, states

    def _alignment(
        self, states: TowerStates, text: Sequence[torch.Tensor], samples: torch.Tensor
    ) -> torch.Tensor:
        """The weighted alignment loss of cross tokens; the projector does not learn from it."""
        learning = [p for p in self.projector.parameters() if p.requires_grad]
        # autograd looks at this when the operation runs; under no_grad the tower's cross tokens
        # would not learn either
        for parameter in learning:
            parameter.requires_grad_(False)
        cross = cast(torch.Tensor, states.cross)  # a tower with CrossGET gives them
        image_tokens = self.projector(cross)
        for parameter in learning:
            parameter.requires_grad_(True)
        text_tokens = torch.stack(list(text))[:, samples.to(cross.device)]
        loss = alignment_loss(
            image_tokens.float(),
            text_tokens=text_tokens.float(),
            direction=self.config.alignment_direction,
        )
        return self.config.alignment_weight * loss

    def train_parts(
        self, projector: bool = True, language_model: bool = False, tower_from: int | None = None
    ) -> None:
        """Let parts learn and freeze all others: the projector, the language model with its head
        (with LoRA its additions only), the stages of a convolutional tower from number `tower_from`
        on. Cross tokens learn together with the language model."""
        self.requires_grad_(False)
        self.projector.requires_grad_(projector)
        for name, parameter in self.model.language_model.named_parameters():
            learns = self.config.lora is None or "lora_" in name
            parameter.requires_grad_(language_model and learns)
        self.lm_head.requires_grad_(language_model and self.config.lora is None)
        if tower_from is not None:
            self.tower.train_from(tower_from)
        if self.model.text_cross_tokens is not None:
            self.model.text_cross_tokens.requires_grad_(language_model)
            self.tower.cross_tokens.requires_grad_(language_model)


def _share(labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor | float:
    """Part of a step's supervised tokens that is in this batch: transformers' Trainer sums the
    losses of accumulated batches, each divided by the tokens of them all."""
    if num_items is None:
        return 1.0
    # the first token of a sample is predicted from nothing, so it has no loss
    return (labels[:, 1:] != -100).sum() / num_items


def _projector(config: LmmConfig, tower: VisionTower) -> nn.Module:
    width = config.text_config.hidden_size
    if config.reduction is not None and config.projector_type in ("vitsplit", "spatial_merge"):
        raise ValueError(
            f"{config.projector_type} needs the plain tower's patches: choose linear or mlp with "
            "CrossGET"
        )
    if config.projector_type == "identity" and tower.width != width:
        raise ValueError(
            f"identity cannot lead from a tower of width {tower.width} to a language model of "
            f"{width}: choose linear or mlp2x_gelu"
        )
    if config.projector_type != "vitsplit":
        return build_projector(config.projector_type, width=tower.width, output_width=width)
    split = ViTSplitConfig(
        tower_width=tower.width,
        output_width=width,
        frozen_layers=tuple(config.frozen_layers),
        tuned_layers=config.tuned_layers,
        keep_extra_tokens=config.keep_extra_tokens,
    )
    return ViTSplit(split, tower.blocks)


def _reduced(config: LmmConfig, tower: VisionTower) -> VisionTower:
    if config.reduction is None:
        return tower
    fields = dict(config.reduction)
    masked = fields.pop("mask_cross_token", False)
    r = fields.pop("r", 13)  # as published for LLaVA-1.5
    reduction = ReductionConfig(r if isinstance(r, int) else tuple(r), **fields)
    return CrossGetTower(tower, config=reduction, mask_cross_token=masked)


def add_lora(language_model: nn.Module, lora: dict | None) -> None:
    """Put low-rank additions beside every Linear of a language model, in place."""
    if lora is None:
        return
    from peft import LoraConfig, inject_adapter_in_model

    # last parts of names, by which peft looks modules up in every block
    linears = {
        name.rpartition(".")[2]
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    config = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        bias=lora["bias"],
        target_modules=sorted(linears),
    )
    inject_adapter_in_model(config, language_model)


def takes_packs(model: LmmForConditionalGeneration) -> bool:
    """Whether the tower takes packs of clips, or images only."""
    tower = model.tower
    if isinstance(tower, CrossGetTower):
        # of the towers that CrossGET reduces, ours alone has no class token
        return not tower.num_class_tokens
    return isinstance(tower, PackedTower)


AutoConfig.register(LmmConfig.model_type, LmmConfig)
AutoModelForImageTextToText.register(LmmConfig, LmmForConditionalGeneration)
