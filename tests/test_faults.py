"""A short run of the campaign of faults. The whole one, and its table, are in docs/reliability.md."""

import os
import random
import re
import subprocess
import sys

from benchmarks.campaign import forks
from benchmarks.campaign.tally import Case, Tally, markdown
from helpers import PROJECT


def test_a_short_campaign_finds_nothing():
    """Kills, two commands at once and malformed inputs: about twenty cases."""
    words = [sys.executable, "-m", "benchmarks.faults", "--short", "--seed", "1"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"\| all \| (\d+) \|(.*)", done.stdout)
    assert len(counts) == 1 and int(counts[0][0]) >= 16 and set(counts[0][1]) <= set(" |0"), done.stdout


#### THE CAMPAIGN ITSELF: IT MUST FIND WHAT IS WRONG


def program(words: str) -> forks.Ended:
    return forks.run(commands[words], [words], PROJECT, limit=2)


def refuses():
    sys.exit(print("error: wrong", file=sys.stderr) or 2)


def says_two_lines():
    sys.exit(print("error: wrong\nand more", file=sys.stderr) or 2)


def fails():
    raise ValueError("a bug")


def hangs():
    while True:
        random.random()


def ends_otherwise():
    sys.exit(print("error: wrong", file=sys.stderr) or 3)


commands = {function.__name__: function for function in (refuses, says_two_lines, fails, hangs, ends_otherwise)}


def test_each_kind_of_bad_end_is_counted():
    expected = {"says_two_lines": "lines", "fails": "tracebacks", "hangs": "hangs", "ends_otherwise": "codes"}
    for name in commands:
        tally = Tally(name)
        assert Case(tally, 0).check_end(program(name)) == (name == "refuses")
        assert dict(tally.counts) == ({expected[name]: 1} if name in expected else {})
    assert markdown([tally]).endswith("| all | 1 | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 0 |")


def test_a_command_can_be_killed_just_before_any_change_of_a_file(tmp_path):
    """Of a write, a rename and a removal, a kill at the second change leaves the first one made."""
    (tmp_path / "first").write_text("")

    def changes():
        (tmp_path / "second").write_text("")
        os.rename(tmp_path / "first", tmp_path / "renamed")
        os.remove(tmp_path / "second")

    whole = forks.Changes(str(tmp_path), at=1, action=forks.die)
    ended = forks.run(changes, [], str(tmp_path), whole.prepare)
    assert ended.code == -9 and whole.count == 2
    assert sorted(os.listdir(tmp_path)) == ["first", "second"]
