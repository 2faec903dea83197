"""Every example of the packing guide runs, in order, as one program."""

import re

import pytest
import torch
from conftest import ROOT

from model_factory.export_folder import save_encoder_folder
from model_factory.registry import create_model

GUIDE = ROOT / "model_factory" / "README_PACKING.md"


@pytest.mark.parametrize("patch_size", [14, 16])
def test_the_examples_of_the_packing_guide_run(tmp_path, patch_size):
    torch.manual_seed(0)
    model = create_model("hf_llava_vit_packing_tiny_ln", patch_size=patch_size)
    save_encoder_folder(model, tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) >= 7
    program = "\n".join(blocks).replace("output/demo/export", str(tmp_path))
    names: dict = {}
    exec(compile(program, str(GUIDE), "exec"), names)
    assert names["image_tokens"].shape[1] == 128
    assert names["model"].patch_embed.proj.weight.grad.abs().sum() > 0
