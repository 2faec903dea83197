"""The encoder of a run: built and initialised from its config, and exported for others.

OUTPUT/backbone.pt, backbone.json   plain tensors in the source key layout, and their configuration
OUTPUT/hf/                          Hugging Face folder: config, safetensors, image processor,
                                    modelling code
"""

from pathlib import Path

from model_factory.backbone import check_is_model, save_backbone
from model_factory.configuration import LlavaViTPackingConfig
from model_factory.export_folder import save_encoder_folder
from model_factory.open_encoder import locate_encoder, open_encoder
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

from .config.schema import ModelConfig


def build_encoder(
    config: ModelConfig, seed: int, frames_per_token: int = 1
) -> LlavaViTPackingModel:
    """Packing model in fp32 with seeded random weights, or with those of `init_from`, whose tokens
    are of `frames_per_token` frames.

    Raises ValueError when `init_from` holds no encoder of ours (model_factory/open_encoder.py), or
    one of another size, width, rotary rule or number of channels than the configuration.
    """
    encoder = open_encoder(
        locate_encoder(config.init_from),
        model_name=config.name,
        rope_pairing=config.rope_pairing,
        seed=seed,
        num_channels=3 * frames_per_token,
    )
    _check_matches(encoder.config, config, frames_per_token=frames_per_token)
    return encoder.requires_grad_(not config.frozen)


def _check_matches(
    built: LlavaViTPackingConfig, config: ModelConfig, frames_per_token: int
) -> None:
    """Raise ValueError unless the loaded encoder is the one that the configuration names."""
    check_is_model(built, model_name=config.name, origin=config.init_from or "")
    if built.num_channels != 3 * frames_per_token:
        raise ValueError(
            f"{config.init_from} has num_channels {built.num_channels}, tokens of "
            f"{built.num_channels / 3:g} frames; the run is set to frames_per_token "
            f"{frames_per_token}: --set "
            f"heads.0.stream.view.frames_per_token={built.num_channels // 3} and so for each head"
        )
    if built.rope_pairing != config.rope_pairing:
        raise ValueError(
            f"{config.init_from} has the {built.rope_pairing} rotary rule, the run is set to "
            f"{config.rope_pairing}: --set model.rope_pairing={built.rope_pairing}"
        )
    if config.embedding_dim not in (None, built.hidden_size):
        raise ValueError(
            f"--embedding_size {config.embedding_dim}: {config.name} has width {built.hidden_size}"
        )


def export_encoder(encoder: LlavaViTPackingModel, output: Path, run: dict[str, object]) -> None:
    """Write backbone.pt and hf/; `run` are rows of the model card: where the weights come from."""
    save_backbone(encoder, output / "backbone.pt")
    save_encoder_folder(encoder, folder=output / "hf", run=run)
