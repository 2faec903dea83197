"""How a clip becomes what an encoder sees, as settings; both probes read clips by them.

Each setting is a flag of the attentive probe at the same time (probe/config.py), of the field's
name where no other is given. Needs no torch.
"""

from dataclasses import asdict, dataclass

from model_factory.command_line.flags import flag

# Public name -> view of the packed encoder; names of one view are synonyms.
VIDEO_FAMILIES = {
    "llava_vit_sampling": "frame",
    "chunk_wise_sampling": "frame",
    "llava_vit_codec": "codec",
    "ov_encoder_codec": "codec",
}
# Encoders that see whole frames. No synonyms, but the sha256 of the encoder itself is in the key of
# stored features, so that `identity` may leave the family out here as well.
IMAGE_FAMILIES = ("clip", "metaclip", "siglip", "siglip2", "dinov2", "dinov3", "aimv2")
DECODERS = ("auto", "decord", "av", "torchcodec")
AUGMENTATIONS = ("jitter", "brightness", "saturation", "hue", "channels")
# of data_pipeline.codec, which takes NumPy to import
CAMERAS = ("none", "median", "similarity", "affine")
SCORES = ("peak", "mean", "clipped", "bits")
RULES = (
    "i_frames_first",
    "published",
    "published_llava",
    "differences",
    "i_frames_random",
    "random",
)


def seed_flag() -> int:
    """Field for --seed; one flag that fills the seed of several dataclasses."""
    return flag(
        "--seed", default=1, help="seed of the first head, the order and the drawn versions"
    )


@dataclass(frozen=True)
class InputConfig:
    """How a clip becomes what the encoder sees."""

    family: str = flag(
        "--model_family",
        default="llava_vit_sampling",
        help=f"{', '.join(VIDEO_FAMILIES)} (ours, whole frames or codec patches), or frame by "
        f"frame {', '.join(IMAGE_FAMILIES)}",
    )
    num_frames: int = flag(default=8, help="whole frames of a clip")
    frame_scale: float = flag(
        default=1.0,
        help="of the sides of whole frames: 0.5 is a quarter of their tokens",
    )
    target_frames: int = flag(
        default=64,
        help="time base of positions, and frames the codec selects from",
    )
    num_tokens: int = flag("--K_keep", default=2048, help="patches of a clip under codec input")
    gop: int = flag(default=0, help="frames between I-frames of raw codec input; 0: by the budget")
    rule: str = flag(
        default="i_frames_first",
        help=f"how patches of raw codec input are selected: {', '.join(RULES)}",
    )
    score: str = flag(default="peak", help=f"of such a patch: {', '.join(SCORES)}")
    i_frame_share: float = flag(default=1.0, help="patches taken of an I-frame, 0 to 1")
    camera: str = flag(
        "--mv_compensate",
        default="median",
        help=f"camera model of codec input: {', '.join(CAMERAS)}",
    )
    centre_prior: float = flag(
        "--center_prior",
        default=0.0,
        help="preference of codec input for the middle of the frame",
    )
    size: int = flag(
        "--input_size",
        default=224,
        help="side of raw videos' frames; image encoders have their own",
    )
    temporal_crops: int = flag(
        "--num_temporal_crops",
        default=1,
        help="shifted samplings of a validation clip, scores averaged",
    )
    spatial_crops: int = flag(
        "--num_spatial_crops",
        default=1,
        help="squares along the long side of a validation clip, averaged",
    )
    train_views: int = flag(
        default=0,
        help="drawn versions of a raw training clip; 0: one per epoch, 1: plain",
    )
    augmentations: tuple[str, ...] = flag(
        "--augment", default=AUGMENTATIONS, help="of drawn versions; `none` for none"
    )
    mean: tuple[float, ...] | None = flag(
        default=None,
        help="of the normalisation; default: what the encoder was trained with",
    )
    std: tuple[float, ...] | None = flag(default=None, help="of the normalisation")
    decoder: str = flag(
        default="auto",
        help=f"raw video reader: {', '.join(DECODERS)} (auto: av, the packer's)",
    )
    decoder_threads: int = flag(
        "--decord_num_threads", default=2, help="threads of one decord reader"
    )
    wall_seconds: float = flag(
        default=300.0,
        help="limit of reading one raw clip; beyond it is unreadable",
    )
    workers: int = flag("--dali_py_num_workers", default=4, help="raw videos decoded at a time")
    seed: int = seed_flag()

    @property
    def view(self) -> str:
        """frame or codec."""
        return VIDEO_FAMILIES.get(self.family, "frame")

    def identity(self) -> dict:
        """What decides on the pixels of any view, for the key of stored features."""
        # Left out: reading speed, and what features.ClipFeatures._identity already keys.
        ignored = ["workers", "decoder_threads", "wall_seconds", "train_views", "family"]
        ignored += ["temporal_crops", "spatial_crops", "seed", "augmentations"]
        if self.view == "codec":
            # codec input selects from target_frames, and av alone decodes it
            ignored += ["num_frames", "frame_scale", "decoder"]
        else:
            ignored += ["num_tokens", "gop", "rule", "score", "i_frame_share", "camera"]
            ignored += ["centre_prior"]
        fields = {name: value for name, value in asdict(self).items() if name not in ignored}
        return {"view": self.view, **fields}
