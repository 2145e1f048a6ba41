"""The forms of rows, from a file to token ids; kinds of files and folders; the hub schemas of config/dataset.

A test of a form writes rows to a file, reads it as `datasets=[FILE]` does, and compares the token ids of the loader's
batches with those of the expected texts. The tokenizer has no chat template, so messages read `\\n\\nHuman: ...`.
"""

import gzip
import json
import math
import os
import random

import datasets
import pyarrow
import pytest

import dataloaders
import hub_copies
from dataloaders import get_local
from halos import components, forms
from halos.errors import UserError
from halos.forms import pairs_of_scores
from halos.hub import choose_split
from helpers import PROJECT, make_config
from hub_copies import turns, write_lines, write_parquet
from small_runs import tokenizer

HI = "\n\nHuman: hi\n\nAssistant:"
SYSTEM = "\n\nSystem: be kind\n\nHuman: hi\n\nAssistant:"
U, A, B = turns("hi"), turns("hi", "yes")[1:], turns("hi", "no")[1:]
PAIR, FEEDBACK, SFT = "PairedPreferenceDataLoader", "UnpairedPreferenceDataLoader", "SFTDataLoader"
TEXT_PAIR = [("hi:", " yes", "chosen", " no", "rejected")]
CHAT_PAIR = [(HI, " yes", "chosen", " no", "rejected")]
LIKED, DISLIKED = (HI, " yes", "chosen"), (HI, " no", "rejected")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def rows_of(dataset, loader: str, folder) -> list[tuple]:
    """Return the token ids of all rows of an epoch: (prompt, response, role, response, role) each."""
    settings = {"batch_size": 64, "max_length": 200, "max_prompt_length": 150, "cache_dir": str(folder)}
    (batch,) = components.find(dataloaders, loader)(list(dataset.examples.values()), tokenizer(), **settings)
    return sorted(
        (one.prompt.tolist(), *(x for pair in zip(one.responses, one.roles, strict=True) for x in _plain(*pair)))
        for one in batch
    )


def _plain(ids, role) -> tuple[list[int], str]:
    return ids.tolist(), str(role)


def ids_of(rows: list[tuple]) -> list[tuple]:
    """Encode expected rows: (prompt, response, role, ...) as text. EOS ends a response."""

    def ids(text: str) -> list[int]:
        return tokenizer()(text, add_special_tokens=False)["input_ids"]

    eos = tokenizer().eos_token_id
    return sorted(
        (ids(prompt), *(ids(x) + [eos] if i % 2 == 0 else x for i, x in enumerate(rest))) for prompt, *rest in rows
    )


