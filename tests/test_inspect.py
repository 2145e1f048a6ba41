"""scripts/inspect_data.py: every number on small data that is counted by hand, tokens as training reads them, one page.

The tokenizer reads characters (test_chat.py), so that lengths can be counted: "abc" and EOS are 4 tokens.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from dataloaders import PairedPreferenceDataLoader, SFTDataLoader, UnpairedPreferenceDataLoader, make_loader
from halos import packing
from halos.errors import UserError
from halos.examples import Dataset, merge
from halos.inspection import evaluation, evaluation_page, numbers, page, spans, terminal
from halos.inspection.facts import common_line, sizes
from halos.inspection.histogram import histogram
from halos.inspection.pairs import common_prompts
from halos.inspection.report import make_report
from halos.inspection.spans import Kind
from halos.loader import DataLoader
from halos.records import Records
from halos.tokens import Role
from helpers import PROJECT, make_config
from test_chat import CHATML, LLAMA2, TURNS, make_tokenizer, user

SCRIPT = "scripts/inspect_data.py"


def dataset(name: str, *pairs: tuple) -> Dataset:
    """A dataset of (prompt, chosen, rejected), with a row read for each."""
    made = Dataset(name)
    for pair in pairs:
        made.rows += 1
        made.add_pair(*pair)
    return made


def loader_of(tmp_path, *datasets: Dataset, kind=PairedPreferenceDataLoader, template=None, **settings) -> DataLoader:
    settings = {"batch_size": 2, "max_length": 1000, "max_prompt_length": 500, "cache_dir": str(tmp_path)} | settings
    loader = kind(merge(list(datasets)), make_tokenizer(template), **settings)
    loader.account = [one.account() for one in datasets]
    return loader


def split_of(tmp_path, *datasets: Dataset, weights=None, **settings) -> numbers.Split:
    return numbers.inspect(loader_of(tmp_path, *datasets, weights=weights, **settings), "train", weights)


def report_of(tmp_path, *datasets: Dataset, **settings):
    return make_report({"train": loader_of(tmp_path, *datasets, **settings)}, {})


#### NUMBERS


def test_counts_of_each_dataset(tmp_path):
    """At 12 tokens, prompts cut to 6: p has 10 characters and is cut; "aaaaaaaaaa" with its EOS is 11 tokens, 6 fit.

    The second dataset has short texts, one with a control token, and half of its two rows is in an epoch.
    """
    one = dataset("one", ("p" * 10, "a" * 10, "b"), ("q", "cc", "d"), ("q", "cc", "d"), ("q", "", "d"))
    one.notes["odd rows"] = 3
    two = dataset("two", ("r", "x</s>", "y"), ("s", "z", "yy"))
    split = split_of(tmp_path, one, two, max_length=12, max_prompt_length=6, weights={"two": 0.5})
    assert split.datasets == [
        numbers.DatasetNumbers(
            name="one",
            weight=1,
            rows_read=4,
            examples=2,
            pairs=2,
            feedback=0,
            dropped={"duplicate pair": 1, "empty response": 1},
            notes=["3 odd rows"],
            control=0,
            rows=2,
            responses=4,
            truncated_prompts=1,
            truncated_responses=1,
        ),
        numbers.DatasetNumbers("two", 0.5, 2, 2, 2, 0, {}, [], 1, 1, 2, 0, 0),
    ]
    assert split.chat == {"examples with control tokens in their texts": 1} and split.empty == 1


def test_lengths_before_and_after_truncation(tmp_path):
    split = split_of(tmp_path, dataset("d", ("p" * 10, "a" * 10, "b")), max_length=12, max_prompt_length=6)
    responses = split.responses
    assert responses.role.tolist() == ["chosen", "rejected"] and responses.is_first.tolist() == [True, False]
    assert (responses.prompt.tolist(), responses.prompt_kept.tolist()) == ([10, 10], [6, 6])
    assert (responses.response.tolist(), responses.response_kept.tolist()) == ([11, 2], [6, 2])
    assert responses.trained.tolist() == [6, 2]


@pytest.mark.parametrize("kind", [SFTDataLoader, PairedPreferenceDataLoader, UnpairedPreferenceDataLoader])
@pytest.mark.parametrize("max_length", [40, 1000])
def test_counts_are_those_of_the_loader_and_of_packing(kind, max_length, tmp_path):
    """On the embedded data: rows, tokens and truncation as `DataLoader.counts` has them, and the input tokens of
    batches as `pack` and `pad` lay them out."""
    words = ["model.max_prompt_length=20", "dataset.demo.keep.n_prompts=90", "n_eval_examples=null"]
    config = make_config(tmp_path, f"model.max_length={max_length}", *words)
    config.loss.dataloader = kind.__name__
    loader = make_loader(config, make_tokenizer(CHATML), "test", keep_texts=True)
    split = numbers.inspect(loader, "test")
    counts = loader.counts()
    (demo,) = split.datasets
    assert (demo.rows, demo.truncated_prompts, demo.truncated_responses) == (
        counts["rows"],
        counts["truncated_prompts"],
        counts["truncated_responses"],
    )
    assert (demo.truncated_responses > 0) == (max_length == 40)
    batches = list(loader)
    assert split.tokens.shared == sum(packing.pack(batch).input_ids.numel() for batch in batches)
    assert split.tokens.padded == sum(packing.pad(batch, 0).input_ids.numel() for batch in batches)
    alone = [packing.pack([one.only([i])]) for batch in batches for one in batch for i in range(len(one.responses))]
    assert split.tokens.packed == sum(inputs.input_ids.numel() for inputs in alone)


def test_tokens_that_sharing_saves(tmp_path):
    """Two pairs of one prompt in a batch of two, 5 tokens of prompt and 2 per response with EOS: padded 4 * 7 = 28;
    packed without the last token 4 * (5 + 1) = 24; with the prompt once 5 + 4 = 9."""
    tokens = split_of(tmp_path, dataset("d", ("ppppp", "a", "b"), ("ppppp", "c", "d"))).tokens
    assert tokens == numbers.Tokens(padded=28, packed=24, shared=9)
    assert tokens.saved_by_sharing == 1 - 9 / 24 and tokens.saved == 1 - 9 / 28


def test_length_bias(tmp_path):
    """Chosen is longer twice, shorter once, equal once; with EOS the means are 3.5 and 2.75 tokens."""
    data = dataset("d", ("p", "aaa", "b"), ("q", "aaa", "b"), ("r", "a", "bb"), ("s", "aaa", "bbb"))
    bias = split_of(tmp_path, data).bias
    assert (bias.longer, bias.shorter, bias.ties, bias.pairs) == (2, 1, 1, 4)
    assert bias.share == 2 / 3 and (bias.mean_chosen, bias.mean_rejected) == (3.5, 2.75) and not bias.is_sure
    assert split_of(tmp_path, data, kind=UnpairedPreferenceDataLoader).bias == bias
    assert split_of(tmp_path, data, kind=SFTDataLoader).bias is None


def test_duplicates_and_contradictions_of_pairs(tmp_path):
    """One exact duplicate within a dataset and one between two. a > b is contradicted by b > a, exactly; "A" > "b " is
    the same as a > b but for case and white space. a and b are both chosen and rejected."""
    one = dataset("one", ("p", "a", "b"), ("p", "a", "b"), ("p", "b", "a"), ("P ", "A", "b "), ("q", "a", "b"))
    two = dataset("two", ("p", "a", "b"), ("r", "c", "d"))
    found = split_of(tmp_path, one, two).repetition
    assert (found.judgments, found.dropped, found.merged, found.near) == (5, 1, 1, 1)
    assert (found.contradictions, found.near_contradictions, found.both) == (1, 1, 2)
    assert found.contradicting == [one.examples["p"].id]


def test_contradictions_that_case_hides(tmp_path):
    found = split_of(tmp_path, dataset("d", ("p", "yes", "no"), ("P", "No", "Yes"))).repetition
    assert (found.near, found.contradictions, found.near_contradictions, found.both) == (0, 0, 1, 0)


def test_duplicates_and_contradictions_of_labels(tmp_path):
    data = Dataset("d")
    for response, desirable in [("a", True), ("a", True), ("a", False), ("A ", True), ("b", False)]:
        data.add_feedback("p", response, desirable)
    found = split_of(tmp_path, data, kind=UnpairedPreferenceDataLoader).repetition
    assert (found.judgments, found.dropped, found.near, found.contradictions) == (4, 1, 1, 1)
    assert found.near_contradictions == 1 and found.both == 1


def test_prompts_common_to_train_and_test():
    """Of four test prompts one is a training prompt, and one but for case and white space. Tools tell prompts apart."""
    train = dataset("d", ("same", "a", "b"), ("Two  words", "a", "b"), ("tools", "a", "b"))
    test = dataset("d", ("same", "x", "y"), ("two\nwords ", "x", "y"), ("other", "x", "y"))
    test.add_pair("tools", "x", "y", tools=[{"name": "search"}])
    found = common_prompts(train.examples.values(), test.examples.values())
    assert (found.test_prompts, found.exact, found.near) == (4, 1, 2)
    assert found.ids == [example.id for example in list(test.examples.values())[:2]]
    assert common_line(found).endswith("1 of 4 (25.0 %); 2 (50.0 %) but for case and white space")


def test_messages_are_compared_with_their_roles():
    one, two = dataset("d", (user("a", "b", "c"), "x", "y")), dataset("d", (user("A", "b", " c"), "x", "y"))
    other = dataset("d", ([*user("a"), {"role": "user", "content": "b"}, {"role": "user", "content": "c"}], "x", "y"))
    assert common_prompts(one.examples.values(), two.examples.values()).near == 1
    assert common_prompts(one.examples.values(), other.examples.values()).near == 0


#### WARNINGS


def test_good_data_have_no_warnings(tmp_path):
    data = dataset("d", ("p", "aa", "b"), ("q", "a", "bb"))
    report = make_report(
        {split: loader_of(tmp_path, dataset("d", (split, "aa", "b"))) for split in ("train", "test")}, {}
    )
    assert report_of(tmp_path, data).alarms == [] and report.alarms == []


def test_a_contaminated_test_split_is_said_first(tmp_path):
    loaders = {
        "train": loader_of(tmp_path, dataset("d", ("p", "a" * 20, "b")), max_length=10, max_prompt_length=4),
        "test": loader_of(tmp_path, dataset("d", ("P", "a", "b"), ("q", "a", "b"))),
    }
    first, second = make_report(loaders, {}).alarms
    assert (
        first.startswith("the test split is contaminated: 1 of its 2 prompts (50.0 %)") and "0 of them exactly" in first
    )
    assert second.startswith("train: d: 50.0 % of the responses lose their end") and "model.max_length=10" in second


def test_a_strong_length_bias_is_said(tmp_path):
    """Twenty pairs, 17 of them with a longer chosen response; the other way round; and too few pairs to be sure."""
    rows = [(f"p{i}", *(("aaaa", "b") if i < 17 else ("a", "bbbb"))) for i in range(20)]
    (line,) = report_of(tmp_path, dataset("d", *rows)).alarms
    assert line.startswith("train: strong length bias: chosen is the longer one in 85.0 % of the pairs")
    turned = dataset("d", *((prompt, worse, better) for prompt, better, worse in rows))
    assert "the shorter one in 85.0 %" in report_of(tmp_path, turned).alarms[0]
    assert report_of(tmp_path, dataset("d", rows[0], rows[1])).alarms == []


def test_rows_that_are_dropped_cut_or_written_in_control_tokens_are_said(tmp_path):
    data = dataset("d", ("p" * 20, "</s>a", "bbbb"), ("q", "", "b"))
    dropped = "train: d: 1 of 2 rows are dropped (1 empty response)"
    empty = "train: 1 responses or rows with a response are empty (50.0 %)"
    lines = report_of(tmp_path, data, max_length=20, max_prompt_length=10).alarms
    assert lines[0].startswith("train: d: 100.0 % of the training rows have their prompt cut")
    assert lines[1:3] == [empty, dropped] and "control tokens written in their texts" in lines[3]


def test_contradictions_and_duplicates_are_said(tmp_path):
    data = dataset("d", ("p", "a", "b"), ("p", "b", "a"), ("P", "a", "b"))
    contradicted, repeated = report_of(tmp_path, data).alarms
    assert (
        contradicted.startswith("train: 1 pairs or labels are contradicted") and data.examples["p"].id in contradicted
    )
    assert repeated.startswith("train: 1 pairs or labels (33.3 %) repeat another one")


EQUAL = [("pp", "same a", "same b"), ("qq", "same c", "same d")]


def test_pairs_that_are_all_equal_after_truncation_stop_the_run(tmp_path):
    """The message said that there were pairs and asked for data of another form; now it names the truncation."""
    with pytest.raises(UserError, match="all 2 rows have equal responses after truncation to model.max_length=6"):
        loader_of(tmp_path, dataset("d", *EQUAL), max_length=6, max_prompt_length=4)


def test_equal_pairs_are_said_where_the_loader_splits_them(tmp_path):
    """An unpaired loader trains on both halves, one text that is chosen and rejected; a paired one drops such pairs."""
    settings = {"max_length": 6, "max_prompt_length": 4}
    lines = report_of(tmp_path, dataset("d", *EQUAL), kind=UnpairedPreferenceDataLoader, **settings).alarms
    assert lines[0].startswith(
        "train: every pair has equal responses after truncation: the loss sees one text as chosen"
    )
    lines = report_of(tmp_path, dataset("d", *EQUAL, ("r", "a", "b")), **settings).alarms
    assert lines[0].startswith("train: 2 pairs (66.7 %) have equal responses after truncation: they are dropped")


def test_responses_without_a_token_to_train_on_are_said(tmp_path):
    """Truncation leaves only the context that a response of several turns begins with."""
    data = Dataset("d")
    data.add_imitated(user("hi"), TURNS[1:])
    report = report_of(tmp_path, data, kind=SFTDataLoader, template=LLAMA2, max_length=20, max_prompt_length=18)
    assert "train: 1 responses have no token to train on after truncation; raise model.max_length" in report.alarms


#### TOKENS


def spelled(some: list[spans.Span]) -> str:
    """Spans as text: {trained}, <end>, /special/, ~cut~, and context as it is; neighbours of one kind together."""
    marks = {Kind.CONTEXT: "", Kind.TRAINED: "{}", Kind.END: "<>", Kind.SPECIAL: "//", Kind.CUT: "~~"}
    text = "".join(f"{marks[s.kind][:1]}{s.text}{marks[s.kind][1:]}" for s in some)
    return text.replace("}{", "").replace("~~", "")


def first_row(tmp_path, data: Dataset, **settings) -> spans.Shown:
    split = split_of(tmp_path, data, **settings)
    return spans.show(split, 0, [])


def test_tokens_of_a_pair_with_a_template(tmp_path):
    row = first_row(tmp_path, dataset("d", (user("hi"), "yo", "no")), template=CHATML)
    assert spelled(row.prompt) == "/<|im_start|>/user\nhi/<|im_end|>/\n/<|im_start|>/assistant\n"
    assert [spelled(response) for response in row.responses] == ["{yo}<<|im_end|>>", "{no}<<|im_end|>>"]
    assert row.roles == (Role.CHOSEN, Role.REJECTED)


def test_tokens_of_several_turns(tmp_path):
    """The user's turn in a response is context, and each of the assistant's ends in an end of turn."""
    data = Dataset("d")
    data.add_imitated(user("hi"), TURNS)
    row = first_row(tmp_path, data, kind=SFTDataLoader, template=LLAMA2)
    assert spelled(row.prompt) == "/<s>/[INST] hi [/INST]"
    assert spelled(row.responses[0]) == "{ yo }<</s>>/<s>/[INST] more [/INST]{ ok }<</s>>"


@pytest.mark.parametrize(("keep", "prompt"), [("keep_end", "~abcd~efghij"), ("keep_start", "abcdef~ghij~")])
def test_tokens_that_truncation_cuts(keep, prompt, tmp_path):
    """10 tokens at most, prompts cut to 6: the longer response loses its end and its end of turn, the other fits."""
    row = first_row(tmp_path, dataset("d", ("abcdefghij", "12345", "x", keep)), max_length=10, max_prompt_length=6)
    assert spelled(row.prompt) == prompt
    assert [spelled(response) for response in row.responses] == ["{1234}~5</s>~", "{x}<</s>>"]


def test_control_tokens_as_text_are_characters(tmp_path):
    row = first_row(tmp_path, dataset("d", (user("a"), "b</s>", "c")), template=CHATML)
    assert spelled(row.responses[0]) == "{b</s>}<<|im_end|>>" and len(row.responses[0]) == 6


def test_a_long_cut_run_is_shown_at_its_ends(tmp_path):
    """500 tokens of prompt, of which 100 are left: 120 are shown at both ends of the 400 that are cut."""
    row = first_row(tmp_path, dataset("d", ("p" * 500, "a", "b")), max_length=110, max_prompt_length=100)
    assert spelled(row.prompt) == f"~{'p' * 120} ... 160 more tokens are cut ... {'p' * 120}~{'p' * 100}"
    assert [s.stands_for for s in row.prompt if s.id == -1] == [160]
    assert sizes(row.prompt) == "500 tokens, 400 cut"


@pytest.mark.parametrize("template", [None, CHATML, LLAMA2])
@pytest.mark.parametrize("max_length", [45, 1000])
def test_spans_have_the_ids_that_training_sees(template, max_length, tmp_path):
    """Without what is cut they are the tokenized row, and the trained kinds are its mask; their texts are the text."""
    data = dataset("d", ("text " * 4, "one", "two", "keep_start"), (user("a", "b", "c" * 20), "d" * 30, "e</s>"))
    data.add_pair(user("hi"), TURNS, "yes")
    split = split_of(tmp_path, data, template=template, max_length=max_length, max_prompt_length=18)
    tokenizer = split.loader.encoder.tokenizer
    for number, row in enumerate(split.rows):
        seen, made = split.loader.tokenized(row), spans.show(split, number, [])
        assert [s.id for s in made.prompt if s.kind != Kind.CUT] == seen.prompt.tolist()
        assert "".join(s.text for s in made.prompt) == tokenizer.decode([s.id for s in made.prompt])
        for response, ids, mask in zip(made.responses, seen.responses, seen.masks, strict=True):
            kept = [s for s in response if s.kind != Kind.CUT]
            trained = [s.kind in (Kind.TRAINED, Kind.END) for s in kept]
            assert [s.id for s in kept] == ids.tolist()
            assert trained == ([True] * len(ids) if mask is None else mask.tolist())
            assert "".join(s.text for s in response) == tokenizer.decode([s.id for s in response])


def test_a_character_of_several_tokens_is_the_text_of_the_last(tmp_path):
    """The committed tokenizer has bytes: three of them are a euro sign. A broken character is not waited for."""
    from halos.loading import load_tokenizer

    tokenizer = load_tokenizer(make_config(tmp_path))
    loader = SFTDataLoader(
        merge([dataset("d", ("p", "a€b", "c"))]), tokenizer, batch_size=1, max_length=90, max_prompt_length=9,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    (row,) = [spans.show(numbers.inspect(loader, "train"), 0, [])]
    texts = [s.text for s in row.responses[0]]
    assert "".join(texts[:-1]) == "a€b" and texts[-1] == tokenizer.eos_token
    assert "€" in texts and "" in texts and not any("\ufffd" in text for text in texts)


def test_rows_that_are_worth_a_look(tmp_path):
    """The typical, the longest, what is cut, contradicted or has control tokens; never more than asked for."""
    data = dataset("d", *((f"prompt {i}", "a" * 5, "b" * 5) for i in range(9)))
    for pair in [("long" * 10, "a" * 9, "b"), ("x", "a</s>", "b"), ("y", "a", "b"), ("y", "b", "a")]:
        data.add_pair(*pair)
    split = split_of(tmp_path, data, max_length=30, max_prompt_length=15)
    chosen = spans.choose(split, 8)
    texts = {
        why: split.loader.examples[split.rows[row].example].prompt for row, all_why in chosen.items() for why in all_why
    }
    assert texts["longest"] == texts["prompt cut"] == "long" * 10 and texts["typical length"].startswith("prompt")
    assert texts["control tokens as text"] == "x" and texts["contradicted"] == "y" and "sample" in texts
    assert len(chosen) == 8 and len(spans.choose(split, 2)) == 2 and spans.choose(split, 0) == {}


def test_the_rows_of_an_example_can_be_shown(tmp_path):
    data = dataset("d", ("p", "a", "b"), ("p", "a", "c"), ("q", "a", "b"))
    wanted = data.examples["p"].id
    report = make_report({"train": loader_of(tmp_path, data)}, {}, wanted=wanted)
    assert len(report.shown) == 2 and {row.example.id for row in report.shown} == {wanted}
    assert make_report({"train": loader_of(tmp_path, data)}, {}, wanted="1").shown[0].number == 1
    with pytest.raises(UserError, match=r"show=d/no: no training row has this id or number; give an id such as d/"):
        make_report({"train": loader_of(tmp_path, data)}, {}, wanted="d/no")


#### THE PAGE AND THE TERMINAL


class Elements(HTMLParser):
    """The elements of a page with their attributes, the text of token spans, and whether all tags are closed."""

    def __init__(self, markup: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.tokens: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "rect", "line", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "line", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span" and "title" in self.found[-1][1]:
            self.tokens.append(data)


NASTY = """</style><script>alert(1)</script><img src=x onerror=alert(2)>"'&amp;"""


