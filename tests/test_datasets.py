"""The dataset readers: examples, pairs and counts from known rows, and the error messages for bad sources."""

import json
import threading
from dataclasses import asdict
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import hub_copies
from dataloaders import (
    Dataset,
    Example,
    get_demo,
    get_hh,
    get_hh_harmless,
    get_hh_helpful,
    get_local,
    get_oasst,
    get_shp,
    merge,
)
from halos import datafiles, demo, hub
from halos.chat import Renderer
from halos.errors import UserError
from halos.rows import FORMS_IN_WORDS
from halos.turns import messages_of_turns, split_reply

RIVER = "\n\nHuman: Name a river.\n\nAssistant:"
TREE = "\n\nHuman: Hi.\n\nAssistant: Hello. How are you?\n\nHuman: Name a tree.\n\nAssistant:"
# A tokenizer without a template: this is all that rendering needs of it.
NO_TEMPLATE = SimpleNamespace(chat_template=None, added_tokens_decoder={})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def shp(tmp_path):
    return str(hub_copies.write_shp(tmp_path / "SHP"))


@pytest.fixture
def hh(tmp_path):
    return str(hub_copies.write_hh(tmp_path / "hh"))


@pytest.fixture
def oasst(tmp_path):
    return str(hub_copies.write_oasst(tmp_path / "oasst"))


def user(*contents: str) -> list[dict]:
    """Return messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def by_text(dataset: Dataset) -> dict[str, Example]:
    """Return the examples by the text of their prompts, as a tokenizer without a template gets it."""
    return {Renderer(NO_TEMPLATE).prompt(example): example for example in dataset.examples.values()}


def texts(example: Example) -> list[str]:
    """Return the texts of the responses, as a tokenizer without a template gets them."""
    return Renderer(NO_TEMPLATE).responses(example)


def text_pairs(example: Example) -> set[tuple[str, str]]:
    return {(example.generations[better], example.generations[worse]) for better, worse in example.pairs}


def message(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


#### SHP


def test_shp_training_pairs(shp):
    """17 rows: 16 in askscience's train.json (7 + 8 + 1 about tea), 1 in asksports's."""
    dataset = get_shp("train", shp)
    assert dataset.rows == 17
    assert dataset.dropped == {
        "equal scores": 1,
        "score ratio below 2": 1,
        "empty response": 1,
        "identical responses": 1,
        "empty prompt": 1,
        "duplicate pair": 1,
        "more than 5 pairs a prompt": 3,
    }
    sky, tea, won = dataset.examples.values()
    assert sky == Example(
        prompt=user("Why is the sky blue?"),
        generations=["Rayleigh scattering.", "It is a mirror.", "Magic."],
        scores=[40, 10, 4],
        pairs=[(0, 1), (0, 2)],
        sft_index=0,
        truncation_mode="keep_start",
        dataset_name="shp",
    )
    assert won.pairs == [(0, 1)] and won.generations == ["We did.", "They did."]
    assert tea.pairs == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)] and len(tea.generations) == 6
    assert sum(len(example.pairs) for example in (sky, tea, won)) == dataset.rows - dataset.dropped.total()


def test_shp_test_split_keeps_every_score_ratio(shp):
    dataset = get_shp("test", shp)
    assert dataset.rows == 3 and not dataset.dropped
    late = by_text(dataset)["\n\nHuman: Is it late?\n\nAssistant:"]
    assert texts(late) == [" Yes.  Very.", " No.", " Perhaps."]
    assert late.scores == [5, 4, 3] and late.pairs == [(0, 1), (1, 2)] and late.sft_index == 0


def test_shp_does_not_depend_on_the_order_of_rows(shp, tmp_path):
    """The choice of five of the eight pairs about tea depends on the prompt and the pairs only."""
    rows = [json.loads(line) for line in (tmp_path / "SHP/askscience/train.json").read_text().splitlines()]
    hub_copies.write_lines(tmp_path / "reversed/train.json", rows[::-1])
    forward, backward = by_text(get_shp("train", shp)), by_text(get_shp("train", str(tmp_path / "reversed")))
    assert len(backward) == 2
    for prompt, example in backward.items():
        assert asdict(example) == asdict(forward[prompt])


#### HH


def test_hh_helpful(hh):
    dataset = get_hh_helpful("train", hh)
    assert dataset.rows == 9
    assert dataset.dropped == {
        "no common prompt": 4,
        "empty response": 1,
        "identical responses": 1,
        "duplicate pair": 1,
    }
    assert list(dataset.examples.values()) == [
        Example(
            prompt=user("Hi.", "Hello.  How are you?", "Name a tree."),
            generations=["An oak.", "A whale.", "A birch:\n\n  white"],
            pairs=[(0, 1), (2, 1)],
            sft_index=0,
            truncation_mode="keep_end",
            dataset_name="hh_helpful",
        )
    ]


def test_hh_subsets(hh):
    """hh reads both subsets, one test row each, and skips the red team's file. A local copy may be a single subset."""
    assert get_hh("test", hh).rows == 2
    harmless = get_hh_harmless("test", hh)
    assert harmless.rows == 1 and list(by_text(harmless)) == ["\n\nHuman: Bad?\n\nAssistant:"]
    assert harmless.examples == get_hh_harmless("test", f"{hh}/harmless-base").examples


