"""Exports of a checkpoint while its run goes on: python -m training.export CHECKPOINT --output DIR.

    DIR/backbone.pt, backbone.json, hf/    as a run leaves them at its end

One process, on the CPU; only the encoder's tensors are read, after every byte of the checkpoint was
checked. Nothing beside the checkpoint is needed.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.quiet import quiet_libraries

from .errors import BadCheckpoint

if TYPE_CHECKING:
    from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_N, or RUN: its newest")
    parser.add_argument("--output", type=output_path, required=True, help="folder of the exports")
    return parser


def export_checkpoint(checkpoint: Path, output: Path) -> int:
    """Write the exports of a checkpoint, or of the newest in a run's folder; returns its step.
    Raises what `read_encoder` raises.
    """
    from .encoder import export_encoder

    encoder, path, step = read_encoder(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    run = {"steps": step, "checkpoint": path.name}
    export_encoder(encoder, output=output, run=run)
    return step


def read_encoder(checkpoint: Path) -> "tuple[LlavaViTPackingModel, Path, int]":
    """(encoder, checkpoint folder, step) of a checkpoint, or of the newest in a run's folder.

    Raises BadCheckpoint for a damaged or missing one.
    """
    from .checkpoint.files import read_tensors
    from .checkpoint.folder import CheckpointFolder, read_state, verify_checkpoint
    from .config.schema import FRAMES_PER_TOKEN, ModelConfig
    from .encoder import build_encoder

    path = resolve_checkpoint(checkpoint)
    problems = verify_checkpoint(path)
    if problems:
        beside = CheckpointFolder(path.parent).commits()
        intact = [str(other) for other in beside if not verify_checkpoint(other)]
        raise BadCheckpoint(
            f"{path}: {'; '.join(problems)}; name an intact one: "
            f"{', '.join(intact) or 'none is left'}"
        )
    state = read_state(path)
    # The model's fields come from the checkpoint, which is bound byte by byte, not from
    # config.json.
    prefix = "model."
    fields = {
        key.removeprefix(prefix): value
        for key, value in state["fingerprint"].items()
        if key.startswith(prefix)
    }
    # all heads have the same, and those of single frames none on record
    frames = state["fingerprint"].get(f"heads.0{FRAMES_PER_TOKEN}", 1)
    encoder = build_encoder(ModelConfig(**fields), seed=0, frames_per_token=frames)
    tensors = {f"encoder.{name}": p.data for name, p in encoder.named_parameters()}
    read_tensors(tensors, path, alone=True)
    # The image size of its training data; older checkpoints have none.
    encoder.config.image_size = state.get("image_size", encoder.config.image_size)
    return encoder, path, state["step"]


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint as named, or the newest of a run's folder; BadCheckpoint where there is none."""
    from .checkpoint.folder import FOLDER_NAME, MANIFEST_NAME, CheckpointFolder

    if (path / MANIFEST_NAME).is_file():
        return path.resolve()
    commits = CheckpointFolder(path.resolve() / FOLDER_NAME).commits()
    if not commits:
        raise BadCheckpoint(f"{path} is no checkpoint, and holds none under {FOLDER_NAME}/")
    return commits[0]


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_export, argv=argv)


def _export(args: argparse.Namespace) -> None:
    quiet_libraries()
    step = export_checkpoint(args.checkpoint, args.output)
    folder = args.output / "hf"
    backbone = args.output / "backbone.pt"
    print(f"step {step}: {folder} and {backbone}")


if __name__ == "__main__":
    sys.exit(main())
