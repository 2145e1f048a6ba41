"""compare.py in this process, against a real server: its results, faults, limits and mistakes.

What takes a process of its own (kills, signals, pipes) is in test_compare_process.py.
"""

import json
import os
from collections import defaultdict

import pytest

from comparing import FakeClock, at, compare, journal, kept, last_line, numbers, results, rows_of, write_samples
from halos.judge import gate, run
from halos.judge.journal import Journal
from judge_server import Settings, serve


@pytest.fixture(scope="module")
def running():
    with serve() as server:
        yield server


@pytest.fixture
def start(running, monkeypatch):
    """start(**settings): the server of this file with these settings, by default without delay, and counts of 0."""
    monkeypatch.setattr(run, "BACKOFF", (0.01, 0.1))

    def set_up(**settings):
        running.reset(**vars(Settings(**{"delay": 0.0, **settings})))
        return running

    return set_up


@pytest.fixture
def samples(tmp_path):
    write_samples(tmp_path, 40)
    return tmp_path


#### WHAT COMES OUT


def test_the_line_has_the_keys_of_the_original_script(samples, start):
    server = start(verdict="longer")
    done = compare(samples, *at(server))
    assert done.returncode == 0, done.stderr
    (line,) = results(samples)
    rows = rows_of(40)
    assert {"date", "total", "seed", "expname", "candidate", "baseline"} <= set(line)
    assert (line["total"], line["seed"], line["expname"]) == (40, 0, str(samples / "samples.json"))
    wins = sum(len(row["policy"]) > len(row["chosen"]) for row in rows)
    assert (line["candidate"]["name"], line["candidate"]["wins"]) == ("policy", wins)
    assert (line["baseline"]["name"], line["baseline"]["wins"]) == ("chosen", 40 - wins)
    assert line["candidate"]["lengths"] == [len(row["policy"].split()) for row in rows]
    assert line["win_rate"] == pytest.approx(wins / 40)
    assert f"{wins} / {40 - wins} / 0" in done.stdout


def test_a_finished_command_again_makes_no_call_and_says_the_same(samples, start):
    server = start()
    for words in ([], [], ["--stats_only"]):
        assert compare(samples, *at(server, *words)).returncode == 0
    assert server.stats()["requests"] == 80
    first, second, third = map(numbers, results(samples))
    assert first == second == third


def test_statistics_do_not_depend_on_concurrency(samples, start):
    server = start(delay=0.01)
    for n in (1, 8, 32, 128):
        done = compare(samples, *at(server, "--concurrency", str(n), "--cache", str(samples / f"cache{n}")))
        assert done.returncode == 0, done.stderr
    lines = [numbers(line) for line in results(samples)]
    assert len(lines) == 4 and all(line == lines[0] for line in lines)


def test_a_judge_that_always_says_one(samples, start):
    """Each pair is won once and lost once: a tie, and the first slot won everything."""
    server = start(verdict="first")
    assert compare(samples, *at(server)).returncode == 0
    (line,) = results(samples)
    assert (line["win_rate"], line["ties"], line["position"]["first_slot_share"]) == (0.5, 40, 1.0)


def test_one_order_asks_half_and_depends_on_the_seed_alone(samples, start):
    server = start(verdict="longer")
    assert compare(samples, *at(server, "--order", "one")).returncode == 0
    assert server.stats()["requests"] == 40
    orders = {record["row"]: record["order"] for record in kept(journal(samples), "sent")}
    assert set(orders.values()) == {0, 1}
    assert compare(samples, *at(server, "--order", "one", "--concurrency", "1")).returncode == 0
    assert server.stats()["requests"] == 40
    compare(samples, *at(server, "--order", "one", "--seed", "1"))
    assert 40 < server.stats()["requests"] < 80


def test_a_larger_sample_pays_for_the_difference_only(samples, start):
    server = start()
    for n, requests in (("10", 20), ("25", 50)):
        assert compare(samples, *at(server, "-mc", n)).returncode == 0
        assert server.stats()["requests"] == requests
    assert [line["total"] for line in results(samples)] == [10, 25]


