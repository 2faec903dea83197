"""Chat from the command line: answers are those of the Speaker, a dialogue remembers its turns, and
an error ends what it has to and no more.
"""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run, write_video
from PIL import Image

from eval_encoder.lmm import chat as lmm_chat
from eval_encoder.lmm.config import parse_arguments
from eval_encoder.lmm.data.conversation import IMAGE, TEMPLATES, Turn, Visual, encode
from eval_encoder.lmm.data.dataset import Collator, Example, visual_tokens
from eval_encoder.lmm.data.visuals import VisualReader
from eval_encoder.lmm.demo.tiny import write_language_model
from eval_encoder.lmm.generate import AnswerStopped, Decoding, Request, open_speaker, visual_config
from eval_encoder.lmm.model.open import compose
from model_factory.export_folder import save_encoder_folder
from model_factory.registry import packing_config
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
COLOUR, SURE, SUM = "What colour?", "Are you sure?", "What is one and one?"


def write_model(folder):
    """Pictures red.png and blue.png, and `model`: a tiny one that has learnt to name them."""
    torch.manual_seed(0)
    for name, colour in COLOURS.items():
        pixels = np.full((40, 56, 3), colour, np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    samples = [
        ([f"{IMAGE}\n{COLOUR}", name, SURE, f"yes, {name}"], f"{name}.png") for name in COLOURS
    ] + [([SUM, "two"], None)]
    texts = [text for turns, _ in samples for text in turns]
    write_language_model([*texts, f"{TEMPLATES['v1']} USER: ASSISTANT:"], folder / "llm", 2, 64)
    config = packing_config("hf_llava_vit_packing_tiny_ln")
    config.num_hidden_layers, config.image_size, config.patch_size = 2, 32, 8
    save_encoder_folder(LlavaViTPackingModel(config), folder / "tower")
    parts = f"--model_name_or_path {folder / 'llm'} --vision_tower {folder / 'tower'}"
    arguments, _ = parse_arguments([*parts.split(), "--data_path", "none"])
    lmm = compose(arguments)
    reader = VisualReader(visual_config(lmm), lmm.image_processor, folder)
    train(lmm, [example(lmm, reader, *sample) for sample in samples])
    lmm.model.save_pretrained(folder / "model")
    lmm.save_processors(folder / "model")


def example(lmm, reader, texts, picture):
    turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]
    items = [] if picture is None else [reader(Visual("image", picture))]
    counts = [visual_tokens(item, lmm.model.tokens_for) for item in items]
    image = lmm.model.config.image_token_id
    encoded = encode(turns, lmm.tokenizer, "v1", counts, image, 2048)
    return Example(encoded.input_ids, encoded.labels, items)


def train(lmm, examples):
    lmm.model.train_parts(projector=True, language_model=True)
    batch = Collator(lmm.tokenizer.pad_token_id)(examples)
    learning = [p for p in lmm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=5e-3)
    for _ in range(60):
        loss = lmm.model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def speaker(folder):
    return open_speaker(folder / "model", folder)


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """chat(*flags, typed) -> (exit code, lines of the output, lines that tell an error)."""

    def chat(*flags, typed="", terminal=False):
        stdin = io.StringIO(typed)
        stdin.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdin", stdin)
        capsys.readouterr()
        code = lmm_chat.main(["--model", str(folder / "model"), *map(str, flags)])
        out, err = capsys.readouterr()
        problems = [line for line in err.splitlines() if line.startswith("error: ")]
        return code, [line.strip() for line in out.splitlines()], problems

    return chat


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("colour", COLOURS)
def test_a_single_answer_is_that_of_the_speaker(chat, folder, speaker, colour, beams):
    request = Request((Turn("human", f"{IMAGE}\n{COLOUR}"),), (Visual("image", f"{colour}.png"),))
    assert speaker.answer([request]) == [colour]
    flags = ("--image", folder / f"{colour}.png", "--num_beams", beams, "--question", COLOUR)
    assert chat(*flags) == (0, [colour], [])


def test_an_answer_is_written_while_it_grows(folder, monkeypatch):
    parts = []
    stdout = io.StringIO()
    stdout.write = parts.append
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{COLOUR}\n{SURE}\n"))
    flags = ["--model", str(folder / "model"), "--image", str(folder / "red.png")]
    assert lmm_chat.main(flags) == 0
    assert [part.strip() for part in parts if part.strip()] == ["red", "yes,", "red"]


