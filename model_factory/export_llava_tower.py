"""Verified export of an encoder or a public vision model as the vision tower of a LLaVA.

    python model_factory/export_llava_tower.py SOURCE --output_dir DIR
    [--language_model FOLDER] [--no-post_norm]

The folder appears whole or not at all; any tensor that is missing or left over when a fresh process
loads it, and any difference from the source above the tolerance, ends with a non-zero exit code.
The files of the folder: llava/tower_folder.py. Nothing heavy is imported here, so that `--help` is
quick.
"""

import argparse
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """Command line of this file."""
    from .command_line.local_output import output_path

    parser = argparse.ArgumentParser(
        description="Write a verified vision tower with the configuration of a LLaVA around it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        type=Path,
        help="RUN/hf or a converted folder; a backbone.pt or .safetensors with its .json beside "
        "it; or a local folder of CLIP, SigLIP or DINOv2",
    )
    parser.add_argument(
        "--output_dir", type=output_path, required=True, help="folder to write; must not exist"
    )
    parser.add_argument(
        "--language_model",
        type=Path,
        help="folder whose config.json becomes text_config, and whose tokenizer, where it has one, "
        "is saved with the <image> token; default: Llama's configuration, no tokenizer",
    )
    parser.add_argument(
        "--no-post_norm",
        dest="post_norm",
        action="store_false",
        help="encoders of ours: features are the last block's output, not the normed one",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit code."""
    from .command_line.command import run_command

    return run_command(parse=build_parser().parse_args, work=_export, argv=argv)


def _export(args: argparse.Namespace) -> None:
    from .command_line.quiet import quiet_libraries

    quiet_libraries()
    from .llava.tower_folder import export_tower

    lines = export_tower(
        source=args.source,
        output=args.output_dir,
        language_model=args.language_model,
        post_norm=args.post_norm,
    )
    for line in lines:
        print(line)
    print(f"written: {args.output_dir}")


if __name__ == "__main__":
    # run by path, this file stands outside of its package: the module inside of it does the work
    import model_factory.export_llava_tower as command

    sys.exit(command.main())