# Form -> (loader, the rows of a file, the rows of an epoch). docs/data.md has the same table.
FORMS = {
    "pairs: text": (PAIR, [{"prompt": "hi:", "chosen": " yes", "rejected": " no"}], TEXT_PAIR),
    "pairs: messages": (PAIR, [{"prompt": U, "chosen": A, "rejected": B}], CHAT_PAIR),
    "pairs: in both, messages": (PAIR, [{"chosen": U + A, "rejected": U + B}], CHAT_PAIR),
    "pairs: in both, turns": (PAIR, [{"chosen": f"{HI} yes", "rejected": f"{HI} no"}], CHAT_PAIR),
    "pairs: in both, text": (
        PAIR,
        [{"prompt": "hi:", "chosen": "hi: yes", "rejected": "hi: no"}],
        TEXT_PAIR,
    ),
    "pairs: UltraFeedback": (
        PAIR,
        [
            {
                "prompt": "hi",
                "chosen": U + A,
                "rejected": U + B,
                "messages": U + A,
                "score_chosen": 9,
                "score_rejected": 1,
            }
        ],
        CHAT_PAIR,
    ),
    "pairs: system": (
        PAIR,
        [{"system": "be kind", "prompt": "hi", "chosen": "yes", "rejected": "no"}],
        [(SYSTEM, *CHAT_PAIR[0][1:])],
    ),
    "feedback: text": (
        FEEDBACK,
        [
            {"prompt": "hi:", "completion": " yes", "label": True},
            {"prompt": "hi:", "completion": " no", "label": "false"},
            {"prompt": "hi:", "completion": " perhaps", "label": 0},
            {"prompt": "hi:", "completion": " sure", "label": "TRUE"},
        ],
        [
            ("hi:", " yes", "chosen"),
            ("hi:", " no", "rejected"),
            ("hi:", " perhaps", "rejected"),
            ("hi:", " sure", "chosen"),
        ],
    ),
    "feedback: messages": (
        FEEDBACK,
        [{"prompt": U, "completion": A, "label": 1}, {"prompt": U, "completion": B, "label": 0.0}],
        [LIKED, DISLIKED],
    ),
    "feedback: conversation": (
        FEEDBACK,
        [{"messages": U + A, "label": "1"}, {"messages": U + B, "label": -1}],
        [LIKED, DISLIKED],
    ),
    "feedback: HALOs": (
        FEEDBACK,
        [
            {"type": "binary_feedback", "prompt_id": "1", "prompt": U, "output": A, "label": 1, "reward": 0.9},
            {"type": "binary_feedback", "prompt_id": "1", "prompt": U, "output": B, "label": 0, "reward": 0.1},
        ],
        [LIKED, DISLIKED],
    ),
    "pairs: HALOs": (
        PAIR,
        [
            {
                "type": "pairwise_feedback",
                "prompt_id": "1",
                "prompt": U,
                "output_A": B,
                "output_B": A,
                "label": 0,
                "reward_A": 0.1,
                "reward_B": 0.9,
                "reward_difference": 0.8,
            }
        ],
        CHAT_PAIR,
    ),  # fmt: skip
    "SFT: messages": (SFT, [{"messages": U + A}], [LIKED]),
    "SFT: completion": (SFT, [{"prompt": "hi:", "completion": " yes"}], [("hi:", " yes", "chosen")]),
    "SFT: text": (
        SFT,
        [{"text": "hi there: yes"}, {"text": "hi you"}],
        [("hi", " there: yes", "chosen"), ("hi", " you", "chosen")],
    ),
    "SFT: alpaca": (
        SFT,
        [{"instruction": "say", "input": "hi", "output": "yes"}, {"instruction": "hi", "input": "", "output": "yes"}],
        [("\n\nHuman: say\n\nhi\n\nAssistant:", " yes", "chosen"), LIKED],
    ),
    "SFT: ShareGPT": (
        SFT,
        [
            {
                "id": "x",
                "conversations": [
                    {"from": "system", "value": "be kind"},
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "yes"},
                ],
            }
        ],
        [(SYSTEM, " yes", "chosen")],
    ),
    "ranked: scores": (
        PAIR,
        [{"prompt": "hi:", "responses": [" no", " yes"], "scores": [0.1, 0.9]}],
        TEXT_PAIR,
    ),
    "ranked: ranks": (PAIR, [{"prompt": U, "completions": ["yes", "no"], "ranks": [1, 2]}], CHAT_PAIR),
    "ranked: objects": (
        PAIR,
        [{"prompt": U, "answers": [{"answer": "no", "rank": 2.0}, {"answer": "yes", "rank": 1.0}]}],
        CHAT_PAIR,
    ),
    "rated": (
        PAIR,
        [{"prompt": "hi:", "response": " no", "score": 1}, {"prompt": "hi:", "response": " yes", "score": "4"}],
        TEXT_PAIR,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_from_a_file_to_token_ids(tmp_path, form):
    loader, rows, expected = FORMS[form]
    write_lines(tmp_path / "data/train.jsonl", rows)
    dataset = get_local(str(tmp_path / "data"), "train", strict=True)
    assert not dataset.dropped and dataset.rows == len(rows)
    assert rows_of(dataset, loader, tmp_path) == ids_of(expected)


def test_the_page_names_every_form_and_its_test():
    with open(os.path.join(PROJECT, "docs", "data.md")) as file:
        page = file.read()
    assert [form for form in FORMS if f"| `{form}` |" not in page] == []
    assert [name for name in forms.FORMS if f"| `{name}` |" not in page] == []


#### WHAT IDS DO NOT SHOW


def read_one(tmp_path, *rows: dict):
    write_lines(tmp_path / "one/train.jsonl", list(rows))
    return get_local(str(tmp_path / "one"), "train", strict=True)


def only(dataset):
    (example,) = dataset.examples.values()
    return example


def test_scores_are_kept(tmp_path):
    _, rows, _ = FORMS["pairs: UltraFeedback"]
    assert only(read_one(tmp_path, *rows)).scores == [9, 1]
    _, rows, _ = FORMS["feedback: HALOs"]
    example = only(read_one(tmp_path, *rows))
    assert (example.scores, example.feedback, example.sft_index) == ([0.9, 0.1], [(0, True), (1, False)], 0)


def test_a_response_without_a_score_has_nan(tmp_path):
    rows = [{"prompt": "p", "response": "a", "desirable": True}, {"prompt": "p", "response": "b", "score": 2}]
    scores = only(read_one(tmp_path, *rows)).scores
    assert math.isnan(scores[0]) and scores[1] == 2


def test_completions_of_several_turns(tmp_path):
    """What both conversations begin with is the prompt, if an assistant goes on in both. The rest are messages."""
    chosen, rejected = turns("hi", "yes", "why", "so"), turns("hi", "no", "what", "nothing")
    example = only(read_one(tmp_path, {"chosen": chosen, "rejected": rejected}))
    assert example.prompt == U and example.generations == [chosen[1:], rejected[1:]] and example.pairs == [(0, 1)]
    late = only(read_one(tmp_path, {"chosen": chosen, "rejected": turns("hi", "yes", "why", "no")}))
    assert late.prompt == chosen[:3] and late.generations == ["so", "no"]
    given = {"prompt": U, "chosen": chosen, "rejected": turns("hi", "yes", "why", "no")}
    assert only(read_one(tmp_path, given)).generations == [chosen[1:], turns("hi", "yes", "why", "no")[1:]]


def test_whole_conversations_for_sft(tmp_path):
    """The prompt ends before the first assistant message; what comes after the last one is nothing to train on."""
    example = only(read_one(tmp_path, {"messages": turns("hi", "yes", "why", "so", "thanks")}))
    assert example.prompt == U and example.generations == [turns("hi", "yes", "why", "so")[1:]]
    assert example.sft_index == 0


def test_tools_and_reasoning_go_along(tmp_path):
    """Tool calls, tools, reasoning and the system prompt are in the example; nulls, as parquet adds them, are not."""
    call = {"type": "function", "function": {"name": "time", "arguments": {}}}
    answer = [
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "noon", "tool_calls": None, "name": "time"},
        {"role": "assistant", "content": "It is noon.", "reasoning_content": "easy", "tool_calls": []},
    ]
    tools = [{"type": "function", "function": {"name": "time", "parameters": {}}}]
    row = {"system": "be kind", "prompt": U, "completion": answer, "tools": json.dumps(tools)}
    example = only(read_one(tmp_path, row))
    assert example.prompt == [{"role": "system", "content": "be kind"}, *U]
    assert example.tools == tools
    assert example.generations == [
        [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "noon", "name": "time"},
            {"role": "assistant", "content": "It is noon.", "reasoning_content": "easy"},
        ]
    ]