@pytest.fixture
def nasty_page(tmp_path) -> str:
    data = dataset(f"d{NASTY}", (user(NASTY), NASTY, "\x0bred"))
    data.notes[NASTY] = 1
    data.dropped[NASTY] = 2
    report = report_of(tmp_path, data, template=CHATML)
    page.write(str(tmp_path / "page.html"), report, NASTY, f"python {NASTY}")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_nothing_of_the_data_becomes_markup(nasty_page):
    """Texts, ids, names, notes, reasons, title and command; the page has no script and loads nothing."""
    elements = Elements(nasty_page)
    assert elements.open == [] and not {"script", "img", "link", "iframe"} & {tag for tag, _ in elements.found}
    attributes = {name for _, given in elements.found for name in given}
    assert not {"src", "href", "style", "onerror"} & attributes and "default-src 'none'" in nasty_page
    assert NASTY.replace("\n", "") in "".join(elements.tokens)


def test_every_token_is_a_span_with_its_id_and_text(nasty_page, tmp_path):
    titles = [given["title"] for tag, given in Elements(nasty_page).found if tag == "span" and "title" in given]
    tokenizer = make_tokenizer(CHATML)
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert f"{start}: '<|im_start|>'" in titles and f"{end}: '<|im_end|>'" in titles
    assert f"{tokenizer.convert_tokens_to_ids('u')}: 'u'" in titles and all(
        re.match(r"\d+: ", title) for title in titles
    )


