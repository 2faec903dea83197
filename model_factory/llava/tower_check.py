"""Check of an exported tower: it is loaded by transformers alone and compared with its source.

    python -m model_factory.llava.tower_check FOLDER REFERENCE

FOLDER is what export_llava_tower.py writes. REFERENCE is a safetensors file with `pixel_values`
[1, 3, H, W], as the folder's processor makes them, and `features` [1, N, D], what the projector of
a LLaVA receives for them. The exporter runs this in a process of its own, so that nothing in its
memory can stand in for what is missing on the disk. Cost: one image through the tower, in fp32.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, LlavaConfig

from ..command_line.command import run_command
from ..command_line.reading import names_place, reading
from ..llava_vision_tower import load_whole
from ..model_folder import check_model_folder

TOLERANCE = 1e-5  # absolute, fp32
TOWERS = ("tower", "tower_legacy")
FOUND = "verified: "  # start of each line of the report


@names_place("folder")
def check_folder(folder: Path, reference: Path) -> list[str]:
    """One line per tower, each of which is whole and equals its source. Raises ValueError for any
    that is not, and where there is no tower."""
    towers = [folder / name for name in TOWERS if (folder / name).is_dir()]
    if not towers:
        raise ValueError(f"{folder} holds no {' or '.join(TOWERS)}: give an exported folder")
    check_model_folder(folder, weights=False)
    config = LlavaConfig.from_pretrained(folder, local_files_only=True)
    with reading(reference):
        expected = load_file(reference)
    return [_check(tower, config=config, expected=expected) for tower in towers]


def selected(state: torch.Tensor, strategy: str) -> torch.Tensor:
    """Tokens [B, N, D] of a hidden state that Llava gives to its projector: under "default" all but
    token 0."""
    return state[:, 1:] if strategy == "default" else state


def _check(tower: Path, config: LlavaConfig, expected: dict[str, torch.Tensor]) -> str:
    model = load_whole(AutoModel, tower, use_safetensors=True).eval()
    with torch.no_grad():
        out = model(expected["pixel_values"], output_hidden_states=True)
    state = out.hidden_states[config.vision_feature_layer]
    features = selected(state, strategy=config.vision_feature_select_strategy)
    height, width = expected["pixel_values"].shape[-2:]
    if features.shape[1] != config.image_seq_length:
        raise ValueError(
            f"{tower} gives {features.shape[1]} tokens for the {height}x{width} pixels that its "
            f"processor makes of a picture, config.json says {config.image_seq_length}: the "
            "source's preprocessor_config.json must crop to a square"
        )
    difference = features - expected["features"]
    worst = float(difference.abs().max())
    # not `worst > TOLERANCE`: a tower that gives NaN must fail
    if not worst <= TOLERANCE:
        raise ValueError(f"{tower} differs from its source by {worst:.2e}; at most {TOLERANCE:.0e}")
    count = len(model.state_dict())
    tokens = features.shape[1]
    return f"{tower.name}: all {count} tensors, {tokens} tokens, difference {worst:.1e}"


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m model_factory.llava.tower_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="what export_llava_tower.py wrote")
    parser.add_argument("reference", type=Path, help="pixels and features, see the module's text")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_report, argv=argv)


def _report(args: argparse.Namespace) -> None:
    for line in check_folder(args.folder, args.reference):
        print(FOUND + line)


if __name__ == "__main__":
    sys.exit(main())