def test_texts_of_all_kinds(tmp_path, start):
    """Markup, templates, fences, emoji, half an emoji, and empty responses are all judged, and the page is written."""
    odd = ["</script>", "{{ 7 * 7 }}", "==== 0123abcd ====", "\U0001f600", "\ud83d", "\u2028", "", "\0"]
    rows = [{"prompt": f"{n} {text}", "chosen": text, "policy": f"{n}{text}"} for n, text in enumerate(odd)]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    server = start(verdict="longer")
    done = compare(tmp_path, *at(server, "--report", "page.html"))
    assert done.returncode == 0, done.stderr
    (line,) = results(tmp_path)
    assert (line["total"], line["win_rate"]) == (len(odd), 1.0)
    assert "2 of 8 baselines are empty texts" in done.stdout


@pytest.mark.parametrize("mode", ["text", "logprob"])
def test_modes(samples, mode, start):
    server = start(verdict="longer", confidence=0.9)
    done = compare(samples, *at(server, "--mode", mode))
    assert done.returncode == 0, done.stderr
    (line,) = results(samples)
    wins = sum(len(row["policy"]) > len(row["chosen"]) for row in rows_of(40))
    expected = (0.9 * wins + 0.1 * (40 - wins)) / 40 if mode == "logprob" else wins / 40
    assert line["win_rate"] == pytest.approx(expected, abs=1e-6)


def test_two_judges_have_a_row_each_and_a_kappa(samples, start):
    server = start(verdict="longer")
    done = compare(samples, "--judge", "one", "--judge", "two", "--base_url", server.url)
    assert done.returncode == 0, done.stderr
    (line,) = results(samples)
    assert [one["name"] for one in line["judges"]] == ["one", "two"]
    assert line["agreement"]["kind"] == "cohen" and line["agreement"]["kappa"] == 1.0
    assert "Cohen's kappa 1.000 over 40 prompts" in done.stdout


def test_a_python_function_judges_without_a_key(samples):
    (samples / "mine.py").write_text(
        "async def longer(prompt, first, second):\n    return 1 if len(first) > len(second) else 2\n"
        "def length(prompt, response):\n    return len(response)\n"
    )
    assert compare(samples, "--judge", "mine:longer").returncode == 0
    assert compare(samples, "--judge", "mine:length", "--judge_kind", "score").returncode == 0
    pairwise, scored = results(samples)
    assert pairwise["win_rate"] == scored["win_rate"]
    assert pairwise["position"]["first_slot_share"] == 0.5 and scored["position"]["first_slot_share"] is None


def test_verdicts_of_rewrites_are_an_anchor(tmp_path):
    """The judge prefers the longer response, but for every fourth prompt the shorter one."""
    rows = []
    for i in range(60):
        text = "word " * (20 + i % 7)
        row = {"prompt": str(i), "reference": text, "concise": "word " * 9, "verbose": text * 2}
        rows.append(row | {"policy": text[: -5 * (1 + i % 3)] if i % 5 else text + "word"})
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    judge = "def long(prompt, a, b):\n    return 1 if (len(a) > len(b)) == (int(prompt) % 4 > 0) else 2\n"
    (tmp_path / "likes.py").write_text(judge)
    words = ("-f", "samples.json", "--order", "one", "--judge", "likes:long")
    for name in ("concise", "verbose"):
        done = compare(tmp_path, *words, "-ck", name, "--verdicts", f"{name}.csv")
        assert done.returncode == 0 and f"{name}.csv" in done.stdout, done.stderr
    lines = (tmp_path / "concise.csv").read_text().splitlines()
    assert lines[0] == "row,length_candidate,length_baseline,preference_candidate" and len(lines) == 61
    assert lines[1].startswith("1,45,100,")
    anchors = ("--length_anchor", "concise.csv", "--length_anchor", "verbose.csv")
    for flags in ((), anchors):
        assert compare(tmp_path, *words, *flags).returncode == 0
    alone, anchored = results(tmp_path)[-2:]
    assert alone["settings"]["length_anchor"] == [] and anchored["settings"]["length_anchor"] == list(anchors[1::2])
    assert alone["win_rate"] == anchored["win_rate"]
    assert alone["length_controlled"] != anchored["length_controlled"]