@pytest.mark.parametrize(
    "conversation, expected",
    [
        ("\n\nHuman: a\n\nAssistant: b", ("\n\nHuman: a\n\nAssistant:", " b")),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", ("\n\nHuman: a\n\nAssistant: b\n\nAssistant:", " c")),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", (None, " b\n\nHuman: c")),
        ("\n\nHuman: a \t b\n  c\n\nAssistant:   d", ("\n\nHuman: a \t b\n  c\n\nAssistant:", "   d")),
        ("no turns", (None, "no turns")),
    ],
)
def test_split_reply(conversation, expected):
    assert split_reply(conversation) == expected


def test_blanks_of_hh_stay_and_do_not_part_a_pair(tmp_path):
    """The prompts of a pair that differ in repeated blanks are one, chosen's. Blanks inside a reply are as they were.

    They became single ones: 32 of 50 conversations of the real file had other ids than their text.
    """
    hub_copies.write_lines(
        tmp_path / "hh" / "harmless-base" / "test.jsonl",
        [
            {
                "chosen": "\n\nHuman: a.  b\n\nAssistant: c.  d",
                "rejected": "\n\nHuman: a. b\n\nAssistant: e.\t f",
            }
        ],
    )
    (example,) = get_hh_harmless("test", str(tmp_path / "hh")).examples.values()
    assert example.prompt == [{"role": "user", "content": "a.  b"}] and example.generations == ["c.  d", "e.\t f"]


@pytest.mark.parametrize(
    "text, expected",
    [
        (RIVER, user("Name a river.")),
        (TREE, user("Hi.", "Hello. How are you?", "Name a tree.")),
        # Two turns of one speaker in a row are one message.
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", user("a\n\nHuman: b")),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:",
            user("a", "b\n\nAssistant: c", "d"),
        ),
        # A turn without a space after its name, and one of an unknown speaker, belong to the turn before.
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant:", user("a\n\nAssistant:\n\nHuman: b")),
        ("\n\nHuman: a\n\nSystem: b\n\nAssistant:", user("a\n\nSystem: b")),
        ("\n\nHuman:  a \n\nAssistant:", user(" a ")),
        # What does not begin and end with the user stays text.
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant:", None),
        ("\n\nAssistant: a\n\nHuman: b\n\nAssistant:", None),
        ("Hello\n\nHuman: b\n\nAssistant:", None),
        ("\n\nHuman:\n\nAssistant:", None),
        ("\n\nAssistant:", None),
        ("no turns", None),
    ],
)
def test_turns_as_messages_render_as_the_same_text(text, expected):
    messages = messages_of_turns(text)
    assert messages == (text if expected is None else expected)
    assert Renderer(NO_TEMPLATE).prompt(Example(messages)) == text


