"""From examples to batches: token ids, the store on disk, truncation, collation, epochs, and the loader's position.

Most tests use a tokenizer of single characters, so that ids can be read: <s> is 0, </s> 1, a space 2, a to z 3 to 28,
a colon 29, and everything else 30.
"""

import hashlib
import json
import multiprocessing
import os
import random
import string
import threading
import tracemalloc

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import dataloaders
from dataloaders import (
    DataLoader,
    Example,
    PairedPreferenceDataLoader,
    SFTDataLoader,
    UnpairedPreferenceDataLoader,
)
from halos import locks, token_store
from halos.errors import UserError
from halos.example_table import ExampleTable
from halos.logps_store import addresses
from halos.reference_cache import Responses
from halos.token_store import tokenize
from halos.tokens import LITERAL, Encoder, Role, truncate
from helpers import PROJECT, make_config

BOS, EOS = 0, 1
ALPHABET = ["<s>", "</s>", " ", *string.ascii_lowercase, ":", "?"]


def character_tokenizer(with_bos: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({token: index for index, token in enumerate(ALPHABET)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="?")


def ids(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def shown(batch) -> list[tuple]:
    """Return a batch as text: (prompt, responses, chosen) per example, EOS as | and BOS as ^."""
    names = ["^", "|", *ALPHABET[2:]]

    def text(array):
        return "".join(names[index] for index in array.tolist())

    return [(text(one.prompt), [text(response) for response in one.responses], flags(one)) for one in batch]


def flags(row) -> tuple[bool, ...]:
    """Return for each response if it is chosen."""
    return tuple(role == "chosen" for role in row.roles)


@pytest.fixture
def loader(tmp_path):
    """Make a loader with the character tokenizer: loader(cls, examples, **settings)."""

    def loader(cls, examples, with_bos=False, **settings) -> DataLoader:
        settings = {"batch_size": 4, "max_length": 100, "max_prompt_length": 50, "cache_dir": str(tmp_path)} | settings
        return cls(examples, character_tokenizer(with_bos), **settings)

    return loader


def pair(prompt: str, chosen: str, rejected: str) -> Example:
    return Example(prompt, [chosen, rejected], pairs=[(0, 1)], sft_index=0)


def numbered(n: int, kind: str = "pairs") -> list[Example]:
    """Make n examples with the prompts aa, ab, ...

    kind: pairs, one per example; or feedback, one labelled response per example, of which every third is desirable
    """
    letters = string.ascii_lowercase
    prompts = [letters[i // 26] + letters[i % 26] for i in range(n)]
    if kind == "pairs":
        return [pair(prompt, " y", " n") for prompt in prompts]
    return [Example(prompt, [" f"], feedback=[(0, i % 3 == 0)]) for i, prompt in enumerate(prompts)]


#### COLLATION


def test_sft_batch(loader):
    """An SFT row has the response of sft_index only. An example without sft_index gives no row."""
    examples = [Example("ab", [" c", " de"], sft_index=1), Example("b", [" c"])]
    data = loader(SFTDataLoader, examples)
    (batch,) = data
    assert shown(batch) == [("ab", [" de|"], (True,))]
    assert batch[0].prompt.tolist() == [3, 4]
    assert batch[0].responses[0].tolist() == [2, 6, 7, EOS]
    assert batch[0].prompt.dtype == batch[0].responses[0].dtype == np.int32


def test_paired_batch(loader):
    """Every pair is a row, the chosen response first: the ranking cc > a > b gives two rows with the same prompt."""
    data = loader(PairedPreferenceDataLoader, [Example("q:", [" a", " b", " cc"], pairs=[(2, 0), (0, 1)])])
    (batch,) = data
    assert sorted(shown(batch)) == [
        ("q:", [" a|", " b|"], (True, False)),
        ("q:", [" cc|", " a|"], (True, False)),
    ]


def test_unpaired_batch(loader):
    """Each half of a pair is a row of its own; labelled responses are rows as they are."""
    examples = [pair("p", " y", " n"), Example("q", [" z", " w"], feedback=[(0, False), (1, True)])]
    (batch,) = loader(UnpairedPreferenceDataLoader, examples)
    assert sorted(shown(batch)) == [
        ("p", [" n|"], (False,)),
        ("p", [" y|"], (True,)),
        ("q", [" w|"], (True,)),
        ("q", [" z|"], (False,)),
    ]


def test_bos_where_the_tokenizer_has_one(loader):
    (batch,) = loader(PairedPreferenceDataLoader, [pair("ab", " c", " d")], with_bos=True)
    assert shown(batch) == [("^ab", [" c|", " d|"], (True, False))]
    assert batch[0].prompt.tolist() == [BOS, 3, 4]


def test_no_row_for_a_loader_is_a_users_error(loader):
    with pytest.raises(UserError, match=r"no row for PairedPreferenceDataLoader \(3 examples with binary feedback\)"):
        loader(PairedPreferenceDataLoader, numbered(3, "feedback"))
    with pytest.raises(UserError, match="no row for SFTDataLoader"):
        loader(SFTDataLoader, numbered(3, "feedback"))


def test_flatten_must_be_defined(loader):
    with pytest.raises(NotImplementedError, match="define flatten"):
        loader(DataLoader, numbered(1))


#### ORDER

LOADERS = [SFTDataLoader, PairedPreferenceDataLoader, UnpairedPreferenceDataLoader]
every_loader = pytest.mark.parametrize("cls", LOADERS, ids=lambda cls: cls.__name__)


@every_loader
def test_batches_are_a_function_of_seed_and_epoch(loader, cls):
    """Two loaders with the same seed agree over three epochs. Other epochs and seeds give the same rows reordered."""
    examples = numbered(30)
    one, same = (list(map(shown, loader(cls, examples, seed=7, n_epochs=3, batch_size=5))) for _ in range(2))
    assert one == same
    per_epoch = len(one) // 3
    epochs = [sum(one[i * per_epoch : (i + 1) * per_epoch], []) for i in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    other = sum(map(shown, loader(cls, examples, seed=8, n_epochs=1, batch_size=5)), [])
    assert other != epochs[0] and sorted(other) == sorted(epochs[0])


@every_loader
def test_the_batch_size_does_not_change_the_order(loader, cls):
    """The order of rows does not depend on the batch size, and the state of the global `random` does not change."""
    examples = numbered(20)
    random.seed(0)
    before = random.getstate()
    in_threes = sum(map(shown, loader(cls, examples, batch_size=3)), [])
    in_eights = sum(map(shown, loader(cls, examples, batch_size=8)), [])
    assert in_threes == in_eights and random.getstate() == before


@pytest.mark.parametrize("n", [2, 3, 5, 8, 31])
@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_unpaired_batches_are_half_and_half(loader, n, batch_size):
    """n chosen and n rejected responses alternate, so every batch of even size is half chosen, also the last one."""
    for batch in loader(UnpairedPreferenceDataLoader, numbered(n), batch_size=batch_size):
        assert sum(flags(one)[0] for one in batch) * 2 == len(batch)


@pytest.mark.parametrize("n", [4, 5, 9, 16, 31])
def test_the_halves_of_a_pair_are_not_in_one_batch(loader, n):
    """The two halves of a pair are not in one batch of size B if B/2 <= n // 2.

    A batch has B/2 of the n chosen halves and B/2 of the rejected ones, which are half an epoch behind. In larger
    batches the halves cannot be kept apart.
    """
    for batch_size in range(2, 2 * (n // 2) + 1, 2):
        for batch in loader(UnpairedPreferenceDataLoader, numbered(n), batch_size=batch_size, n_epochs=3):
            prompts = [tuple(one.prompt) for one in batch]
            assert len(set(prompts)) == len(prompts)


def test_every_half_of_a_pair_is_seen_once_an_epoch(loader):
    rows = sum(map(shown, loader(UnpairedPreferenceDataLoader, numbered(7), batch_size=3)), [])
    assert len(rows) == 14
    assert sorted(rows) == sorted(
        (example.prompt, [f"{example.generations[i]}|"], (i == 0,)) for example in numbered(7) for i in (0, 1)
    )


def test_binary_feedback_keeps_its_proportions(loader):
    """A third of 300 labelled responses is desirable: 100 in the epoch, and 50 +- 20 in its first half.

    The standard deviation of such a draw without replacement is sqrt(150 * 1/3 * 2/3 / 2) = 4.1; 20 is about five.
    """
    rows = [flags(row)[0] for row in loader(UnpairedPreferenceDataLoader, numbered(300, "feedback")).order(0)]
    assert sum(rows) == 100
    assert abs(sum(rows[:150]) - 50) <= 20


def test_pairs_and_feedback_are_mixed(loader):
    """100 pairs and 300 labelled responses give 200 + 300 rows, mixed: each fifth of the epoch has 20 to 60 halves.

    The halves of pairs still alternate between chosen and rejected.
    """
    examples = [*numbered(100), *numbered(300, "feedback")]
    data = loader(UnpairedPreferenceDataLoader, examples)
    rows = data.order(0)
    is_half = [row.example < 100 for row in rows]
    assert (len(rows), sum(is_half)) == (500, 200)
    assert all(20 < sum(is_half[start : start + 100]) < 60 for start in range(0, 500, 100))
    halves = [flags(row)[0] for row, half in zip(rows, is_half, strict=True) if half]
    assert halves == [True, False] * 100


#### HOW LONG


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, [4, 4, 2]),
        ({"n_epochs": 2}, [4, 4, 2, 4, 4, 2]),
        ({"n_epochs": 2, "batch_size": 5}, [5, 5, 5, 5]),  # exact multiples
        ({"n_epochs": 2, "batch_size": 10}, [10, 10]),
        ({"n_epochs": 2, "batch_size": 64}, [10, 10]),  # a batch never crosses epochs
        ({"n_examples": 6}, [4, 2]),
        ({"n_examples": 8}, [4, 4]),
        ({"n_examples": 1}, [1]),
        ({"n_examples": 100}, [4, 4, 2]),  # n_epochs 1 comes first
        ({"n_epochs": None, "n_examples": 10}, [4, 4, 2]),
        ({"n_epochs": None, "n_examples": 13}, [4, 4, 2, 3]),
        ({"n_epochs": None, "n_examples": 14}, [4, 4, 2, 4]),
        ({"n_epochs": None, "n_examples": 25}, [4, 4, 2, 4, 4, 2, 4, 1]),
        ({"n_epochs": 3, "n_examples": 12}, [4, 4, 2, 2]),
        ({"n_epochs": 3, "n_examples": 30}, [4, 4, 2] * 3),
    ],
    ids=str,
)
def test_length(loader, settings, sizes):
    """Ten rows, in batches of 4 by default. The last, smaller batch of an epoch is kept; len() counts the batches."""
    data = loader(PairedPreferenceDataLoader, numbered(10), **settings)
    assert [len(batch) for batch in data] == sizes
    assert len(data) == len(sizes)
    assert data.total_examples == data.examples_seen == sum(sizes)
    assert list(data) == []  # the end, until restart()
    data.restart()
    assert [len(batch) for batch in data] == sizes


def repeated(n: int) -> list[Example]:
    """Make n examples, each with three pairs of its four responses."""
    pairs = [(0, 1), (1, 2), (2, 3)]
    return [Example(one.prompt, [" a", " b", " c", " d"], pairs=pairs, sft_index=0) for one in numbered(n)]


@every_loader
def test_grouped_prompts_are_the_same_rows_in_other_batches(loader, cls):
    """Six prompts of three pairs in batches of 6: each prompt is in one batch, in another order in each epoch.

    Unpaired rows, six of each prompt, are half chosen and half rejected in each batch, as they are without.
    """
    settings = {"batch_size": 6, "n_epochs": 2}
    plain, grouped = (
        list(map(shown, loader(cls, repeated(6), **settings, group_prompts=grouped))) for grouped in (False, True)
    )
    assert [len(batch) for batch in grouped] == [len(batch) for batch in plain]
    assert sorted(sum(grouped, [])) == sorted(sum(plain, []))
    half = len(grouped) // 2
    assert grouped[:half] != grouped[half:]
    for epoch in (grouped[:half], grouped[half:]):
        prompts = [prompt for batch in epoch for prompt in {prompt for prompt, _, _ in batch}]
        assert len(prompts) == len(set(prompts)) == 6
    if cls is UnpairedPreferenceDataLoader:
        assert all(sum(is_chosen for _, _, (is_chosen,) in batch) == 3 for batch in grouped)


@every_loader
@pytest.mark.parametrize(
    "settings",
    [{"n_epochs": 2}, {"n_epochs": None, "n_examples": 51}, {"n_epochs": 2, "group_prompts": True}],
    ids=str,
)
def test_resume_gives_exactly_the_rest(loader, cls, settings):
    """From the state after any batch, also at the end of an epoch, iteration gives the rest; also through JSON."""
    examples = repeated(5) if "group_prompts" in settings else numbered(9)
    data = loader(cls, examples, **settings)
    batches, states = [], [json.dumps(data.state_dict())]
    for batch in data:
        batches.append(shown(batch))
        states.append(json.dumps(data.state_dict()))
    assert len(batches) == len(data)
    for done, state in enumerate(states):
        resumed = loader(cls, examples, **settings)
        resumed.load_state_dict(json.loads(state))
        assert list(map(shown, resumed)) == batches[done:]


def test_evaluation_loader_is_the_same_every_time(tmp_path):
    """Every evaluation reads the first n_eval_examples of one seeded shuffle, once, even if n_epochs is 3.

    They come in batches of eval_batch_size: 20 examples as 8, 8, 4.
    """
    config = make_config(tmp_path, "loss=dpo", "n_eval_examples=20", "model.eval_batch_size=8", "n_epochs=3")
    data = dataloaders.make_loader(config, tiny_tokenizer(), "test")
    assert isinstance(data, PairedPreferenceDataLoader)

    def read() -> list:
        data.restart()
        return [[one.prompt.tolist() for one in batch] for batch in data]

    first = read()
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert read() == first


#### TRUNCATION


def cut(prompt: str, responses: list[str], max_length: int, max_prompt_length: int, keep="keep_end", n_bos=0):
    """Call truncate() on strings, with characters as tokens."""
    arrays = [np.array([ord(character) for character in text], np.int32) for text in (prompt, *responses)]
    prompt_ids, response_ids = truncate(
        arrays[0], tuple(arrays[1:]), (Role.CHOSEN,) * len(responses), max_length, max_prompt_length, keep, n_bos
    )
    return "".join(map(chr, prompt_ids)), ["".join(map(chr, response)) for response in response_ids]


def test_what_fits_is_not_cut():
    """6 + 4 = 10 tokens fit, so nothing is cut, although the prompt is longer than max_prompt_length."""
    assert cut("abcdef", ["wxy|"], 10, 3) == ("abcdef", ["wxy|"])


@pytest.mark.parametrize(
    ("keep", "n_bos", "expected"),
    [("keep_start", 0, "^abc"), ("keep_end", 0, "cdef"), ("keep_start", 1, "^abc"), ("keep_end", 1, "^def")],
)
def test_prompts_are_cut_to_max_prompt_length(keep, n_bos, expected):
    """7 + 4 tokens do not fit into 10: the prompt keeps 4 of its 7 tokens, among them BOS if there is one."""
    assert cut("^abcdef", ["wxy|"], 10, 4, keep, n_bos) == (expected, ["wxy|"])


def test_a_prompt_may_have_room_for_bos_alone():
    assert cut("^abcdef", ["wxy|"], 9, 1, "keep_end", 1) == ("^", ["wxy|"])
    assert cut("^abcdef", ["wxy|"], 9, 1, "keep_start", 1) == ("^", ["wxy|"])


def test_then_the_response_loses_its_end():
    """If a cut prompt is not enough, the response loses its end, and its EOS.

    A prompt of 3 stays: 10 - 3 = 7 of the 9 tokens of the response are left. A prompt of 6 is cut to 4: 10 - 4 = 6.
    """
    assert cut("abc", ["12345678|"], 10, 4) == ("abc", ["1234567"])
    assert cut("abcdef", ["12345678|"], 10, 4) == ("cdef", ["123456"])


def test_a_pair_cuts_its_prompt_once_by_its_longer_response():
    """The short response would fit with the whole prompt (6 + 2 <= 10), the long one does not: one prompt for both.

    With 6 tokens, the long one fits after the cut (4 + 6). With 9, it loses its end.
    """
    assert cut("abcdef", ["1|", "12345|"], 10, 4) == ("cdef", ["1|", "12345|"])
    assert cut("abcdef", ["1|", "12345678|"], 10, 4) == ("cdef", ["1|", "123456"])


def test_truncation_in_a_batch(loader):
    """With max_length 8, max_prompt_length 4 and BOS, ^abcdef and ' y|' have 7 + 3 > 8 tokens: ^def is left, or ^abc.

    ' nnnnn|' then keeps 8 - 4 = 4 of its 7 tokens.
    """
    start = Example("abcdef", [" y", " nnnnn"], pairs=[(0, 1)], truncation_mode="keep_start")
    end = Example("abcdef", [" y", " nnnnn"], pairs=[(0, 1)], truncation_mode="keep_end")
    for one, prompt in ((start, "^abc"), (end, "^def")):
        data = loader(PairedPreferenceDataLoader, [one], with_bos=True, max_length=8, max_prompt_length=4)
        (batch,) = data
        assert shown(batch) == [(prompt, [" y|", " nnn"], (True, False))]
        assert data.counts() == {
            "examples": 1, "rows": 1, "tokens": 4 + 3 + 4, "truncated_prompts": 1, "truncated_responses": 1,
        }  # fmt: skip


@every_loader
@pytest.mark.parametrize("with_bos", [False, True])
def test_counts_are_what_happens(loader, cls, with_bos):
    """counts() equals a count over all rows, on 60 random examples of which many are cut."""
    rng = random.Random(0)

    def text(most: int) -> str:
        return " " + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, most)))

    examples = []
    for i in range(60):
        one = Example(
            f"{i % 26}{text(30)}", [text(25) for _ in range(3)], pairs=[(0, 1), (2, 0)], sft_index=rng.randrange(3)
        )
        one.feedback = [(1, True)]
        one.truncation_mode = rng.choice(["keep_start", "keep_end"])
        examples.append(one)
    data = loader(cls, examples, with_bos, max_length=24, max_prompt_length=10)
    rows = [data.tokenized(row) for row in data.order(0)]
    whole_prompts = [len(data.prompt_ids[row.example]) for row in data.order(0)]
    assert data.counts() == {
        "examples": 60,
        "rows": len(rows),
        "tokens": sum(len(row.prompt) + sum(map(len, row.responses)) for row in rows),
        "truncated_prompts": sum(len(row.prompt) < whole for row, whole in zip(rows, whole_prompts, strict=True)),
        "truncated_responses": sum(response[-1] != EOS for row in rows for response in row.responses),
    }
    assert 0 < data.counts()["truncated_responses"] and 0 < data.counts()["truncated_prompts"]
    for row in rows:
        assert all(len(row.prompt) + len(response) <= 24 and len(response) for response in row.responses)
        assert row.prompt[0] == BOS or not with_bos
        assert (row.prompt == BOS).sum() == with_bos


#### TEXTS TO IDS


def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(os.path.join(PROJECT, "assets", "tiny_tokenizer"))


CORPUS = [
    "Human: what is the capital of France? Assistant: Paris is the capital of France.",
    "Human: how are you today? Assistant: I am well, and you are kind.",
] * 20


def llama_tokenizer(scheme: str, corpus: list[str]) -> LlamaTokenizer:
    """Train a small BPE with Llama's rules: spaces as ▁, one before each text, unknown characters as bytes.

    scheme: where a space is put before: 'first' is Llama's legacy=False, 'always' its legacy=True
    """
    backend = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    names = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned])
    tokenizer = LlamaTokenizer(
        vocab={name: index for index, name in enumerate(names)},
        merges=[tuple(merge) for merge in model["merges"]],
        legacy=scheme == "always",
        add_bos_token=True,
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    return tokenizer


def sentencepiece_tokenizer(folder, kind: str):
    """Train a model with the sentencepiece package and Llama's settings, and read it with transformers."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return LlamaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["byte-level", "first", "always", "sentencepiece bpe", "sentencepiece unigram"])
def encoder(request, tmp_path_factory) -> Encoder:
    kind, _, rest = request.param.partition(" ")
    if kind == "byte-level":
        return Encoder(tiny_tokenizer())
    if kind == "sentencepiece":
        return Encoder(sentencepiece_tokenizer(tmp_path_factory.mktemp("sp"), rest))
    return Encoder(llama_tokenizer(kind, CORPUS))


RESPONSES = [
    " Paris", " I am well, and you are kind.", "Paris", "", " ", "  two  spaces ", "\n\nHuman: more", "\n", "\n Paris",
    " tab\tand\r\nline", " é ü 漢字", " 🙂👩‍🔬", " <b>", "\u00a0nbsp",
]  # fmt: skip


def test_the_ids_of_a_response_are_those_it_has_after_other_text(encoder):
    """A response that begins with a space has the ids that it has when prompt and response are encoded together."""
    prompt = "\n\nHuman: how are you today?\n\nAssistant:"
    for response in (" Paris", " I am well, and you are kind.", " how 漢字 🙂"):
        together = encoder._encode([prompt + response])[0]
        assert encoder.prompts([prompt])[0][len(encoder.bos) :] + encoder.responses([response])[0][:-1] == together


@pytest.mark.parametrize("response", RESPONSES, ids=ascii)
def test_concatenated_ids_decode_to_concatenated_texts(encoder, response):
    """The ids of prompt and response decode to both texts together, and decode_response gives back the response."""
    prompt = "\n\nHuman: how are you today?\n\nAssistant:"
    ids = encoder.responses([response])[0]
    assert ids[-1] == encoder.eos_token_id
    whole = encoder.prompts([prompt])[0] + ids[:-1]
    assert encoder.tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False) == (
        prompt + response
    )
    assert encoder.decode_response(ids) == response
    assert encoder.decode_response(ids[:-1]) == response  # without EOS, as after truncation
    assert encoder.decode_response([*ids, *ids]) == response  # with tokens after EOS


def test_a_response_has_one_space_not_two(encoder):
    """' Paris' begins with a token '▁...' or 'Ġ...', without a separate space before it."""
    first = encoder.tokenizer.convert_ids_to_tokens(encoder.responses([" Paris is"])[0])[:2]
    assert first[0] not in ("▁▁",) and not (first[0] == "▁" and first[1].startswith("▁"))


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_line_breaks_of_a_response_survive_where_they_merge(scheme):
    """In a vocabulary with a token for two line breaks, a line break that begins a response is kept."""
    encoder = Encoder(llama_tokenizer(scheme, [line.replace(" Assistant", "\n\nAssistant") for line in CORPUS]))
    assert encoder.tokenizer.convert_tokens_to_ids("\n\n") > 2  # not unknown
    for response in ("\n\nHuman: more", "\n", "\n Paris"):
        assert encoder.decode_response(encoder.responses([response])[0]) == response


def test_bos_is_there_only_if_the_tokenizer_starts_texts_with_it():
    """BOS is added only if the tokenizer starts texts with it. Having a BOS token is not enough: GPT-2's is its EOS."""
    without, with_bos = Encoder(character_tokenizer()), Encoder(character_tokenizer(with_bos=True))
    assert without.tokenizer.bos_token_id == BOS
    assert without.prompts(["ab"]) == [ids("ab")]
    assert with_bos.prompts(["ab", ""]) == [[BOS, *ids("ab")], [BOS]]
    assert Encoder(tiny_tokenizer()).bos == []
    assert Encoder(llama_tokenizer("first", CORPUS)).bos == [1]


def test_a_text_that_begins_with_bos_gets_no_second_one():
    """A text that begins with BOS, as chat templates write it, gets no second BOS."""
    assert Encoder(character_tokenizer(with_bos=True)).prompts(["<s>ab"]) == [[BOS, *ids("ab")]]


def test_responses_get_no_bos_and_end_with_eos():
    assert Encoder(character_tokenizer(with_bos=True)).responses([" a", ""]) == [[*ids(" a"), EOS], [EOS]]


def test_settings_of_the_tokenizer_do_not_cut_or_pad():
    """Texts stay whole if the tokenizer was set to truncate or pad, by its files or by an earlier call."""
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=5)
    encoder = Encoder(tokenizer)
    assert encoder.prompts(["a", "abcdef"]) == [ids("a"), ids("abcdef")]