def test_prompts_with_different_tools_are_different(tmp_path):
    rows = [{"prompt": U, "completion": "yes", "tools": tools} for tools in (None, [{"name": "a"}], [{"name": "b"}])]
    assert [example.tools for example in read_one(tmp_path, *rows).examples.values()] == [
        None, [{"name": "a"}], [{"name": "b"}]
    ]  # fmt: skip


def test_columns_that_are_not_read_are_named_once(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": str(i), "margin": 0.5, "source": "x"} for i in range(3)]
    assert read_one(tmp_path, *rows).account()["notes"] == ["columns that are not read: margin, source"]


def test_rows_that_keep_where_leaves_out(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": f"a {lang}", "lang": lang} for lang in ("en", "de", "fr")])
    config = make_config(tmp_path, "datasets=[ultrachat]", f"dataset.ultrachat.source={tmp_path}/train.jsonl")
    spec = config.dataset.ultrachat
    spec.update(form="auto", splits={"train": None, "test": None})
    spec["keep"]["where"] = {"lang": ["en", "fr"]}
    read = [dataloaders.read_dataset("ultrachat", split, spec) for split in ("train", "test")]
    assert sorted(text for dataset in read for text in dataset.examples) == ["a en", "a fr"]
    assert [dataset.dropped for dataset in read] == [{"not in keep.where": 1}] * 2
    spec["keep"]["where"] = {"language": "en"}
    with pytest.raises(UserError, match="no column 'language', which keep.where names; did you mean 'lang'?"):
        dataloaders.read_dataset("ultrachat", "train", spec)


def test_null_and_the_empty_list_are_alike(tmp_path):
    """Columns that a row leaves empty do not decide about its form."""
    rows = [
        {"prompt": "p", "chosen": None, "rejected": [], "completion": "a", "label": True, "messages": []},
        {"prompt": None, "chosen": [], "rejected": None, "completion": None, "label": None, "messages": U + A},
    ]
    dataset = read_one(tmp_path, *rows)
    assert [example.feedback for example in dataset.examples.values()] == [[(0, True)], []]


def test_a_second_demonstration_of_a_prompt_is_counted(tmp_path):
    rows = [{"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "b"}]
    assert read_one(tmp_path, *rows).dropped == {"SFT has a response to this prompt": 1}


def test_malformed_rows_among_good_ones_are_counted_and_shown(tmp_path):
    """Three of five malformed rows are shown, with their lines. strict_data stops at the first."""
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    bad = ["{oops}", '{"prompt": 3, "chosen": "a", "rejected": "b"}', "[]", '{"prompt": "p"}', '{"p": 1}']
    file = tmp_path / "data/train.jsonl"
    file.parent.mkdir()
    file.write_text("\n".join([bad[0], good, *bad[1:]]) + "\n")
    dataset = get_local(str(file.parent), "train")
    assert dataset.rows == 6 and dataset.dropped == {"malformed row": 5}
    assert [line.removeprefix(f"{file}:")[:24] for line in dataset.lines] == [
        "1: malformed JSON (Expec", "3: column 'prompt' is 3;", "4: a row is an object wi"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"train.jsonl:1: malformed JSON .* \(strict_data=false drops such rows\)"):
        get_local(str(file.parent), "train", strict=True)


#### PAIRS OF SCORES


@pytest.mark.parametrize(
    ("pairing", "margin", "expected"),
    [
        ("all", 0, [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)]),
        ("all", 2, [(1, 3), (0, 3), (2, 3)]),
        ("best-worst", 0, [(1, 3)]),
        ("best-worst", 4, []),
        ("adjacent", 0, [(1, 0), (2, 3)]),
    ],
)
def test_pairs_of_scores(pairing, margin, expected):
    """Scores 2, 3, 2, 0: ranked 1 > 0 = 2 > 3. A difference of 2 and more: 3 - 0 and 2 - 0."""
    assert pairs_of_scores([2, 3, 2, 0], pairing, margin) == expected


#### FILES AND FOLDERS

PAIRS = [{"prompt": f"p{i}", "chosen": "a, b", "rejected": 'say "no"\nplease'} for i in range(3)]


def write(file, rows) -> None:
    name, pack = (file.with_suffix(""), file.suffix) if file.suffix in (".gz", ".zst") else (file, "")
    if name.suffix == ".parquet":
        write_parquet(name, rows)
    elif name.suffix == ".csv":
        name.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_csv(str(name))
    elif name.suffix == ".json":
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(json.dumps(rows))
    else:
        write_lines(name, rows)
    if pack == ".gz":
        file.write_bytes(gzip.compress(name.read_bytes()))
    elif pack:
        with pyarrow.CompressedOutputStream(str(file), "zstd") as packed:
            packed.write(name.read_bytes())
    if pack:
        name.unlink()


def prompts(dataset) -> list:
    return [example.prompt for example in dataset.examples.values()]


@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_kinds_of_files(tmp_path, suffix, pack):
    write(tmp_path / f"data/train{suffix}{pack}", PAIRS)
    dataset = get_local(str(tmp_path / "data"), "train", strict=True)
    assert prompts(dataset) == ["p0", "p1", "p2"]
    assert only_texts(dataset) == {("a, b", 'say "no"\nplease')}


def only_texts(dataset) -> set[tuple]:
    return {tuple(example.generations) for example in dataset.examples.values()}


def test_messages_in_csv_are_json(tmp_path):
    write(tmp_path / "data/train.csv", [{"chosen": json.dumps(U + A), "rejected": json.dumps(U + B)}])
    example = only(get_local(str(tmp_path / "data"), "train", strict=True))
    assert (example.prompt, example.generations) == (U, ["yes", "no"])


def test_globs_and_numbered_parts(tmp_path):
    """A glob is one file without splits. A folder may have a split in numbered parts, and a validation split."""
    for i in range(2):
        write(tmp_path / f"data/train-0000{i}-of-00002.parquet", [row | {"prompt": f"{i}"} for row in PAIRS[:1]])
    write(tmp_path / "data/validation.jsonl", PAIRS[2:])
    assert prompts(get_local(str(tmp_path / "data"), "train")) == ["0", "1"]
    assert prompts(get_local(str(tmp_path / "data"), "test")) == ["p2"]
    both = [prompts(get_local(str(tmp_path / "data/train*.parquet"), split)) for split in ("train", "test")]
    assert sorted(sum(both, [])) == ["0", "1"] and all(both)


def test_save_to_disk_folders(tmp_path):
    table = datasets.Dataset.from_list(PAIRS)
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "two")
    table.save_to_disk(tmp_path / "one")
    assert [len(prompts(get_local(str(tmp_path / "two"), split))) for split in ("train", "test")] == [3, 1]
    held_out = [prompts(get_local(str(tmp_path / "one"), split)) for split in ("train", "test")]
    assert sorted(sum(held_out, [])) == ["p0", "p1", "p2"] and len(held_out[1]) == 1


def test_a_hub_layout_with_configurations(tmp_path):
    """`source: DIR:math` is the configuration `math` of a repository; its README says which files that has."""
    write_lines(tmp_path / "hub/a/some.jsonl", PAIRS[:1])
    write_lines(tmp_path / "hub/b/more.jsonl", PAIRS[1:])
    files = "\n".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}"
        for name, path in (("chat", "a/*"), ("math", "b/*"))
    )
    (tmp_path / "hub/README.md").write_text(f"---\nconfigs:\n{files}\n---\n")
    config = make_config(tmp_path, "datasets=[nectar]")
    spec = config.dataset.nectar
    spec.update(source=f"{tmp_path}/hub:math", form="auto", columns={}, prompt_as="text")
    split = [prompts(dataloaders.read_dataset("nectar", split, spec)) for split in ("train", "test")]
    assert sorted(sum(split, [])) == ["p1", "p2"]