#### OASST


def test_oasst(oasst):
    """3 of the 21 messages are prompts, and 6 are replies. Each of the other 12 is dropped for one reason."""
    dataset = get_oasst("train", oasst)
    assert dataset.rows == 21
    assert dataset.dropped == {
        "not English": 1,
        "deleted": 1,
        "empty text": 1,
        "missing parent": 2,
        "dropped parent": 3,
        "no rank": 1,
        "duplicate response": 1,
        "equal ranks": 1,
        "prompt without a usable reply": 1,
    }
    river, where, longer = dataset.examples.values()
    assert river == Example(
        prompt=user("Name a river."),
        generations=["The Rhine.", "A creek.", "The sea."],
        pairs=[(0, 1), (1, 2)],
        sft_index=0,
        truncation_mode="keep_end",
        dataset_name="oasst",
    )
    assert list(by_text(dataset)) == [
        RIVER,
        f"{RIVER} The Rhine.\n\nHuman: Where is it?\n\nAssistant:",
        f"{RIVER} The Nile.\n\nHuman: Longer?\n\nAssistant:",
    ]
    assert (texts(where), where.pairs, where.sft_index) == ([" In Europe."], [], 0)
    assert text_pairs(longer) == {("Yes.", "No.")}
    replies = sum(len(example.generations) for example in dataset.examples.values())
    assert dataset.rows == len(dataset.examples) + replies + dataset.dropped.total()


def test_oasst_validation_is_our_test(oasst):
    dataset = get_oasst("test", oasst)
    assert dataset.rows == 3 and list(by_text(dataset)) == ["\n\nHuman: Two?\n\nAssistant:"]


#### OTHER LOCAL COPIES, AND SOURCES THAT CANNOT BE READ


def test_copies_made_by_save_to_disk(hh, tmp_path):
    """A local copy may be a saved DatasetDict, or a single saved split."""
    saved = datasets.load_dataset(hh, data_dir="helpful-base")
    saved.save_to_disk(tmp_path / "all")
    saved["train"].save_to_disk(tmp_path / "one")
    expected = get_hh_helpful("train", hh)
    for folder in "all", "one":
        assert get_hh_helpful("train", str(tmp_path / folder)).examples == expected.examples
    with pytest.raises(UserError) as error:
        get_hh_helpful("test", str(tmp_path / "one"))
    assert message(error) == (
        f"{tmp_path}/one has no split 'test' (it has: train); "
        "dataset.hh_helpful.source=DIR reads a local copy (made by save_to_disk, or the hub's own files)"
    )


def test_a_directory_that_is_not_there():
    with pytest.raises(UserError) as error:
        get_shp("train", "/data/SHP")
    assert message(error) == (
        "dataset.shp.source=/data/SHP: no such directory; "
        "dataset.shp.source=DIR reads a local copy (made by save_to_disk, or the hub's own files)"
    )


