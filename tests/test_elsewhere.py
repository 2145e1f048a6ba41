"""The task for lm-evaluation-harness: its rows, its prompts, and the log-prob that the harness computes for them.

The harness itself is not installed where tests run; `python -m benchmarks.elsewhere` compares with it.
"""

import json
import os

import jinja2
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from benchmarks import elsewhere
from halos.chat import Renderer
from halos.examples import Example
from helpers import PROJECT, tiny_lm
from test_chat import GEMMA


def task() -> dict:
    with open(os.path.join(elsewhere.FOLDER, "halos_demo.yaml")) as file:
        return yaml.safe_load(file)


@pytest.fixture
def bos_and_template(tmp_path) -> str:
    """An export of a random model whose tokenizer starts texts with BOS, and whose chat template writes it, too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(os.path.join(PROJECT, "assets", "tiny_tokenizer"))
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<start>", "<end>"]})
    starts = {"single": "<s> $A", "special_tokens": [("<s>", tokenizer.bos_token_id)]}
    tokenizer._tokenizer.post_processor = TemplateProcessing(**starts)  # private: there is no public setter
    tokenizer.chat_template = GEMMA
    tokenizer.save_pretrained(tmp_path)
    tiny_lm("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    return str(tmp_path)


def test_rows_and_prompts_of_the_task():
    """The rows are the demo's test pairs, and the task writes a prompt as the project does without a template."""
    with open(elsewhere.ROWS, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert rows == elsewhere.rows() and len(rows) == elsewhere.N_ROWS
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(PROJECT, "assets", "tiny_tokenizer"))
    example = Example([{"role": "user", "content": rows[0]["question"]}], [rows[0]["chosen"], rows[0]["rejected"]])
    renderer = Renderer(tokenizer)
    assert jinja2.Template(task()["doc_to_text"]).render(rows[0]) == renderer.prompt(example)
    choices = [task()["target_delimiter"] + rows[0][key] for key in ("chosen", "rejected")]
    assert choices == renderer.responses(example)
    assert task()["doc_to_choice"] == "{{[chosen, rejected]}}"  # a list of templates would not be rendered


def test_log_probs_as_the_harness_computes_them(bos_and_template, monkeypatch):
    """The harness encodes prompt and response as one text, without white space at the prompt's end: written out here.

    BOS is there once. The line break at the end of the template's prompt counts with the response.
    """
    rows = elsewhere.rows()[:2]
    monkeypatch.setattr(elsewhere, "rows", lambda: rows)
    tokenizer = AutoTokenizer.from_pretrained(bos_and_template)
    lm = tiny_lm("llama", vocab_size=len(tokenizer)).eval()
    expected = []
    for row in rows:
        message = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        n = len(tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"])
        for key in ("chosen", "rejected"):
            ids = torch.tensor(tokenizer(prompt + row[key], add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logps = lm(ids[None]).logits[0, :-1].log_softmax(-1)
            expected.append(logps.gather(1, ids[1:, None])[n - 1 :].sum().item())
    found = sum(elsewhere.of_the_project(bos_and_template, blank_at_the_end=True), [])
    assert found == pytest.approx(expected, rel=1e-5)
    without = sum(elsewhere.of_the_project(bos_and_template, blank_at_the_end=False), [])
    assert all(a > b + 0.1 for a, b in zip(without, found, strict=True))
