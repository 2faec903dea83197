"""The multimodal probe: what fewer tokens and stored features save.

    prefill   one pass of a small language model over 576 and over 278 visual tokens with 40 of text
    tower     counted operations and seconds of CLIP-L/14-336 with CrossGET's published reduction
              against the plain tower, random weights, one picture
    cache     an epoch of stage 1 with a base encoder of ours, 224 px, from stored features against
              the same epoch through the tower

Prints JSON; ratios are of runs in this process, one after the other. Run it alone on the machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from eval_encoder.lmm.demo.question_set import DemoSet
from eval_encoder.lmm.demo.samples import write_demo_set
from eval_encoder.lmm.demo.tiny import write_language_model
from eval_encoder.lmm_probe import main as probe
from model_factory.configuration import LlavaViTPackingConfig
from model_factory.export_folder import save_encoder_folder
from model_factory.llava.crossget import CrossGetTower
from model_factory.llava.token_reduction import ReductionConfig
from model_factory.llava.towers import VisualInputs, tower_of
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

TEXT, FULL, REDUCED = 40, 576, 278
REPEATS = 7


def seconds(call, repeats: int = REPEATS) -> float:
    """Median of several calls after one to warm up."""
    call()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


@torch.no_grad()
def bench_prefill() -> dict:
    """A Llama of 8 layers of width 512."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    taken = {}
    for tokens in (FULL, REDUCED):
        inputs = torch.randn(1, TEXT + tokens, 512)
        taken[tokens] = seconds(lambda x=inputs: model(inputs_embeds=x, logits_to_keep=1))
    return {"ratio": taken[FULL] / taken[REDUCED], **{f"s_{k}": v for k, v in taken.items()}}


@torch.no_grad()
def bench_tower() -> dict:
    """Operations as torch counts them, multiply and add apart; it does not count fused attention,
    so they are counted with plain attention and timed with the fused one."""
    fields = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    fields |= dict(num_attention_heads=16, image_size=336, patch_size=14)
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**fields)).eval()
    plain = tower_of(clip)
    reduced = CrossGetTower(tower_of(clip), ReductionConfig(13))
    picture = VisualInputs(torch.randn(1, 3, 336, 336))
    counted, taken = {}, {}
    for name, tower in (("plain", plain), ("reduced", reduced)):
        clip.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            states = tower(picture, [23])
        clip.set_attn_implementation("sdpa")
        counted[name] = counter.get_total_flops()
        taken[name] = seconds(lambda t=tower: t(picture, [23]), repeats=3)
    return {
        "tokens": states.lengths[0],
        "operations_ratio": counted["reduced"] / counted["plain"],
        "plain_gflop": counted["plain"] / 1e9,
        "seconds_ratio": taken["reduced"] / taken["plain"],
    }


def bench_cache(root: Path, pictures: int) -> dict:
    """train_runtime of one epoch of lmm_probe.py, the first one to fill the store left out."""
    write_demo_set(DemoSet(root / "set", num_train=pictures, num_val=192, size=224))
    write_language_model(["a red star ."], root / "llm", layers=2, width=128)
    fields = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    fields |= dict(num_attention_heads=12, image_size=224)
    save_encoder_folder(LlavaViTPackingModel(LlavaViTPackingConfig(**fields)), root / "tower")
    flags = ["--recipe", "llava15", "--model_name_or_path", root / "llm", "--vision_tower"]
    flags += [root / "tower", "--data_path", root / "set" / "align.json", "--image_folder"]
    flags += [root / "set", "--per_device_train_batch_size", "8", "--global_batch_size", "8"]
    flags += ["--num_frames", "2", "--gradient_checkpointing", "False", "--disable_tqdm", "True"]
    flags += ["--save_strategy", "no", "--mm_vision_select_layer", "-1"]
    taken = {}
    for name, more in (("live", []), ("stored", ["--feature_cache", root / "features"])):
        output = root / name
        assert probe([str(part) for part in [*flags, *more, "--output_dir", output]]) == 0
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        taken[name] = lines[-1]["train_runtime"]
    return {"ratio": taken["live"] / taken["stored"], "epoch_s": taken, "pictures": pictures}


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["prefill", "tower", "cache"])
    parser.add_argument("--pictures", type=int, default=60, help="pictures and clips of an epoch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "prefill": bench_prefill,
            "tower": bench_tower,
            "cache": lambda: bench_cache(Path(folder), args.pictures),
        }
        torch.manual_seed(0)
        print(json.dumps({name: parts[name]() for name in args.parts}, indent=1))


if __name__ == "__main__":
    main()
