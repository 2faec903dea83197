"""Conversations: what is supervised is exactly what is answered, for every kind of tokenizer; lists
that break the format and samples that cannot be labelled exactly are named.
"""

import functools
import hashlib
import json
from dataclasses import replace

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from eval_encoder.lmm.data.conversation import (
    IGNORE_INDEX,
    IMAGE,
    TEMPLATES,
    VIDEO,
    Encoded,
    Sample,
    Turn,
    Visual,
    encode,
    encode_prompt,
    read_samples,
    words,
)

SPECIAL = ["<s>", "</s>", "<pad>", "<image>"]
CORPUS = [
    f"{TEMPLATES['v1']} USER: What is this? ASSISTANT: A dog runs over the grass.",
    f"{TEMPLATES['llava_v1']} USER: How many dogs are there?\nAnswer with a single word.",
    "Naïve cafés: 狗 🐕 1234567890 (two, of them) - Yes! No.",
] * 3
KINDS = ("byte_level", "byte_level_trimmed", "metaspace", "byte_fallback")
QUESTION, ANSWER = "What is this?", "A naïve 狗 🐕, 2 cafés."
ROUNDS = [
    Turn("human", QUESTION),
    Turn("gpt", ANSWER),
    Turn("human", "How many\nare there?"),
    Turn("gpt", "(two)  dogs\nof them "),
    Turn("human", "Are there more?"),
    Turn("gpt", "No"),
]


def wrap(tokenizer):
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level(trim_offsets=False, normalizer=None):
    """As GPT-2 and Qwen: bytes, the space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, special_tokens=SPECIAL, initial_alphabet=alphabet)
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


def metaspace():
    """As sentencepiece: a space is a character, and one is put in front of everything."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    train(tokenizer, special_tokens=["<unk>", *SPECIAL])
    return tokenizer


def train(tokenizer, **settings):
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, **settings)
    tokenizer.train_from_iterator(CORPUS, trainer)


def byte_fallback():
    """As Vicuna: no splitting into words, bytes for characters that the vocabulary lacks."""
    trained = json.loads(metaspace().to_str())["model"]
    rare = {word for word in trained["vocab"] if "狗" in word or "🐕" in word}
    vocab = {word: number for word, number in trained["vocab"].items() if word not in rare}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = 1000 + byte
    merges = [(a, b) for a, b in trained["merges"] if a + b not in rare]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


@functools.cache
def tokenizer_of(kind):
    makers = dict(
        byte_level=byte_level,
        byte_level_trimmed=lambda: byte_level(trim_offsets=True),
        lowercase=lambda: byte_level(normalizer=normalizers.Lowercase()),
        metaspace=metaspace,
        byte_fallback=byte_fallback,
    )
    return wrap(makers[kind]())


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return tokenizer_of(request.param)


def image_id(tokenizer):
    return tokenizer.convert_tokens_to_ids("<image>")


def encoded(turns, tokenizer, visual_tokens=(), version="v1", max_length=10_000) -> Encoded:
    return encode(turns, tokenizer, version, visual_tokens, image_id(tokenizer), max_length)


def prompt_of(question, tokenizer, visual_tokens=(), version="v1"):
    return encode_prompt(question, tokenizer, version, visual_tokens, image_id(tokenizer))