def test_two_files_are_compared_on_their_common_prompts(tmp_path, start):
    write_samples(tmp_path, 30)
    other = [{**row, "policy": row["policy"] + " and more"} for row in rows_of(40)[10:]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    server = start(verdict="longer")
    words = ["-f", "samples.json", "-f2", "other.json"]
    done = compare(tmp_path, *at(server, *words))
    assert done.returncode == 0 and "20 prompts are in both files" in done.stdout, done.stderr
    (line,) = results(tmp_path)
    assert (line["total"], line["candidate"]["wins"], line["baseline"]["wins"]) == (20, 0, 20)


def test_human_labels(tmp_path, start):
    rows = rows_of(20)
    for row in rows[:10]:
        row["person"] = "candidate" if len(row["policy"]) > len(row["chosen"]) else "baseline"
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    server = start(verdict="longer")
    assert compare(tmp_path, *at(server, "--human", "person")).returncode == 0
    (line,) = results(tmp_path)
    assert (line["human"]["n"], line["human"]["agreement"]) == (10, 1.0)


def test_picture_and_page_are_written_and_never_over_others(samples, start):
    (samples / "out.png").write_text("mine")
    server = start()
    done = compare(samples, *at(server, "--plot", "out.png", "--report", "deep/out.html"))
    assert done.returncode == 0, done.stderr
    assert (samples / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert (samples / "out.png.bak-1").read_text() == "mine"
    assert "</html>" in (samples / "deep" / "out.html").read_text()


#### NOTHING LOST, NOTHING PAID TWICE


def test_a_bad_day(samples, start):
    """With faults of every kind, every unit gets its verdict, and every reply of the server is in the journal."""
    faults = {"rate_429": 0.1, "rate_500": 0.05, "rate_503": 0.03, "rate_hang": 0.02, "rate_malformed": 0.05}
    server = start(seed=1, delay=0.01, retry_after=0.05, **faults)
    done = compare(samples, *at(server, "--timeout", "0.5"))
    stats = server.stats()
    assert set(stats["outcomes"]) == {"200", "429", "500", "503", "hang", "malformed", "broken"}
    assert done.returncode == 0, done.stderr
    records = journal(samples)
    keys = [record["verdict"] for record in kept(records, "verdict")]
    assert len(keys) == len(set(keys)) == 80
    assert not any("failed" in record for record in records)
    answers = kept(records, "got")
    whole = {record["id"] for record in answers}
    assert all(paid in whole or any(paid in record["text"] for record in answers) for paid in stats["ids"])
    assert stats["max_in_flight"] <= 32
    attempts = defaultdict(list)
    for record in kept(records, "sent"):
        attempts[record["sent"]].append(record["attempt"])
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in attempts.values())
    assert max(map(len, attempts.values())) > 1


def test_a_torn_last_line_is_repaired(samples, start):
    server = start()
    compare(samples, *at(server))
    path = samples / "judgments" / "journal.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-7])  # of the last verdict
    done = compare(samples, *at(server))
    assert done.returncode == 0 and "the torn last line (" in done.stdout
    assert server.stats()["requests"] == 80  # its reply is in the journal
    assert len(kept(journal(samples), "verdict")) == 80


def test_a_journal_that_is_in_use_exits_with_5(samples, start):
    """The lock belongs to the open file, so this process can stand for another one. The journal is not harmed."""
    server = start()
    with Journal(str(samples / "judgments")):
        second = compare(samples, *at(server))
        assert second.returncode == 5 and "in use by another compare.py" in last_line(second)
        assert compare(samples, *at(server, "--dry_run")).returncode == 0  # only reads
        assert server.stats()["requests"] == 0
    assert compare(samples, *at(server)).returncode == 0


#### LIMITS AND FAILURES


def test_what_was_given_up_says_why_and_is_asked_again(samples):
    """A failure that another run may repair is not final; the page shows its reason."""
    (samples / "mine.py").write_text(
        "import os\n\ndef judge(prompt, first, second):\n"
        "    if 'Human: 3 ' in prompt and not os.path.exists('mended'):\n        raise RuntimeError('no light')\n"
        "    return 1 if len(first) > len(second) else 2\n"
    )
    words = ["--judge", "mine:judge", "--report", "page.html"]
    done = compare(samples, *words, "--max_fail", "0.05")
    assert done.returncode == 0, done.stderr
    assert "RuntimeError: no light" in (samples / "page.html").read_text()
    assert results(samples)[0]["failed_units"] == 2
    (samples / "mended").touch()
    assert compare(samples, *words).returncode == 0
    assert results(samples)[1]["failed_units"] == 0


def test_dry_run_prints_calls_and_cost_and_makes_none(samples, start):
    server = start()
    done = compare(samples, *at(server, "--dry_run", "--price", "2,8"))
    assert server.stats()["requests"] == 0
    assert done.returncode == 0 and "80 to ask for" in done.stdout and "$" in done.stdout
    assert not (samples / "judgments").exists() and not (samples / "result.jsonl").exists()


def test_max_cost_stops_in_time_and_resumes(samples, start):
    server = start()
    words = at(server, "--price", "2,8")
    stopped = compare(samples, *words, "--max_cost", "0.05")
    assert stopped.returncode == 3 and "--max_cost 0.05" in last_line(stopped), stopped.stderr
    paid = server.stats()["requests"]
    assert 0 < paid < 80
    assert compare(samples, *words, "--max_cost", "1").returncode == 0
    assert server.stats()["requests"] == 80
    cost = results(samples)[0]["calls"]["cost"]
    assert cost * paid / 80 <= 0.05


def test_max_cost_without_a_known_price_is_an_error(samples):
    done = compare(samples, "--judge", "m", "--base_url", "http://127.0.0.1:9/v1", "--max_cost", "1")
    assert done.returncode == 2 and "--price" in last_line(done)


@pytest.mark.parametrize(("error", "code"), [("invalid_api_key", 2), ("model_not_found", 2), ("insufficient_quota", 3)])
def test_hopeless_errors_stop_at_once(samples, error, code, start):
    server = start(error=error)
    done = compare(samples, *at(server))
    assert server.stats()["requests"] <= 32
    assert done.returncode == code and last_line(done).startswith("error: test-judge"), done.stderr


def test_failures_are_counted_and_bounded(samples, start):
    """The content filter refuses one prompt. The failure is final and counted, and the win rate has two bounds."""
    server = start(verdict="longer", filtered="Human: 7 ")
    done = compare(samples, *at(server))
    assert done.returncode == 4 and "2 of 80 verdicts failed" in last_line(done)
    done = compare(samples, *at(server, "--max_fail", "0.05"))
    assert done.returncode == 0, done.stderr
    assert server.stats()["requests"] == 80  # a final failure is not asked again
    (line,) = results(samples)
    assert (line["n_judged"], line["failures"], line["failed_units"]) == (39, 1, 2)
    worst, best = line["bounds"]
    assert best - worst == pytest.approx(1 / 40) and worst < line["win_rate"] < best


def test_parameters_are_negotiated_once(samples, start):
    refused = ("max_tokens", "temperature", "response_format")
    server = start(refuse=refused, verdict="longer")
    done = compare(samples, *at(server))
    answered = server.stats()["answered"]
    assert done.returncode == 0, done.stderr
    assert answered == {"200": 80, "400": 4}  # max_tokens, temperature, json_schema, json_object


@pytest.mark.parametrize("words", [["-st", "0.5"], ["--rpm", "120"]])
def test_pace(samples, start, monkeypatch, words):
    """12 calls, each half a second after the one before, take exactly 5.5 s on the gate's clock."""
    server, clock = start(), FakeClock()
    began = clock.time
    monkeypatch.setattr(gate, "Clock", lambda: clock)
    assert compare(samples, *at(server, "-mc", "6", *words)).returncode == 0
    assert clock.time - began == 11 * 0.5 and server.stats()["requests"] == 12


#### MISTAKES


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ('[{"prompt": "a", ]', "samples.json:1: malformed JSON"),
        ('[{"prompt": "a", "chosen": "b"}]', "(row 1): no key 'policy'"),
        ('[{"prompt": "a", "chosen": "", "policy": "c"}]', "is empty in every row"),
        (
            '[{"prompt": "a", "chosen": "b", "policy": "c"}, {"prompt": "a", "chosen": "b", "policy": "c"}]',
            "same prompt",
        ),
        ('[{"prompt": "a", "chosen": 3, "policy": "c"}]', "not a text"),
        ("[]", "no rows"),
        ("[" * 100_000, "malformed JSON (More than 100 levels of nesting"),
        ('[{"prompt": "a", "chosen": "b", "policy": %s}]' % ("9" * 5000), "malformed JSON (Exceeds the limit"),
    ],
)
def test_bad_samples_are_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "samples.json").write_text(content)
    done = compare(tmp_path, OPENAI_API_KEY="any")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
    assert os.listdir(tmp_path) == ["samples.json"] * (content is not None)


