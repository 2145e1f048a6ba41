"""Commands whose output nobody reads to its end."""

import os
import signal
import subprocess
import sys

import pytest

from helpers import PROJECT


@pytest.mark.parametrize("words", [["train.py", "--help"], ["eval.py", "--help"], ["compare.py", "--help"]])
def test_head_ends_a_command_without_a_traceback(words):
    """`python train.py --help | head -1` ended with BrokenPipeError, as a traceback or as "Exception ignored"."""
    reader, writer = os.pipe()
    os.close(reader)
    command = subprocess.Popen([sys.executable, *words], cwd=PROJECT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    _, err = command.communicate(timeout=60)
    assert (command.returncode, err) == (128 + signal.SIGPIPE, "")
