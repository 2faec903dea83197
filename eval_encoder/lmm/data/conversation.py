"""Conversations about images and clips -> token ids and labels, exact by construction.

    LLaVA's list -> Sample -> every n-th of them -> without visuals, for the blind baseline
      -> checked, before anything heavy is imported or loaded (`stage_samples`)
    Sample -> text of the template, cut at its visuals -> ids and labels (`encode`)

    plain       [BOS, visual, caption, newline]; the human text is thrown away; no EOS
    v1          system text, then "USER: q ASSISTANT: a</s>" for every round, without a space
                between </s> and the next USER
    llava_v1    the same with another system text

What breaks a rule of the format is an error that names the sample, never a masked sample. A wrong
path, a broken line or an absent image ends a stage within seconds, not after minutes of loading
weights. Needs no more than the standard library. Cost: that of labels.py; a list is held in memory
as a whole, and every image and clip is looked up in the file system once.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model_factory.command_line.plain_text import printable
from model_factory.files import stays_below

from ..config import LmmArguments
from .labels import IGNORE_INDEX, Encoded, Piece, assemble

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
VIDEO = "<video>"
# a conversation alternates between them, in this order
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
    """The text of one side. Human text may hold placeholders of visuals."""

    speaker: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Visual:
    """An image or a video, by its path in the list, relative to a folder that the list does not
    know."""

    kind: Literal["image", "video"]
    path: str

    def place(self, folder: Path) -> Path:
        """File or folder that the path names; the key of a packed clip follows behind a `#`."""
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

    Raises ValueError that names file, line and id of the first sample that breaks these rules.
    """
    path = Path(path)
    samples = []
    for location, entry in _entries(path):
        try:
            sample = _sample(entry)
            for visual in sample.visuals:
                check_below(visual, folder)
            samples.append(sample)
        except ValueError as error:
            has_id = isinstance(entry, dict) and "id" in entry
            name = f" (id {entry['id']!r})" if has_id else ""
            raise ValueError(f"{location}{name}: {error}") from error
    if not samples:
        raise ValueError(f"{path} holds no sample: give a list of conversations")
    return samples


def stage_samples(arguments: LmmArguments) -> list[Sample]:
    """The samples that a stage trains on, checked.

    Raises ValueError for an --image_folder that is none, what `read_samples` raises, a
    --data_fraction that leaves nothing, a sample that the template does not take, and for images
    and clips that are absent.
    """
    folder = Path(arguments.image_folder)
    if not folder.is_dir():
        raise ValueError(f"--image_folder {folder} is no folder: name the one that paths begin at")
    # a blind model reads no files, so that its list may name any
    samples = read_samples(arguments.data_path, None if arguments.blind else folder)
    count = int(len(samples) * arguments.data_fraction)
    if not count:
        raise ValueError(
            f"--data_fraction {arguments.data_fraction} of the {len(samples)} samples of "
            f"{arguments.data_path} is none: give a larger one"
        )
    # spread evenly, as lists are often sorted by their source
    samples = [samples[int(number / arguments.data_fraction)] for number in range(count)]
    if arguments.blind:
        samples = [without_visuals(sample) for sample in samples]
    for sample in samples:
        try:
            _render(sample.turns, version=arguments.version, eos="")
        except ValueError as error:
            raise ValueError(f"sample {sample.id!r}: {error}") from error
    _check_present(samples, folder)
    return samples


def without_visuals(sample: Sample) -> Sample:
    """The same conversation, text only: what a blind reader is given."""
    turns = [
        Turn(turn.speaker, turn.text.replace("<image>\n", "").replace("<video>\n", ""))
        for turn in sample.turns
    ]
    return Sample(id=sample.id, turns=tuple(turns), visuals=())


