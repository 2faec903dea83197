"""A small random language model and a tokenizer of its own, for laptops and tests:

    python -m eval_encoder.lmm.demo.tiny LIST.json ... --output DIR [--layers 4] [--width 128]

The tokenizer is a byte-level BPE trained on the texts of the lists, with <s>, </s>, <pad> and
<image>; the model is a Llama with random weights, which learns the language in stage 2. With
--convnext DIR a small random ConvNeXt of four stages is written too, for the convllava recipe where
no pretrained one is at hand. Cost: seconds.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.quiet import quiet_libraries

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerFast

    from eval_encoder.lmm.data.conversation import Sample

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
HEAD_WIDTH = 32  # channels of an attention head
MIN_VOCABULARY = 256 + len(SPECIAL)  # every byte is a token
MAX_POSITIONS = 4096  # tokens of a conversation, as LLaVA 1.5's language model has


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.lmm.demo.tiny", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "lists", nargs="+", type=Path, help="conversations whose words it shall know"
    )
    parser.add_argument(
        "--output", type=output_path, required=True, help="folder of model and tokenizer"
    )
    parser.add_argument("--layers", type=int, default=4, help="blocks (default: 4)")
    parser.add_argument(
        "--width", type=_width, default=128, help="hidden size, a multiple of 32 (default: 128)"
    )
    parser.add_argument(
        "--vocabulary",
        type=_vocabulary,
        default=1024,
        help=f"most tokens, at least {MIN_VOCABULARY} (default: 1024)",
    )
    parser.add_argument("--convnext", type=output_path, help="folder for a small random ConvNeXt")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    return parser


def _width(text: str) -> int:
    width = int(text)
    if width < HEAD_WIDTH or width % HEAD_WIDTH:
        below = max(HEAD_WIDTH, width // HEAD_WIDTH * HEAD_WIDTH)
        raise argparse.ArgumentTypeError(
            f"{text} is no multiple of {HEAD_WIDTH}, the width of an attention head: give {below}"
        )
    return width


def _vocabulary(text: str) -> int:
    if int(text) < MIN_VOCABULARY:
        raise argparse.ArgumentTypeError(
            f"{text} tokens are too few: give at least {MIN_VOCABULARY}, one for every byte and "
            f"{len(SPECIAL)} of the conversation"
        )
    return int(text)


def train_tokenizer(texts: Iterable[str], vocabulary: int = 1024) -> "PreTrainedTokenizerFast":
    """A fast tokenizer trained on the texts; unseen text becomes single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos, image = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=[image],
    )


def conversation_texts(samples: "Sequence[Sample]") -> list[str]:
    """Texts for a tokenizer: those of the samples, and what templates add to every conversation."""
    from eval_encoder.lmm.data.conversation import TEMPLATES

    texts = [turn.text for sample in samples for turn in sample.turns]
    # What templates add must not fall apart into single bytes. Merges are chosen by how often they
    # occur, so these texts stand here as often as in the conversations.
    added = [f"{system} USER: ASSISTANT:" for system in TEMPLATES.values() if system]
    return texts + added * len(samples)


def write_language_model(
    texts: Iterable[str],
    output: Path,
    layers: int,
    width: int,
    vocabulary: int = 1024,
    seed: int = 0,
) -> None:
    """Write a tokenizer and a randomly initialised Llama of `layers` blocks; `width` is a multiple
    of 32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from model_factory.model_folder import seal_folder

    tokenizer = train_tokenizer(texts, vocabulary)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        num_key_value_heads=width // HEAD_WIDTH,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=width**-0.5,  # so narrow a model hardly moves from weights of 0.02
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(output)
    tokenizer.save_pretrained(output)
    seal_folder(output)


def write_convnext(output: Path, side: int = 128, seed: int = 0) -> None:
    """A random ConvNeXt of four stages with a CLIP image processor for squares of `side`."""
    import torch
    from transformers import ConvNextConfig, ConvNextModel

    from model_factory.export_folder import image_processor_json
    from model_factory.model_folder import seal_folder

    torch.manual_seed(seed)
    config = ConvNextConfig(
        hidden_sizes=[32, 64, 128, 256],  # doubled from stage to stage, as in ConvNeXt
        depths=[1, 1, 2, 1],
        image_size=side,
    )
    ConvNextModel(config).save_pretrained(output)
    (output / "preprocessor_config.json").write_text(image_processor_json(side))
    seal_folder(output)


def main(argv: list[str] | None = None) -> int:
    """Write the folder; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_write, argv=argv)


def _write(args: argparse.Namespace) -> None:
    quiet_libraries()
    from eval_encoder.lmm.data.conversation import read_samples

    samples = [sample for path in args.lists for sample in read_samples(path)]
    # save_pretrained only logs when the path is a file, so make the folder first
    args.output.mkdir(parents=True, exist_ok=True)
    if args.convnext is not None:
        write_convnext(args.convnext, seed=args.seed)
    write_language_model(
        conversation_texts(samples),
        output=args.output,
        layers=args.layers,
        width=args.width,
        vocabulary=args.vocabulary,
        seed=args.seed,
    )


if __name__ == "__main__":
    sys.exit(main())
