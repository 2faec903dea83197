"""Answers of a trained model, and how likely it finds given answers.

    Speaker.answer    turns and visuals in, text out, several at a time
    log_likelihood    what multiple choice is decided by

Prompts are padded on the left and padding is masked, so an answer does not depend on what else is
in its batch. Decoding is greedy unless a temperature is given. A prompt that leaves no room for its
answer in the model's context is refused; an answer can be stopped. Cost: one pass over the prompt,
then one small pass per token of the longest answer; for a likelihood one pass over both.

Shape legend: B samples, A token positions where some sample has an answer, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from .data.conversation import Turn, Visual, encode, encode_prompt
from .data.dataset import Collator, Example, visual_tokens
from .data.labels import IGNORE_INDEX
from .data.visuals import VisualConfig, VisualItem, VisualReader
from .model.lmm import takes_packs
from .model.open import Lmm, open_lmm

# A text of more characters per token of the context is refused before it is tokenised: language has
# about four to a token, and no more than a few tokens of any vocabulary (blanks, rules) have 32.
CHARACTERS_PER_TOKEN = 32


class AnswerStopped(RuntimeError):
    """An answer was stopped before its end."""


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


class WordStreamer(TextStreamer):
    """Hands every finished word of an answer to `write(text, is_end)`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str, bool], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        self._write(text, stream_end)


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
        streamer: TextStreamer | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[str]:
        """One text per request.

        streamer: for a single request. stop: asked in front of every block of the model, in the
        prompt's pass too; once it is true, AnswerStopped is raised. Raises what reading and
        data/conversation.py raise, and ValueError for a prompt beyond the model's context.
        """
        with _interruptible(self.lmm.model, stop):
            return self._answer(requests, streamer)

    def _answer(self, requests: Sequence[Request], streamer: TextStreamer | None) -> list[str]:
        model = self.lmm.model
        tokenizer = self.lmm.tokenizer
        examples = [self._example(request) for request in requests]
        batch = Collator(tokenizer.pad_token_id, left=True)(examples)
        visuals = batch.get("visuals")
        decoding = self.decoding
        # transformers warns of a temperature that greedy decoding does not use
        sampling: dict[str, Any] = {"do_sample": False}
        if decoding.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
            }
            torch.manual_seed(decoding.seed)
        tokens = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            mm_encoder_outputs=None if visuals is None else model.encode(visuals.to(model.device)),
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            use_cache=decoding.use_cache,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
        # prompts are padded to one length, behind which every answer begins
        prompt_length = batch["input_ids"].shape[1]
        new_tokens = tokens[:, prompt_length:]
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _example(self, request: Request) -> Example:
        config = self.lmm.model.config
        context = getattr(config.text_config, "max_position_embeddings", None)
        characters = sum(len(turn.text) for turn in request.turns)
        if context is not None and characters > CHARACTERS_PER_TOKEN * context:
            raise ValueError(
                f"a prompt of {characters} characters exceeds the model's context of {context} "
                "tokens: ask something shorter, or begin anew"
            )
        items = self.read(request)
        counts = [visual_tokens(item, self.lmm.model.tokens_for) for item in items]
        ids = encode_prompt(
            request.turns,
            tokenizer=self.lmm.tokenizer,
            version=config.version,
            visual_tokens=counts,
            image_token_id=config.image_token_id,
        )
        longest = self.decoding.max_new_tokens
        if context is not None and len(ids) + longest > context:
            raise ValueError(
                f"a prompt of {len(ids)} tokens, {sum(counts)} of them of what is shown, and an "
                f"answer of up to {longest} exceed the model's context of {context} tokens: ask "
                "something shorter, begin anew, or lower --max_new_tokens"
            )
        return Example(input_ids=ids, labels=[IGNORE_INDEX] * len(ids), visuals=items)

    def read(self, request: Request) -> list[VisualItem]:
        """What the tower sees of a request's visuals."""
        return [
            visual if isinstance(visual, VisualItem) else self.reader(visual)
            for visual in request.visuals
        ]


