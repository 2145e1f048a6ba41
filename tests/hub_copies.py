"""Small local copies of the hub's datasets, with the layout and columns of the hub; the content is made up.

Each has the awkward rows that the real data has. test_datasets.py checks how the readers treat each of them.
"""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet


def write_shp(folder: Path) -> Path:
    """Write stanfordnlp/SHP: a folder per forum with train.json, validation.json, test.json, one object per line."""
    train = [
        shp_row("Why is the sky blue?", "Rayleigh scattering.", "It is a mirror.", 40, 10),
        shp_row("Why is the sky blue?", "Magic.", "Rayleigh scattering.", 4, 40),
        shp_row("Why is the sky blue?", "Nobody knows.", "It just is.", 7, 7),  # equal scores
        shp_row("Why is the sky blue?", "It is a mirror.", "Magic.", 10, 6),  # score ratio below 2
        shp_row("How do I boil an egg?", "Seven minutes.", " ", 9, 3),  # empty response
        shp_row("How do I boil an egg?", "Ten minutes.", "Ten minutes. ", 8, 2),  # identical responses
        shp_row(" \n", "Hello.", "Bye.", 8, 2),  # empty prompt
    ]
    train += [shp_row("Which tea?", "Green.", f"Kind {i}.", 100, i) for i in range(2, 10)]  # eight pairs
    train += [shp_row("Which tea?", "Kind 2.", "Green.", 2, 100)]  # duplicate pair
    test = [shp_row("Is it late?", "Yes.  Very.\n", "No.", 5, 4), shp_row("Is it late?", "Perhaps.", "No.", 3, 4)]
    other = [shp_row("Who won?", "We did.", "They did.", 30, 1)]
    for forum, rows in ("askscience", train), ("asksports", other):
        files = {"train": rows, "validation": rows[:1], "test": test if forum == "askscience" else other}
        for split, lines in files.items():
            write_lines(folder / forum / f"{split}.json", lines)
    return folder


def shp_row(history: str, a: str, b: str, score_a: int, score_b: int) -> dict:
    return {
        "post_id": "p1",
        "domain": "askscience_train",
        "upvote_ratio": 0.9,
        "history": history,
        "c_root_id_A": "a1",
        "c_root_id_B": "b1",
        "created_at_utc_A": 1600000000,
        "created_at_utc_B": 1600000100,
        "score_A": score_a,
        "score_B": score_b,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": int(score_a > score_b),
        "seconds_difference": 100.0,
        "score_ratio": max(score_a, score_b) / min(score_a, score_b),
    }


HH_TURNS = "\n\nHuman: Hi.\n\nAssistant: Hello.  How are you?"


def write_hh(folder: Path) -> Path:
    """Write Anthropic/hh-rlhf: a folder per subset with {train,test}.jsonl.gz, and the red team's, without pairs."""
    question = f"{HH_TURNS}\n\nHuman: Name a tree.\n\nAssistant:"
    helpful = [
        {"chosen": f"{question}  An oak.", "rejected": f"{question} A whale. "},
        {"chosen": f"{question} A birch:\n\n  white", "rejected": f"{question} A whale."},
        {"chosen": f"{question} An oak.", "rejected": f"{question} A whale."},  # duplicate pair
        {"chosen": f"{question} An oak.", "rejected": f"{question}"},  # empty response
        {"chosen": f"{question} An oak.", "rejected": f"{question} An  oak."},  # identical but for blanks
        # The conversations diverge before the last turn.
        {"chosen": f"{question} An oak.", "rejected": f"{HH_TURNS}\n\nHuman: Name a bird.\n\nAssistant: An owl."},
        {"chosen": f"{question} Oak.\n\nHuman: Why?\n\nAssistant: So.", "rejected": f"{question} Ash."},
        {"chosen": f"{question} Oak.\n\nHuman: Thanks!", "rejected": f"{question} Ash."},  # does not end in a reply
        {"chosen": "An oak.", "rejected": "An ash."},  # nobody speaks
    ]
    harmless = [{"chosen": "\n\nHuman: Bad?\n\nAssistant: No.", "rejected": "\n\nHuman: Bad?\n\nAssistant: Yes."}]
    for subset, rows in ("helpful-base", helpful), ("harmless-base", harmless):
        write_lines(folder / subset / "train.jsonl.gz", rows)
        write_lines(folder / subset / "test.jsonl.gz", rows[:1])
    write_lines(folder / "red-team-attempts" / "red_team_attempts.jsonl.gz", [{"transcript": "Bad?", "rating": 3.0}])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Dialogues\n")
    return folder


