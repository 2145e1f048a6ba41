"""Journal keys and journal files as they were written before the judge had a folder of its own.

If a key changes, people pay again for verdicts that they already have. So none of these may change by accident.
"""

import json
import math
import shutil
from pathlib import Path

import pytest

from halos.judge import FunctionJudge, PromptTemplate, load_template
from halos.judge.chat import ChatJudge
from halos.judge.journal import Journal
from halos.judge.samples import Pair, orders, sample_pairs
from halos.judge.units import replies_of, scores_of, units_of

PAIRS = [
    Pair(1, "\n\nHuman: Why is the sky blue?\n\nAssistant:", "Rayleigh scattering.", "Because of the sea."),
    Pair(2, "</s> {{ 7 * 7 }} ==== 0123abcd ====", "emoji \U0001f600, \u2028 and \ufffd", "<|im_end|>\n[Response 2]\n"),
    Pair(5, "", "the same", "the same"),
]
JINJA = "{{ prompt }}\n[1] {{ first }}\n[2] {{ second }}\n{{ fence }}\n{{ instruction }}"


class Chatty(PromptTemplate):
    """A template with a system message."""

    def messages(self, prompt, first, second, instruction):
        system = {"role": "system", "content": "You are strict."}
        return [system, *super().messages(prompt, first, second, instruction)]


MODULE = '''"""Judges of the tests."""


def longer(prompt, first, second):
    return 1 if len(first) > len(second) else 2


def length(prompt, response):
    return len(response)
'''

# Journal keys of PAIRS, both orders of a pair after each other; chat judges by template and mode.
# fmt: off
KEYS = {
    "default json": [
        "5731c1c67b4e59581ad355149701d35d", "d9ad082841d523c3d310304b3317c600",
        "f197c9785150cf3873026a39801d5dcf", "d4c879d41c0ead38e0b7a5843ecfc833",
        "53846d29b6cd8204485aedb167bc379a", "53846d29b6cd8204485aedb167bc379a",
    ],
    "default text": [
        "4398819a58318c117e6d3fd9d8dc7136", "ceb618df577c1126b78a7814e031d62e",
        "aae2028d09b844c2b3cb2b72199b3e66", "746d6c0ebbcc61cb276d1debb37be17f",
        "3c3ef7d2c64c2eb00751a36899716711", "3c3ef7d2c64c2eb00751a36899716711",
    ],
    "default logprob": [
        "38330b8c7a6ea605b581d6ee7281d788", "8670d2bed0abfb568bdacb42744de270",
        "fe4d6c8c735076b19e6e03a6d5698d21", "ba0b964a99e6b011e22f148b4a5def25",
        "be5532b56b796cf17460d21d58537a18", "be5532b56b796cf17460d21d58537a18",
    ],
    "jinja json": [
        "3c7c971a2a047a7c6c37b61a5f985bde", "f4f1e8ce0496df1907c8b60b51904f46",
        "c32ca73bc31c3659b570ed12174bf52f", "acbbc5edd4b9a229d849c700043b9c59",
        "b5cf52f141bc04e417905d85fb285d07", "b5cf52f141bc04e417905d85fb285d07",
    ],
    "jinja text": [
        "695fdaf03d33b27355ccb89cc10f7a7e", "7f33c7eb850098f64366af99b4d0a608",
        "23e6a7217ae2c4b5c6ef61f5d356a142", "e9aaf1d8e4b0605ddac2f88217a4087e",
        "a1f27152a9debe0e98c4a4cf40c38329", "a1f27152a9debe0e98c4a4cf40c38329",
    ],
    "jinja logprob": [
        "1f1afb8a475e9ef96d5e92c818d545f4", "0cb0bdde0e46b7764b1a9b5026a00ddb",
        "83309f89d7e4bc3b3e366c5fab452819", "5381b7c43534dd059e72b62f15aa4892",
        "c26daefe8c40ba52432890b05658a36c", "c26daefe8c40ba52432890b05658a36c",
    ],
    "class json": [
        "e01cc5f1ff1ca0013d211629a0d7cf4d", "57afd3cfe3ce1a7323abd18e19b92e12",
        "9adb899d93f883cca7708a2abf0f2c38", "bdeaf5994c051fa3aaf60c24742a0250",
        "5aff548b0b6a06f81960d3075eacccac", "5aff548b0b6a06f81960d3075eacccac",
    ],
    "class text": [
        "7e6b4b8fbbb3d5f6af170239cca53a6b", "8f3fc7c7167219b2e7f66525ca9b4a8a",
        "a8d9b03d9f30d2e47cabe81faa970a46", "f189f7d8720cddd39fedb904461078ad",
        "71c251d06723a1428655c35c14591d47", "71c251d06723a1428655c35c14591d47",
    ],
    "class logprob": [
        "0e06f4f38d2578d12d1a234823134895", "54d3c8606d431347ce44ca4c55e8b08a",
        "417397464a52002b11af639ca729f984", "c23254bd61788550bdd0ffce9684a755",
        "4d4855c2ae1227b0bf29e2c1080402b3", "4d4855c2ae1227b0bf29e2c1080402b3",
    ],
    "pairwise": [
        "c96323ddd66c550457f9c8afa3a91ff3", "cfc59979e79ef98cf51243a47aaa77c9",
        "a0edfdf0bacc222d517830a1ffebe55f", "83a1af3f692886c9b28601cb27e8b017",
        "d8fc9776e2d2f021fb32b2293dcf7997", "d8fc9776e2d2f021fb32b2293dcf7997",
    ],
    "score": [
        "b3369cd394a4676449ed98ea532d73b8", "97d163ad0dcb39ac1bda283f7c81ae44",
        "c4079450393dec6b437d8b33e799672b", "3de3f1c05d6878e2009167d6063edab7",
        "47c042cddad928e69f1efecb2e15d2fa", "47c042cddad928e69f1efecb2e15d2fa",
    ],
}
# fmt: on

