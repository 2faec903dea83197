"""How likely a trained model finds given answers: what multiple choice is decided by.

The tokens that count are those that training supervises (lmm_conversation.encode): all of the
answer, with the end that the conversation template puts behind it. So an answer is greedy exactly
if a Speaker would say it and nothing more. Samples are padded on the right, as in training, and
nothing is cut. Cost: one pass over prompt and answer; logits are computed where answers stand only.

Shape legend: B samples, A places of the batch where some sample has an answer, V vocabulary.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .data.conversation import Turn, encode
from .data.dataset import Collator, Example, visual_tokens
from .data.labels import IGNORE_INDEX
from .data.visuals import VisualItem
from .generate import Request, Speaker


class Likelihood(NamedTuple):
    """log_probability: natural logarithm, summed over the tokens of an answer; greedy: whether each
    of them is the likeliest at its place."""

    log_probability: float
    greedy: bool


@torch.no_grad()
def log_likelihood(
    speaker: Speaker, requests: Sequence[Request], answers: Sequence[str]
) -> list[Likelihood]:
    """One for each request and what might be answered to it, as one batch. Earlier answers of a
    conversation do not count. Raises what reading and lmm_conversation raise."""
    model = speaker.lmm.model
    pairs = zip(requests, answers, strict=True)
    examples = [_example(speaker, request, answer) for request, answer in pairs]
    batch = Collator(speaker.lmm.tokenizer.pad_token_id)(examples)
    labels = batch.pop("labels")
    places = (labels != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]
    batch = {name: part.to(model.device) for name, part in batch.items()}
    # what is said at a place is decided at the place before
    keep = (places - 1).to(model.device)
    logits = model(**batch, logits_to_keep=keep, use_cache=False).logits.float()  # [B, A, V]
    labels = labels[:, places].to(model.device)  # [B, A]
    silent = labels == IGNORE_INDEX
    own = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    sums = own.double().masked_fill(silent, 0).sum(dim=1)
    greedy = ((logits.argmax(-1) == labels) | silent).all(dim=1)
    return [Likelihood(*pair) for pair in zip(sums.tolist(), greedy.tolist(), strict=True)]


def _example(speaker: Speaker, request: Request, answer: str) -> Example:
    """Prompt and answer, labelled in the answer only."""
    model = speaker.lmm.model
    items = [v if isinstance(v, VisualItem) else speaker.reader(v) for v in request.visuals]
    encoded = encode(
        (*request.turns, Turn("gpt", answer)),
        speaker.lmm.tokenizer,
        model.config.version,
        [visual_tokens(item, model.tokens_for) for item in items],
        model.config.image_token_id,
        max_length=sys.maxsize,
    )
    ids, labels = encoded.input_ids, encoded.labels
    # the last answer is the supervised end; in front of it stands "ASSISTANT:" or a visual
    start = max(place for place, label in enumerate(labels) if label == IGNORE_INDEX) + 1
    return Example(ids, [IGNORE_INDEX] * start + labels[start:], items)
