"""The journal: every line is checked, a damaged one is named and not used, and no reply that can be used is lost."""

import gzip
import json
import os

import pytest

from comparing import at, compare, journal, kept, last_line, numbers, results, write_samples
from halos.errors import UserError
from halos.judge import run
from halos.judge.journal import Journal, JournalLocked
from halos.judge.judges import Reply
from halos.judge.records import problem_with
from judge_server import Settings, serve

KEY = "0123456789abcdef" * 2
GOT = {"got": KEY, "attempt": 1, "text": "Verdict: 1", "usage": [10, 5], "latency": 0.1, "broken": False}
GOOD = [
    {"sent": KEY, "at": 1.5, "attempt": 1, "judge": "m", "row": 1, "order": 0},
    {**GOT, "id": None, "finish": "stop", "p_first": 0.25},
    GOT,
    {"error": KEY, "reason": "503", "billed": True},
    {"verdict": KEY, "score": 1},
    {"verdict": KEY, "failed": "400", "later": ["fields"]},
]


@pytest.mark.parametrize("record", GOOD)
def test_lines_of_all_versions_are_used(record):
    assert problem_with(record) is None


@pytest.mark.parametrize("score", [5.0, -1, 1.0001, float("nan"), float("inf"), True, "1", None, [1], {}, 10**400])
def test_a_score_is_between_0_and_1(tmp_path, score):
    """Before, a score of 5.0 made a win rate of 287 %."""
    line = json.dumps({"verdict": KEY, "score": score})
    (tmp_path / "journal.jsonl").write_text(json.dumps(GOT) + "\n" + line + "\n")
    with Journal(str(tmp_path)) as read:
        assert read.entry(KEY).score is None and list(read.damaged) == [2]


ODD = [None, 5.5, -1, True, float("nan"), "x", [], ["a", "b"], [-1, 1], [1], {}, 10**20, "missing"]
KNOWN = {"usage": (None,), "latency": (5.5, 10**20), "text": ("x", "missing"), "broken": (True,), "got": ()}
OPTIONAL = {"p_first": (None, "missing"), "id": (None, "x", "missing"), "finish": (None, "x", "missing")}


@pytest.mark.parametrize("field", [*KNOWN, *OPTIONAL])
def test_every_field_has_its_type_and_its_range(field):
    fits = {**KNOWN, **OPTIONAL}[field]
    for value in ODD:
        record = {**GOOD[1], field: value}
        if value == "missing":
            del record[field]
        expected = value in fits and not (value == "missing" and field == "text")
        assert (problem_with(record) is None) == expected, value


@pytest.mark.parametrize("record", [None, 5, [], "x", {}, {"budget": KEY}, {"sent": KEY, "got": KEY}, {"sent": "k"}])
def test_what_is_no_record(record):
    assert problem_with(record)


#### DAMAGED FILES


def test_a_damaged_line_is_named_and_its_verdict_asked_for_again(tmp_path):
    """The numbers are those of the whole journal, and the reply that was paid for is read instead of a new call."""
    write_samples(tmp_path, 10)
    path = tmp_path / "judgments" / "journal.jsonl"
    with serve(delay=0.0, verdict="longer") as server:
        assert compare(tmp_path, *at(server)).returncode == 0
        whole = path.read_text().splitlines()
        at_verdict = next(n for n, line in enumerate(whole) if '"verdict": "' in line and '"score"' in line)
        lines = list(whole)
        lines[at_verdict] = lines[at_verdict].replace('"score": ', '"score": 5')
        lines.insert(0, "{]")
        path.write_text("\n".join(lines) + "\n")
        done = compare(tmp_path, *at(server))
        assert f"line 1 (not JSON), line {at_verdict + 2} (score is 5" in done.stdout
        assert server.stats()["requests"] == 20
    assert numbers(results(tmp_path)[0]) == numbers(results(tmp_path)[1])


GZIPPED = gzip.compress(b"x" * 100, mtime=0)  # without a time: its bytes are part of the test's name
OTHERS = [GZIPPED, b"my thesis", b"my\nthesis\n", b"\x80" * 500, b"\xff\xfe[\0]\0\n", b'[{"a": 1}]\n']


@pytest.mark.parametrize("data", OTHERS)
def test_a_file_that_is_no_journal_is_refused_as_it_is(tmp_path, data):
    """Before, a last line without an end was cut off, whatever it was."""
    (tmp_path / "journal.jsonl").write_bytes(data)
    with pytest.raises(UserError, match="is not a journal of compare.py"):
        Journal(str(tmp_path))
    assert (tmp_path / "journal.jsonl").read_bytes() == data