# Each was accepted before, waited for ever, or ended in a traceback.
NONSENSE = [
    *(
        [f"--{flag}={value}"]
        for flag in ("sleep_time", "rpm", "tpm", "timeout", "max_cost", "max_fail")
        for value in ("nan", "inf", "-inf", "-1", "1e400", "1e300")
    ),
    *([f"--price={price}"] for price in ("nan,1", "1,inf", "-1,1", "1,1e400", "nan")),
    *(
        [f"--{flag}", text]
        for flag in ("results_file", "plot", "judge", "human", "file2")
        for text in ("", " ", "a\0b")
    ),
    *([f"--{flag}", "a\udce4b"] for flag in ("report", "cache", "candidate_key")),
    ["--max_fail", "2"],
    ["--sleep_time", "999999"],
    ["--rpm", "0"],
    ["--concurrency", "1000000000"],
    ["--max_comp", "0"],
    ["--judge", "__main__:f"],
]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "OPENAI_API_KEY is not set"),
        (["--judge", "no.such:thing"], "no module"),
        (["--judge", "halos.demo:chek"], "no 'chek'"),
        (["--judge", "halos.demo:check"], "--judge_kind score"),
        (["--judge", "gpt-4o", "--judge_kind", "score"], "for Python functions"),
        (["--concurrency", "0"], "--concurrency"),
        (["--price", "2"], "IN,OUT"),
        (["--template", "missing.txt"], "no such file"),
        (["--moed", "text"], "--moed"),
        (["--base_url", "localhost:8000"], "not an address"),
        *([words, words[0].partition("=")[0]] for words in NONSENSE),
    ],
)
def test_bad_flags_are_one_line(samples, words, said):
    done = compare(samples, *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr


def test_a_template_must_show_the_responses(samples, start):
    (samples / "mine.txt").write_text("{{ prompt }} {{ first }} {{ instruction }}")
    done = compare(samples, "--template", "mine.txt", OPENAI_API_KEY="any")
    assert done.returncode == 2 and "{{ second }}" in done.stderr
    (samples / "mine.txt").write_text("{{ prompt }} [1] {{ first }} [2] {{ second }} {{ instruction }}")
    server = start(verdict="first")
    assert compare(samples, *at(server, "--template", "mine.txt")).returncode == 0