@pytest.mark.parametrize(
    ("found", "split", "expected"),
    [
        (["train", "test"], "train", "train"),
        (["train", "validation"], "test", "validation"),
        (["train_sft", "train_prefs", "test_sft", "test_prefs"], "train", "train_prefs"),
        (["train_sft", "test_sft"], "test", "test_sft"),
        (["all"], "train", "all"),
        (["train"], "test", None),
    ],
)
def test_splits_are_found_by_their_names(found, split, expected):
    assert choose_split("source", found, split, None) == expected


def test_a_split_that_is_not_there():
    with pytest.raises(UserError, match="source has no split 'trian'; did you mean 'train'?"):
        choose_split("source", ["train", "test"], "train", "trian")


#### THE YAMLS OF config/dataset


def named(tmp_path, name: str, split: str, *words: str):
    folder = getattr(hub_copies, f"write_{name}")(tmp_path / name / "copy") if not (tmp_path / name).exists() else None
    source = folder or tmp_path / name / "copy"
    config = make_config(tmp_path, f"datasets=[{name}]", f"dataset.{name}.source={source}", "strict_data=true", *words)
    (dataset,) = dataloaders.read_datasets(config, split)
    return dataset


TREE = "\n\nHuman: Name a tree.\n\nAssistant:"


def test_ultrafeedback(tmp_path):
    dataset = named(tmp_path, "ultrafeedback", "train")
    assert rows_of(dataset, PAIR, tmp_path) == ids_of([(TREE, " An oak.", "chosen", " A whale.", "rejected")])
    assert only(dataset).scores == [8, 3.5]
    assert only(named(tmp_path, "ultrafeedback", "test")).prompt == turns("Name a bird.")
    assert dataset.account()["notes"] == ["columns that are not read: messages, prompt_id"]