@contextmanager
def _interruptible(model: nn.Module, stop: Callable[[], bool] | None) -> Iterator[None]:
    """Within it, a pass of the model ends with AnswerStopped at the first block of layers in front
    of which `stop` is true. A long prompt's pass takes minutes on a CPU, so looking between tokens
    alone would be too seldom."""
    if stop is None:
        yield
        return

    # an exception in a hook leaves the pass at once, whatever the model
    def look(*_call: object) -> None:
        if stop():
            raise AnswerStopped("the answer was stopped")

    # the layers of any transformer, of the tower too, are in a ModuleList
    block_lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    hooks = [block.register_forward_pre_hook(look) for blocks in block_lists for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Likelihood(NamedTuple):
    """log_probability: natural logarithm, summed over the tokens of an answer; greedy: whether each
    of them is the most likely token of its position."""

    log_probability: float
    greedy: bool


@torch.no_grad()
def log_likelihood(
    speaker: Speaker, requests: Sequence[Request], answers: Sequence[str]
) -> list[Likelihood]:
    """One for each request and what might be answered to it, computed as one batch.

    The tokens that count are those that training supervises (data/conversation.py): all of the
    answer, with the end that the conversation template puts behind it. So an answer is greedy
    exactly if the Speaker would give it and nothing more. Earlier answers of a conversation do not
    count, and nothing is cut. Raises what reading and data/conversation.py raise.
    """
    model = speaker.lmm.model
    examples = [
        _answered_example(speaker, request=request, answer=answer)
        for request, answer in zip(requests, answers, strict=True)
    ]
    # padded on the right, as in training
    batch = Collator(speaker.lmm.tokenizer.pad_token_id)(examples)
    labels = batch.pop("labels")
    positions = (labels != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]
    batch = {name: part.to(model.device) for name, part in batch.items()}
    # the token of a position is predicted at the position before; others need no logits
    keep = (positions - 1).to(model.device)
    logits = model(**batch, logits_to_keep=keep, use_cache=False).logits.float()  # [B, A, V]
    labels = labels[:, positions].to(model.device)  # [B, A]
    is_ignored = labels == IGNORE_INDEX
    # gather needs valid indices; what it gives for ignored labels is masked
    indices = labels.clamp(min=0)[..., None]
    log_probabilities = logits.log_softmax(-1)
    log_probabilities = log_probabilities.gather(-1, indices)[..., 0]  # [B, A]
    counted = log_probabilities.double().masked_fill(is_ignored, 0)
    sums = counted.sum(dim=1)
    is_most_likely = logits.argmax(-1) == labels
    greedy = (is_most_likely | is_ignored).all(dim=1)
    return [
        Likelihood(log_probability=log_probability, greedy=is_greedy)
        for log_probability, is_greedy in zip(sums.tolist(), greedy.tolist(), strict=True)
    ]


def _answered_example(speaker: Speaker, request: Request, answer: str) -> Example:
    """Prompt and answer, labelled in the answer only."""
    model = speaker.lmm.model
    items = speaker.read(request)
    encoded = encode(
        (*request.turns, Turn("gpt", answer)),
        tokenizer=speaker.lmm.tokenizer,
        version=model.config.version,
        visual_tokens=[visual_tokens(item, model.tokens_for) for item in items],
        image_token_id=model.config.image_token_id,
        max_length=sys.maxsize,  # an answer that is cut would be another one
    )
    labels = encoded.labels
    # the last answer is the supervised end; in front of it stands "ASSISTANT:" or a visual
    ignored = [index for index, label in enumerate(labels) if label == IGNORE_INDEX]
    start = ignored[-1] + 1
    labels = [IGNORE_INDEX] * start + labels[start:]
    return Example(input_ids=encoded.input_ids, labels=labels, visuals=items)


def open_speaker(
    folder: str | Path,
    media: str | Path = ".",
    device: str | torch.device = "cpu",
    decoding: Decoding | None = None,
    dtype: str = "float32",
    **visual_options: Any,
) -> Speaker:
    """The model of a folder, reading paths below `media`; visual_options: fields of VisualConfig
    other than those that the model decides on, None for what it was trained with."""
    lmm = open_lmm(folder, getattr(torch, dtype))
    lmm.model.to(device).eval()
    given = {name: value for name, value in visual_options.items() if value is not None}
    config = replace(visual_config(lmm), **given)
    reader = VisualReader(config, image_processor=lmm.image_processor, folder=media)
    return Speaker(lmm, reader=reader, decoding=decoding or Decoding())


def visual_config(lmm: Lmm) -> VisualConfig:
    """How a model's tower takes images and clips: as it was trained, where that is on record."""
    vision = lmm.model.config.vision_config
    packs = takes_packs(lmm.model)
    _, _, columns = lmm.model.tower.grid_of(vision.image_size, vision.image_size)
    # towers of images may state none, such as ConvNeXt: a token covers so many pixels
    patch_size = vision.patch_size if packs else vision.image_size // columns
    video = {"video_size": vision.image_size, **(lmm.model.config.video or {})}
    aspect = lmm.model.config.image_aspect_ratio
    return VisualConfig(patch_size=patch_size, packs=packs, aspect=aspect, **video)