def write_oasst(folder: Path) -> Path:
    """Write OpenAssistant/oasst1: data/{train,validation}-*.parquet, one message per row, and a raw export beside."""
    train = [
        # A ranking of three, out of order; its best reply has an answer.
        oasst_row("q1", None, "Name a river.", "prompter"),
        oasst_row("a2", "q1", "The sea.", "assistant", rank=2),
        oasst_row("a0", "q1", " The Rhine. ", "assistant", rank=0),
        oasst_row("a1", "q1", "A river.", "assistant", rank=1),
        oasst_row("a3", "q1", "The Nile.", "assistant"),  # no rank
        oasst_row("a4", "q1", "Spam", "assistant", rank=3, deleted=True),
        oasst_row("a5", "q1", " ", "assistant", rank=4),  # empty text
        oasst_row("a6", "q1", "The Rhine.", "assistant", rank=5),  # duplicate response
        oasst_row("a7", "q1", "A creek.", "assistant", rank=1),  # equal ranks
        oasst_row("q2", "a0", "Where is it?", "prompter"),
        oasst_row("b0", "q2", "In Europe.", "assistant", rank=0),  # the only reply: no pair
        oasst_row("q3", "a3", "Longer?", "prompter"),  # a reply without a rank is still part of a prompt
        oasst_row("c1", "q3", "No.", "assistant", rank=1),
        oasst_row("c0", "q3", "Yes.", "assistant", rank=0),
        oasst_row("q4", "a1", "Anything else?", "prompter"),  # without a reply
        oasst_row("q5", "a4", "Why?", "prompter"),  # its parent is deleted
        oasst_row("d0", "q5", "So.", "assistant", rank=0),
        oasst_row("e0", "nowhere", "Hm.", "assistant", rank=0),  # missing parent
        oasst_row("e1", None, "I begin.", "assistant", rank=0),  # a reply to nothing
        oasst_row("q6", None, "Hola", "prompter", lang="es"),
        oasst_row("f0", "q6", "Hello", "assistant", rank=0),  # its parent is not English
    ]
    validation = [
        oasst_row("v", None, "Two?", "prompter"),
        oasst_row("v0", "v", "2", "assistant", rank=0),
        oasst_row("v1", "v", "3", "assistant", rank=1),
    ]
    (folder / "data").mkdir(parents=True)
    types = {"rank": pyarrow.int32(), "review_count": pyarrow.int32(), "model_name": pyarrow.string()}
    for split, rows in ("train", train), ("validation", validation):
        table = pyarrow.Table.from_pylist(rows)
        schema = pyarrow.schema([column.with_type(types.get(column.name, column.type)) for column in table.schema])
        file = folder / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet"
        pyarrow.parquet.write_table(table.cast(schema), file)
    write_lines(folder / "2023-04-12_oasst_all.messages.jsonl.gz", train + validation)
    return folder


def oasst_row(message_id, parent_id, text, role, rank=None, lang="en", deleted=False) -> dict:
    return {
        "message_id": message_id,
        "parent_id": parent_id,
        "user_id": "u1",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text,
        "role": role,
        "lang": lang,
        "review_count": 3,
        "review_result": True,
        "deleted": deleted,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": {"toxicity": 0.001, "insult": 0.002},
        "message_tree_id": "q1",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    }


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)


def write_parquet(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def turns(*contents: str) -> list[dict]:
    """Return messages of the user and the assistant in turn."""
    return [{"content": content, "role": ("user", "assistant")[i % 2]} for i, content in enumerate(contents)]


def write_ultrafeedback(folder: Path) -> Path:
    """Write HuggingFaceH4/ultrafeedback_binarized: data/{train,test}_{prefs,sft,gen}-*.parquet."""
    for split, question in ("train_prefs", "Name a tree."), ("test_prefs", "Name a bird."), ("train_sft", "Not read."):
        row = {
            "prompt": question,
            "prompt_id": "0a1b",
            "chosen": turns(question, "An oak."),
            "rejected": turns(question, "A whale."),
            "messages": turns(question, "An oak."),
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        }
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", [row])
    return folder


def write_helpsteer(folder: Path) -> Path:
    """Write nvidia/HelpSteer: {train,validation}.jsonl.gz, one rated response per row."""

    def row(prompt: str, response: str, helpfulness: int) -> dict:
        others = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **others}

    train = [("Name a tree.", "An oak.", 4), ("Name a tree.", "A whale.", 0), ("Why?", "So.", 3)]
    train += [("Name a tree.", "A bush.", 2), ("Name a tree.", "A hedge.", 2)]
    write_lines(folder / "train.jsonl.gz", [row(*values) for values in train])
    write_lines(folder / "validation.jsonl.gz", [row("Two?", "2", 4), row("Two?", "3", 1)])
    return folder


def write_nectar(folder: Path, n: int = 40) -> Path:
    """Write berkeley-nest/Nectar: one parquet file, a training split only, ranked answers."""
    rows = [
        {
            "prompt": f"\n\nHuman: Hi {i}.\n\nAssistant: Hello.\n\nHuman: Bye.\n\nAssistant: ",
            "answers": [
                {"answer": "Later.", "model": "a", "rank": 2.0},
                {"answer": "Bye.", "model": "b", "rank": 1.0},
                {"answer": "No.", "model": "c", "rank": 3.0},
            ],
            "turns": 2,
            "num_responses": 3,
            "source": ["lmsys-chat-1m"],
            "good_natured": True,
        }
        for i in range(n)
    ]
    write_parquet(folder / "rlaif.parquet", rows)
    return folder


def write_ultrachat(folder: Path) -> Path:
    """Write HuggingFaceH4/ultrachat_200k: data/{train,test}_{sft,gen}-*.parquet, conversations."""
    conversations = {
        "train_sft": turns("Hi.", "Hello.", "Bye.", "See you."),
        "test_sft": turns("Hi.", "Hello."),
        "train_gen": turns("Not read.", "No."),
    }
    for split, messages in conversations.items():
        row = {"prompt": messages[0]["content"], "prompt_id": "0a1b", "messages": messages}
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", [row])
    return folder