def _check_present(samples: Sequence[Sample], folder: Path) -> None:
    """Raises ValueError that counts the files below `folder` that are absent and names the first
    of them."""
    # {file: a sample that shows it}; a packed folder holds many visuals and is looked up once
    users: dict[Path, str] = {}
    for sample in samples:
        for visual in sample.visuals:
            users.setdefault(visual.place(folder), sample.id)
    absent = [(path, name) for path, name in users.items() if not path.exists()]
    if absent:
        named = [f"{path} (sample {name!r})" for path, name in absent[:5]]
        first = ", ".join(named)
        raise ValueError(
            f"{len(absent)} of {len(users)} pictures and clips are not there; the first: {first}; "
            "check --image_folder"
        )


def check_below(visual: Visual, folder: str | Path | None) -> None:
    """ValueError for a path of a list that leads out of the folder where its paths begin.

    A list often comes from others, and must not name other files of the disk. An absolute path
    is fine where it is below the folder. Links are followed: whoever has put them there has chosen
    so, as data on other disks needs it.
    """
    if folder is None:
        return
    named = visual.path.partition("#")[0]
    if named.startswith("/"):
        # the list may name the folder by its links or by where they lead
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
    tokenizer: "PreTrainedTokenizerBase",
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
        encoded, visuals_end = assemble(
            _render(turns, version=version, eos=tokenizer.eos_token),
            tokenizer=tokenizer,
            visual_tokens=visual_tokens,
            image_token_id=image_token_id,
        )
        return _cut(encoded, visuals_end=visuals_end, max_length=max_length)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def encode_prompt(
    question_or_turns: str | Sequence[Turn],
    tokenizer: "PreTrainedTokenizerBase",
    version: str,
    visual_tokens: Sequence[int],
    image_token_id: int,
) -> list[int]:
    """Ids after which the model answers: those of `encode` up to and including the last
    "ASSISTANT:" (plain: up to the visual).

    Takes a question with its placeholders, or turns that end with a human one; the rest is as in
    `encode`, ValueError as well.
    """
    if isinstance(question_or_turns, str):
        question_or_turns = [Turn("human", question_or_turns)]
    name, turns = _named(question_or_turns)
    try:
        _check_order(turns, last="human")
        encoded, _ = assemble(
            _render(turns, version=version, eos=tokenizer.eos_token),
            tokenizer=tokenizer,
            visual_tokens=visual_tokens,
            image_token_id=image_token_id,
        )
        return encoded.input_ids
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line or rank, content) of every sample of a file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a JSON list or JSONL of conversations")
    # a byte order mark and blanks may stand in front; lists of millions are read line by line
    with open(path, "rb") as stream:
        is_list = stream.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if is_list:
        for number, entry in enumerate(_parse(path.read_bytes(), str(path)), start=1):
            yield f"{path} sample {number}", entry
        return
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                location = f"{path} line {number}"
                yield location, _parse(line, location)


def _parse(text: bytes, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{location} is no JSON: {error}; give one JSON list, or one object per line"
        ) from error


def _sample(entry: Any) -> Sample:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
        raise ValueError("a sample is an object with an id, a text or a whole number: give it one")
    turns = _read_turns(entry.get("conversations"))
    _check_order(turns, last="gpt")
    visuals = [Visual("image", path) for path in _paths(entry.get("image"), "image")]
    visuals += [Visual("video", path) for path in _paths(entry.get("video"), "video")]
    ordered = _in_order(turns, visuals)
    return Sample(
        id=str(entry["id"]), turns=_placeholders_in_front(turns, ordered), visuals=ordered
    )


def _read_turns(conversations: Any) -> list[Turn]:
    if not isinstance(conversations, list):
        raise ValueError("conversations is no list: give the turns there")
    turns = []
    for number, turn in enumerate(conversations, start=1):
        has_text = isinstance(turn, dict) and isinstance(turn.get("value"), str)
        if not has_text or turn.get("from") not in SPEAKERS:
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
        shown = _PLACEHOLDER.search(turn.text)
        if turn.speaker == "gpt" and shown is not None:
            raise ValueError(
                f"turn {number}, an answer, holds {shown[0]}: only human turns show something; "
                "write it in another way, for example without the brackets"
            )


