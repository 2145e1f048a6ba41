"""`make demo` with a fraction of the examples: the same script and commands."""

import re
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

import dataloaders
from halos import loading
from helpers import PROJECT

ROW = r"^{name} +([\d.]+) % ± [\d.]+ +([\d.]+) +(?:([\d.]+) % \[([\d.]+), ([\d.]+)\]|-)$"


def test_the_shortened_demo(tmp_path):
    """With a tenth of the training and 32 samples, the table has its rows.

    The chosen responses are right in more than 60 % of the samples, more often than SFT's, and SFT wins at most 60 %.
    """
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
    accuracy, quality = map(float, rows["(chosen)"].groups()[:2])
    assert accuracy > 60 and quality > 0.6
    wins, low, high = map(float, rows["SFT"].groups()[2:])
    assert 0 <= low <= wins <= high <= 60  # the chosen responses are better
    assert float(rows["SFT"][1]) < accuracy
    assert {"sft_seed1", "sft_kto_seed1"} <= {path.name for path in tmp_path.iterdir()}


def gain_over_sft(tmp_path, loss: str) -> float:
    """Run the full demo at the default seed; return the gain in true accuracy over SFT, in percentage points."""
    command = [sys.executable, "scripts/demo.py", "--cache_dir", str(tmp_path), "--loss", loss]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sft, aligned = (
        float(re.search(ROW.format(name=re.escape(name)), done.stdout, re.MULTILINE)[1])
        for name in ("SFT", f"SFT+{loss.upper()}")
    )
    return aligned - sft


@pytest.mark.slow
def test_kto_improves_on_sft(tmp_path):
    assert gain_over_sft(tmp_path, "kto") >= 5


@pytest.mark.slow
def test_ppo_improves_on_sft_and_its_critic_separates_good_from_bad(tmp_path, capsys):
    """The values of the last states of 256 held-out responses correlate with their labels (+1 or -1)."""
    assert gain_over_sft(tmp_path, "ppo") >= 5
    directory = tmp_path / "sft_ppo_seed1"
    config = OmegaConf.load(directory / "config.yaml")
    tokenizer = loading.load_tokenizer(config)
    loader = dataloaders.make_loader(config, tokenizer, "test")
    policy_pt = str(directory / "LATEST" / "policy.pt")
    policy, _ = loading.load_policy_and_reference(config, tokenizer, torch.device("cpu"), policy_pt)
    values, labels = [], []
    for batch in loader:
        with torch.no_grad():
            per_token = policy(policy.inputs(batch)).values
        lengths = [len(example.responses[0]) for example in batch]
        values += [response[-1] for response in per_token.split(lengths)]
        labels += [1.0 if example.roles[0] == "chosen" else -1.0 for example in batch]
    correlation = torch.corrcoef(torch.stack((torch.tensor(values), torch.tensor(labels))))[0, 1].item()
    with capsys.disabled():
        print(f" correlation of value and label over {len(labels)} responses: {correlation:.2f}")
    assert correlation > 0.2
