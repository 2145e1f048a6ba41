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
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    streams = {"stdout": writer, "stderr": subprocess.PIPE, "text": True}
    command = subprocess.Popen([sys.executable, *words], cwd=PROJECT, env=environment, **streams)
    os.close(writer)
    _, err = command.communicate(timeout=60)
    assert (command.returncode, err) == (128 + signal.SIGPIPE, "")
