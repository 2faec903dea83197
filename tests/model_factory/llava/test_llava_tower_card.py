"""The card of an eye: its program makes a LLaVA out of the folder, and it names the other ways."""

import re
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from model_factory.export_folder import image_processor_json, save_encoder_folder
from model_factory.export_llava_tower import main
from model_factory.registry import packing_config
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

pytestmark = pytest.mark.usefixtures("quick_tower_check")
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)


def make_source(kind, folder):
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8)
        transformers.CLIPVisionModel(config).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(image_processor_json(32))
        return
    config = packing_config("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary")
    config.num_hidden_layers, config.image_size = 2, 64
    save_encoder_folder(LlavaViTPackingModel(config), folder)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tiny Llama with a tokenizer of nine words."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=9)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", "what", "is", "this", "a", "red", "cat"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "with_tokenizer"), [("ours", True), ("clip", False)])
def test_the_card_makes_a_llava_that_answers(language, tmp_path, kind, with_tokenizer):
    """The card's own program, run; with a tokenizer in the folder and with a later one."""
    given = language
    if not with_tokenizer:
        given = tmp_path / "alone"
        given.mkdir()
        shutil.copyfile(language / "config.json", given / "config.json")
    folder = tmp_path / "eye"
    options = ["--output_dir", str(folder), "--language_model", str(given)]
    make_source(kind, tmp_path / "source")
    assert main([str(tmp_path / "source"), *options]) == 0
    card = (folder / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", card, re.S)[1]
    names = {}
    exec(program.replace("PATH", str(folder)).replace("LANGUAGE_MODEL", str(language)), names)
    model, processor, config = names["model"].eval(), names["processor"], names["config"]
    assert not [n for n, p in model.named_parameters() if p.is_meta or p.dtype != torch.float32]
    assert config.image_token_index == 9 and config.text_config.vocab_size == 64
    picture = torch.randint(0, 256, (90, 70, 3), dtype=torch.uint8).numpy()
    batch = processor(text="<image> what is this", images=picture, return_tensors="pt")
    assert int((batch["input_ids"] == 9).sum()) == config.image_seq_length == 16
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[-1] == 64 and logits.isfinite().all()
    assert ("tower_or_none" in card) == (kind == "ours")
    assert ("tower_legacy" in card) == (kind == "clip")
