"""`make demo`, shortened: the same script and commands with a fraction of the examples."""

import re
import subprocess
import sys

import pytest

from helpers import PROJECT

ROW = r"^{name} +([\d.]+) % ± [\d.]+ +([\d.]+) +([\d.]+) % ± [\d.]+$"


def test_the_shortened_demo(tmp_path):
    """A tenth of the training and 32 samples: the table has its rows, and the data's chosen responses their quality."""
    words = ["--cache_dir", str(tmp_path), "--n_samples", "32", "n_examples=1280", "n_eval_examples=64"]
    done = subprocess.run(
        [sys.executable, "scripts/demo.py", *words], cwd=PROJECT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        name: re.search(ROW.format(name=re.escape(name)), done.stdout, re.MULTILINE)
        for name in ("SFT", "SFT+KTO", "(chosen)")
    }
    assert all(rows.values()), done.stdout
    accuracy, quality, wins = map(float, rows["(chosen)"].groups())
    assert wins == 50.0  # against itself
    assert accuracy > 60 and quality > 0.6
    assert float(rows["SFT"][1]) < accuracy
    assert {"sft_seed1", "sft_kto_seed1"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_kto_improves_on_sft(tmp_path):
    """The whole demo at the default seed: at least 5 points of true accuracy above SFT."""
    done = subprocess.run(
        [sys.executable, "scripts/demo.py", "--cache_dir", str(tmp_path)], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sft, kto = (
        float(re.search(ROW.format(name=re.escape(name)), done.stdout, re.MULTILINE)[1]) for name in ("SFT", "SFT+KTO")
    )
    assert kto >= sft + 5
