"""Rebuild assets/tiny_tokenizer, the byte-level BPE tokenizer of `model=tiny`, from the texts of the demo dataset.

    python scripts/make_tiny_tokenizer.py [OUTPUT_DIR]

Deterministic: the same library version writes the same bytes. A lowercase word becomes one token. Capitals and digits
never merge, because the questions are about them ("Write KAMI backwards."). Every text can be encoded, and decode()
returns it unchanged.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from halos import demo  # noqa: E402
from halos.project_dir import PROJECT  # noqa: E402

VOCAB_SIZE = 1024  # an upper limit
EOS, PAD = "<|endoftext|>", "<|pad|>"

# A token never crosses the end of a piece. At each position, the alternatives are tried in this order.
PIECES = "|".join(
    [
        r"\n+[A-Z][a-z]+:",  # a turn: "\n\nHuman:"
        r"\p{N}",  # one digit
        r", (?=[\p{Lu}\p{N}])",  # the comma of "17, 42", so that a digit is the same token everywhere
        r" ?\p{Lu}?\p{Ll}+",  # a word with the space before it: " The", " answer"
        r"\p{Lu}",  # one capital of KAMI
        r" ?[\p{L}&&[^\p{Lu}\p{Ll}]]+",  # a word of a script without capitals
        r" ?[^\s\p{L}\p{N}]+",  # punctuation
        r"\s+(?!\S)|\s",  # whitespace, without the space that belongs to the next word
    ]
)


def demo_texts() -> Iterator[str]:
    for item in demo.generate("train"):
        yield item["prompt"]
        yield from item["responses"]


def build(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(demo_texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    return fast


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(PROJECT) / "assets" / "tiny_tokenizer"
    print(f"{directory}: {len(build(directory))} tokens")