@pytest.mark.parametrize(("tail", "is_cut"), [(b"{", 1), (b'{"sent": "01', 1), (b"\0\0\0", 1), (b"\xff\xfe", 0)])
def test_a_last_line_without_an_end(tmp_path, tail, is_cut):
    """The beginning of a line of ours is cut off. Anything else is ended, so that the next line is not damaged too."""
    whole = (json.dumps(GOT) + "\n").encode()
    (tmp_path / "journal.jsonl").write_bytes(whole + tail)
    with Journal(str(tmp_path)) as read:
        assert read.torn == len(tail) * is_cut and list(read.damaged) == [2] * (not is_cut)
        read.verdict(KEY, 1.0)
    with Journal(str(tmp_path)) as read:
        assert read.entry(KEY).score == 1.0 and read.reply(KEY).text == "Verdict: 1"
    assert (tmp_path / "journal.jsonl").read_bytes().startswith(whole + (b"" if is_cut else tail + b"\n"))


def test_a_line_that_the_disk_takes_in_part_leaves_no_trace(tmp_path):
    """Other calls go on writing until the run has stopped. Before, their first line became a part of the torn one."""
    with Journal(str(tmp_path)) as written:
        written.verdict(KEY, 0.5)
        whole = written.file

        class Full:
            def write(self, data):
                return whole.write(data[:10])

            def __getattr__(self, name):
                return getattr(whole, name)

        written.file = Full()
        with pytest.raises(UserError, match="make room"):
            written.verdict(KEY, 0.75)
        written.file = whole
        written.verdict(KEY, 1.0)
    with Journal(str(tmp_path)) as read:
        assert read.entry(KEY).score == 1.0 and not read.damaged and not read.torn


def test_counts_are_never_negative(tmp_path):
    """A reply whose call stood in a damaged line."""
    (tmp_path / "journal.jsonl").write_text(f"{json.dumps(GOT)}\n{json.dumps(GOOD[3])}\n")
    with Journal(str(tmp_path)) as read:
        assert (read.entry(KEY).open, read.entry(KEY).possibly_billed) == (0, 1)


def test_one_writer(tmp_path):
    with Journal(str(tmp_path)), pytest.raises(JournalLocked, match="in use by another compare.py"):
        Journal(str(tmp_path))


def test_a_pipe_is_no_journal(tmp_path):
    """Before, reading it waited for ever."""
    os.mkfifo(tmp_path / "journal.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        Journal(str(tmp_path))


def test_a_disk_that_refuses_to_sync_is_one_line(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(5, "Input/output error")

    with pytest.raises(UserError, match="not safe on the disk"), Journal(str(tmp_path)) as written:
        written.verdict(KEY, 1.0)
        monkeypatch.setattr(os, "fsync", refuse)


def test_a_reply_with_a_note_is_read_back(tmp_path):
    reply = Reply("", usage=(1, 2), note="only reasoning")
    with Journal(str(tmp_path)) as written:
        written.got(KEY, reply, 1)
        assert written.reply(KEY) == reply


#### VERDICTS THAT FAILED


def test_a_verdict_that_failed_is_asked_for_again(tmp_path, monkeypatch):
    """Before, "no verdict in 4 replies" was final, though the message said to run the command again."""
    write_samples(tmp_path, 3)
    path = tmp_path / "judgments" / "journal.jsonl"
    nothing = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    with serve(delay=0.0, message=nothing) as server:
        done = compare(tmp_path, *at(server))
        assert done.returncode == 4 and server.stats()["requests"] == 6 * run.MAX_ASKS
        said = "no verdict in 4 replies, the last: only reasoning: finish_reason stop"
        assert said in last_line(done) and "run the command again to ask for 6 of them again" in last_line(done)
        assert compare(tmp_path, *at(server)).returncode == 4
        assert server.stats()["requests"] == 2 * 6 * run.MAX_ASKS
        # As earlier versions wrote it, without "final".
        path.write_text(path.read_text().replace(', "final": false', ""))
        server.reset(**{**vars(Settings()), "delay": 0.0, "verdict": "longer", "message": None})
        assert compare(tmp_path, *at(server)).returncode == 0
        assert server.stats()["requests"] == 6
    assert results(tmp_path)[0]["failed_units"] == 0


def test_a_paid_reply_that_can_be_read_now_is_not_paid_again(tmp_path):
    """As after an update that reads more forms of a verdict."""
    write_samples(tmp_path, 3)
    path = tmp_path / "judgments" / "journal.jsonl"
    with serve(delay=0.0, message={"role": "assistant", "content": "I cannot decide."}) as server:
        compare(tmp_path, *at(server))
        paid = server.stats()["requests"]
        path.write_text(path.read_text().replace("I cannot decide.", "Verdict: 1"))
        assert compare(tmp_path, *at(server)).returncode == 0
        assert server.stats()["requests"] == paid
    assert len([record for record in kept(journal(tmp_path), "verdict") if "score" in record]) == 6


def test_what_no_run_can_repair_says_so(tmp_path):
    write_samples(tmp_path, 3)
    with serve(delay=0.0, error="content_filter") as server:
        for _ in range(2):
            done = compare(tmp_path, *at(server))
            assert done.returncode == 4 and "no run can repair these" in last_line(done)
        assert server.stats()["requests"] == 6