#### THE TOKEN STORE


@pytest.fixture
def counted(monkeypatch):
    """The texts that were encoded, and not read from the store."""
    texts = []
    encode = Encoder._encode

    def recorded(self, batch):
        texts.extend(batch)
        return encode(self, batch)

    monkeypatch.setattr(Encoder, "_encode", recorded)
    return texts


def stored(store) -> list[list[int]]:
    return [store[i].tolist() for i in range(len(store))]


def test_the_store_holds_the_ids(tmp_path):
    """Three texts of 2, 0, and 3 characters have, with EOS, the lengths 3, 1, 4."""
    store = tokenize(["ab", "", "c d"], Encoder(character_tokenizer()), "responses", str(tmp_path))
    assert stored(store) == [[3, 4, EOS], [EOS], [5, 2, 6, EOS]]
    assert store.lengths.tolist() == [3, 1, 4] and len(store) == 3
    assert store[0].dtype == np.int32


def test_a_second_start_tokenizes_nothing(tmp_path, counted):
    texts = [f"text {'abcdefghij'[i % 10] * i}" for i in range(50)]
    first = tokenize(texts, Encoder(character_tokenizer()), "prompts", str(tmp_path))
    assert counted == texts
    counted.clear()
    second = tokenize(texts, Encoder(character_tokenizer()), "prompts", str(tmp_path))
    assert counted == []
    assert stored(second) == stored(first) == [ids(text) for text in texts]


