"""Writer of an encoder's Hugging Face folder, which `LlavaViTPackingModel.from_pretrained` and
`AutoModel` load.

    config.json, model.safetensors    the model
    *.py                              the modelling code and its siblings, for AutoModel
    preprocessor_config.json          CLIPImageProcessor at the model's image size
    README.md                         model card: shapes, preprocessing, where it comes from
    SHA256SUMS                        of all but the model card, written last
"""

import json
import shutil
from pathlib import Path

from .command_line.plain_text import in_markdown
from .configuration import LlavaViTPackingConfig
from .model_folder import seal_folder
from .packing import CLIP_MEAN, CLIP_STD, TARGET_FRAMES
from .vit_preview_v0_packing_hf import LlavaViTPackingModel

CARD = """\
---
library_name: transformers
pipeline_tag: feature-extraction
---

# Packed video and image encoder

{parameters:.1f} M parameters, {num_hidden_layers} layers of width {hidden_size}, patch
{patch_size}. Takes images, clips and sparse patch selections of any size in one pack.

## Use

```python
import torch
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

model = LlavaViTPackingModel.from_pretrained("PATH", torch_dtype=torch.float32).eval()
rows = torch.randn(4 * 6, {patch_dim})  # normalised patch rows: one image of 4 x 6 patches
out = model(hidden_states=rows, grid_thw=torch.tensor([[1, 4, 6]]))
out.last_hidden_state, out.pooler_output
```

`grid_thw` is frames, rows and columns of each item in patches. Sparse items come with
`patch_positions` [S, 3] and `cu_seqlens` [N + 1] instead. Where the project is not installed,
transformers' AutoModel builds the same model from the code in this folder, if you have read that
code and allow it (`trust_remote_code`).

## Preprocessing

- pixels / 255, minus {mean}, divided by {std} (red, green, blue)
- sides a multiple of {patch_size}; `preprocessor_config.json` resizes and crops to {image_size}
- a patch row is {patch_text}
- time: frame i of n goes to round(i / (n - 1) * {last_frame}): every clip spans 0..{last_frame}

## Configuration

{config_table}

## Training run

{run_table}
"""


def save_encoder_folder(
    model: LlavaViTPackingModel, folder: str | Path, run: dict[str, object] | None = None
) -> None:
    """Write the folder; `run` are rows of the model card on the origin of the weights."""
    folder = Path(folder)
    # save_pretrained then copies the classes' code and names them in config.json's auto_map
    LlavaViTPackingConfig.register_for_auto_class()
    LlavaViTPackingModel.register_for_auto_class("AutoModel")
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        # safetensors writes files that only their owner may read, whatever the umask
        shutil.copymode(folder / "config.json", weights)
    processor = image_processor_json(model.config.image_size)
    (folder / "preprocessor_config.json").write_text(processor)
    (folder / "README.md").write_text(_model_card(model, run or {"weights": "not recorded"}))
    seal_folder(folder)  # last, as it hashes the files above


def image_processor_json(size: int) -> str:
    """Text of a preprocessor_config.json: CLIP's processor for images of size x size pixels.
    Written without transformers' class, which needs an image library."""
    fields = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # PIL's bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }
    return json.dumps(fields, indent=2)


def _model_card(model: LlavaViTPackingModel, run: dict[str, object]) -> str:
    config = model.config
    fields = {name: getattr(config, name) for name in sorted(config.own_fields())}
    return CARD.format(
        **fields,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        patch_dim=config.patch_dim,
        patch_text=_patch_text(config),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        last_frame=TARGET_FRAMES - 1,
        config_table=_table("field", fields),
        run_table=_table("fact", run),
    )


def _patch_text(config: LlavaViTPackingConfig) -> str:
    """What a patch row holds."""
    p = config.patch_size
    if config.num_channels == 3:
        return f"{p} x {p} pixels, channel first inside the patch"
    frames = config.num_channels // 3
    return (
        f"a tube: {p} x {p} pixels of {frames} successive frames at one place, channel first, then "
        "frame; its time is the mean of theirs, and an image is repeated"
    )


def _table(name: str, rows: dict[str, object]) -> str:
    body = []
    for key, value in rows.items():
        body.append(f"| {key} | {in_markdown(value)} |")
    return "\n".join([f"| {name} | value |", "| --- | --- |", *body])
