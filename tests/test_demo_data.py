"""The embedded dataset: check() on hand-written cases, the proportions in generate()'s data, and the tokenizer."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from halos import demo

ROOT = Path(__file__).resolve().parent.parent
items = cache(demo.generate)  # generating the training split takes a second or two


def ask(*turns: str) -> str:
    """Write a prompt of Human and Assistant turns in alternation; "" is an empty turn."""
    speakers = ("Human: ", "Assistant: ")
    return "".join(f"\n\n{speakers[i % 2]}{turn}" for i, turn in enumerate(turns)) + "\n\nAssistant:"


def as_shown_to_judges(*turns: str) -> str:
    """Write the same turns as compare.py shows the messages of a conversation."""
    return "\n\n".join(f"{('user', 'assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny_tokenizer")


#### CHECKING ANSWERS

QUESTIONS = [  # (turns, right answer, a plausible wrong answer)
    (("Write backwards: KAMI",), "IMAK", "KAMI"),
    (("Reverse: 729",), "927", "729"),
    (("Sort: BANANA",), "AAABNN", "ABN"),
    (("Put in order: 729",), "279", "9, 7, 2"),
    (("Repeat: KAMI",), "KAMI", "IMAK"),
    (("Say this after me: 314",), "314", "134"),
    (("Which number is the largest? 3, 8, 5",), "8", "5"),
    (("Which number is the smallest? 3, 8, 5",), "3", "8"),
    (("What is the first letter? KAMI",), "K", "I"),
    (("What is the last letter? KAMI",), "I", "K"),
    (("How many letters are here? BANANA",), "6", "3"),
    (("How many A are here? BANANA",), "3", "6"),
    (("How many E are here? KAMI",), "0", "1"),
    (("What is 38 + 7?",), "45", "35"),
    (("Eva has 12 coins and finds 9 more. How many coins are they?",), "21", "129"),
    (("Count from 8 to 11.",), "8, 9, 10, 11", "8, 9, 10"),
    (("My prices are: fig 3, pear 8, plum 1. What does the pear cost?",), "8", "3"),
    (("My prices are: cow 9, fig 2.", "I will remember them.", "What does the fig cost?"), "2", "9"),
]


@pytest.mark.parametrize(("turns", "right", "wrong"), QUESTIONS)
def test_check_knows_the_answer_to_every_question(turns, right, wrong):
    for prompt in (ask(*turns), ask("What is 1 + 1?", "2", "Sort: MIKA", "AIKM", *turns)):
        assert demo.check(prompt, f" {right}") == 1.0
        assert demo.check(as_shown_to_judges(*turns), f" {right}") == 1.0
        assert demo.check(prompt, f" The answer is {right}.") == 1.0
        assert demo.check(prompt, f" {wrong}") <= 0.4


def test_every_template_has_a_hand_written_case():
    """QUESTIONS covers each template of each task, so every answer is also checked against one written by hand."""
    questions = [ask(*turns) for turns, *_ in QUESTIONS]
    for task, pattern in demo.PATTERNS:
        asked = [prompt for prompt in questions if pattern.search(prompt)]
        assert asked, (task.templates, pattern.pattern)


@pytest.mark.parametrize(
    ("response", "quality"),
    [
        (" 9, 10, 11", 1.0),
        ("9, 10, 11", 1.0),  # without the leading space
        (" 9, 10, 11.\n", 1.0),
        (" Sure: 9, 10, 11", 1.0),
        (" 9, 10, 11. I hope that this helps!", 0.5),
        (" The answer is 9, 10, 11. I hope that this helps!", 0.5),
        (" 9, 10", 0.4 * 5 / 9),  # 5 of 9 characters
        (" 9, 10, 12", 0.4 * 8 / 9),
        (" 9, 10, 11, 12", 0.4 * 9 / 13),
        (" 9,10,11", 0.4 * 2 / 9),
        (" I am not sure.", 0.0),
        (" The answer is", 0.0),
    ],
)
def test_partial_credit(response, quality):
    assert demo.check(ask("Count from 9 to 11."), response) == pytest.approx(quality, abs=1e-3)


GARBAGE = ["", " ", "\n\n", ".", "\x00", "\ufffd" * 3, "(((", "9" * 100_000, "é日本🦊", "\n\nHuman: hi"]


@pytest.mark.parametrize("response", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_a_response(response):
    for turns, *_ in QUESTIONS:
        assert 0.0 <= demo.check(ask(*turns), response) < 0.5


def test_a_prompt_of_another_dataset_is_refused():
    with pytest.raises(ValueError, match="How do I bake bread"):
        demo.check(ask("How do I bake bread?"), " With flour.")


#### GENERATED DATA


def test_generation_is_a_function_of_split_and_seed():
    assert demo.generate("test") == items("test") == demo.generate("test", seed=0)
    assert demo.generate("test", seed=1)[:5] != items("test")[:5]


def test_the_same_data_in_every_process():
    """The data does not depend on hash(), set order or a global random generator, which differ between processes."""
    program = "from halos import demo; print(repr(demo.generate('test')[-1]))"
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == repr(items("test")[-1])


def test_sizes():
    train = items("train")
    assert len(train) == 24_000 and len(items("test")) == 2_048
    assert sum(len(item["pairs"]) for item in train) >= 40_000
    assert 0.2 < sum(len(item["pairs"]) > 1 for item in train) / len(train) < 0.6
    assert {len(item["responses"]) for item in train} == {2, 3, 4}


def test_splits_share_no_prompt_and_no_question():
    """Training and test share no prompt, also for another seed, and no question after other turns."""

    def prompts(split, seed=0):
        return [item["prompt"] for item in items(split, seed)]

    for train, test in [(prompts("train"), prompts("test")), (prompts("train"), prompts("test", 1))]:
        assert len(set(train)) == len(train) and len(set(test)) == len(test)
        train = set(train)
        for prompt in test:
            tail = prompt.split("\n\nHuman: ")
            assert train.isdisjoint("\n\nHuman: ".join(["", *tail[-n:]]) for n in range(1, len(tail) + 1))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_item_keeps_the_form(split):
    for item in items(split):
        prompt, responses = item["prompt"], item["responses"]
        assert prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:")
        assert len(set(responses)) == len(responses) >= 2
        assert all(r.startswith(" ") and r.strip() and not r.startswith("  ") for r in responses)
        quality = [demo.check(prompt, r) for r in responses]
        assert item["scores"] == quality
        assert item["pairs"] and len(set(item["pairs"])) == len(item["pairs"])
        assert all(quality[better] > quality[worse] for better, worse in item["pairs"])
        assert 0 <= item["sft_index"] < len(responses)


def test_the_annotators_are_imperfect_by_a_known_amount():
    """An SFT target is right with probability 0.95 * 0.70 = 0.665, plus right answers of `wrong_response` by chance."""
    train = items("train")
    imitated = [demo.check(item["prompt"], item["responses"][item["sft_index"]]) for item in train]
    assert 0.65 < sum(q == 1.0 for q in imitated) / len(train) < 0.70
    pairs = [(item["prompt"], item["responses"][i], item["responses"][j]) for item in train for i, j in item["pairs"]]
    assert 0.88 < sum(demo.check(prompt, better) == 1.0 for prompt, better, _ in pairs) / len(pairs) < 0.92
    assert not any(demo.check(prompt, worse) == 1.0 for prompt, _, worse in pairs)


def test_the_mistakes_are_various():
    """More than half of the rejected responses are far from the right answer, and more than one in seven is close.

    Quality is 0.4 times the share of characters that match in place: far is below a third, close above a half.
    """
    rejected = [
        demo.check(item["prompt"], item["responses"][worse]) for item in items("train") for _, worse in item["pairs"]
    ]
    far = sum(quality < 0.4 / 3 for quality in rejected) / len(rejected)
    close = sum(quality > 0.4 / 2 for quality in rejected) / len(rejected)
    assert far > 0.5 and close > 1 / 7


#### THE TOKENIZER


def test_every_text_comes_back():
    texts = [item["prompt"] for item in items("test")] + [r for item in items("test") for r in item["responses"]]
    texts += ["", " ", "  two  spaces ", "tabs\tand\n\nlines\n", "don't, 3.14; A Pear KAMIro", "naïve 日本語 🦊 \x00"]
    assert tokenizer().batch_decode(tokenizer()(texts)["input_ids"]) == texts


def test_prompt_and_response_tokenize_apart_as_together():
    """The ids of prompt and response, encoded separately, are those of the whole text.

    So a model reads the same ids in sampling as in training.
    """
    for item in items("test")[:200]:
        for response in item["responses"]:
            apart = tokenizer()(item["prompt"])["input_ids"] + tokenizer()(response)["input_ids"]
            assert apart == tokenizer()(item["prompt"] + response)["input_ids"]


def test_letters_and_digits_are_tokens_and_words_do_not_fall_apart():
    tokens = tokenizer().tokenize("\n\nHuman: Write backwards: KAMI, 17, 42.\n\nAssistant:")
    assert [tokenizer().convert_tokens_to_string([token]) for token in tokens] == (
        ["\n\nHuman:", " Write", " backwards", ":", " ", "K", "A", "M", "I", ", ", "1", "7", ", ", "4", "2", "."]
        + ["\n\nAssistant:"]
    )


def test_special_tokens_and_lengths():
    tok = tokenizer()
    assert tok.is_fast and len(tok) <= 1024
    assert tok.eos_token_id is not None and tok.pad_token_id is not None and tok.eos_token_id != tok.pad_token_id
    assert tok.bos_token is None and tok("")["input_ids"] == []  # no special tokens are added to a text
    lengths = sorted(map(len, tok([item["prompt"] for item in items("test")])["input_ids"]))
    assert lengths[len(lengths) // 2] < 16 and lengths[-1] > 100  # a realistic spread, and inside max_prompt_length
    assert lengths[-1] <= 192


def test_the_tokenizer_can_be_rebuilt(tmp_path):
    """scripts/make_tiny_tokenizer.py, run on today's dataset, gives the committed files."""
    script = ROOT / "scripts" / "make_tiny_tokenizer.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    assert (tmp_path / "tokenizer.json").read_text() == (ROOT / "assets/tiny_tokenizer/tokenizer.json").read_text()
