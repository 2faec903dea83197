"""A trained model answers: turns and visuals in, text out, several at a time.

Prompts are padded on the left and what is padded is masked, so an answer does not depend on what
else is in its batch. Greedy unless a temperature is given. A prompt that leaves no room for its
answer in the model's context is refused; an answer can be stopped. Cost: one pass over the prompt,
then one small pass per token of the longest answer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .data.conversation import Turn, Visual, encode_prompt
from .data.dataset import Collator, Example, visual_tokens
from .data.visuals import VisualConfig, VisualItem, VisualReader
from .model.lmm import takes_packs
from .model.open import Lmm, open_lmm

# A text of more characters per token of the context is refused before it is tokenised: language has
# about four to a token, and no more than a few tokens of any vocabulary (blanks, rules) have 32.
CHARACTERS_PER_TOKEN = 32


class AnswerStopped(RuntimeError):
    """An answer that was given up before its end, because somebody wished it."""


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
    def answer(
        self,
        requests: Sequence[Request],
        streamer=None,
        stop: Callable[[], bool] | None = None,
    ) -> list[str]:
        """One text per request.

        streamer: of transformers, for a single request. stop: asked in front of every block of the
        model, in the prompt's pass too; once it is true, AnswerStopped is raised. Raises what
        reading and lmm_conversation raise, and ValueError for a prompt beyond the model's context.
        """
        with _interruptible(self.lmm.model, stop):
            return self._answer(requests, streamer)

    def _answer(self, requests: Sequence[Request], streamer) -> list[str]:
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
        config = self.lmm.model.config
        context = getattr(config.text_config, "max_position_embeddings", None)
        if context is not None:
            _check_characters(request.turns, context)
        items = [v if isinstance(v, VisualItem) else self.reader(v) for v in request.visuals]
        counts = [visual_tokens(item, self.lmm.model.tokens_for) for item in items]
        ids = encode_prompt(
            request.turns, self.lmm.tokenizer, config.version, counts, config.image_token_id
        )
        longest = self.decoding.max_new_tokens
        if context is not None and len(ids) + longest > context:
            raise ValueError(
                f"a prompt of {len(ids)} tokens, {sum(counts)} of them of what is shown, and an "
                f"answer of up to {longest} exceed the model's context of {context} tokens: ask "
                "something shorter, begin anew, or lower --max_new_tokens"
            )
        return Example(ids, [-100] * len(ids), items)


def _check_characters(turns: Sequence[Turn], context: int) -> None:
    characters = sum(len(turn.text) for turn in turns)
    if characters > CHARACTERS_PER_TOKEN * context:
        raise ValueError(
            f"a prompt of {characters} characters exceeds the model's context of {context} tokens: "
            "ask something shorter, or begin anew"
        )


@contextmanager
def _interruptible(model: nn.Module, stop: Callable[[], bool] | None) -> Iterator[None]:
    """Within it, a pass of the model ends with AnswerStopped at the first block of layers in front
    of which `stop` is true. A long prompt's pass takes minutes on a CPU, so looking between tokens
    alone would be too seldom."""

    def look(*_call) -> None:
        if stop():
            raise AnswerStopped("the answer was stopped")

    lists = [] if stop is None else [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    hooks = [block.register_forward_pre_hook(look) for blocks in lists for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
