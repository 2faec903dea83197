"""A trained model answers: turns and visuals in, text out, several at a time.

Prompts are padded on the left and what is padded is masked, so an answer does not depend on what
else is in its batch. Greedy unless a temperature is given. Cost: one pass over the prompt, then one
small pass per token of the longest answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from .lmm_conversation import Turn, Visual, encode_prompt
from .lmm_data import Collator, Example, visual_tokens
from .lmm_model import takes_packs
from .lmm_open import Lmm, open_lmm
from .lmm_visuals import VisualConfig, VisualItem, VisualReader


@dataclass(frozen=True)
class Request:
    """Turns that end with a human one, and what their placeholders stand for."""

    turns: tuple[Turn, ...]
    visuals: tuple[Visual | VisualItem, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """temperature 0 is greedy; `seed` decides on what is drawn otherwise."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    use_cache: bool = True
    seed: int = 0


@dataclass
class Speaker:
    """A model with its tokenizer and its reader of visuals."""

    lmm: Lmm
    reader: VisualReader
    decoding: Decoding = field(default_factory=Decoding)

    @torch.no_grad()
    def answer(self, requests: Sequence[Request], streamer=None) -> list[str]:
        """One text per request. Raises what reading and lmm_conversation raise.

        streamer: of transformers, for a single request.
        """
        model, tokenizer = self.lmm.model, self.lmm.tokenizer
        examples = [self._example(request) for request in requests]
        batch = Collator(tokenizer.pad_token_id, left=True)(examples)
        visuals = batch.get("visuals")
        encoded = None if visuals is None else model.encode(visuals.to(model.device))
        decoding = self.decoding
        options = {"do_sample": decoding.temperature > 0}
        if options["do_sample"]:
            options |= {"temperature": decoding.temperature, "top_p": decoding.top_p}
            torch.manual_seed(decoding.seed)
        tokens = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            mm_encoder_outputs=encoded,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            use_cache=decoding.use_cache,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **options,
        )
        said = tokens[:, batch["input_ids"].shape[1] :]
        return [t.strip() for t in tokenizer.batch_decode(said, skip_special_tokens=True)]

    def picture(self, picture: np.ndarray) -> VisualItem:
        """A picture uint8 [H, W, 3] that is no file."""
        return self.reader.picture(picture)

    def _example(self, request: Request) -> Example:
        items = [v if isinstance(v, VisualItem) else self.reader(v) for v in request.visuals]
        counts = [visual_tokens(item, self.lmm.model.tokens_for) for item in items]
        config = self.lmm.model.config
        ids = encode_prompt(
            request.turns, self.lmm.tokenizer, config.version, counts, config.image_token_id
        )
        return Example(ids, [-100] * len(ids), items)


def open_speaker(
    folder: str | Path,
    media: str | Path = ".",
    device: str | torch.device = "cpu",
    decoding: Decoding | None = None,
    dtype: str = "float32",
    **visual_options,
) -> Speaker:
    """The model of a folder, reading paths below `media`; visual_options: fields of VisualConfig
    other than those that the model decides on."""
    lmm = open_lmm(folder, getattr(torch, dtype))
    lmm.model.to(device).eval()
    given = {name: value for name, value in visual_options.items() if value is not None}
    config = replace(visual_config(lmm), **given)
    return Speaker(lmm, VisualReader(config, lmm.image_processor, media), decoding or Decoding())


def visual_config(lmm: Lmm) -> VisualConfig:
    """How a model's tower wants to be shown things."""
    vision = lmm.model.config.vision_config
    packs = takes_packs(lmm.model)
    grid = lmm.model.tower.patches_of(vision.image_size, vision.image_size)
    return VisualConfig(
        patch_size=vision.patch_size if packs else vision.image_size // grid[1],
        packs=packs,
        aspect=lmm.model.config.image_aspect_ratio,
        **{"video_size": vision.image_size, **(lmm.model.config.video or {})},
    )
