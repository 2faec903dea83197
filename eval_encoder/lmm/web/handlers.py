"""What happens on the page: a visitor uploads, asks, stops, begins a new chat.

    upload -> size, then content: an image or a clip within the limits, whatever its name says
    question -> its length -> GrowingAnswers: the answer while it grows -> a Dialogue

Needs no gradio: handlers take values and give values. Where they yield, gradio may close them: a
visitor who left. Cost: that of lmm/chat.py.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from model_factory.command_line.plain_text import RUNNING, in_html

from ..chat import Dialogue, one_line
from ..data.conversation import IMAGE, Visual

if TYPE_CHECKING:  # imports torch, which --help must not
    from ..data.visuals import VisualItem
    from ..generate import Request, Speaker

# Of an upload; its pixels are limited by InputLimits. Choices, for a machine that strangers share:
# 64 MiB hold ten minutes of film at 0.9 Mbit/s, and any photograph.
MAX_BYTES = 64 << 20
MAX_CLIP_SECONDS = 600.0
MAX_SESSIONS = 64  # visitors whose dialogues are remembered, some 10 MB each with a clip
# characters: the context of LLaVA-1.5's language models, 4096 tokens of some four characters
LONGEST_QUESTION = 16_384
# That Stop waits until the answer's generator has ended, which takes about POLL_S. The thread that
# answers goes on to the model's next block and may then still be alive.
HALT_S = 5.0
POLL_S = 0.3  # between two texts: seldom enough to cost nothing, often enough to read along
NOT_SEEN = ("container", "no_video")  # reasons of RejectedInput for files that are not clips

Messages = list[dict[str, object]]


@dataclass(frozen=True)
class Limits:
    """max_answer_seconds: of one answer; max_waiting: how many questions and uploads may wait."""

    max_answer_seconds: float = 120.0
    max_waiting: int = 32

    def __post_init__(self) -> None:
        if not self.max_answer_seconds > 0:
            raise ValueError(f"--max_seconds {self.max_answer_seconds}: give more than 0")
        if self.max_waiting < 1:
            raise ValueError(f"--max_waiting {self.max_waiting}: at least 1")


def read_upload(speaker: "Speaker", path: Path) -> "VisualItem":
    """VisualItem of an uploaded file, an image or a clip.

    Raises ValueError with the file's name for what is too large, damaged, or neither an image nor
    a clip.
    """
    from data_pipeline.codec.open_video import InputLimits
    from data_pipeline.errors import RejectedInput
    from eval_encoder.clip_reader import shared_reader

    limits = InputLimits(max_bytes=MAX_BYTES, max_seconds=MAX_CLIP_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        # readers go by names too: a link without a suffix, so that content alone decides
        plain = Path(folder, "upload")
        plain.symlink_to(path.resolve())  # a relative target would be looked for beside the link
        try:
            try:
                return speaker.reader.picture(shared_reader().picture(plain, limits))
            except RejectedInput as error:
                if error.reason != "image":
                    raise
            return speaker.reader(Visual("video", str(plain)), limits)
        except RejectedInput as error:
            detail = error.detail.replace(str(plain), path.name)
            if error.reason in NOT_SEEN:
                detail = f"{path.name} is neither a picture nor a clip that can be read"
            raise ValueError(detail) from error


class GrowingAnswers:
    """Answers of at most `max_seconds` each, one at a time."""

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self._alone = threading.Lock()

    def texts(self, speaker: "Speaker", request: "Request") -> Generator[str, None, None]:
        """The text so far, every POLL_S and at the end. A beam search gives nothing before its end.

        Whoever no longer wants the rest closes the iterator; the thread that answers then ends at
        the next block of the model's layers. Raises what Speaker.answer raises, and AnswerStopped
        where the time is over: at once, also where the model does not come to its next block.
        """
        from ..generate import AnswerStopped, WordStreamer

        deadline = time.monotonic() + self.max_seconds
        is_closed = threading.Event()
        words: list[str] = []
        streamer = None
        # a beam search takes no streamer: it changes its mind about earlier words
        if speaker.decoding.num_beams == 1:
            streamer = WordStreamer(speaker.lmm.tokenizer, write=lambda text, _: words.append(text))
        outcome: SimpleQueue[list[str] | BaseException] = SimpleQueue()

        def work() -> None:
            try:
                with self._alone:
                    answers = speaker.answer([request], streamer=streamer, stop=is_closed.is_set)
                    outcome.put(answers)
            except BaseException as error:  # whatever it is, it is raised where texts are read
                outcome.put(error)

        # daemon: a command that is ended does not wait for an answer
        threading.Thread(target=work, name="answer", daemon=True).start()
        try:
            while True:
                try:
                    result = outcome.get(timeout=POLL_S)
                    break
                except Empty:
                    yield "".join(words).strip()
                if time.monotonic() > deadline:
                    raise AnswerStopped(
                        f"the answer was stopped after {self.max_seconds:g} s, the longest time "
                        "that one may take (--max_seconds)"
                    )
        finally:
            is_closed.set()
        if isinstance(result, BaseException):
            raise result
        yield result[0]


@dataclass(frozen=True)
class Visit:
    """An opened page, and how often its Stop was pressed before."""

    session: str
    num_stops: int


class Handlers:
    """What happens on an upload, on a question, for a new chat; `warn` shows a text, as HTML."""

    def __init__(self, speaker: "Speaker", warn: Callable[[str], object], limits: Limits) -> None:
        self._speaker = speaker
        self._warn = warn
        self._answers = GrowingAnswers(limits.max_answer_seconds)
        self._stopped: dict[str, int] = {}  # session -> num_stops of the last visit stopped
        self._answered: str | None = None  # session whose answer is being made
        self._changed = threading.Condition()

    def show(self, path: str | None) -> tuple[str | None, Dialogue, Messages]:
        """(upload, dialogue, messages) of a new upload, of none where it is refused."""
        dialogue = Dialogue()
        if path is not None:
            try:
                dialogue = Dialogue((read_upload(self._speaker, Path(path)),))
            except ValueError as error:
                self._problem(error)
                path = None
        return path, dialogue, _messages(dialogue, path)

    def answer(
        self,
        visit: Visit,
        question: str,
        path: str | None,
        dialogue: Dialogue,
        temperature: float,
        length: float,
    ) -> Iterator[tuple[str, Dialogue, Messages]]:
        """(question, dialogue, messages), again and again while the answer grows.

        The question comes back where no word was answered; the words of a stopped answer stay.
        gradio closes this generator when the visitor leaves.
        """
        question = question.strip()
        if not question or self._is_stopped(visit):
            yield question, dialogue, _messages(dialogue, path)
            return
        # checked here too: the browser's own limit binds the page, not who speaks to the server
        if len(question) > LONGEST_QUESTION:
            text = f"a question of {len(question)} characters: at most {LONGEST_QUESTION} are read"
            self._problem(ValueError(text))
            yield question[:LONGEST_QUESTION], dialogue, _messages(dialogue, path)
            return
        asked = dialogue.ask(question)
        shown = asked
        decoding = replace(
            self._speaker.decoding, temperature=temperature, max_new_tokens=int(length)
        )
        speaker = replace(self._speaker, decoding=decoding)
        texts = self._answers.texts(speaker, asked.request())
        text = ""
        # around every yield: a Stop waits for the last one, so that what follows it comes after
        with self._answering(visit):
            yield "", dialogue, _messages(asked, path)
            try:
                with closing(texts):
                    for text in self._until_stopped(visit, texts):
                        if text:  # until the first word the question stands alone
                            dialogue = asked.said(text)
                            shown = dialogue
                        yield "", dialogue, _messages(shown, path)
                if not self._is_stopped(visit):
                    dialogue = asked.said(text)  # an answer may be empty
            except (ValueError, RuntimeError) as error:  # RuntimeError: no memory left, or no time
                self._problem(error)
            is_unanswered = len(dialogue.turns) < len(asked.turns)
            yield question if is_unanswered else "", dialogue, _messages(dialogue, path)

    def halt(self, visit: Visit) -> int:
        """Stop what the visitor has asked for, whether it is answered or waits; returns the number
        of Stops until now."""
        with self._changed:
            self._stopped.pop(visit.session, None)
            self._stopped[visit.session] = visit.num_stops
            while len(self._stopped) > MAX_SESSIONS:
                self._stopped.pop(next(iter(self._stopped)))
            # what follows, such as a new chat, must not be overwritten by the end of the old one
            self._changed.wait_for(lambda: self._answered != visit.session, timeout=HALT_S)
        return visit.num_stops + 1

    def forget(self, path: str | None, dialogue: Dialogue) -> tuple[Dialogue, Messages]:
        """(dialogue, messages) of a new chat about the same upload."""
        dialogue = dialogue.forget()
        return dialogue, _messages(dialogue, path)

    def _is_stopped(self, visit: Visit) -> bool:
        return self._stopped.get(visit.session, -1) >= visit.num_stops

    def _until_stopped(self, visit: Visit, texts: Iterator[str]) -> Iterator[str]:
        """Texts until the visit is stopped; after that not even the first, which starts the thread
        that answers, is asked for."""
        while not self._is_stopped(visit):
            text = next(texts, None)
            if text is None:
                return
            yield text

    @contextmanager
    def _answering(self, visit: Visit) -> Iterator[None]:
        with self._changed:
            self._answered = visit.session
        try:
            yield
        finally:
            with self._changed:
                if self._answered == visit.session:
                    self._answered = None
                self._changed.notify_all()

    def _problem(self, error: Exception) -> None:
        self._warn(in_html(one_line(error)))  # a file's name is not ours


def _messages(dialogue: Dialogue, path: str | None) -> Messages:
    """A dialogue as the page shows it: the upload, then the turns. The page takes a text for HTML,
    so that its special characters are escaped: neither a visitor nor the model writes markup."""
    messages: Messages = []
    if dialogue.visuals:
        messages.append({"role": "user", "content": {"path": path}})
    roles = {"human": "user", "gpt": "assistant"}
    for turn in dialogue.turns:
        text = in_html(turn.text.replace(f"{IMAGE}\n", ""), keep=RUNNING)
        messages.append({"role": roles[turn.speaker], "content": text})
    return messages
