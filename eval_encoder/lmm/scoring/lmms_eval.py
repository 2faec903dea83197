"""A model adapter for lmms-eval (EvolvingLMMs-Lab) 0.7 or later; the only module that imports it.

    python -m eval_encoder.lmm.scoring.lmms_eval --model univit_lmm --model_args pretrained=OUT \\
        --tasks mme,pope --batch_size 8 --output_path RESULTS

is lmms-eval's own command line with `univit_lmm` among its models; started by torchrun, it divides
the documents among the ranks. From Python, hand a `UnivitLmm(OUT)` to lmms_eval's simple_evaluate.
An installed package may name `model_manifest` as an entry point of the group lmms_eval.models; then
plain `lmms-eval` knows the model.

    --model_args   pretrained   folder that lmm_probe.py wrote
                   video_view   frame or codec; this and the others: as trained, if not given
                   num_frames   of a clip, with frame
                   K_keep       patches of a clip, with codec

    lmms-eval             here
    context               a human turn; its placeholders are taken out, and one for each image and
                          clip is put in front, as in training
    PIL image             an image, alpha laid on white
    path                  an image or a clip, by its ending
    generation_kwargs     those of ARGUMENTS; stop strings are cut off afterwards
    log-likelihood        of the whole answer, its end included: see generate.py

lmms-eval 0.7.3 turns log-likelihoods into text on their way to a task, and takes the choice with
the smallest: tasks of the types loglikelihood and multiple_choice fail there, with any model.

Without lmms-eval this module imports, and what needs it raises ImportError. Cost: that of
generate.py.
"""

import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data_pipeline.codec.open_video import is_image
from data_pipeline.errors import MissingLibrary
from model_factory.command_line.command import run_command

from ..data.conversation import Visual
from ..data.visuals import VisualItem
from ..generate import (
    Decoding,
    Likelihood,
    Request,
    Speaker,
    log_likelihood,
    open_speaker,
)
from ..questions import Question, request_of

_ABSENT: ImportError | None = None
try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    lmms = object  # a base for the class below, so that the module imports without the library
    _ABSENT = error

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelManifest

LOG = logging.getLogger("univit")
MODEL_NAME = "univit_lmm"
# generation_kwargs that have an effect
ARGUMENTS = ("max_new_tokens", "temperature", "do_sample", "top_p", "num_beams", "until")


@dataclass(frozen=True)
class Asked:
    """One request of lmms-eval. `fetch` gives its images (PIL) and paths, or None; it is called
    when its batch comes, as all of them at once would fill the memory. `name` is for errors."""

    context: str
    fetch: Callable[[], Sequence | None]
    name: str

    def request(self, speaker: Speaker) -> Request:
        """The same as a Request, with everything read. Raises ValueError with the name."""
        try:
            read = [_read(speaker, visual) for visual in self.fetch() or ()]
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.name}: {error}") from error
        unnamed = tuple(Visual(kind, "") for kind, _ in read)  # a PIL image has no path
        request = request_of(Question(self.name, self.context, unnamed))
        return replace(request, visuals=tuple(item for _, item in read))


def decoding_of(arguments: dict, default: Decoding) -> Decoding:
    """Of generation_kwargs, where None stands for what is not given; `default` for the rest. Greedy
    unless do_sample or a temperature asks for draws."""
    given = {name: value for name, value in arguments.items() if value is not None}
    names = ("max_new_tokens", "top_p", "num_beams")
    fields = {name: given[name] for name in names if name in given}
    is_drawn = given.get("do_sample", given.get("temperature", 0) > 0)
    # 1 is transformers' own default where do_sample alone is given
    temperature = given.get("temperature", 1.0) if is_drawn else 0.0
    return replace(default, temperature=temperature, **fields)


def stop_strings(arguments: dict) -> tuple[str, ...]:
    """`until` of generation_kwargs: a text, several, or none."""
    until = arguments.get("until") or ()
    if isinstance(until, str):
        until = [until]
    return tuple(text for text in until if text)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings, without space at its end."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text.rstrip()


def answer_until(
    speaker: Speaker,
    asked: Sequence[Asked],
    arguments: Sequence[dict],
    batch_size: int,
    quiet: bool = False,
) -> list[str]:
    """One text for each, in order; those of equal generation_kwargs share batches. Logs what of
    these has no effect. `quiet`: no progress bar."""
    names = {name for given in arguments for name in given}
    unknown = sorted(names - set(ARGUMENTS))
    if unknown:
        LOG.warning("generation_kwargs %s: no effect on %s", ", ".join(unknown), MODEL_NAME)
    # generate takes one decoding for a batch
    groups: dict[tuple[Decoding, tuple[str, ...]], list[int]] = {}
    for index, given in enumerate(arguments):
        group = (decoding_of(given, speaker.decoding), stop_strings(given))
        groups.setdefault(group, []).append(index)
    texts = [""] * len(asked)  # filled by index, since groups change the order
    with tqdm(total=len(asked), desc="answers", disable=quiet) as bar:
        for (decoding, stops), indices in groups.items():
            for batch in _batches(indices, batch_size):
                # another seed for every batch: lmms-eval repeats a request to draw several answers
                decoding_of_batch = replace(decoding, seed=decoding.seed + batch[0])
                batch_speaker = replace(speaker, decoding=decoding_of_batch)
                requests = [asked[index].request(speaker) for index in batch]
                answers = batch_speaker.answer(requests)
                for index, answer in zip(batch, answers, strict=True):
                    texts[index] = cut(answer, stops)
                bar.update(len(batch))
    return texts


