"""Log-likelihoods are those of the logits, and what lmms-eval asks gets the answers that a Speaker
gives; most of it without lmms-eval, the adapter itself where that can be imported.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run, write_video
from forked import forked
from PIL import Image

from eval_encoder.lmm.config import parse_arguments
from eval_encoder.lmm.data.conversation import TEMPLATES, Sample, Turn, Visual, encode_prompt
from eval_encoder.lmm.data.dataset import Collator, ConversationDataset, TextConfig, collate_visuals
from eval_encoder.lmm.data.visuals import VisualReader
from eval_encoder.lmm.demo.tiny import write_language_model
from eval_encoder.lmm.generate import (
    Decoding,
    Request,
    Speaker,
    log_likelihood,
    open_speaker,
    visual_config,
)
from eval_encoder.lmm.model.open import compose
from eval_encoder.lmm.scoring.lmms_eval import (
    Asked,
    answer_until,
    cut,
    decoding_of,
    model_manifest,
    rate_answers,
    stop_strings,
)
from model_factory.configuration import LlavaViTPackingConfig
from model_factory.export_folder import save_encoder_folder
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
CAPTIONS = {"red.png": "a red one", "blue.png": "blue", "clip.mp4": "it moves"}
QUESTION = "What is this?"
STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two pictures, a clip, and a model that has learned to name them."""
    folder = tmp_path_factory.mktemp("lmm")
    pictures = {name: np.full((40, 56, 3), rgb, np.uint8) for name, rgb in COLOURS.items()}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    write_video(folder / "clip.mp4", [np.full((64, 64, 3), 20 * i, np.uint8) for i in range(8)])
    lmm = untrained(folder)
    torch.manual_seed(0)
    samples = [sample_of(name, caption) for name, caption in CAPTIONS.items()]
    samples.append(Sample("text", (Turn("human", "Who?"), Turn("gpt", "nobody")), ()))
    teach(lmm, samples, folder)
    lmm.model.save_pretrained(folder / "model")
    lmm.save_processors(folder / "model")
    return folder