def test_helpsteer(tmp_path):
    """Four rated responses to one prompt, of which two are equal: 4 > 2 = 2 > 0 gives five pairs."""
    dataset = named(tmp_path, "helpsteer", "train")
    tree, why = dataset.examples.values()
    ranking = ["An oak.", "A bush.", "A hedge.", "A whale."]
    expected = [(a, b) for i, a in enumerate(ranking) for b in ranking[i + 1 :] if (a, b) != ("A bush.", "A hedge.")]
    assert sorted((tree.generations[a], tree.generations[b]) for a, b in tree.pairs) == sorted(expected)
    assert (tree.sft_index, why.pairs, why.sft_index) == (0, [], 0)
    rows = [(TREE, f" {a}", "chosen", f" {b}", "rejected") for a, b in expected]
    assert rows_of(dataset, PAIR, tmp_path) == ids_of(rows)
    assert len(only(named(tmp_path, "helpsteer", "test")).pairs) == 1
    best = named(tmp_path, "helpsteer", "train", "dataset.helpsteer.pairs=best-worst")
    assert sum(len(example.pairs) for example in best.examples.values()) == 1


def test_nectar(tmp_path):
    """Ranks 1, 2, 3 give two adjacent pairs a prompt. The source has no test split, so some prompts are held out."""
    train, test = (named(tmp_path, "nectar", split) for split in ("train", "test"))
    assert len(train.examples) + len(test.examples) == 40 and not train.examples.keys() & test.examples.keys()
    example = next(iter(train.examples.values()))
    assert example.prompt == turns(example.prompt[0]["content"], "Hello.", "Bye.")
    assert [(example.generations[a], example.generations[b]) for a, b in example.pairs] == [
        ("Bye.", "Later."), ("Later.", "No.")
    ]  # fmt: skip
    few = named(tmp_path, "nectar", "train", "dataset.nectar.keep.n_prompts=5")
    assert len(few.examples) == 5 and few.dropped == {"prompts over keep.n_prompts": len(train.examples) - 5}
    assert few.examples.keys() <= train.examples.keys()
    with pytest.raises(UserError, match="no usable row|no row of split"):
        named(tmp_path, "nectar", "train", "+dataset.nectar.keep.where={good_natured:false}")


