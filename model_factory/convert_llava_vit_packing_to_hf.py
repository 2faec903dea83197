"""backbone.pt -> Hugging Face folder of the packing model, verified.

    python model_factory/convert_llava_vit_packing_to_hf.py llava_vit_large_ln backbone.pt
    --output_dir DIR

Any difference between source and packing model above the tolerance, any missing or unexpected key,
ends with a non-zero exit code; see conversion.py for the checks. This file is run by path, so it
imports absolutely; it also offers the position helpers under their public place, resolved on first
use so that `--help` needs no torch.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.quiet import quiet_libraries
from model_factory.registry import packing_name

_HELPERS = (
    "compute_patch_positions_from_grid_thw",
    "compute_patch_positions_with_interpolated_temporal",
    "interpolate_frame_indices",
)


def __getattr__(name: str) -> Any:
    if name in _HELPERS:
        from model_factory import packing

        return getattr(packing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_parser() -> argparse.ArgumentParser:
    """Command line of this file."""
    parser = argparse.ArgumentParser(
        description="Convert a backbone.pt to a Hugging Face folder and verify it."
    )
    parser.add_argument("model_name", help="source model, e.g. llava_vit_large_ln")
    parser.add_argument("weight_path", type=Path, help="backbone.pt")
    parser.add_argument(
        "--output_dir", type=output_path, help="default: <stem>_hf_packing beside the weights"
    )
    parser.add_argument(
        "--target_model_name",
        help="accepted for old scripts; must be the packing name of model_name",
    )
    parser.add_argument(
        "--rope_pairing",
        choices=("legacy", "rotary"),
        default="legacy",
        help="rotary rule of weights without a .json beside them",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Convert; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_convert, argv=argv)


def _convert(args: argparse.Namespace) -> None:
    quiet_libraries()
    output = args.output_dir or args.weight_path.with_name(args.weight_path.stem + "_hf_packing")
    if args.target_model_name not in (None, packing_name(args.model_name)):
        raise ValueError(
            f"--target_model_name {args.target_model_name!r}: {args.model_name} converts to "
            f"{packing_name(args.model_name)}"
        )
    from model_factory.conversion import convert

    lines = convert(
        model_name=args.model_name,
        weight_path=args.weight_path,
        output_dir=output,
        rope_pairing=args.rope_pairing,
    )
    for line in lines:
        print(line)
    print(f"written: {output}")


if __name__ == "__main__":
    sys.exit(main())
