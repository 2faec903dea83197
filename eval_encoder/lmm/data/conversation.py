"""Conversations about pictures -> token ids and labels, exact by construction.

    JSON of LLaVA -> Sample -> text of the template, cut at its visuals -> ids and labels

    plain       [BOS, visual, caption, newline]; the human text is thrown away; no EOS
    v1          system text, then "USER: q ASSISTANT: a</s>" for every round, without a space
                between </s> and the next USER
    llava_v1    the same with another system text

What breaks a rule of the format is an error that names the sample, never a masked sample. Needs no
more than the standard library. Cost: that of `lmm_labels`; a list is held in memory as a whole.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model_factory.command_line.plain_text import printable
from model_factory.files import stays_below

from .labels import IGNORE_INDEX, Encoded, Piece, assemble

IMAGE = "<image>"
VIDEO = "<video>"
SPEAKERS = ("human", "gpt")

_PLACEHOLDER = re.compile(f"{IMAGE}|{VIDEO}")
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# version -> system text; None: neither system text nor roles
TEMPLATES: dict[str, str | None] = {
    "plain": None,
    "v1": _SYSTEM,
    "llava_v1": _SYSTEM.replace("user", "human"),
}


@dataclass(frozen=True)
class Turn:
    """What one side says. Human text may hold placeholders of visuals."""

    speaker: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Visual:
    """A picture or a video, by its path in the list, relative to a folder that the list does not
    know."""

    kind: Literal["image", "video"]
    path: str

    def place(self, folder: Path) -> Path:
        """File or folder that the path names; behind a `#` stands the key of a packed clip."""
        return folder / self.path.partition("#")[0]


@dataclass(frozen=True)
class Sample:
    """One conversation: turns that alternate, human first, gpt last; the visuals in the order of
    their placeholders."""

    id: str
    turns: tuple[Turn, ...]
    visuals: tuple[Visual, ...]


def read_samples(path: str | Path, folder: str | Path | None = None) -> list[Sample]:
    """Samples of a LLaVA list: a JSON list, or one JSON object per line. `folder`: where its paths
    begin and stay; None where nothing will be read of them.

    A sample has `id`, `conversations` ([{"from": "human" or "gpt", "value": text}, ...]) and, where
    it is about something, `image` and `video`: a path or a list of paths. There are as many
    placeholders as visuals; a single visual without any belongs in front of the first turn. Where
    all visuals are of one kind either placeholder stands for them, as published video lists write
    `<image>`; else each placeholder takes the next visual of its kind.

    The placeholders of a turn are moved to its front, each followed by a newline, and the rest is
    stripped: the published rule for one image, ours for several.

    Raises ValueError that names file, place and id of the first sample that breaks these rules.
    """
    path = Path(path)
    samples = []
    for place, entry in _entries(path):
        try:
            sample = _sample(entry)
            for visual in sample.visuals:
                check_below(visual, folder)
            samples.append(sample)
        except ValueError as error:
            known = isinstance(entry, dict) and "id" in entry
            name = f" (id {entry['id']!r})" if known else ""
            raise ValueError(f"{place}{name}: {error}") from error
    if not samples:
        raise ValueError(f"{path} holds no sample: give a list of conversations")
    return samples


def check_template(samples: Sequence[Sample], version: str) -> None:
    """Raises ValueError that names the first sample that a template does not take, or the templates
    for an unknown one."""
    for sample in samples:
        try:
            _render(sample.turns, version, eos="")
        except ValueError as error:
            raise ValueError(f"sample {sample.id!r}: {error}") from error


def check_below(visual: Visual, folder: str | Path | None) -> None:
    """ValueError for a path of a list that leads out of the folder where its paths begin.

    A list often comes from others, and must not name what else lies on the disk. An absolute path
    is fine where it is below the folder. Links are followed: whoever has put them there has chosen
    so, as data on other disks needs it.
    """
    if folder is None:
        return
    named = visual.path.partition("#")[0]
    if named.startswith("/"):
        folders = (Path(folder).absolute(), Path(folder).resolve())
        is_plain = stays_below(named.lstrip("/"))
        is_below = is_plain and any(Path(named).is_relative_to(one) for one in folders)
    else:
        is_below = stays_below(named)
    if not is_below:
        raise ValueError(
            f"{visual.kind} {printable(visual.path)} is not below --image_folder {folder}, and a "
            "list reads nothing else: name the folder where its paths begin, / where they are "
            "absolute, or put a link there"
        )


def words(sample: Sample) -> int:
    """Number of words of all turns; placeholders count as words."""
    return sum(len(turn.text.split()) for turn in sample.turns)


def encode(
    sample_or_turns: Sample | Sequence[Turn],
    tokenizer,
    version: str,
    visual_tokens: Sequence[int],
    image_token_id: int,
    max_length: int,
) -> Encoded:
    """Ids and labels of a conversation for training.

    tokenizer       a fast tokenizer of transformers, with an EOS; its BOS comes first, if any
    version         a key of TEMPLATES
    visual_tokens   for every visual, in order, how often image_token_id is written for it
    max_length      tokens; what is longer is cut at its end

    The tokens of an answer are those that begin at or after the end of "ASSISTANT:", up to and
    including EOS. Raises ValueError, with the id of the sample, for a token across the border of
    an answer, an answer that its tokens do not decode to, text that makes special or image tokens,
    a slow tokenizer, a wrong number of visuals, and a cut that takes a visual or every label away.
    """
    name, turns = _named(sample_or_turns)
    try:
        _check_order(turns, last="gpt")
        pieces = _render(turns, version, tokenizer.eos_token)
        encoded, needed = assemble(pieces, tokenizer, visual_tokens, image_token_id)
        return _cut(encoded, needed, max_length)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def encode_prompt(
    question_or_turns: str | Sequence[Turn],
    tokenizer,
    version: str,
    visual_tokens: Sequence[int],
    image_token_id: int,
) -> list[int]:
    """Ids after which the model is to speak: those of `encode` up to and including the last
    "ASSISTANT:" (plain: up to the visual).

    Takes a question with its placeholders, or turns that end with a human one; the rest is as in
    `encode`, ValueError as well.
    """
    if isinstance(question_or_turns, str):
        question_or_turns = [Turn("human", question_or_turns)]
    name, turns = _named(question_or_turns)
    try:
        _check_order(turns, last="human")
        pieces = _render(turns, version, tokenizer.eos_token)
        return assemble(pieces, tokenizer, visual_tokens, image_token_id)[0].input_ids
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, content) of every sample of a file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a JSON list or JSONL of conversations")
    with open(path, "rb") as stream:
        is_list = stream.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if is_list:
        for number, entry in enumerate(_parse(path.read_bytes(), str(path)), start=1):
            yield f"{path} sample {number}", entry
        return
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{path} line {number}", _parse(line, f"{path} line {number}")


def _parse(text: bytes, place: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} is no JSON: {error}; give one JSON list, or one object per line"
        ) from error


def _sample(entry) -> Sample:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
        raise ValueError("a sample is an object with an id, a text or a whole number: give it one")
    turns = _read_turns(entry.get("conversations"))
    _check_order(turns, last="gpt")
    visuals = [
        Visual(kind, path) for kind in ("image", "video") for path in _paths(entry.get(kind), kind)
    ]
    return Sample(str(entry["id"]), *_place_visuals(turns, visuals))


def _read_turns(conversations) -> list[Turn]:
    if not isinstance(conversations, list):
        raise ValueError("conversations is no list: give the turns there")
    turns = []
    for number, turn in enumerate(conversations, start=1):
        known = isinstance(turn, dict) and isinstance(turn.get("value"), str)
        if not known or turn.get("from") not in SPEAKERS:
            raise ValueError(f'turn {number} is no {{"from": "human" or "gpt", "value": text}}')
        turns.append(Turn(turn["from"], turn["value"]))
    return turns


def _check_order(turns: Sequence[Turn], last: str) -> None:
    speakers = [turn.speaker for turn in turns]
    expected = [SPEAKERS[number % 2] for number in range(len(turns))]
    if speakers != expected or not speakers or speakers[-1] != last:
        raise ValueError(
            f"the turns are those of {', '.join(speakers) or 'nobody'}: they must alternate, begin "
            f"with human and end with {last}; merge or take out turns"
        )
    for number, turn in enumerate(turns, start=1):
        if turn.speaker == "gpt" and _PLACEHOLDER.search(turn.text):
            raise ValueError(
                f"turn {number}, an answer, holds {_PLACEHOLDER.search(turn.text)[0]}: only human "
                "turns show something; write it in another way, for example without the brackets"
            )


def _paths(value, kind: str) -> list[str]:
    """Paths of a field that holds one, several, or nothing (absent or null)."""
    paths = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{kind} is {value!r}: give a path or a list of paths")
    return paths


def _place_visuals(turns: list[Turn], visuals: list[Visual]):
    """(turns with their placeholders in front, visuals in the order of these)."""
    found = [_PLACEHOLDER.findall(turn.text) for turn in turns]
    if len(visuals) == 1 and not any(found):
        found[0] = [f"<{visuals[0].kind}>"]
    kinds = [placeholder[1:-1] for placeholders in found for placeholder in placeholders]
    if len(kinds) != len(visuals):
        raise ValueError(
            f"{len(kinds)} placeholders for {len(visuals)} visuals: write {IMAGE} or {VIDEO} once "
            "for each path"
        )
    given = [visual.kind for visual in visuals]
    if len(set(given)) == 1:
        kinds = given
    if sorted(kinds) != sorted(given):
        raise ValueError(
            f"{kinds.count('video')} {VIDEO} for {given.count('video')} videos: where images and "
            "videos meet, each needs a placeholder of its kind"
        )
    waiting = {kind: iter([v for v in visuals if v.kind == kind]) for kind in given}
    ordered = tuple(next(waiting[kind]) for kind in kinds)
    placed, taken = [], iter(ordered)
    for turn, placeholders in zip(turns, found, strict=True):
        front = "".join(f"<{next(taken).kind}>\n" for _ in placeholders)
        rest = _PLACEHOLDER.sub("", turn.text).strip() if front else turn.text
        placed.append(Turn(turn.speaker, front + rest))
    return tuple(placed), ordered


def _named(sample_or_turns: Sample | Sequence[Turn]) -> tuple[str, Sequence[Turn]]:
    """(what errors call it, turns)."""
    if isinstance(sample_or_turns, Sample):
        return f"sample {sample_or_turns.id!r}", sample_or_turns.turns
    begin = sample_or_turns[0].text[:60] if sample_or_turns else ""
    return f"turns that begin with {begin!r}", sample_or_turns


def _render(turns: Sequence[Turn], version: str, eos: str | None) -> list[Piece]:
    """The text of a conversation, cut at its visuals: one piece more than there are visuals."""
    if version not in TEMPLATES:
        raise ValueError(f"version is {version!r}; choose one of {', '.join(TEMPLATES)}")
    system = TEMPLATES[version]
    if system is None:
        return _render_plain(turns)
    if eos is None:
        raise ValueError(f"the tokenizer has no EOS, with which {version} ends an answer: set one")
    pieces = [Piece(f"{system} ")]
    for turn in turns:
        if turn.speaker == "gpt":
            pieces[-1].add_answer(" ", turn.text, eos)
            continue
        first, *others = _PLACEHOLDER.split(turn.text)
        pieces[-1].text += f"USER: {first}"
        pieces += [Piece(text) for text in others]
        pieces[-1].text += " ASSISTANT:"
    return pieces


def _render_plain(turns: Sequence[Turn]) -> list[Piece]:
    shown = _PLACEHOLDER.findall(turns[0].text)
    if len(turns) > 2 or len(shown) != 1:
        raise ValueError(
            f"{len(turns)} turns and {len(shown)} visuals: plain is for one visual and its "
            "caption; choose another version"
        )
    pieces = [Piece(), Piece()]
    for turn in turns[1:]:
        pieces[1].add_answer("", f"{turn.text}\n", "")
    return pieces


def _cut(encoded: Encoded, needed: int, max_length: int) -> Encoded:
    length = len(encoded.input_ids)
    if length <= max_length:
        return encoded
    if needed > max_length:
        raise ValueError(
            f"{length} tokens, the last visual ends at {needed}, --model_max_length {max_length} "
            f"would cut it: raise --model_max_length to more than {needed}"
        )
    labels = encoded.labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError(
            f"{length} tokens, no answer begins within --model_max_length {max_length}: raise it"
        )
    return Encoded(encoded.input_ids[:max_length], labels)