def test_pictures_and_clips_stand_in_front_in_the_order_of_their_kinds(chat, folder, speaker):
    clip = write_video(folder / "clip.mp4", [np.full((64, 64, 3), i, np.uint8) for i in range(9)])
    visuals = [Visual("image", "red.png"), Visual("image", "blue.png"), Visual("video", clip.name)]
    request = Request((Turn("human", f"{IMAGE}\n" * 3 + COLOUR),), tuple(visuals))
    flags = ("--video", clip, "--image", folder / "red.png", folder / "blue.png")
    code, said, _ = chat(*flags, "--question", COLOUR)
    assert (code, "\n".join(said).strip()) == (0, speaker.answer([request])[0])
    assert (
        chat(*flags[:2], "--image", flags[3], "--image", flags[4], "--question", COLOUR)[1] == said
    )


def test_a_piped_dialogue_remembers_its_turns(chat, folder, speaker):
    dialogue = lmm_chat.Dialogue((speaker.reader(Visual("image", "red.png")),))
    first = dialogue.ask(COLOUR).answer(speaker)
    second = first.ask(SURE).answer(speaker)
    assert [turn.text for turn in second.turns] == [
        f"{IMAGE}\n{COLOUR}",
        "red",
        SURE,
        "yes, red",
    ]
    typed = f"{COLOUR}\n\n  {SURE}"
    assert chat("--image", folder / "red.png", typed=typed) == (0, ["red", "yes, red"], [])


def test_without_pictures_it_is_about_text(chat):
    assert chat(typed=f"{SUM}\n") == (0, ["two"], [])


def test_reset_forgets_the_turns_but_not_the_picture(chat, folder, speaker):
    item = speaker.reader(Visual("image", "blue.png"))
    dialogue = lmm_chat.Dialogue((item,)).ask(COLOUR).answer(speaker)
    assert dialogue.forget() == lmm_chat.Dialogue((item,))
    typed = f"{COLOUR}\n/reset\n{COLOUR}\n/quit\n{COLOUR}\n"
    assert chat("--image", folder / "blue.png", typed=typed) == (0, ["blue", "blue"], [])


def test_a_terminal_is_prompted(chat):
    _, lines, _ = chat(typed=f"{SUM}\n/quit\n", terminal=True)
    assert lines == ["/reset forgets what was said, /quit ends", ">  two", ">"]


def test_an_error_of_one_question_does_not_end_the_chat(chat, folder):
    typed = f"{COLOUR}\nWhat <pad>?\n{SURE}\n"
    code, said, [problem] = chat("--image", folder / "red.png", typed=typed)
    assert (code, said) == (0, ["red", "yes, red"])
    assert "'<pad>' becomes the special token" in problem


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("content", [b"no picture", None])
def test_an_unreadable_file_is_named_in_one_line(chat, tmp_path, kind, content):
    path = tmp_path / "broken.png"
    if content:
        path.write_bytes(content)
    for flags in ((), ("--question", COLOUR)):
        code, said, [problem] = chat(f"--{kind}", path, *flags, typed=COLOUR)
        assert (code, said) == (1, []) and str(path) in problem


def test_a_stopped_answer_ends_at_the_next_block_and_leaves_no_trace(speaker):
    request = Request((Turn("human", f"{IMAGE}\n{COLOUR}"),), (Visual("image", "red.png"),))
    blocks = []

    def stop_in_the_second():
        blocks.append(None)
        return len(blocks) > 1

    with pytest.raises(AnswerStopped):
        speaker.answer([request], stop=stop_in_the_second)
    assert len(blocks) == 2
    assert speaker.answer([request]) == ["red"] and len(blocks) == 2


def test_a_prompt_beyond_the_context_is_refused(speaker):
    long = Request((Turn("human", f"{COLOUR} " * 5000),))
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens, .* context of 4096 tokens"):
        speaker.answer([long])


def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenised(speaker):
    deaf = replace(speaker, lmm=replace(speaker.lmm, tokenizer=None))
    with pytest.raises(ValueError, match="a prompt of 3000000 characters exceeds"):
        deaf._example(Request((Turn("human", "x" * 3_000_000),)))


@pytest.mark.parametrize("beams", [1, 2])
def test_what_a_terminal_would_obey_is_shown_as_escapes(capsys, beams):
    class Hostile:
        decoding = Decoding(num_beams=beams)
        lmm = SimpleNamespace(tokenizer=None)

        def answer(self, requests, streamer):
            if streamer is not None:
                streamer.on_finalized_text("\x1b[2Jred\n\u202egreen", stream_end=True)
            return ["\x1b[2Jred\n\u202egreen"]

    lmm_chat._print_answer(Hostile(), lmm_chat.Dialogue().ask(COLOUR))
    assert capsys.readouterr().out == "\\x1b[2Jred\n\\u202egreen\n"


def test_a_folder_without_a_model_is_an_error_of_one_line(capsys, tmp_path):
    assert lmm_chat.main(["--model", str(tmp_path / "absent"), "--question", SUM]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_help_imports_nothing_heavy():
    done = run("-X", "importtime", "eval_encoder/lmm_chat.py", "--help")
    assert "--question" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "av", "gradio"}