def test_a_second_loader_tokenizes_nothing(loader, counted):
    """A second loader reads the store, whatever its seed, batch size, and lengths, unless a text has changed."""
    examples = numbered(10)
    loader(PairedPreferenceDataLoader, examples)
    counted.clear()
    loader(UnpairedPreferenceDataLoader, examples, seed=9, batch_size=2, max_length=9, max_prompt_length=3)
    assert counted == []
    loader(PairedPreferenceDataLoader, [*examples[:-1], pair("zz", " y", " n")])
    assert "zz" in counted


def test_different_contents_do_not_collide(tmp_path):
    """Each of these has a store of its own: texts that concatenate alike, another order, prompts and responses, BOS."""
    plain, with_bos = Encoder(character_tokenizer()), Encoder(character_tokenizer(with_bos=True))
    cases = [
        (["ab", "c"], plain, "prompts", [ids("ab"), ids("c")]),
        (["a", "bc"], plain, "prompts", [ids("a"), ids("bc")]),
        (["abc"], plain, "prompts", [ids("abc")]),
        (["abc", ""], plain, "prompts", [ids("abc"), []]),
        (["c", "ab"], plain, "prompts", [ids("c"), ids("ab")]),
        (["ab", "c"], plain, "responses", [[*ids("ab"), EOS], [*ids("c"), EOS]]),
        (["ab", "c"], with_bos, "prompts", [[BOS, *ids("ab")], [BOS, *ids("c")]]),
    ]
    for _ in range(2):  # written, then read
        for texts, encoder, kind, expected in cases:
            assert stored(tokenize(texts, encoder, kind, str(tmp_path))) == expected
    assert len(os.listdir(tmp_path / ".tokens")) == len(cases)