def test_the_page_has_warnings_numbers_and_rows(tmp_path):
    data = dataset("d", ("p" * 20, "aaa", "bb"), ("q" * 20, "c", "dd"))
    loaders = {name: loader_of(tmp_path, data, max_length=20, max_prompt_length=10) for name in ("train", "test")}
    page.write(str(tmp_path / "page.html"), make_report(loaders, {}, n_shown=2), "Data", "python x")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "the test split is contaminated: 2 of its 2 prompts (100.0 %)" in text
    assert text.count("<svg") == 8 and text.count("max_prompt_length 10<") == 2 and text.count("<article>") == 2
    assert '<section class="chosen">' in text and '<section class="rejected">' in text
    assert [len(re.findall(f'<span class="{kind}" title', text)) for kind in ("cut", "end")] == [20, 4]


def test_a_histogram_has_a_bar_per_length_and_a_line_at_the_limit():
    """40 bins of width 1: three lengths of 10, one of 40, which is over the limit of 20 in the middle."""
    figure = histogram("prompt", np.array([10, 10, 10, 40]), 40, ("max_prompt_length", 20))
    heights = [float(h) for h in re.findall(r'<rect .*? height="([\d.]+)"', figure)]
    assert heights == [90.0, 30.0] and '<line x1="210.0" x2="210.0"' in figure
    assert "median 10, longest 40 tokens; 1 (25.0 %) over max_prompt_length=20" in figure
    assert "<line" not in histogram("prompt", np.array([10]), 40, ("max_prompt_length", 900))