def test_no_network(monkeypatch):
    """If the hub cannot be reached (here: a closed port), reading fails at once and nothing is retried."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    hub.hub_answers.cache_clear()
    with pytest.raises(UserError) as error:
        get_shp("train")
    assert datasets.config.HF_HUB_OFFLINE
    assert message(error) == (
        "shp: cannot load stanfordnlp/SHP (the hub cannot be reached, and no download of it is cached); without "
        "internet, dataset.shp.source=DIR reads a local copy (made by save_to_disk, or the hub's own files)"
    )


def test_a_hub_that_never_answers(monkeypatch):
    """The question ends after its own limit of time, even if looking up the name has none."""
    answered = threading.Event()

    def wait(*args, **kwargs):
        answered.wait(60)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", wait)
    hub.hub_answers.cache_clear()
    assert not hub.hub_answers(seconds=0.05) and not answered.is_set()
    answered.set()
    hub.hub_answers.cache_clear()


def test_a_source_without_the_columns(tmp_path):
    hub_copies.write_lines(tmp_path / "copy/train.jsonl", [{"chosen": "a", "rejcted": "b"}])
    with pytest.raises(
        UserError, match=r"has no column 'rejected' \(it has: chosen, rejcted\); .*dataset.hh.source=DIR"
    ):
        get_hh("train", str(tmp_path / "copy"))


def test_sources_that_are_empty_or_broken(tmp_path):
    (tmp_path / "empty").mkdir()
    hub_copies.write_lines(tmp_path / "broken/train.jsonl", [])
    (tmp_path / "broken/train.jsonl").write_text("{no\n")
    for folder in "empty", "broken":
        with pytest.raises(UserError, match="hh: cannot load .*dataset.hh.source=DIR") as error:
            get_hh("train", str(tmp_path / folder))
        message(error)


def test_nothing_usable(tmp_path):
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}
    hub_copies.write_lines(tmp_path / "copy/train.jsonl", [row, row])
    with pytest.raises(UserError) as error:
        get_hh("train", str(tmp_path / "copy"))
    assert message(error) == (
        "hh: no usable row in split 'train' (2 read; dropped: 2 empty response); "
        "check the source, or leave this dataset out"
    )


#### THE EMBEDDED DATASET


def test_demo(monkeypatch):
    known = {"scores": [0.0, 0.5, 1.0], "pairs": [(2, 0), (2, 1)], "sft_index": 1}
    items = [{"prompt": RIVER, "responses": [" a", " b", " c"], **known}]
    monkeypatch.setattr(demo, "generate", lambda split: items)
    dataset = get_demo("train")
    assert dataset.rows == 1
    ((text, example),) = by_text(dataset).items()
    assert (text, texts(example)) == (RIVER, [" a", " b", " c"])
    assert list(dataset.examples.values()) == [
        Example(user("Name a river."), ["a", "b", "c"], dataset_name="demo", **known)
    ]


#### MERGING


def example_of(name: str, *args, **kwargs) -> Dataset:
    dataset = Dataset(name)
    dataset.examples["p"] = Example("p", *args, dataset_name=name, **kwargs)
    return dataset


def test_merge_loses_nothing():
    """The generations ' y', ' z' of b get the indices 1, 2, so its pairs (0, 1), (1, 0) become (1, 2), (2, 1)."""
    a = example_of("a", [" x", " y"], scores=[3, 1], pairs=[(0, 1)], sft_index=0, truncation_mode="keep_start")
    b = example_of(
        "b", [" y", " z"], scores=[9, 5], pairs=[(0, 1), (1, 0)], feedback=[(0, True), (1, False)], sft_index=1
    )
    b.examples["q"] = Example("q", [" x"])
    merged, alone = merge([a, b])
    assert merged == Example(
        prompt="p",
        generations=[" x", " y", " z"],
        scores=[3, 1, 5],
        pairs=[(0, 1), (1, 2), (2, 1)],
        feedback=[(1, True), (2, False)],
        sft_index=0,
        truncation_mode="keep_start",
        dataset_name="a",
    )
    assert alone.prompt == "q"
    assert a.examples["p"].generations == [" x", " y"]  # the source is unchanged


def test_merge_drops_scores_that_only_one_has_and_takes_the_only_sft_index():
    a, b = example_of("a", [" x"], feedback=[(0, False)]), example_of("b", [" y"], scores=[1], sft_index=0)
    (merged,) = merge([a, b])
    assert merged.scores == [] and merged.sft_index == 1


def test_a_subset_named_beside_its_whole_adds_nothing(hh):
    both = merge([get_hh("train", hh), get_hh_helpful("train", hh)])
    assert both == merge([get_hh("train", hh)])


#### LOCAL FILES

PAIRS = [
    {"prompt": "p", "chosen": " a", "rejected": " b"},
    {"prompt": "p", "chosen": " c", "rejected": " a"},
    {"prompt": "p", "chosen": " a", "rejected": " b"},
    {"prompt": "p", "chosen": " a", "rejected": ""},
    {"prompt": "p", "chosen": None, "rejected": "b"},
    {"prompt": "p", "chosen": " a", "rejected": " a"},
    {"prompt": "", "chosen": " a", "rejected": " b"},
]


def write(file, rows):
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        hub_copies.write_lines(file, rows)
    return str(file)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_local_pairs(tmp_path, suffix):
    write(tmp_path / f"data/train{suffix}", PAIRS)
    write(tmp_path / f"data/test{suffix}", PAIRS[:1])
    dataset = get_local(str(tmp_path / "data"), "train")
    assert dataset.rows == 7
    assert dataset.dropped == {
        "duplicate pair": 1,
        "empty response": 2,
        "identical responses": 1,
        "empty prompt": 1,
    }
    assert list(dataset.examples.values()) == [
        Example("p", [" a", " b", " c"], pairs=[(0, 1), (2, 0)], sft_index=0, dataset_name=str(tmp_path / "data"))
    ]
    assert get_local(str(tmp_path / "data"), "test").rows == 1


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "response, label, yes, no", [("response", "desirable", True, False), ("completion", "label", 1, -1)]
)
def test_local_feedback(tmp_path, suffix, response, label, yes, no):
    rows = [("p", "a", no), ("p", "b", yes), ("p", "a", yes), ("p", "b", yes), ("q", "c", no), ("q", " ", yes)]
    rows = [{"prompt": prompt, response: text, label: value, "split": "train"} for prompt, text, value in rows]
    dataset = get_local(write(tmp_path / f"data{suffix}", rows), "train")
    assert dataset.rows == 6 and dataset.dropped == {"duplicate feedback": 1, "empty response": 1}
    p, q = dataset.examples.values()
    assert (p.generations, p.feedback, p.sft_index) == (["a", "b"], [(0, False), (1, True), (0, True)], 1)
    assert (q.generations, q.feedback, q.sft_index) == (["c"], [(0, False)], None)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_local_chat_messages(tmp_path, suffix):
    """A prompt of messages stays a list, without nulls. A response of one message becomes its text."""
    prompt = [{"role": "user", "content": "Hi", "name": None}]
    chosen, rejected = [{"role": "assistant", "content": "Hello"}], [{"role": "assistant", "content": "No"}]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": "train"}
    (example,) = get_local(write(tmp_path / f"data{suffix}", [row]), "train").examples.values()
    assert example.prompt == [{"role": "user", "content": "Hi"}]
    assert example.generations == ["Hello", "No"] and example.pairs == [(0, 1)]


def test_local_split_column(tmp_path):
    rows = [
        {"prompt": split, "chosen": " a", "rejected": " b", "split": split}
        for split in ("train", "test", "validation", "eval")
    ]
    path = write(tmp_path / "data.jsonl", rows)
    assert list(get_local(path, "train").examples) == ["train"]
    assert list(get_local(path, "test").examples) == ["test", "validation", "eval"]


def test_local_file_without_splits_holds_prompts_out(tmp_path):
    """About 5 % of 2000 prompts are held out, each with both of its rows, whatever the order of the file."""
    rows = [{"prompt": f"p{i}", "chosen": f" {j}", "rejected": " b"} for i in range(2000) for j in (1, 2)]
    path = write(tmp_path / "data.jsonl", rows)
    train, test = get_local(path, "train"), get_local(path, "test")
    assert not train.examples.keys() & test.examples.keys()
    assert len(train.examples) + len(test.examples) == 2000 and train.rows + test.rows == 4000
    assert 60 <= len(test.examples) <= 140
    backward = get_local(write(tmp_path / "backward.jsonl", rows[::-1]), "test")
    assert backward.examples.keys() == test.examples.keys()


@pytest.mark.parametrize("offset", range(0, 60, 2))
def test_two_prompts_are_one_for_each_split(tmp_path, offset):
    """A file of two prompts gives one to each split, whatever their hashes.

    Of 60 prompts about 3 have a hash below the limit, so most files here have both prompts on one side of it.
    """
    rows = [{"prompt": f"p{offset + i}", "chosen": " a", "rejected": " b"} for i in (0, 1)]
    path = write(tmp_path / "data.jsonl", rows)
    assert [len(get_local(path, split).examples) for split in ("train", "test")] == [1, 1]


def test_local_text_that_is_not_unicode_is_dropped(tmp_path):
    """Half an emoji, which a text cut at a fixed length can end in, is dropped and counted.

    JSON can write it, and tokenizers refuse it.
    """
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "p", "chosen": " \\ud83d", "rejected": " b"}\n' + json.dumps(PAIRS[0]) + "\n")
    assert get_local(str(tmp_path), "train").dropped == {"invalid Unicode": 1}


def test_jsonl_with_a_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    lines = "\r\n\r\n".join(json.dumps(row) for row in PAIRS[:2])
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert get_local(str(tmp_path), "train").rows == 2


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}'
NOT_LABELS = "give true or false, 1 or 0, or 1 or -1"


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("train.jsonl", "", "{file}: no rows; a row has {forms}"),
        ("train.json", " \n", "{file}: no rows; a row has {forms}"),
        ("train.json", "[]", "{file}: no rows; a row has {forms}"),
        ("train.parquet", "PAR?", "{file}: not a readable parquet file ("),
        ("train.jsonl", GOOD + "\n{oops}\n", "{file}:2: malformed JSON (Expecting property name enclosed in double"),
        (
            "train.json",
            f"[{GOOD},\n\n{GOOD}\n{GOOD}]",
            "{file}:4: malformed JSON (Expecting , or ] at column 1); correct",
        ),
        ("train.json", f"[{GOOD},\n]", "{file}:2: malformed JSON (Expecting value at column 1); correct or remove it"),
        ("train.json", f"[{GOOD}", "{file}:1: malformed JSON (Expecting , or ] at column 49); correct or remove it"),
        ("train.json", f"[{GOOD}]\nx", "{file}:2: malformed JSON (Expecting the end of the file at column 1); correct"),
        ("train.json", f"{GOOD}\n{GOOD}", "{file}: not a list of objects; name a file with one object per line .jsonl"),
        ("train.jsonl", f"[{GOOD}]", "{file}:1: a row is an object with {forms}, not [{{"),
        (
            "train.jsonl",
            f'{GOOD}\n\n{{"prompt": "p", "chosen": "a", "rejcted": "b"}}',
            "{file}:3: no column 'rejected' (it has: chosen, prompt, rejcted); did you mean 'rejcted'?",
        ),
        (
            "train.json",
            f'[\n{GOOD},\n{{"prompt": "p", "text": "a"}}\n]',
            "{file}:3: no response (it has: prompt, text); a row has {forms}",
        ),
        (
            "train.jsonl",
            '{"question": "p", "chosen": "a", "rejected": "b"}',
            "{file}:1: no column 'prompt' (it has: chosen, question, rejected); a row has {forms}",
        ),
        (
            "train.jsonl",
            '{"prompt": "p", "completion": "a", "label": "good"}',
            "{file}:1: column 'label' is \"good\"; " + NOT_LABELS,
        ),
        (
            "train.jsonl",
            '{"prompt": "p", "response": "a", "desirable": 2}',
            "{file}:1: column 'desirable' is 2; " + NOT_LABELS,
        ),
        (
            "train.jsonl",
            '{"prompt": 3, "chosen": "a", "rejected": "b"}',
            "{file}:1: column 'prompt' is 3; give text, or",
        ),
        (
            "train.jsonl",
            '{"prompt": "p", "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}], '
            '"rejected": "b"}',
            "{file}:1: column 'chosen' has the messages [user, assistant]; give one assistant message, "
            "and put the turns before it in 'prompt'",
        ),
        (
            "train.jsonl",
            '{"messages": [{"role": "usr", "content": "p"}, {"role": "assistant", "content": "a"}]}',
            "{file}:1: column 'messages' has a message of role 'usr'; give one of system, developer, user, assistant",
        ),
        (
            "train.jsonl",
            '{"messages": [{"role": "user", "content": "p"}]}',
            "{file}:1: the messages are [user]; an assistant message that follows another one is needed",
        ),
        (
            "train.jsonl",
            '{"prompt": "p", "responses": ["a", "b"], "scores": [1]}',
            "{file}:1: 2 responses and 1 scores; give one score to each response",
        ),
        (
            "train.jsonl",
            '{"chosen": [{"role": "user", "content": "p"}], "rejected": [{"role": "user", "content": "p"}]}',
            "{file}:1: 'chosen' and 'rejected' have no prompt in common that an assistant answers; correct the row",
        ),
        ("train.csv", "prompt,chosen,rejected\np,a\n", "{file}:2: 2 cells in 3 columns; quote cells that hold a comma"),
        ("train.csv", "prompt,chosen,rejected\np,a,b,c\n", "{file}:2: 4 cells in 3 columns; quote cells that hold a"),
        ("train.csv", 'prompt,chosen,rejected\np,"a"x,b\n', "{file}:2: malformed CSV ("),
        ("train.jsonl.gz", "no", "{file}: cannot be read (Not a gzipped file"),
        ("train.jsonl.zst", "no", "{file}: cannot be read ("),
    ],
)
def test_local_files_that_are_wrong(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        get_local(str(tmp_path), "train", strict=True)
    assert message(error).startswith(expected.format(file=tmp_path / name, forms=FORMS_IN_WORDS))


@pytest.mark.parametrize(
    "rows, expected",
    [
        (['{"split": "dev"}'], "{file}:1: column 'split' is \"dev\"; give one of: train, test, validation, eval"),
        (['{"split": "train"}', "{}"], "{file}:2: column 'split' is null; give one of: train, test, validation, eval"),
        (
            ['{"split": "train"}'],
            "{file}: no row of split 'test'; add rows, give them a column 'split' (train or test), "
            "or give a folder with train.* and test.*",
        ),
        (
            ["{}", "{}"],
            "{file}: one prompt alone cannot be divided into train and test; add rows, give them a column 'split'",
        ),
    ],
)
def test_local_splits_that_are_wrong(tmp_path, rows, expected):
    file = tmp_path / "data.jsonl"
    hub_copies.write_lines(file, [json.loads(GOOD) | json.loads(row) for row in rows])
    with pytest.raises(UserError) as error:
        get_local(str(file), "test")
    assert message(error).startswith(expected.format(file=file))


def test_local_paths_that_are_wrong(tmp_path):
    (tmp_path / "data.txt").write_text("prompt,chosen\n")
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "train.jsonl").write_bytes(b"{}\n\xff\n")
    expected = {
        (
            "nowhere.jsonl",
            "train",
        ): "nowhere.jsonl: no such file or folder; give a .json, .jsonl, .csv or "
        ".parquet file, or a folder with train.* and test.*",
        ("data.txt", "train"): "data.txt: not a data file; give one that ends in .json, .jsonl, .csv, .parquet, or in "
        "one of these and .gz or .zst",
        ("*.arrow", "train"): "/*.arrow: no file matches; correct the pattern",
        (".", "test"): "/.: no test file in this folder; add test.json, test.jsonl or test.parquet",
        (".", "train"): "/.: both train.json and train.jsonl; keep one",
    }
    for (path, split), text in expected.items():
        with pytest.raises(UserError) as error:
            get_local(f"{tmp_path}/{path}", split)
        assert message(error).endswith(text)
    with pytest.raises(UserError, match=r"train.jsonl:2: not UTF-8 text \(invalid start byte at byte 0\); save it as"):
        list(datafiles.read_rows(str(tmp_path / "train.jsonl")))