def untrained(folder):
    """A random tower behind a random language model."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1)
    encoder = LlavaViTPackingModel(LlavaViTPackingConfig(image_size=32, patch_size=8, **sizes))
    save_encoder_folder(encoder, folder / "tower")
    words = [QUESTION, *CAPTIONS.values(), f"{TEMPLATES['v1']} USER: ASSISTANT:"]
    write_language_model(words, folder / "llm", layers=2, width=64, vocabulary=400)
    flags = f"--model_name_or_path {folder}/llm --vision_tower {folder}/tower --data_path none"
    flags += " --mm_vision_select_layer -1 --image_aspect_ratio pad"
    return compose(parse_arguments(flags.split())[0])


def sample_of(name, caption):
    visual = Visual("video" if name.endswith("mp4") else "image", name)
    turns = (Turn("human", f"<{visual.kind}>\n{QUESTION}"), Turn("gpt", caption))
    return Sample(name, turns, (visual,))


def teach(lmm, samples, media):
    lmm.model.config.video = {"num_frames": 2, "video_size": 32}
    reader = VisualReader(visual_config(lmm), lmm.image_processor, media)
    text = TextConfig("v1", lmm.model.config.image_token_id, 512)
    dataset = ConversationDataset(samples, lmm.tokenizer, text, reader, lmm.model.tokens_for)
    batch = Collator(lmm.tokenizer.pad_token_id)([dataset[i] for i in range(len(dataset))])
    lmm.model.train_parts(projector=True, language_model=True)
    learning = [p for p in lmm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=3e-3)
    lmm.model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        lmm.model(**batch).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def speaker(folder) -> Speaker:
    return open_speaker(folder / "model", folder, decoding=Decoding(max_new_tokens=8))


def request_for(name, question=QUESTION):
    if name is None:
        return Request((Turn("human", question),))
    sample = sample_of(name, "")
    return Request((Turn("human", f"<{sample.visuals[0].kind}>\n{question}"),), sample.visuals)


def by_hand(speaker, request, tail):
    """(log-likelihood, greedy) of the tokens of a text that follows on the prompt, from the logits
    of the whole sequence."""
    model, tokenizer = speaker.lmm.model, speaker.lmm.tokenizer
    items = [speaker.reader(visual) for visual in request.visuals]
    counts = [model.tokens_for(item.grids[0], len(item.rows)) for item in items]
    prompt = encode_prompt(request.turns, tokenizer, "v1", counts, model.config.image_token_id)
    said = tokenizer(tail, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ids = torch.tensor([prompt + said])
        logits = model(input_ids=ids, visuals=collate_visuals([items])).logits[0].double()
    total, greedy = 0.0, True
    for number, token in enumerate(said):
        row = logits[len(prompt) + number - 1]
        total += float(row[token] - row.logsumexp(0))
        greedy &= int(row.argmax()) == token
    return total, greedy


PAIRS = [(name, answer) for name in (*CAPTIONS, None) for answer in ("a red one", "blue", "it")]


@pytest.mark.parametrize("name, answer", PAIRS)
def test_log_likelihood_is_that_of_the_logits_and_ends_with_eos(speaker, name, answer):
    request = request_for(name)
    found = log_likelihood(speaker, [request], [answer])[0]
    total, greedy = by_hand(speaker, request, f" {answer}</s>")
    assert found.log_probability == pytest.approx(total, abs=1e-4)
    assert found.greedy == greedy


def test_log_likelihood_does_not_depend_on_the_batch(speaker):
    requests, answers = [request_for(name) for name, _ in PAIRS], [answer for _, answer in PAIRS]
    requests[0] = request_for("red.png", f"{QUESTION} " * 9)
    together = log_likelihood(speaker, requests, answers)
    for request, answer, found in zip(requests, answers, together, strict=True):
        (alone,) = log_likelihood(speaker, [request], [answer])
        assert found.log_probability == pytest.approx(alone.log_probability, abs=1e-4)
        assert found.greedy == alone.greedy


def test_what_a_speaker_says_is_the_only_greedy_answer_and_the_likeliest(speaker):
    for name, caption in CAPTIONS.items():
        request = request_for(name)
        assert speaker.answer([request]) == [caption]
        options = [*CAPTIONS.values(), f"{caption} too", caption[:-1]]
        found = log_likelihood(speaker, [request] * len(options), options)
        assert [one.greedy for one in found] == [option == caption for option in options]
        assert max(found).greedy


def test_earlier_answers_of_a_conversation_do_not_count(speaker):
    turns = (Turn("human", "Who?"), Turn("gpt", "a red one"), Turn("human", QUESTION))
    (found,) = log_likelihood(speaker, [Request(turns)], ["blue"])
    assert found.log_probability == pytest.approx(by_hand(speaker, Request(turns), " blue</s>")[0])


def asked(folder, *names, context=QUESTION):
    """As lmms-eval asks: pictures as PIL images, clips as paths."""

    def fetch():
        paths = [folder / name for name in names]
        return [str(p) if p.suffix == ".mp4" else Image.open(p).copy() for p in paths]

    return Asked(context, fetch, f"task document {names}")


def assert_same(items, others):
    for one, other in zip(items, others, strict=True):
        assert one.grids == other.grids and torch.equal(one.rows, other.rows)


def test_contexts_get_their_placeholders_in_front_in_the_order_of_the_visuals(folder, speaker):
    context = f"First <image> then <video>\n{QUESTION}"
    request = asked(folder, "red.png", "clip.mp4", "blue.png", context=context).request(speaker)
    text = f"<image>\n<video>\n<image>\nFirst  then \n{QUESTION}"
    assert request.turns == (Turn("human", text),)
    names = ("red.png", "clip.mp4", "blue.png")
    assert_same(request.visuals, [speaker.reader(sample_of(name, "").visuals[0]) for name in names])
    nothing = Asked("Who?", lambda: None, "").request(speaker)
    assert nothing == Request((Turn("human", "Who?"),))


def test_images_in_memory_are_seen_as_their_files_are(folder, speaker, tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (30, 50, 4), dtype=np.uint8))
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        path = tmp_path / f"{mode}.png"
        noise.convert(mode).save(path)
        memory = Asked("", lambda path=path: [Image.open(path)], mode).request(speaker)
        file = Asked("", lambda path=path: [path], mode).request(speaker)
        assert memory.turns == file.turns
        assert_same(memory.visuals, file.visuals)


@pytest.mark.parametrize(
    "visual, says",
    [
        ({"array": [0.0]}, "type dict"),
        (Image.new("I;16", (8, 8)), "I;16 pixels"),
        ("absent.mp4", "absent.mp4"),
    ],
)
def test_what_cannot_be_shown_is_named(speaker, visual, says):
    with pytest.raises(ValueError, match=f"mme test document 3: .*{says}"):
        Asked("", lambda: [visual], "mme test document 3").request(speaker)


def test_answers_are_a_speakers_in_order_whatever_the_batches(folder, speaker):
    requests = [asked(folder, name) for name in CAPTIONS] + [asked(folder, context="Who?")]
    long, short = {"max_new_tokens": 8, "until": ["\n\n"]}, {"max_new_tokens": 1}
    arguments = [long, short, long, {**long, "until": "bod"}]
    plain = [request_for(name) for name in CAPTIONS] + [request_for(None, "Who?")]
    expected = [speaker.answer([request])[0] for request in plain]
    assert expected == [*CAPTIONS.values(), "nobody"]
    for size in (1, 3):
        texts = answer_until(speaker, requests, arguments, size, quiet=True)
        assert texts[0::2] == expected[0::2] and texts[3] == "no"
        assert expected[1].startswith(texts[1]) and texts[1] != expected[1]


def test_judged_answers_are_in_order_and_spaces_around_them_do_not_count(folder, speaker):
    requests = [asked(folder, name) for name in CAPTIONS]
    judged = rate_answers(speaker, requests, [" blue", "blue", "blue "], 2, quiet=True)
    plain = log_likelihood(speaker, [request_for(name) for name in CAPTIONS], ["blue"] * 3)
    for one, other in zip(judged, plain, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    assert [one.greedy for one in judged] == [False, True, False]


def test_a_request_that_is_repeated_draws_anew_and_a_run_that_is_repeated_does_not(folder, speaker):
    requests, hot = [asked(folder, "red.png")] * 6, {"temperature": 5.0, "max_new_tokens": 4}
    first, again = (answer_until(speaker, requests, [hot] * 6, 1, quiet=True) for _ in range(2))
    assert first == again and len(set(first)) > 1


@pytest.mark.parametrize(
    "arguments, changed",
    [
        ({}, {}),
        ({"temperature": 0, "do_sample": False, "top_p": 1.0}, {"top_p": 1.0}),
        ({"temperature": 0.7, "do_sample": False}, {}),
        ({"temperature": 0.7, "top_p": None}, {"temperature": 0.7}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"max_new_tokens": 9, "num_beams": 3}, {"max_new_tokens": 9, "num_beams": 3}),
    ],
)
def test_generation_arguments_as_transformers_reads_them(arguments, changed):
    assert decoding_of(arguments, Decoding()) == Decoding(**changed)


def test_arguments_without_effect_are_named(folder, speaker, caplog):
    given = {"max_new_tokens": 1, "image_aspect_ratio": "original", "top_k": 5}
    answer_until(speaker, [asked(folder)] * 2, [given] * 2, 1, quiet=True)
    assert [r.getMessage() for r in caplog.records if r.name == "univit"] == [
        "generation_kwargs image_aspect_ratio, top_k: no effect on univit_lmm"
    ]


def test_answers_end_at_the_first_stop_string():
    assert stop_strings({"until": "x"}) == ("x",) and stop_strings({"until": ["", "x"]}) == ("x",)
    assert stop_strings({}) == stop_strings({"until": None}) == ()
    assert cut("one two three", ("three", "two")) == cut("one two three", ("two", "three")) == "one"
    assert cut("one", ()) == "one"


def test_without_lmms_eval_it_says_what_to_install():
    code = (
        "import sys; sys.modules['lmms_eval'] = None\n"
        "from eval_encoder.lmm.scoring.lmms_eval import UnivitLmm, main\n"
        "try: UnivitLmm('model')\n"
        "except ImportError as error: print(error)\n"
        "sys.exit(main())"
    )
    done = forked("-c", code, check=False)
    assert done.returncode == 1
    assert "pip install lmms-eval" in done.stdout and "pip install lmms-eval" in done.stderr


@pytest.fixture(scope="module")
def adapter(folder):
    """The model as lmms-eval builds it from its command line, with a task of three documents."""
    pytest.importorskip("lmms_eval.models", reason="needs lmms-eval", exc_type=ImportError)
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    MODEL_REGISTRY_V2.register_manifest(model_manifest(), overwrite=True)
    kind, flags = get_model("univit_lmm"), {"batch_size": "2", "device": "cpu"}
    adapter = kind.create_from_arg_string(f"pretrained={folder / 'model'},num_frames=2", flags)
    adapter.task_dict = {"task": {"test": [*CAPTIONS]}}
    return adapter


def instances(kind, folder, second):
    """What lmms-eval's tasks make of every document."""
    from lmms_eval.api.instance import Instance

    def visuals(name):
        return asked(folder, name).fetch()

    for number in range(len(CAPTIONS)):
        metadata = {"task": "task", "doc_id": number, "repeats": 1}
        yield Instance(kind, (QUESTION, second, visuals, number, "task", "test"), 0, metadata)