def supervised_runs(result):
    """The supervised ids as the runs they stand in."""
    runs, inside = [], False
    for token, label in zip(result.input_ids, result.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX and not inside:
            runs.append([])
        inside = label != IGNORE_INDEX
        if inside:
            runs[-1].append(token)
    return runs


def said(tokenizer, ids):
    """What ids say, without the space that belongs to the first token."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.removeprefix(" ")


def text_length(tokenizer, *texts):
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def test_system_texts_are_the_published_ones():
    digest = hashlib.sha256(TEMPLATES["v1"].encode()).hexdigest()
    assert digest == "1fa69e2371b762d1882b0bd98d284f312a36c27add732016e12e52586f98a9f5"
    assert len(TEMPLATES["v1"]) == 154
    assert len(TEMPLATES["llava_v1"]) == 156
    assert TEMPLATES["plain"] is None


# --- labels


@pytest.mark.parametrize("version", ["v1", "llava_v1"])
def test_supervised_ids_decode_to_the_answers_each_with_its_eos(tokenizer, version):
    runs = supervised_runs(encoded(ROUNDS, tokenizer, version=version))
    answers = [turn.text for turn in ROUNDS if turn.speaker == "gpt"]
    assert [said(tokenizer, run) for run in runs] == [f"{answer}</s>" for answer in answers]
    assert all(run[-1] == tokenizer.eos_token_id for run in runs)


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_trimmed"])
def test_the_whole_text_is_that_of_the_template(kind):
    tokenizer = tokenizer_of(kind)
    result = encoded(ROUNDS, tokenizer)
    rounds = "".join(
        f"USER: {q.text} ASSISTANT: {a.text}</s>"
        for q, a in zip(ROUNDS[::2], ROUNDS[1::2], strict=True)
    )
    decoded = tokenizer.decode(result.input_ids, clean_up_tokenization_spaces=False)
    assert decoded == f"<s>{TEMPLATES['v1']} {rounds}"


def test_text_is_tokenised_in_one_piece_between_visuals(tokenizer):
    turns = [Turn("human", f"{IMAGE}\n{QUESTION}"), *ROUNDS[1:]]
    result = encoded(turns, tokenizer, [3])
    end = f"\n{QUESTION} ASSISTANT: {ANSWER}</s>" + "".join(
        f"USER: {q.text} ASSISTANT: {a.text}</s>"
        for q, a in zip(ROUNDS[2::2], ROUNDS[3::2], strict=True)
    )
    begin = tokenizer(f"{TEMPLATES['v1']} USER: ", add_special_tokens=False)["input_ids"]
    rest = tokenizer(end, add_special_tokens=False)["input_ids"]
    assert result.input_ids == [
        tokenizer.bos_token_id, *begin, *[image_id(tokenizer)] * 3, *rest
    ]  # fmt: skip


def test_plain_supervises_caption_and_newline_only(tokenizer):
    turns = [Turn("human", f"Describe it briefly. {IMAGE}"), Turn("gpt", ANSWER)]
    result = encoded(turns, tokenizer, [5], "plain")
    assert result.input_ids[:6] == [tokenizer.bos_token_id] + [image_id(tokenizer)] * 5
    assert result.labels[:6] == [IGNORE_INDEX] * 6
    assert result.labels[6:] == result.input_ids[6:]
    assert said(tokenizer, result.input_ids[6:]) == f"{ANSWER}\n"
    assert tokenizer.eos_token_id not in result.input_ids


def test_plain_refuses_all_but_one_visual_and_one_caption():
    tokenizer = tokenizer_of("byte_level")
    pair = [Turn("human", IMAGE), Turn("gpt", "A dog")]
    for turns, visual_tokens in (
        (pair * 2, [4, 4]),
        (ROUNDS[:2], []),
        ([Turn("human", IMAGE * 2), Turn("gpt", "A dog")], [4, 4]),
    ):
        with pytest.raises(ValueError, match="plain is for one visual"):
            encoded(turns, tokenizer, visual_tokens, "plain")


def test_an_empty_answer_is_an_eos(tokenizer):
    (run,) = supervised_runs(encoded([Turn("human", QUESTION), Turn("gpt", "")], tokenizer))
    assert said(tokenizer, run) == "</s>"


def test_a_tokenizer_without_bos_begins_with_the_text():
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    result = encode(ROUNDS[:2], bare, "v1", [], 3, 1000)
    full = encoded(ROUNDS[:2], tokenizer_of("byte_level"))
    assert (result.input_ids, result.labels) == (full.input_ids[1:], full.labels[1:])


# --- visuals


def test_length_is_that_of_the_text_plus_the_visual_tokens(tokenizer):
    turns = [
        Turn("human", f"{IMAGE}\n{IMAGE}\n{QUESTION}"),
        Turn("gpt", ANSWER),
        Turn("human", f"{VIDEO}\nAnd here?"),
        Turn("gpt", "Two dogs"),
    ]
    counts = [7, 1, 12]
    result = encoded(turns, tokenizer, counts)
    text = 1 + text_length(
        tokenizer,
        f"{TEMPLATES['v1']} USER: ",
        "\n",
        f"\n{QUESTION} ASSISTANT: {ANSWER}</s>USER: ",
        "\nAnd here? ASSISTANT: Two dogs</s>",
    )
    assert len(result.input_ids) == len(result.labels) == text + sum(counts)
    image = image_id(tokenizer)
    runs, previous = [], None
    for place, token in enumerate(result.input_ids):
        if token == image:
            assert result.labels[place] == IGNORE_INDEX
            runs = [*runs[:-1], runs[-1] + 1] if previous == image else [*runs, 1]
        previous = token
    assert runs == counts
    answers = [said(tokenizer, run) for run in supervised_runs(result)]
    assert answers == [f"{ANSWER}</s>", "Two dogs</s>"]


@pytest.mark.parametrize("visual_tokens", [[], [4, 4], [0], [-1]])
def test_wrong_visual_tokens_are_refused(visual_tokens):
    turns = [Turn("human", f"{IMAGE}\n{QUESTION}"), Turn("gpt", "A dog")]
    with pytest.raises(ValueError, match="for 1 placeholders: give a positive count for each"):
        encoded(turns, tokenizer_of("byte_level"), visual_tokens)


# --- truncation


def test_what_is_too_long_is_cut_at_its_end(tokenizer):
    turns = [Turn("human", f"{IMAGE}\n{QUESTION}"), *ROUNDS[1:]]
    whole = encoded(turns, tokenizer, [4])
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    for length in (first + 1, len(whole.labels) - 1, len(whole.labels)):
        cut = encoded(turns, tokenizer, [4], max_length=length)
        assert cut.input_ids == whole.input_ids[:length]
        assert cut.labels == whole.labels[:length]
    with pytest.raises(ValueError, match=rf"no answer .* --model_max_length {first}"):
        encoded(turns, tokenizer, [4], max_length=first)


def test_no_visual_is_ever_cut(tokenizer):
    turns = [*ROUNDS[:2], Turn("human", f"{IMAGE}\nAnd here?"), Turn("gpt", "Two dogs")]
    whole = encoded(turns, tokenizer, [9])
    places = [i for i, token in enumerate(whole.input_ids) if token == image_id(tokenizer)]
    end = places[-1] + 1
    for length in (places[0] - 3, places[0], places[4], end - 1):
        with pytest.raises(ValueError, match=f"raise --model_max_length to more than {end}"):
            encoded(turns, tokenizer, [9], max_length=length)
    assert encoded(turns, tokenizer, [9], max_length=end).input_ids == whole.input_ids[:end]


# --- prompts


def test_a_prompt_is_the_beginning_of_the_training_sequence(tokenizer):
    turns = [Turn("human", f"{IMAGE}\n{QUESTION}"), *ROUNDS[1:]]
    whole = encoded(turns, tokenizer, [6])
    for rounds in (1, 2, 3):
        prompt = prompt_of(turns[: 2 * rounds - 1], tokenizer, [6])
        assert whole.input_ids[: len(prompt)] == prompt
        answer = supervised_runs(whole)[rounds - 1]
        assert whole.input_ids[len(prompt) :][: len(answer)] == answer
        assert whole.labels[len(prompt) - 1] == IGNORE_INDEX
        assert said(tokenizer, prompt).endswith(" ASSISTANT:")


def test_a_question_is_a_turn(tokenizer):
    question = f"{IMAGE}\n{QUESTION}"
    turns = [Turn("human", question)]
    assert prompt_of(question, tokenizer, [6]) == prompt_of(turns, tokenizer, [6])


def test_the_plain_prompt_ends_with_the_visual(tokenizer):
    whole = encoded([Turn("human", IMAGE), Turn("gpt", "A dog")], tokenizer, [6], "plain")
    prompt = prompt_of(IMAGE, tokenizer, [6], "plain")
    assert prompt == whole.input_ids[:7]
    assert len(supervised_runs(whole)[0]) == len(whole.input_ids) - 7


def test_a_prompt_ends_with_a_question():
    with pytest.raises(ValueError, match="end with human"):
        prompt_of(ROUNDS, tokenizer_of("byte_level"))
    with pytest.raises(ValueError, match="end with gpt"):
        encoded(ROUNDS[:3], tokenizer_of("byte_level"))


# --- what cannot be labelled exactly


@pytest.mark.parametrize("typed", ["</s>", "<s>", "<pad>"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_special_tokens_typed_into_a_turn_are_refused(tokenizer, typed, place):
    turns = list(ROUNDS[:4])
    turns[place] = replace(turns[place], text=f"so {typed} it is")
    with pytest.raises(ValueError, match="special token"):
        encoded(turns, tokenizer)


@pytest.mark.parametrize("typed", [IMAGE, VIDEO])
def test_a_placeholder_in_an_answer_is_refused(tokenizer, typed):
    turns = [Turn("human", QUESTION), Turn("gpt", f"Write {typed} there")]
    with pytest.raises(ValueError, match=f"turn 2, an answer, holds {typed}"):
        encoded(turns, tokenizer)


def test_text_that_becomes_the_image_token_is_refused():
    tokenizer = tokenizer_of("byte_level")
    turns = [Turn("human", "Where is the dog?"), Turn("gpt", "A dog")]
    (dog,) = tokenizer(" dog", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="the text ' dog' becomes the special token"):
        encode(turns, tokenizer, "v1", [], dog, 1000)


def test_characters_that_the_vocabulary_lacks_are_refused():
    with pytest.raises(ValueError, match="the text 'Ω' becomes the special token '<unk>'"):
        encoded([Turn("human", "What is Ω?"), Turn("gpt", "No")], tokenizer_of("metaspace"))


def test_an_answer_that_decodes_to_something_else_is_refused():
    sample = Sample("dog 7", (Turn("human", QUESTION), Turn("gpt", "Yes")), ())
    with pytest.raises(ValueError, match="sample 'dog 7': the answer 'Yes' .* say ' yes'"):
        encoded(sample, tokenizer_of("lowercase"))


def test_a_token_across_the_border_of_an_answer_is_refused():
    letters = {letter: i for i, letter in enumerate(map(chr, range(32, 127)))}
    vocab = {**letters, "</s>": 200, ": ": 201}
    tokenizer = Tokenizer(models.BPE(vocab, [(":", " ")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    with pytest.raises(ValueError, match="the token of ': ' lies across a border"):
        encode(ROUNDS[4:], tokenizer, "v1", [], 300, 1000)


def test_slow_tokenizers_and_unknown_versions_are_refused():
    sample = Sample("dog 7", tuple(ROUNDS), ())
    with pytest.raises(ValueError, match="sample 'dog 7': ByT5Tokenizer is a slow tokenizer"):
        encode(sample, ByT5Tokenizer(), "v1", [], 300, 1000)
    with pytest.raises(ValueError, match="sample 'dog 7': version is 'v2'; choose one of plain,"):
        encoded(sample, tokenizer_of("byte_level"), version="v2")
    without = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    with pytest.raises(ValueError, match="sample 'dog 7': the tokenizer has no EOS"):
        encode(sample, without, "v1", [], 300, 1000)


# --- lists


def entry(*values, **others):
    speakers = ("human", "gpt") * len(values)
    turns = [{"from": s, "value": v} for s, v in zip(speakers, values, strict=False)]
    return {"id": "dog 7", "conversations": turns, **others}


def read_one(tmp_path, content):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([content]))
    (sample,) = read_samples(path)
    return sample


def test_a_list_and_its_lines_are_the_same(tmp_path):
    entries = [
        entry(f"{QUESTION}\n{IMAGE}", "A 狗", image="a/1.jpg"),
        entry("Hello", "Hi", "And?", "No"),
        {**entry(f"{VIDEO}\n{QUESTION}", "Two dogs", video="b.mp4"), "id": 12, "model": "x"},
    ]
    whole, lines = tmp_path / "list.json", tmp_path / "list.jsonl"
    whole.write_text(" \n" + json.dumps(entries, indent=1))
    lines.write_text("\n".join(json.dumps(e, ensure_ascii=False) for e in entries) + "\n\n")
    samples = read_samples(whole)
    assert samples == read_samples(str(lines))
    assert [sample.id for sample in samples] == ["dog 7", "dog 7", "12"]
    assert [len(sample.turns) for sample in samples] == [2, 4, 2]
    assert samples[0].turns[0] == Turn("human", f"{IMAGE}\n{QUESTION}")
    assert [sample.visuals for sample in samples] == [
        (Visual("image", "a/1.jpg"),), (), (Visual("video", "b.mp4"),)
    ]  # fmt: skip
    assert [words(sample) for sample in samples] == [6, 4, 6]


@pytest.mark.parametrize(
    "text, images, expected",
    [
        (f"{IMAGE}\nWhat?", ["1"], f"{IMAGE}\nWhat?"),
        (f"What?\n{IMAGE}", ["1"], f"{IMAGE}\nWhat?"),
        ("What?", ["1"], f"{IMAGE}\nWhat?"),
        (f"First {IMAGE}, then {IMAGE}?", ["1", "2"], f"{IMAGE}\n{IMAGE}\nFirst , then ?"),
        (IMAGE, ["1"], f"{IMAGE}\n"),
        ("  What? ", [], "  What? "),
    ],
)
def test_placeholders_move_to_the_front_of_their_turn(tmp_path, text, images, expected):
    sample = read_one(tmp_path, entry(text, "A dog", image=images))
    assert sample.turns == (Turn("human", expected), Turn("gpt", "A dog"))
    assert [visual.path for visual in sample.visuals] == images


def test_visuals_follow_their_placeholders(tmp_path):
    content = entry(f"{VIDEO} and {IMAGE}?", "No", f"{IMAGE} or {VIDEO}?", "Yes")
    sample = read_one(tmp_path, {**content, "image": ["1", "2"], "video": ["3", "4"]})
    assert [visual.path for visual in sample.visuals] == ["3", "1", "2", "4"]
    assert sample.turns[0].text == f"{VIDEO}\n{IMAGE}\nand ?"
    assert sample.turns[2].text == f"{IMAGE}\n{VIDEO}\nor ?"


def test_videos_may_be_written_as_images(tmp_path):
    sample = read_one(tmp_path, entry(f"{IMAGE}\nWhat?", "A dog", video="b.mp4"))
    assert sample.turns[0].text == f"{VIDEO}\nWhat?"
    assert sample.visuals == (Visual("video", "b.mp4"),)


@pytest.mark.parametrize(
    "content, message",
    [
        (entry("Hello", "Hi", "And?"), "human, gpt, human: they must alternate"),
        (entry(), "nobody: they must alternate"),
        (entry(f"{IMAGE} What?", "A dog"), "1 placeholders for 0 visuals"),
        (entry("What?", "A dog", image=["1", "2"]), "0 placeholders for 2 visuals"),
        (entry(IMAGE * 2, "A dog", image="1"), "2 placeholders for 1 visuals"),
        (entry(IMAGE * 2, "A dog", image="1", video="2"), "0 <video> for 1 videos"),
        (entry("What?", f"A {IMAGE}", image="1"), "turn 2, an answer, holds <image>"),
        (entry("What?", "A dog", image=["1", ""]), "image is .* give a path"),
        (entry("What?", 3), "turn 2 is no"),
        ({"id": "dog 7", "conversations": [{"from": "user", "value": "Hi"}]}, "turn 1 is no"),
        ({"id": "dog 7"}, "conversations is no list"),
    ],
)
def test_an_error_names_file_place_and_id(tmp_path, content, message):
    for name, text in (
        ("list.json", json.dumps([entry("Hello", "Hi"), content])),
        ("list.jsonl", f"{json.dumps(entry('Hello', 'Hi'))}\n{json.dumps(content)}"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_samples(tmp_path / name)
        where = "sample" if name == "list.json" else "line"
        assert str(error.value).startswith(f"{tmp_path / name} {where} 2 (id 'dog 7'): ")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"id": 1}\n{"id":', "line 1 "),
        (f"{json.dumps(entry('Hello', 'Hi'))}\n{{oh", "line 2 is no JSON"),
        ("[3]", "sample 1: a sample is an object with an id"),
        ("[", "is no JSON"),
        ("[]", "holds no sample"),
        ("", "holds no sample"),
        (None, "does not exist"),
    ],
)
def test_files_that_are_no_lists_are_refused(tmp_path, text, message):
    path = tmp_path / "list.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_samples(path)
    assert str(path) in str(error.value)
