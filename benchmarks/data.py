"""Tokens per second of the data path, from texts to batches: cold (nothing cached) and warm.

    python -m benchmarks.data
    python -m benchmarks.data --data DIR --tokenizer DIR

Without a source of natural text: pairs of SHP-like lengths in made-up words, tokenized with a 32k byte-level BPE that
is trained on the same words. Tokenization alone is compared with what the tokenizers library does with the responses
as plain texts, in blocks of several sizes.
"""

import argparse
import os
import random
import tempfile
import time

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataloaders import PairedPreferenceDataLoader, get_local
from halos.chat import Renderer
from halos.examples import Example, merge
from halos.token_store import BLOCK, tokenize
from halos.tokens import Encoder


def words(rng: random.Random, n: int = 20000) -> list[str]:
    syllables = [c + v + e for c in "bcdfghklmnprst" for v in "aeiou" for e in ("", "n", "r", "s", "t")]
    return ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(n)]


def pairs(rng: random.Random, vocabulary: list[str], n: int) -> list[Example]:
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    draw = iter(rng.choices(vocabulary, weights, k=n * 400)).__next__

    def text(median: float, sigma: float) -> str:
        return " ".join(draw() for _ in range(int(min(400, rng.lognormvariate(0, sigma) * median)) + 1))

    return [
        Example(f"\n\nHuman: {text(80, 0.9)}\n\nAssistant:", [" " + text(35, 0.9), " " + text(35, 0.9)], pairs=[(0, 1)])
        for _ in range(n)
    ]


def large_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=32000, special_tokens=["<eos>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def tokenization(examples: list[Example], tokenizer) -> None:
    """Print the speed of rendering and of tokenization, and that of the library."""
    renderer, encoder, started = Renderer(tokenizer), Encoder(tokenizer), time.perf_counter()
    texts = {
        "prompts": [renderer.prompt(example) for example in examples],
        "responses": [response for example in examples for response in renderer.responses(example)],
    }
    rendered = time.perf_counter() - started
    print(f"rendering: {1e6 * rendered / sum(map(len, texts.values())):.0f} microseconds a text")
    for _ in range(2):
        n_tokens, started = 0, time.perf_counter()
        with tempfile.TemporaryDirectory() as cache_dir:
            for kind, of_kind in texts.items():
                n_tokens += int(tokenize(of_kind, encoder, kind, cache_dir).lengths.sum())
            seconds = time.perf_counter() - started
        print(f"tokenization: {n_tokens / seconds:,.0f} tokens/s ({n_tokens:,} tokens)")
    plain = [text for example in examples for text in example.generations if isinstance(text, str)]
    for block in (256, BLOCK, 4096):
        n_tokens, started = 0, time.perf_counter()
        for start in range(0, len(plain), block):
            encoded = tokenizer.backend_tokenizer.encode_batch_fast(plain[start : start + block])
            n_tokens += sum(map(len, encoded))
        print(f"library, {block} texts at once: {n_tokens / (time.perf_counter() - started):,.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_pairs", type=int, default=20000, help="of made-up words")
    parser.add_argument("--data", help="a source that `datasets` can name, instead of made-up words")
    parser.add_argument("--tokenizer", help="a directory with a tokenizer; needed with --data")
    args = parser.parse_args()
    if args.data and args.tokenizer:
        examples, tokenizer = merge([get_local(args.data, "train")]), AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        rng = random.Random(0)
        examples = pairs(rng, words(rng), args.n_pairs)
        tokenizer = large_tokenizer([example.prompt for example in examples[:2000]])
    print(f"{os.cpu_count()} processors, {sum(len(example.pairs) for example in examples)} pairs")
    tokenization(examples, tokenizer)
    with tempfile.TemporaryDirectory() as cache_dir:
        for state in ("cold", "warm"):
            started = time.perf_counter()
            loader = PairedPreferenceDataLoader(
                examples, tokenizer, batch_size=32, max_length=2048, max_prompt_length=1024, cache_dir=cache_dir
            )
            loaded = time.perf_counter()
            tokens = sum(len(e.prompt) + sum(map(len, e.responses)) for batch in loader for e in batch)
            ended = time.perf_counter()
            print(
                f"{state}: {tokens / (ended - started):,.0f} tokens/s from texts to batches "
                f"({tokens:,} tokens; load {loaded - started:.2f} s, batches {ended - loaded:.2f} s)"
            )


if __name__ == "__main__":
    main()
