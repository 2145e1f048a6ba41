"""Samples: which pairs are taken, which response is shown first, and which rows belong together.

Mistakes in files are tested in test_compare.py.
"""

import json

import pytest

from halos.errors import UserError
from halos.judge.samples import Pair, orders, read_pairs, sample_pairs


def test_samples_are_nested_and_do_not_depend_on_the_order_of_the_file():
    pairs = [Pair(n, f"prompt {n}", f"a{n}", f"b{n}") for n in range(100)]
    small, large = (set(pair.row for pair in sample_pairs(pairs, n, seed=3)) for n in (20, 50))
    assert small < large and len(small) == 20
    assert {pair.row for pair in sample_pairs(pairs[::-1], 20, seed=3)} == small
    assert {pair.row for pair in sample_pairs(pairs, 20, seed=4)} != small
    first = sum(orders(pair, both=False, seed=0) == (0,) for pair in pairs)
    assert 30 < first < 70


#### WHICH ROWS BELONG TOGETHER


@pytest.fixture
def file(tmp_path):
    """file(name, rows...): the path of a .jsonl with these rows."""

    def write(name: str, *rows: dict) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def asked(content: str) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


def shown(pairs: list[Pair]) -> list[tuple[str, str, str]]:
    return [(pair.prompt, pair.candidate, pair.baseline) for pair in pairs]


def test_a_judge_is_shown_the_messages_and_no_markup(file):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    path = file("a.jsonl", {"prompt": "<|im_start|>user\nHi", "messages": turns, "policy": "a", "chosen": "b"})
    (pair,) = read_pairs(path, "policy", "chosen")
    assert pair == Pair(1, "system: Be kind.\n\nuser: Hi", "a", "b")
    assert pair.source == (turns, "a", "b")


def test_rows_without_messages_and_other_keys_are_shown_as_they_are(file):
    row = {"prompt": "<s>Hi", "question": "Hi?", "policy": "a", "chosen": "b"}
    path = file("a.jsonl", {**row, "messages": None}, {**row, "prompt": "x", "question": "y", **asked("z")})
    assert [pair.prompt for pair in read_pairs(path, "policy", "chosen")] == ["<s>Hi", "user: z"]
    assert [pair.prompt for pair in read_pairs(path, "policy", "chosen", "question")] == ["Hi?", "y"]


def test_calls_of_tools_are_shown(file):
    """Messages need no content. Messages that are no list are refused, with the row."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    turns = [{"role": "user", "content": "1+1"}, call, {"role": "tool", "content": "2"}]
    path = file("a.jsonl", {"prompt": "x", "messages": turns, "policy": "a", "chosen": "b"})
    (pair,) = read_pairs(path, "policy", "chosen")
    assert pair.prompt == 'user: 1+1\n\nassistant: [{"name": "add", "arguments": {"a": 1}}]\n\ntool: 2'
    with pytest.raises(UserError, match="row 1.*'messages' is 'hi', not a list of messages"):
        read_pairs(file("b.jsonl", {"prompt": "x", "messages": "hi", "policy": "a", "chosen": "b"}), "policy", "chosen")


def test_two_model_families_are_paired_by_their_messages(file):
    """The same message is another text for each template. Rows without messages are paired by their prompts."""
    a = file(
        "a.jsonl",
        {"prompt": "<|user|>Hi", **asked("Hi"), "policy": "a1"},
        {"prompt": "Once", "policy": "a2"},
        {"prompt": "same", **asked("one"), "policy": "a3"},
        {"prompt": "plain", **asked("two"), "policy": "a4"},
    )
    b = file(
        "b.jsonl",
        {"prompt": "plain", "policy": "b4"},
        {"prompt": "same", **asked("another"), "policy": "b3"},
        {"prompt": "Once", "policy": "b2"},
        {"prompt": "[INST] Hi [/INST]", **asked("Hi"), "policy": "b1"},
    )
    pairs = read_pairs(a, "policy", "policy", baseline_file=b)
    assert shown(pairs) == [("user: Hi", "a1", "b1"), ("Once", "a2", "b2"), ("user: two", "a4", "b4")]
    assert pairs[0].source == (asked("Hi")["messages"], "a1", "b1")


def samples_of(prompt: str, *texts: str) -> list[dict]:
    return [{"prompt": prompt, "sample": n, "policy": text, "chosen": "c"} for n, text in enumerate(texts)]


def test_several_samples_of_a_prompt(file):
    """Each sample is a pair. Samples of the same number belong together; one response serves for all samples."""
    several = file("k.jsonl", *samples_of("p", "p0", "p1"), *samples_of("q", "q0", "q1"))
    single = file("one.jsonl", {"prompt": "p", "policy": "x"}, {"prompt": "q", "policy": "y"})
    assert len(read_pairs(several, "policy", "chosen")) == 4
    others = read_pairs(several, "policy", "policy", baseline_file=several)
    assert [pair.baseline for pair in others] == ["p0", "p1", "q0", "q1"]
    assert [pair.baseline for pair in read_pairs(several, "policy", "policy", baseline_file=single)] == list("xxyy")
    assert [pair.baseline for pair in read_pairs(single, "policy", "policy", baseline_file=several)] == ["p0", "q0"]
    with pytest.raises(UserError, match="row 2.*same prompt and sample as row 1"):
        read_pairs(file("twice.jsonl", *samples_of("p", "a"), *samples_of("p", "b")), "policy", "chosen")


def test_the_samples_of_a_prompt_are_compared_with_each_other(file):
    path = file(
        "k.jsonl", *samples_of("p", "p0", "p1", "p2", "p3"), *samples_of("q", "q0"), *samples_of("r", "r0", "r1")
    )
    assert shown(read_pairs(path, "policy", "policy")) == [("p", "p0", "p1"), ("p", "p2", "p3"), ("r", "r0", "r1")]
    with pytest.raises(UserError, match="compared with itself.*--n_per_prompt 2"):
        read_pairs(file("one.jsonl", *samples_of("p", "a")), "policy", "policy")