def test_ultrachat(tmp_path):
    example = only(named(tmp_path, "ultrachat", "train"))
    assert (example.prompt, example.generations) == (turns("Hi."), [turns("Hi.", "Hello.", "Bye.", "See you.")[1:]])
    expected = ids_of([("\n\nHuman: Hi.\n\nAssistant:", " Hello.", "chosen")])
    assert rows_of(named(tmp_path, "ultrachat", "test"), SFT, tmp_path) == expected


def test_a_yaml_and_ten_lines(tmp_path, monkeypatch):
    """The example of docs/data.md: a reader that goes over its rows and calls add_pair."""

    def get_debates(split, source):
        dataset = dataloaders.Dataset("debates")
        for row in json.loads((tmp_path / f"{source}.json").read_text())[split]:
            dataset.rows += 1
            if row["votes"] < 2:
                dataset.dropped["few votes"] += 1
            else:
                prompt = [{"role": "user", "content": row["question"]}]
                dataset.add_pair(prompt, row["winner"], row["loser"])
        return dataset.not_empty(split)

    rows = [{"question": "hi", "winner": "yes", "loser": "no", "votes": n} for n in (1, 3)]
    (tmp_path / "debates.json").write_text(json.dumps({"train": rows, "test": rows}))
    monkeypatch.setattr(dataloaders, "get_debates", get_debates, raising=False)
    config = make_config(tmp_path, "datasets=[debates]", "+dataset.debates={source:debates,reader:get_debates}")
    (dataset,) = dataloaders.read_datasets(config, "train")
    assert dataset.dropped == {"few votes": 1}
    assert rows_of(dataset, PAIR, tmp_path) == ids_of(CHAT_PAIR)
    assert only(dataset).sft_index == 0