def test_another_tokenizer_or_end_of_text_does_not_collide(tmp_path):
    """A tokenizer with one more word, or with another EOS, has a store of its own."""
    more = character_tokenizer()
    more.add_tokens(["ab"])
    other_end = character_tokenizer()
    other_end.eos_token = ":"
    results = [
        stored(tokenize(["ab"], Encoder(tokenizer), "responses", str(tmp_path)))
        for tokenizer in (character_tokenizer(), more, other_end)
    ]
    assert results == [[[3, 4, EOS]], [[len(ALPHABET), EOS]], [[3, 4, ALPHABET.index(":")]]]


def test_no_texts_and_empty_texts(tmp_path):
    encoder = Encoder(character_tokenizer())
    for _ in range(2):
        assert stored(tokenize([], encoder, "prompts", str(tmp_path))) == []
        assert stored(tokenize(["", ""], encoder, "prompts", str(tmp_path))) == [[], []]


def test_emoji_and_astral_characters(tmp_path):
    encoder = Encoder(tiny_tokenizer())
    texts = [" 🙂", " 👩‍🔬 𝔘 \x00 é", "\ufeff", "\u00e9", "e\u0301"]
    for _ in range(2):
        store = tokenize(texts, encoder, "responses", str(tmp_path))
        assert [encoder.decode_response(one) for one in stored(store)] == texts