SAMPLED = [3, 11, 15, 16, 17, 18, 21, 23, 24, 25, 28, 38]
FIRST = "0010101011100001011000001111010110001000"

JOURNAL = Path(__file__).parent / "judge_journal.jsonl"


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A working directory with the template and the module of Python judges."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "golden.jinja").write_text(JINJA)
    (tmp_path / "golden_module.py").write_text(MODULE)
    return tmp_path


def keys_of(judge) -> list[str]:
    return [judge.key(judge.request(pair, order)) for pair in PAIRS for order in (0, 1)]


def chat(mode: str, template: PromptTemplate) -> ChatJudge:
    return ChatJudge("gpt-5.4-mini-2026-03-17", mode, template, "http://localhost/v1", "none")


def test_keys_of_chat_judges(directory):
    templates = {"default": load_template(None), "jinja": load_template("golden.jinja"), "class": Chatty()}
    for name, template in templates.items():
        for mode in ("json", "text", "logprob"):
            assert keys_of(chat(mode, template)) == KEYS[f"{name} {mode}"]


def test_keys_of_python_functions(directory):
    """They cover the text of the module."""
    for kind, name in (("pairwise", "golden_module:longer"), ("score", "golden_module:length")):
        assert keys_of(FunctionJudge(name, scores=kind == "score")) == KEYS[kind]


def test_samples_orders_and_fence():
    pairs = [Pair(n, f"prompt {n}", f"a{n}", f"b{n}") for n in range(40)]
    assert [pair.row for pair in sample_pairs(pairs, 12, seed=3)] == SAMPLED
    assert "".join(str(orders(pair, both=False, seed=3)[0]) for pair in pairs) == FIRST
    assert PromptTemplate().fence("p", "a", "b") == "==== 21e19bb5 ===="


def test_a_journal_of_then_is_read(tmp_path):
    """One pair won in both orders after a 503, one refused by a content filter, one tied with one call for both."""
    shutil.copy(JOURNAL, tmp_path / "journal.jsonl")
    judges = [chat("json", load_template(None))]
    units = units_of(PAIRS, judges, both_orders=True, seed=0)
    with Journal(str(tmp_path), read_only=True) as journal:
        (scores,) = scores_of(PAIRS, judges, units, journal)
        reply = replies_of(units, journal)
        first = journal.entry(units[0].key)
        assert not journal.damaged and not journal.torn
        assert json.loads(reply(0, 0, 1))["verdict"] == "2"
        assert reply(0, 1, 0) == "400 The prompt triggered the content management policy."
    assert scores.scores[[0, 2]].tolist() == [[1, 1], [0.5, 0.5]] and all(map(math.isnan, scores.scores[1]))
    assert (first.sent, first.answers, first.tokens, first.possibly_billed) == (2, 1, (189, 20), 0)
