"""A run is a function that returns a whole TrainConfig and says its command,
its cost and what to expect.

Command line flags are laid over a preset; without one, over `baseline`, the public trainer's
defaults.
"""

from dataclasses import replace

from data_pipeline.loading.choices import ViewConfig
from data_pipeline.loading.stream_config import StreamConfig

from .config import HeadConfig, ModelConfig, TrainConfig
from .losses.partial_fc import PartialFCConfig
from .lr_scheduler import ScheduleConfig
from .optimizer import OptimizerConfig


def baseline() -> TrainConfig:
    """The public trainer's defaults: batch 32 per GPU, 60 M samples, lr 1e-3,
    a tenth of the negatives.

    torchrun --nproc_per_node 8 -m training.train_univit --list_datasets DIR --list_batch_size 64
    --output OUT
    """
    return TrainConfig(schedule=ScheduleConfig(warmup_ratio=0.2))


def debug() -> TrainConfig:
    """Twenty steps of a tiny encoder on synthetic patches: seconds on a laptop; the loss falls.

    torchrun --nproc_per_node 2 -m training.train_univit --preset debug --output DIR
    """
    head = HeadConfig(
        dataset="synthetic",
        stream=StreamConfig(
            batch_size=8, view=ViewConfig(max_tokens=32), label_width=1, labels_per_step=1
        ),
        loss=PartialFCConfig(sample_rate=1.0, scale=16.0),
    )
    return TrainConfig(
        model=ModelConfig(name="llava_vit_tiny_ln"),
        heads=(head,),
        schedule=ScheduleConfig(total_samples=20 * 16),
        log_every=5,
        checkpoint_every=10,
        synthetic_data=True,
    )


def demo() -> TrainConfig:
    """Learning made visible on the embedded motion_shapes set: eight minutes on two CPU cores.

    torchrun --nproc_per_node 2 -m training.train_univit --preset demo --output DIR

    1200 clips of 64 frames at 112 px, 98 tokens each: half of the time the codec view (one I-frame
    and the 49 best P-frame patches), half of the time two whole frames. 64 clusters of the codec
    descriptor are the classes, and the 8 nearest of each clip its labels; as most of these stand
    for the same motion, they are not each other's negatives. Results: docs/evaluation.md.
    """
    head = HeadConfig(
        stream=StreamConfig(
            batch_size=32,
            view=ViewConfig(codec_ratio=0.5, frame_ratio=0.5, max_tokens=98, max_frames=2),
            label_width=8,
            labels_per_step=8,
            dali_num_threads=1,
        ),
        loss=PartialFCConfig(sample_rate=1.0, margin=0.3, scale=16.0, mask_co_positives=True),
    )
    return TrainConfig(
        model=ModelConfig(name="llava_vit_tiny_ln"),
        heads=(head,),
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(total_samples=800 * 64, warmup_ratio=0.1),
        log_every=20,
        checkpoint_every=200,
    )


PRESETS = {function.__name__: function for function in (baseline, debug, demo)}


def preset(name: str, output: str | None = None) -> TrainConfig:
    """Build a preset by name; ValueError lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    config = PRESETS[name]()
    return config if output is None else replace(config, output=output)
