"""README.md of an exported vision tower: what it is and how to load it."""

from pathlib import Path

from transformers import LlavaConfig

from ..command_line.plain_text import in_code, in_markdown
from ..llava_vision_tower import LlavaViTVisionConfig

CARD = """\
# Vision tower of a LLaVA: {model_type}

Written from {source}, every tensor in fp32.

| fact | value |
| --- | --- |
| image | {side} x {side} pixels, patches of {patch_size} |
| tokens of an image | {tokens}, of width {width} |
| hidden state that is read | {layer}, strategy "{strategy}" |
| image token | {image_token}, in a vocabulary of {vocabulary} |

## transformers

LANGUAGE_MODEL is a folder of the shape of `text_config`. Nothing is drawn at random but the
projector, which has to be trained.{legacy}

```python
{imports}
config = LlavaConfig.from_pretrained("PATH")
with torch.device("meta"):
    model = LlavaForConditionalGeneration(config)
model.model.vision_tower = AutoModel.from_pretrained("PATH/tower", dtype=torch.float32)
language = AutoModelForCausalLM.from_pretrained("LANGUAGE_MODEL", dtype=torch.float32)
language.resize_token_embeddings(config.text_config.vocab_size)
model.model.language_model = language.get_decoder()
model.lm_head = language.get_output_embeddings()
projector = model.model.multi_modal_projector.to_empty(device="cpu")
for layer in (projector.linear_1, projector.linear_2):
    layer.reset_parameters()
{processor}
```

## The original LLaVA

{original}
"""
IMPORTS = """\
import json
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
"""
REGISTRATION = "import model_factory.llava_vision_tower  # makes the model type known\n"
WHOLE_PROCESSOR = 'processor = LlavaProcessor.from_pretrained("PATH")'
OWN_PROCESSOR = """\
tokenizer = AutoTokenizer.from_pretrained("LANGUAGE_MODEL")
tokenizer.add_tokens(["<image>"], special_tokens=True)
config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
fields = json.load(open("PATH/processor_config.json"))
processor = LlavaProcessor(AutoImageProcessor.from_pretrained("PATH/tower"), tokenizer, **fields)"""
OURS = """\
Add two lines to `build_vision_tower` in `multimodal_encoder/builder.py`, above its checks of the
name:

    from model_factory.llava_vision_tower import tower_or_none
    if (tower := tower_or_none(vision_tower, vision_tower_cfg, **kwargs)) is not None: return tower

and train with `--vision_tower PATH/tower --mm_vision_select_layer -1`."""
CLIP = """\
Train with `--vision_tower PATH/tower_legacy --mm_vision_select_layer -2`; no line of its code has
to change."""
LEGACY = """ With transformers 4 take
`tower_legacy` for `tower`, of which it may find no tensor, and then starts from random weights with
no more than a warning."""
CLIP_TYPE = "clip_vision_model"
LEGACY_TYPES = (CLIP_TYPE, "siglip_vision_model")
OTHER = "It reads CLIP towers and, with two lines, ours: use this one in transformers."


def tower_card(config: LlavaConfig, side: int, source: Path, whole_processor: bool) -> str:
    """Text of the card.

    side: of the images in pixels; source: where the weights come from; whole_processor: whether
    the folder holds a tokenizer too.
    """
    vision = config.vision_config
    is_ours = vision.model_type == LlavaViTVisionConfig.model_type
    original = OTHER
    if is_ours:
        original = OURS
    elif vision.model_type == CLIP_TYPE:
        original = CLIP
    return CARD.format(
        model_type=in_markdown(vision.model_type),
        source=in_code("/".join(source.parts[-2:])),
        side=side,
        patch_size=vision.patch_size,
        tokens=config.image_seq_length,
        width=vision.hidden_size,
        layer=config.vision_feature_layer,
        strategy=in_markdown(config.vision_feature_select_strategy),
        image_token=config.image_token_index,
        vocabulary=config.text_config.vocab_size,
        legacy=LEGACY if vision.model_type in LEGACY_TYPES else "",
        imports=IMPORTS + REGISTRATION if is_ours else IMPORTS,
        processor=WHOLE_PROCESSOR if whole_processor else OWN_PROCESSOR,
        original=original,
    )
