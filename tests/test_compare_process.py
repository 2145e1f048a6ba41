"""compare.py in a process of its own, as a user runs it: killed, interrupted, mistaken, in a pipe."""

import random
import shlex
import signal
import subprocess
import sys
import time

import pytest

from comparing import at, command, compare, environment, journal, kept, results, rows_of, write_samples
from helpers import PROJECT
from judge_server import serve


@pytest.fixture
def samples(tmp_path):
    write_samples(tmp_path, 40)
    return tmp_path


def started(directory, *words: str, **streams) -> subprocess.Popen:
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams}
    return subprocess.Popen(command(directory, *words), env=environment(), cwd=directory, text=True, **streams)


def wait_for_requests(server, n: int) -> None:
    deadline = time.monotonic() + 60
    while server.stats()["requests"] < n and time.monotonic() < deadline:
        time.sleep(0.01)


def test_killed_again_and_again_and_finished(tmp_path):
    """Each kill may cost the calls in flight once more, and no others; the next command says how many."""
    write_samples(tmp_path, 50)
    rng = random.Random(0)
    with serve(delay=0.05) as server:
        words = at(server, "--concurrency", "8")
        for _ in range(4):
            process = started(tmp_path, *words)
            wait_for_requests(server, server.stats()["requests"] + 5)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            process.wait()
        assert len(kept(journal(tmp_path), "verdict")) < 100
        done = compare(tmp_path, *words)
        stats = server.stats()
    assert done.returncode == 0, done.stderr
    keys = [record["verdict"] for record in kept(journal(tmp_path), "verdict")]
    assert len(keys) == len(set(keys)) == 100
    repaid = sum(stats["paid"].values()) - len(stats["paid"]) + stats["abandoned"]
    (line,) = results(tmp_path)
    listed = line["calls"]["possibly_billed"]
    assert 0 < listed <= 4 * 8 and repaid <= listed
    assert f"{listed} earlier calls were possibly billed" in done.stdout


def test_ctrl_c_lets_calls_end_and_the_next_run_goes_on(samples):
    with serve(delay=0.1) as server:
        words = at(server, "--concurrency", "4")
        process = started(samples, *words, stderr=subprocess.PIPE)
        wait_for_requests(server, 12)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130 and "run the same command again" in said
        assert not (samples / "result.jsonl").exists()
        server.reset(delay=0.0)
        before = len(kept(journal(samples), "verdict"))
        assert 8 <= before < 80
        assert compare(samples, *words).returncode == 0
        assert server.stats()["requests"] == 80 - before  # nothing twice
    assert results(samples)[0]["calls"]["possibly_billed"] == 0


def test_a_mistake_is_one_line_and_exit_code_2(samples):
    done = subprocess.run(command(samples), env=environment(), cwd=samples, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "OPENAI_API_KEY is not set" in done.stderr


def test_the_command_of_the_readme(tmp_path):
    """With a server of one's own, from another directory, and with the key in the environment."""
    (tmp_path / "samples").mkdir()
    write_samples(tmp_path / "samples", 20, "kto_llama7b.json")
    line = "compare.py -f samples/kto_llama7b.json -mc 512 -bk chosen -ck policy -r result.jsonl"
    with serve(delay=0.0, verdict="longer") as server:
        variables = environment(OPENAI_API_KEY="sk-mine", OPENAI_BASE_URL=server.url)
        words = [sys.executable, f"{PROJECT}/{line.split()[0]}", *shlex.split(line)[1:]]
        done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert server.stats()["headers"]["authorization"] == "Bearer sk-mine"
    (result,) = results(tmp_path)
    wins = sum(len(row["policy"]) > len(row["chosen"]) for row in rows_of(20))
    assert (result["total"], result["candidate"]["wins"]) == (20, wins)
    assert (tmp_path / "judgments" / "journal.jsonl").exists()


def test_a_pipe_gets_the_table_and_nothing_else(samples):
    """The progress bar goes to stderr; a module of the user that is called `judge` is found."""
    (samples / "judge.py").write_text(
        "def longer(prompt, first, second):\n    return 1 if len(first) > len(second) else 2\n"
    )
    words = shlex.join(command(samples, "--judge", "judge:longer"))
    done = subprocess.run(
        f"{words} | cat", shell=True, cwd=samples, env=environment(), capture_output=True, text=True, check=True
    )
    first, *table, last = done.stdout.splitlines()
    assert first == "judge:longer: 80 verdicts, 0 in the journal, 80 to ask for"
    assert table[0].startswith("policy against chosen") and table[1].startswith("win rate") and "\r" not in done.stdout
    assert last.startswith("written to ") and "judging: 100%" in done.stderr
    assert results(samples)[0]["total"] == 40