def test_the_adapter_answers_what_lmms_eval_asks(adapter, folder):
    requests = list(instances("generate_until", folder, {"until": ["\n"], "max_new_tokens": 8}))
    assert adapter.generate_until(requests) == [*CAPTIONS.values()]
    with pytest.raises(NotImplementedError, match="several rounds"):
        adapter.generate_until_multi_round(requests)


def test_the_adapter_judges_targets_and_choices(adapter, folder, speaker):
    for target in (CAPTIONS.get, " blue"):
        judged = adapter.loglikelihood(list(instances("loglikelihood", folder, target)))
        answers = [*CAPTIONS.values()] if callable(target) else ["blue"] * 3
        plain = log_likelihood(speaker, [request_for(name) for name in CAPTIONS], answers)
        for (value, greedy), other in zip(judged, plain, strict=True):
            assert value == pytest.approx(other.log_probability, abs=1e-4)
            assert greedy == other.greedy


TASK = """
task: captions
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/documents.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.visuals
doc_to_text: question
doc_to_target: caption
generation_kwargs: {max_new_tokens: 8, until: ["\\n"]}
process_results: !function functions.results
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
from PIL import Image

def visuals(document):
    path = document["path"]
    return [path if path.endswith("mp4") else Image.open(path).convert("RGB")]

def results(document, answers):
    return {"right": float(answers == [document["caption"]])}
"""


def test_lmms_evals_own_command_line_runs_a_task(folder, tmp_path):
    pytest.importorskip("lmms_eval.evaluator", reason="needs lmms-eval", exc_type=ImportError)
    documents = [
        {"path": str(folder / name), "question": QUESTION, "caption": caption}
        for name, caption in CAPTIONS.items()
    ]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "captions.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    flags = f"--model univit_lmm --model_args pretrained={folder / 'model'} --batch_size 2"
    flags += f" --tasks captions --include_path {tmp_path} --output_path {tmp_path} --device cpu"
    run("-m", "eval_encoder.lmm.scoring.lmms_eval", *flags.split(), HF_HOME=str(tmp_path / "hub"))
    (written,) = tmp_path.rglob("*_results.json")
    assert json.loads(written.read_text())["results"]["captions"]["right,none"] == 1.0
