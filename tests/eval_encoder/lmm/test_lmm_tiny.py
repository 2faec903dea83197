"""The small language model of the demo: what its flags refuse, and what its tokenizer knows."""

from types import SimpleNamespace

import pytest

from eval_encoder.lmm.demo.tiny import build_parser, conversation_texts, train_tokenizer


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--width", "16", "no multiple of 32, the width of an attention head: give 32"),
        ("--width", "100", "give 96"),
        ("--vocabulary", "10", "give at least 260"),
    ],
)
def test_sizes_that_no_model_can_have_are_refused_with_the_remedy(capsys, flag, value, said):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["list.json", "--output", "out", flag, value])
    assert said in capsys.readouterr().err


def test_what_templates_add_stays_whole_among_many_other_texts():
    words = [
        f"{first}{second}{third}"
        for first in "abcdefghij"
        for second in "klmnopqrst"
        for third in "uvwxyz"
    ]
    texts = [" ".join(words[(7 * i + 13 * j) % len(words)] for j in range(12)) for i in range(5000)]
    samples = [SimpleNamespace(turns=[SimpleNamespace(text=text)]) for text in texts]
    tokenizer = train_tokenizer(conversation_texts(samples), 1024)
    assert len(tokenizer(" USER: ASSISTANT:")["input_ids"]) <= 6
