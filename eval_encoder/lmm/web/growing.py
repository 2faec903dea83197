"""An answer while it grows: made in a thread, ended by a limit of time or by whoever listens.

    texts(request) -> the text so far, again and again -> at last the whole answer

One answer is made at a time. Whoever no longer wants the rest closes the iterator; the thread then
ends at the next block of the model's layers.
"""

import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from transformers import TextStreamer

from ..generate import AnswerStopped, Request, Speaker

POLL_S = 0.3  # between two texts: seldom enough to cost nothing, often enough to read along


class Heard(TextStreamer):
    """A streamer that keeps what was said so far in `text`."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with every word."""
        self.text += text


class GrowingAnswers:
    """Answers of at most `max_seconds` each, one at a time."""

    def __init__(self, max_seconds: float):
        self.max_seconds = max_seconds
        self._alone = threading.Lock()

    def texts(self, speaker: Speaker, request: Request) -> Iterator[str]:
        """The text so far, every POLL_S and at the end. A search with beams says nothing before
        its end.

        Raises what Speaker.answer raises, and AnswerStopped where the time is over: at once, also
        where the model does not come to its next block.
        """
        until = time.monotonic() + self.max_seconds
        unwanted = threading.Event()
        # a search with beams takes no streamer: it changes its mind about earlier words
        streamer = None if speaker.decoding.num_beams > 1 else Heard(speaker.lmm.tokenizer)
        outcome: SimpleQueue = SimpleQueue()

        def work() -> None:
            try:
                with self._alone:
                    outcome.put(speaker.answer([request], streamer, stop=unwanted.is_set))
            except BaseException as error:  # whatever it is, it is the listener's
                outcome.put(error)

        # daemon: a command that is ended does not wait for an answer
        threading.Thread(target=work, name="answer", daemon=True).start()
        try:
            while True:
                try:
                    result = outcome.get(timeout=POLL_S)
                    break
                except Empty:
                    yield "" if streamer is None else streamer.text.strip()
                if time.monotonic() > until:
                    raise AnswerStopped(
                        f"the answer was stopped after {self.max_seconds:g} s, the longest time "
                        "that one may take (--max_seconds)"
                    )
        finally:
            unwanted.set()
        if isinstance(result, BaseException):
            raise result
        yield result[0]