def _paths(value: Any, kind: str) -> list[str]:
    """Paths of a field that holds one, several, or nothing (absent or null)."""
    if value is None:
        return []
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{kind} is {value!r}: give a path or a list of paths")
    return paths


def _in_order(turns: Sequence[Turn], visuals: Sequence[Visual]) -> tuple[Visual, ...]:
    """The visuals in the order of their placeholders."""
    placeholders = [shown for turn in turns for shown in _PLACEHOLDER.findall(turn.text)]
    kinds = [shown[1:-1] for shown in placeholders]  # without the brackets
    if len(visuals) == 1 and not kinds:
        return tuple(visuals)
    if len(kinds) != len(visuals):
        raise ValueError(
            f"{len(kinds)} placeholders for {len(visuals)} visuals: write {IMAGE} or {VIDEO} once "
            "for each path"
        )
    given = [visual.kind for visual in visuals]
    # published video lists write <image> for clips
    if len(set(given)) <= 1:
        return tuple(visuals)
    if sorted(kinds) != sorted(given):
        raise ValueError(
            f"{kinds.count('video')} {VIDEO} for {given.count('video')} videos: where images and "
            "videos meet, each needs a placeholder of its kind"
        )
    # visuals of a kind keep their order; the placeholders give the order of the kinds
    waiting = {kind: iter([v for v in visuals if v.kind == kind]) for kind in given}
    return tuple(next(waiting[kind]) for kind in kinds)


def _placeholders_in_front(turns: Sequence[Turn], visuals: Sequence[Visual]) -> tuple[Turn, ...]:
    """The turns, each with the placeholders of its visuals moved to its front."""
    counts = [len(_PLACEHOLDER.findall(turn.text)) for turn in turns]
    if not any(counts):
        # a visual without a placeholder belongs in front of the first turn
        counts[0] = len(visuals)
    remaining = iter(visuals)
    placed = []
    for turn, count in zip(turns, counts, strict=True):
        text = turn.text
        if count:
            kinds = [next(remaining).kind for _ in range(count)]
            front = "".join(f"<{kind}>\n" for kind in kinds)
            text = front + _PLACEHOLDER.sub("", text).strip()
        placed.append(Turn(turn.speaker, text))
    return tuple(placed)


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
            pieces[-1].add_answer(turn.text, lead=" ", eos=eos)
            continue
        first, *others = _PLACEHOLDER.split(turn.text)
        # behind an answer this follows </s> without a space, as published
        pieces[-1].text += f"USER: {first}"
        pieces += [Piece(text) for text in others]
        pieces[-1].text += " ASSISTANT:"
    return pieces


def _render_plain(turns: Sequence[Turn]) -> list[Piece]:
    """The visual and its caption; the human text is thrown away."""
    shown = _PLACEHOLDER.findall(turns[0].text)
    if len(turns) > 2 or len(shown) != 1:
        raise ValueError(
            f"{len(turns)} turns and {len(shown)} visuals: plain is for one visual and its "
            "caption; choose another version"
        )
    pieces = [Piece(), Piece()]
    for turn in turns[1:]:
        pieces[1].add_answer(f"{turn.text}\n")
    return pieces


def _cut(encoded: Encoded, visuals_end: int, max_length: int) -> Encoded:
    """The first `max_length` tokens. ValueError where these lack part of a visual, which the model
    could not match with its tokens, or have no label."""
    length = len(encoded.input_ids)
    if length <= max_length:
        return encoded
    if visuals_end > max_length:
        raise ValueError(
            f"{length} tokens, the last visual ends at {visuals_end}, --model_max_length "
            f"{max_length} would cut it: raise --model_max_length to more than {visuals_end}"
        )
    labels = encoded.labels[:max_length]
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError(
            f"{length} tokens, no answer begins within --model_max_length {max_length}: raise it"
        )
    return Encoded(encoded.input_ids[:max_length], labels)