def test_half_a_surrogate_pair_fails_and_leaves_nothing_half_made(tmp_path):
    """Half a surrogate pair raises an error and leaves no store. Readers drop such rows, as no tokenizer takes them."""
    encoder = Encoder(tiny_tokenizer())
    with pytest.raises((UnicodeError, TypeError, ValueError)):
        tokenize([" fine", " \ud83d"], encoder, "responses", str(tmp_path))
    finished = [name for name in os.listdir(tmp_path / ".tokens") if not name.startswith("unfinished-")]
    assert finished == []
    assert len(tokenize([" fine"], encoder, "responses", str(tmp_path))) == 1


def test_more_texts_than_a_block(tmp_path, monkeypatch):
    """10 texts are encoded in blocks of 4, 4 and 2."""
    monkeypatch.setattr(token_store, "BLOCK", 4)
    texts = ["abcdefghijkl"[: i + 1] for i in range(10)]
    store = tokenize(texts, Encoder(character_tokenizer()), "prompts", str(tmp_path))
    assert stored(store) == [ids(text) for text in texts]


def test_blocks_at_once_have_the_ids_of_blocks_one_by_one(tmp_path, monkeypatch):
    """Also around texts with control tokens that a person wrote, which change the library's settings for a while."""
    monkeypatch.setattr(token_store, "BLOCK", 3)
    encoder = Encoder(tiny_tokenizer())
    end = encoder.tokenizer.eos_token
    texts = [f" word {i} {end[0] + LITERAL + end[1:] if i % 7 == 5 else end}" for i in range(100)]
    expected = [encoder.responses([text])[0] for text in texts]
    assert stored(tokenize(texts, encoder, "responses", str(tmp_path))) == expected
    assert len(expected[5]) > len(expected[4])