def test_the_terminal_has_colors_only_if_asked(tmp_path):
    """Control characters of the data are escaped, so that they cannot change the terminal."""
    report = report_of(tmp_path, dataset("d\x1b[2J", ("p", "aa\x0b", "b")))
    plain, colored = terminal.text(report, False), terminal.text(report, True)
    assert not {"\x1b", "\x0b"} & set(plain) and "[aa\\x0b][</s>]" in plain and "d\\x1b[2J: 1 rows read" in plain
    assert "\x1b[2J" not in colored and "\x1b[32maa\\x0b\x1b[0m\x1b[1;30;43m</s>\x1b[0m" in colored


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.has_colors()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.has_colors()


#### THE COMMAND


def run(cwd, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, os.path.join(PROJECT, SCRIPT), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_command_reads_only_the_tokenizer_and_keeps_an_earlier_page(tmp_path):
    """The model is a folder with a tokenizer and no weights. The second page does not replace the first one."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": user(f"p{i}"), "chosen": "a", "rejected": "b", "split": "test" if i else "train"} for i in range(2)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["loss=dpo", "model=base_model", "model.name=own", "model.name_or_path=model", "datasets=[pairs.jsonl]"]
    for _ in range(2):
        done = run(tmp_path, *words, "cache_dir=cache", "examples=1")
        assert done.returncode == 0, done.stderr
    path = os.path.join("cache", "dpo_own.data.html")
    assert f"the page with all of this: {path}" in done.stdout and f"{path}.bak-1" in done.stdout
    assert sorted(name for name in os.listdir(tmp_path / "cache") if "." in name[1:]) == [
        "dpo_own.data.html",
        "dpo_own.data.html.bak-1",
    ]
    assert "1 rows read" in done.stdout and "test prompts that are training prompts: 0 of 1" in done.stdout
    assert "python " in (tmp_path / path).read_text() and "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    {
        "examples=few": "examples=few is not a whole number",
        "split=dev": "split=dev is not a split",
        "output=no/such/page.html": "output=no/such/page.html",
        "datasets=[nothing]": "nothing is not known",
    }.items(),
)
def test_mistakes_are_one_line(words, part, tmp_path):
    done = run(tmp_path, words, f"cache_dir={tmp_path}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and part in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("*.html"))


def test_help_is_the_docstring(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0 and "split=both" in done.stdout


#### AN EVALUATION


def evaluation_of(ids: list[str], roles: list[str], rewards: list[float], rows: list[int]) -> Records:
    n = len(ids)
    lengths = torch.arange(1, n + 1)
    return Records(
        id=ids, dataset=["hh"] * n, role=roles, row=torch.tensor(rows), n_tokens=lengths,
        reward=torch.tensor(rewards, dtype=torch.float64), logps=-lengths.double(),
        reference_logps=-lengths.double() - 2, loss=lengths.double(), weight=torch.full((n,), 1 / n),
    )  # fmt: skip


PAIRED = evaluation_of(
    ["hh/a/0", "hh/a/1", "hh/b/0", "hh/b/1"], ["chosen", "rejected"] * 2, [3, 1, 1, 2.5], [0, 0, 1, 1]
)


def test_the_numbers_of_an_evaluation_by_hand():
    """Margins are 2 and -1.5; lengths 1, 3 and 2, 4; chosen rewards 3 and 1 fall with length, rejected ones rise."""
    (row,) = evaluation.datasets(PAIRED)
    assert row == ("hh", 4, 2.5, 2.0, 1.75, 0.5, 2.0, 3.0)
    assert evaluation.length_correlation(PAIRED, Role.CHOSEN) == pytest.approx(-1)
    assert evaluation.length_correlation(PAIRED, Role.REJECTED) == pytest.approx(1)
    assert evaluation.worst(PAIRED, 8) == [[2, 3], [0, 1]] and evaluation.worst(PAIRED, 1) == [[2, 3]]


def test_the_worst_single_responses():
    """Without pairs: a rejected response of reward 5, then a chosen one of -2; without rewards there are none."""
    rows = evaluation_of(list("abcd"), ["chosen", "rejected", "chosen", "rejected"], [-2, 5, 1, -9], [0, 1, 2, 3])
    assert evaluation.worst(rows, 3) == [[1], [0], [2]]
    (row,) = evaluation.datasets(rows)
    assert row.wins is None
    unknown = evaluation_of(["a"], ["chosen"], [float("nan")], [0])
    assert evaluation.worst(unknown, 3) == [] and evaluation.length_correlation(unknown, Role.CHOSEN) is None


def test_the_page_of_an_evaluation_has_the_texts_of_the_data(tmp_path):
    """Ids are matched with the loader's examples. What is in a text is shown as it is, and is no element."""
    data = dataset("hh", ("<b>who?</b>", "abc", "<script>x</script>"))
    loader = loader_of(tmp_path, data)
    (example,) = loader.examples
    ids = [f"{example.id}/0", f"{example.id}/1"]
    texts = evaluation.texts_of(loader, {ids[1]})
    assert list(texts) == [ids[1]] and texts[ids[1]][1].startswith("<script>x</script>")
    rows = evaluation_of(ids, ["chosen", "rejected"], [1, 4], [0, 0])
    path = str(tmp_path / "page.html")
    evaluation_page.write(path, rows, evaluation.texts_of(loader, set(ids)), 8, "step <4>", "python x")
    with open(path) as file:
        content = file.read()
    assert "<script" not in content and "<b>who" not in content
    assert "&lt;script&gt;x&lt;/script&gt;" in content and "&lt;b&gt;who?&lt;/b&gt;" in content
    assert f"{example.id}, margin -3.000, loss 1.000" in content and "+2.00 nats against the reference" in content
    assert content.count("<circle") == 2 and "step &lt;4&gt;" in content


def test_an_evaluation_whose_data_are_gone_is_shown_without_texts(tmp_path, capsys):
    """The run has no config.yaml, so there are no texts; an earlier page is kept."""
    path = tmp_path / "run" / "evaluations" / "step-4.parquet"
    PAIRED.write(str(path))
    (path.parent / "step-4.html").touch()
    runpy.run_path(os.path.join(PROJECT, SCRIPT))["inspect_evaluation"](str(path), 8, "", "python x")
    said = capsys.readouterr().out
    assert "warning: the page has no texts: " in said and "config.yaml cannot be read" in said
    assert "hh: 4 responses, loss 2.5, rewards 2.000 and 1.750" in said
    assert sorted(os.listdir(path.parent)) == ["step-4.html", "step-4.html.bak-1", "step-4.parquet"]
