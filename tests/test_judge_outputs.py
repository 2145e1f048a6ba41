"""What a comparison may write to: nothing of a user's is replaced, and devices and pipes are written to directly."""

import os
import subprocess
import threading

import pytest

from comparing import command, compare, environment, last_line, results, write_samples
from halos.errors import UserError
from halos.judge import outputs
from halos.judge.settings import Settings

JUDGE = "def longer(prompt, first, second):\n    return 1 if len(first) > len(second) else 2\n"
OUTPUTS = ("--report", "--plot", "--verdicts", "-r", "--export_feedback")


@pytest.fixture
def samples(tmp_path):
    write_samples(tmp_path, 6)
    (tmp_path / "mine.py").write_text(JUDGE)
    return tmp_path


def judged(directory, *words):
    return compare(directory, "--judge", "mine:longer", *words)


@pytest.mark.parametrize("flag", OUTPUTS)
def test_a_pipe_is_written_to_directly(samples, flag):
    """Before, it was renamed, and a file took its place: as root, so was /dev/null."""
    pipe, read = samples / "out.jsonl", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    done = judged(samples, flag, str(pipe))
    reader.join(10)
    assert done.returncode == 0, done.stderr
    assert read[0] and pipe.is_fifo() and not [name for name in os.listdir(samples) if ".bak" in name]


@pytest.mark.parametrize("flag", OUTPUTS[:4])
def test_the_output_of_the_process(samples, flag):
    """/dev/stdout is a link to a file here; it stays a link, and no journal is made in /dev."""
    before = set(os.listdir("/dev"))
    words = command(samples, "--judge", "mine:longer", flag, "/dev/stdout")
    with open(samples / "said", "wb") as said:
        done = subprocess.run(words, env=environment(), cwd=samples, stdout=said, stderr=subprocess.PIPE)
    assert done.returncode == 0 and os.path.islink("/dev/stdout") and set(os.listdir("/dev")) == before, done.stderr
    assert not (samples / "said.bak-1").exists()


def test_devices_and_the_links_to_them():
    links = ["/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"]
    assert all(map(outputs.is_device, links)) and not outputs.is_device(__file__) and not outputs.is_device("/dev")
    assert Settings("s.json", results_file="/dev/null").journal_directory == "judgments"


def test_a_link_to_a_device_stays(samples):
    os.symlink("/dev/null", samples / "out")
    assert judged(samples, "--report", "out").returncode == 0
    assert os.readlink(samples / "out") == "/dev/null"


@pytest.mark.parametrize("flag", OUTPUTS)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("folder.jsonl", "not a file"),
        ("n" * 250 + ".jsonl", "240 bytes"),
        ("samples.jsonl", "another use"),
        ("judgments/x.jsonl", "journal"),
        ("mine.py/x.jsonl", "not a directory|exists"),
    ],
)
def test_what_is_no_place_for_a_file_is_refused_before_anything_is_asked(samples, flag, path, said):
    """Before, names that are too long failed when all was paid, and the samples themselves could be written over."""
    (samples / "folder.jsonl").mkdir()
    os.symlink("samples.json", samples / "samples.jsonl")
    words = [flag, path] if flag == "-r" else [flag, path, "-r", "out"]
    text = (samples / "samples.json").read_text()
    done = judged(samples, *words, *(["--cache", "judgments"] if flag == "-r" else []))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert any(part in done.stderr.lower() for part in said.split("|")), done.stderr
    assert (samples / "samples.json").read_text() == text and not (samples / "judgments" / "journal.jsonl").exists()


def test_two_outputs_in_one_file_are_refused(samples):
    done = judged(samples, "--report", "out", "--verdicts", "./out")
    assert done.returncode == 2 and "is another output" in last_line(done)


@pytest.mark.parametrize("flag", OUTPUTS[:4])
def test_a_full_disk_is_one_line(samples, flag):
    """The verdicts are kept: the next command asks for nothing."""
    os.symlink("/dev/full", samples / "full")
    done = judged(samples, flag, "full")
    assert done.returncode == 2 and "No space left on device" in last_line(done), done.stderr
    assert "0 to ask for" in judged(samples, "--report", "page.html").stdout and results(samples)


def test_an_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(ZeroDivisionError), outputs.written(str(path)) as unfinished:
        open(unfinished, "w").write("half" + "x" * (1 // 0))
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["out"]
    with pytest.raises(UserError, match="cannot be written"), outputs.written(str(tmp_path / "no" / "out")) as place:
        open(place, "w")