#### WEIGHTS


def counts_of(loader, epoch: int) -> dict[str, int]:
    """Return how often each response is in an epoch, by its text."""
    seen: dict[str, int] = {}
    for row in loader.order(epoch):
        for example, generation in row.responses:
            text = loader.examples[example].generations[generation]
            seen[text] = seen.get(text, 0) + 1
    return seen


def weighted_loader(tmp_path, loader: str, **weights: float):
    """Make a loader over ten pairs each of the datasets a and b."""
    examples = [
        dataloaders.Example(
            f"{name}{i}", [f"{name}{i}+", f"{name}{i}-"], pairs=[(0, 1)], sft_index=0, dataset_name=name
        )
        for name in "ab"
        for i in range(10)
    ]
    settings = {"batch_size": 4, "max_length": 60, "max_prompt_length": 40, "cache_dir": str(tmp_path)}
    return components.find(dataloaders, loader)(examples, tokenizer(), weights=weights, n_epochs=4, **settings)


@pytest.mark.parametrize(("loader", "per_pair"), [(PAIR, 1), (SFT, 1), (FEEDBACK, 2)])
def test_half_the_weight_is_half_the_rows_and_then_the_other_half(tmp_path, loader, per_pair):
    data = weighted_loader(tmp_path, loader, a=0.5)
    assert data.rows_per_epoch == 15 * per_pair
    epochs = [{text for text in counts_of(data, epoch) if text[0] == "a"} for epoch in range(4)]
    chosen = [{text for text in epoch if text[-1] == "+"} for epoch in epochs]
    assert [len(epoch) for epoch in chosen] == [5] * 4
    assert not chosen[0] & chosen[1] and chosen[0] == chosen[2] and chosen[1] == chosen[3]
    assert all(sum(n for text, n in counts_of(data, epoch).items() if text == "b3+") == 1 for epoch in range(4))
    again = weighted_loader(tmp_path, loader, a=0.5)
    assert again.order(2) == data.order(2)  # whatever was read before
    assert sum(len(batch) for batch in data) == data.total_examples == 60 * per_pair


def test_a_weight_above_one(tmp_path):
    """Weight 2.5: every row twice an epoch, and half of them a third time; in two epochs five times."""
    data = weighted_loader(tmp_path, PAIR, a=2.5, b=0.1)
    first, second = (counts_of(data, epoch) for epoch in (0, 1))
    assert sorted(n for text, n in first.items() if text[0] == "a") == [2] * 10 + [3] * 10
    assert {first[f"a{i}+"] + second[f"a{i}+"] for i in range(10)} == {5}
    assert [sum(n for text, n in epoch.items() if text[0] == "b") for epoch in (first, second)] == [2, 2]
    assert data.rows_per_epoch == 26


def test_a_share_that_does_not_divide_the_rows_is_fair(tmp_path):
    """With 0.3 of 10 rows, ten epochs show each row three times."""
    data = weighted_loader(tmp_path, PAIR, a=0.3)
    total = [sum(counts_of(data, epoch).get(f"a{i}+", 0) for epoch in range(10)) for i in range(10)]
    assert total == [3] * 10


def test_weights_come_from_the_config_and_leave_evaluation_alone(tmp_path):
    write_lines(tmp_path / "data/train.jsonl", PAIRS)
    write_lines(tmp_path / "data/test.jsonl", PAIRS)
    words = [f"dataset.ultrafeedback.source={tmp_path}/data", "dataset.ultrafeedback.weight=2", "loss=dpo"]
    config = make_config(tmp_path, "datasets=[ultrafeedback]", *words)
    config.dataset.ultrafeedback.splits = {"train": None, "test": None}
    lengths = [dataloaders.make_loader(config, tokenizer(), split).rows_per_epoch for split in ("train", "test")]
    assert lengths == [6, 3]


def test_without_weights_nothing_changes(tmp_path):
    data = weighted_loader(tmp_path, PAIR, a=1, b=1.0)
    assert data.thinned == [] and data.order(0) == data.flatten(random.Random("1-0"))