def rate_answers(
    speaker: Speaker,
    asked: Sequence[Asked],
    answers: Sequence[str],
    batch_size: int,
    quiet: bool = False,
) -> list[Likelihood]:
    """How likely each answer is, in order. Space around an answer does not count: the conversation
    template has its own."""
    likelihoods: list[Likelihood] = []
    with tqdm(total=len(asked), desc="log-likelihoods", disable=quiet) as bar:
        for batch in _batches(range(len(asked)), batch_size):
            likelihoods += log_likelihood(
                speaker,
                requests=[asked[index].request(speaker) for index in batch],
                answers=[answers[index].strip() for index in batch],
            )
            bar.update(len(batch))
    return likelihoods


class UnivitLmm(lmms):
    """A model of lmm_probe.py as lmms-eval knows models; arguments as in the module's text, device
    and batch_size from its command line."""

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        num_frames: int | None = None,
        video_view: str | None = None,
        K_keep: int | None = None,
    ) -> None:
        """device: by default a GPU where there is one. Raises ImportError without lmms-eval."""
        _require()
        super().__init__()
        if not device:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.batch_size = int(batch_size)
        self.speaker = open_speaker(
            pretrained,
            device=self.device,
            video_view=video_view,
            num_frames=num_frames,
            num_tokens=K_keep,
        )
        if dist.is_initialized():  # by lmms-eval, which then hands each rank its own documents
            self._rank = dist.get_rank()
            self._world_size = dist.get_world_size()

    def generate_until(self, requests: list["Instance"]) -> list[str]:
        """Answers to (context, generation_kwargs, doc_to_visual, document, task, split)."""
        return answer_until(
            self.speaker,
            asked=[self._asked(request) for request in requests],
            arguments=[request.args[1] for request in requests],
            batch_size=self.batch_size,
            quiet=self.rank > 0,
        )

    def loglikelihood(self, requests: list["Instance"]) -> list[Likelihood]:
        """Of (context, answer or doc_to_target, doc_to_visual, document, task, split)."""
        return rate_answers(
            self.speaker,
            asked=[self._asked(request) for request in requests],
            answers=[self._answer(request) for request in requests],
            batch_size=self.batch_size,
            quiet=self.rank > 0,
        )

    def generate_until_multi_round(self, requests: list["Instance"]) -> list[str]:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            f"{MODEL_NAME} answers single rounds: in tasks of several rounds the pictures of one "
            "depend on the answer before; choose other tasks"
        )

    def _asked(self, request: "Instance") -> Asked:
        context, _, doc_to_visual, document, task, split = request.args

        def fetch() -> Sequence[object] | None:
            return doc_to_visual(self.task_dict[task][split][document])

        return Asked(context=context, fetch=fetch, name=f"{task} {split} document {document}")

    def _answer(self, request: "Instance") -> str:
        _, target, _, document, task, split = request.args
        if isinstance(target, str):
            return target
        return str(target(self.task_dict[task][split][document]))


def model_manifest() -> "ModelManifest":
    """The entry of lmms-eval's registry of models. Raises ImportError without lmms-eval."""
    _require()
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        MODEL_NAME, simple_class_path=f"eval_encoder.lmm.scoring.lmms_eval.{UnivitLmm.__name__}"
    )


def main() -> int:
    """lmms-eval's own command line; returns the exit code."""
    return run_command(parse=lambda argv: None, work=lambda args: _run_lmms_eval())


def _run_lmms_eval() -> None:
    try:
        manifest = model_manifest()
    except ImportError as error:
        raise MissingLibrary(str(error)) from error
    from lmms_eval.models import MODEL_REGISTRY_V2

    # in this process, so that the command line below finds the model among its own
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)


def _require() -> None:
    if _ABSENT is not None:
        raise ImportError(
            f"lmms-eval cannot be imported ({_ABSENT}): pip install lmms-eval"
        ) from _ABSENT


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    starts = range(0, len(indices), size)
    return (indices[start : start + size] for start in starts)


def _read(speaker: Speaker, visual: object) -> tuple[Literal["image", "video"], VisualItem]:
    """(image or video, what the tower sees) of a PIL image or a path."""
    if isinstance(visual, str | os.PathLike):
        kind: Literal["image", "video"] = "image" if is_image(Path(visual)) else "video"
        return kind, speaker.reader(Visual(kind, str(visual)))
    return "image", speaker.reader.picture(_pixels(visual))


def _pixels(picture: object) -> np.ndarray:
    """uint8 [H, W, 3] of a PIL image."""
    from PIL import Image

    if not isinstance(picture, Image.Image):
        raise ValueError(
            f"a visual of type {type(picture).__name__}: pictures as PIL images or paths and clips "
            "as paths can be shown, nothing else"
        )
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        raise ValueError(f"a picture with {picture.mode} pixels: convert it to 8 bit")
    paper = Image.new("RGBA", picture.size, "white")
    composed = Image.alpha_composite(paper, picture.convert("RGBA"))
    return np.asarray(composed.convert("RGB"))


if __name__ == "__main__":
    sys.exit(main())