def test_an_interrupted_write_is_not_read(tmp_path, monkeypatch):
    """Tokenization that was killed halfway starts again; a half-written store is not read."""
    texts = [string.ascii_lowercase[i] for i in range(10)]
    monkeypatch.setattr(token_store, "BLOCK", 4)
    encoder = Encoder(character_tokenizer())
    prompts, calls = encoder.prompts, []

    def killed(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prompts(batch)

    encoder.prompts = killed
    with pytest.raises(KeyboardInterrupt):
        tokenize(texts, encoder, "prompts", str(tmp_path))
    del encoder.prompts
    assert stored(tokenize(texts, encoder, "prompts", str(tmp_path))) == [ids(text) for text in texts]


def _write_together(cache_dir, barrier, results):
    encoder = Encoder(character_tokenizer())
    texts = ["abc" * (i % 7) for i in range(3000)]
    barrier.wait()
    results.put(stored(tokenize(texts, encoder, "prompts", cache_dir)) == [ids(text) for text in texts])


def test_concurrent_writers_are_safe(tmp_path):
    """Three processes encode the same texts at the same time. Each reads all of them, and one store is left."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    writers = [context.Process(target=_write_together, args=(str(tmp_path), barrier, results)) for _ in range(3)]
    for writer in writers:
        writer.start()
    assert [results.get(timeout=60) for _ in writers] == [True] * 3
    for writer in writers:
        writer.join(60)
    assert len(os.listdir(tmp_path / ".tokens")) == 1


def test_two_cold_starts_share_one_tokenization(tmp_path, capfd):
    """Each of two starts tokenized everything, and the second deleted what it had made."""
    texts, expected = ["ab", "c"], [ids("ab"), ids("c")]
    began, may_end, results, calls = threading.Event(), threading.Event(), [], []

    def start() -> None:
        encoder = Encoder(character_tokenizer())
        prompts = encoder.prompts

        def slow(batch):
            calls.append(batch)
            began.set()
            assert may_end.wait(30)
            return prompts(batch)

        encoder.prompts = slow
        results.append(stored(tokenize(texts, encoder, "prompts", str(tmp_path))))

    starts = [threading.Thread(target=start) for _ in range(2)]
    starts[0].start()
    assert began.wait(30)
    starts[1].start()
    said = ""
    while "the same prompts" not in said:  # one reading may end within the line
        assert starts[1].is_alive()
        said += capfd.readouterr().out
    may_end.set()
    for thread in starts:
        thread.join(30)
    assert f"waiting for process {os.getpid()} on" in said and "which is tokenizing the same prompts" in said
    assert results == [expected, expected] and calls == [texts]
    assert len(os.listdir(tmp_path / ".tokens")) == 1


@pytest.mark.parametrize("file", ["ids.bin", "offsets.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_entry_is_made_again(tmp_path, capfd, file, damage):
    """A flipped bit in the cache trained on other tokens, and a truncated file ended every start with a traceback."""
    encoder, texts = Encoder(character_tokenizer()), ["ab", "c"]
    store = tokenize(texts, encoder, "prompts", str(tmp_path))
    path = os.path.join(store.directory, file)
    with open(path, "rb") as opened:
        data = opened.read()
    os.remove(path)
    if damage != "missing":
        changed = data[:-1] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 128])
        with open(path, "wb") as opened:
            opened.write(changed)
    capfd.readouterr()
    assert stored(tokenize(texts, encoder, "prompts", str(tmp_path))) == [ids("ab"), ids("c")]
    out = capfd.readouterr().out
    assert out.count("\n") == 1 and file in out and out.endswith("; tokenizing again\n"), out
    with open(path, "rb") as opened:
        assert opened.read() == data
    tokenize(texts, encoder, "prompts", str(tmp_path))
    assert capfd.readouterr().out == ""


def test_what_dead_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    encoder, root = Encoder(character_tokenizer()), tmp_path / ".tokens"
    for name in ("dead.unfinished", "dead.old", "unfinished-0123", "alive.unfinished"):
        (root / name).mkdir(parents=True)
        (root / name / "ids.bin").write_text("half")
    (root / ".dead.lock").write_text("")
    with locks.take(str(root / "alive")):
        tokenize(["ab"], encoder, "prompts", str(tmp_path))
        assert {".alive.lock", "alive.unfinished"} < set(os.listdir(root)) and len(os.listdir(root)) == 3
    tokenize(["ab"], encoder, "prompts", str(tmp_path))
    assert len(os.listdir(root)) == 1


#### EXAMPLES WITHOUT THEIR TEXTS


def described(example) -> tuple:
    names = "pairs feedback scores sft_index truncation_mode dataset_name id".split()
    return (*(getattr(example, name) for name in names), len(example.generations))


def test_a_table_reads_as_its_examples():
    """All but the texts, also of an example that is put into it later; texts are an error with a remedy."""
    examples = [
        Example("p", ["a", "b", "c"], [2.5, 1.0, float("inf")], [(0, 1), (2, 0)], dataset_name="x", id="x/12ab"),
        Example("q", ["a"], feedback=[(0, False), (0, True)], sft_index=0, truncation_mode="keep_start", id="é"),
        Example("r", id="x/0"),
    ]
    table = ExampleTable(examples)
    assert [described(one) for one in table] == [described(one) for one in examples] and len(table) == 3
    assert described(table[-1]) == described(examples[2]) and [described(one) for one in table[:2]][1][3] == 0
    table[1] = examples[0]
    assert [one.id for one in table] == ["x/12ab", "x/12ab", "x/0"]
    for read in (lambda: table[0].prompt, lambda: table[0].generations[0], lambda: "a" in table[0].generations):
        with pytest.raises(UserError, match="keep_texts=True"):
            read()


@every_loader
@pytest.mark.parametrize("weights", [{}, {"": 1.5}], ids=str)
def test_batches_are_the_same_without_texts(loader, cls, weights):
    settings = {"n_epochs": 2, "weights": weights, "batch_size": 3}
    one, other = (loader(cls, repeated(9), **settings, keep_texts=keep_texts) for keep_texts in (True, False))
    assert isinstance(other.examples, ExampleTable) and isinstance(one.examples, list)
    assert list(map(shown, one)) == list(map(shown, other)) and one.fingerprint == other.fingerprint


def test_a_loader_that_reads_texts_keeps_them(loader):
    """A flatten() of before, which asks for texts, works as it did."""

    class Short(SFTDataLoader):
        def flatten(self, rng):
            return [row for row in super().flatten(rng) if len(self.examples[row.example].prompt) < 2]

    for weights in ({}, {"": 1.5}):
        data = loader(Short, [pair("a", "y", "n"), pair("ab", "y", "n")], keep_texts=False, weights=weights)
        assert {data.examples[row.example].prompt for row in data.order(0)} == {"a"}


def test_memory_of_a_pair_without_texts(tmp_path):
    """A pair takes 60 to 100 bytes in a table, and 26 in an epoch; with its texts, it took 3.6 kB."""
    n = 20_000
    examples = [
        Example(f"{i}", ["y", "n"], pairs=[(0, 1)], sft_index=0, dataset_name="named", id=f"named/{i:012x}")
        for i in range(n)
    ]
    tracemalloc.start()
    table = ExampleTable(examples)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(table) == n and used / n < 100


@every_loader
def test_addresses_of_reference_log_probs(loader, cls):
    """The short way, for rows that truncation leaves whole, finds the addresses of the tokenized rows."""
    long = [Example("a" * 40, ["b" * 30, "c" * 20], pairs=[(0, 1)], sft_index=0)]
    data = loader(cls, [*repeated(5), *long], max_length=60, max_prompt_length=30, n_epochs=2)
    assert 0 < data.are_whole(data.order(0)).sum() < len(data.order(0))
    found = Responses([data])
    expected = {one for row in data.order(0) for one in addresses(data.tokenized(row))}
    assert {one.tobytes() for one in found.addresses} == expected
    for i in range(len(found)):
        assert next(addresses(found.place(i).example())) == found.addresses[i].tobytes()


def test_the_fingerprint_of_earlier_runs_is_still_theirs(loader):
    """A state of an earlier run is refused if this changes: int64 lengths, then the text of (example, responses)."""
    data = loader(PairedPreferenceDataLoader, [pair("ab", "y", "nn")])
    digest = hashlib.blake2b(np.array([2, 2, 3], np.int64).tobytes(), digest_size=16)
    digest.update(b"(0, ((0, 0), (0, 1)))")
    assert data.fingerprint == digest.hexdigest()
