"""How OpenMP's threads wait."""

import os
import subprocess
import sys

import pytest

from halos import openmp
from helpers import PROJECT

# What libgomp itself shows of its settings when torch loads it, and what a process of this one would inherit.
SHOW = "import halos, os, torch; print('inherited', os.environ.get('GOMP_SPINCOUNT'))"


def shown(**environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in openmp.WAITING}
    env |= {"OMP_DISPLAY_ENV": "verbose", **environment}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=PROJECT, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def test_threads_spin_briefly():
    """libgomp has read the number: it was set before torch loaded the library."""
    text = shown()
    if "GOMP_SPINCOUNT" not in text:
        pytest.skip("torch's OpenMP here is not libgomp")
    assert f"GOMP_SPINCOUNT = '{openmp.SPINS}'" in text and f"inherited {openmp.SPINS}" in text


@pytest.mark.parametrize("own", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "active"}])
def test_what_the_user_has_set_stays(own):
    assert f"inherited {own.get('GOMP_SPINCOUNT')}" in shown(**own)
