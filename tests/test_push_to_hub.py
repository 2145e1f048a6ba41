"""scripts/push_to_hub.py against a small hub: what goes up, what stays here, and what is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import hub_server
from halos import manifest, run_dir
from helpers import PROJECT, make_config

SCRIPT = os.path.join(PROJECT, "scripts", "push_to_hub.py")
TOKEN = "hf_oneTokenOfTheseTests1234567"
EXPORT = {
    "config.json": '{"model_type": "llama"}',
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "adapter/adapter_config.json": "{}",
}
STAYS = {"policy.pt": "a pickle", "v_head.pt": "a pickle", "config.yaml": "cache_dir: /home/me", "notes.log": "-"}


def checkpoint(run, name: str = "LATEST", **more: str):
    """Make a checkpoint of small files, with the project's model card and a manifest, and return its directory."""
    card = run_dir.model_card(make_config(run, "loss=kto", "exp_name=kto_tiny"), 20, {"loss/eval": 0.5})
    directory = run / name
    for path, text in ({"README.md": card} | EXPORT | STAYS | more).items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    manifest.write(str(directory))
    return directory


def push(*words, url: str = "http://127.0.0.1:9", token: str = TOKEN) -> subprocess.CompletedProcess:
    """Run the script in a process of its own: the hub's address and token are read when its client is imported."""
    own = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_TOKEN_PATH": "/no/such/file"}
    command = [sys.executable, SCRIPT, *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def script(monkeypatch, capsys):
    """Run the script in this process, for what needs no hub: script(words...) -> (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("push_to_hub", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, words)])
        try:
            module.main()
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return SimpleNamespace(run=run, module=module)


def test_an_upload_is_the_export_and_its_card(tmp_path):
    """No pickle and no config.yaml goes up. A repository that exists gets a commit only with --update."""
    checkpoint(tmp_path)
    with hub_server.serve() as hub:
        done = push(tmp_path, "--repo", "me/kto", "--private", url=hub.url)
        assert done.returncode == 0, done.stderr
        assert f"uploaded: {hub.url}/me/kto" in done.stdout
        files = hub.repos["me/kto"]
        assert set(files) == {"README.md", *EXPORT} and hub.private == {"me/kto"}
        assert all(files[name] == text.encode() for name, text in EXPORT.items())
        assert b'AutoModelForCausalLM.from_pretrained("me/kto")' in files["README.md"]
        assert set(hub.tokens) == {f"Bearer {TOKEN}"}

        again = push(tmp_path, "--repo", "me/kto", url=hub.url)
        assert again.returncode == 2 and "me/kto exists on the hub; --update" in again.stderr
        checkpoint(tmp_path, "step-64", **{"tokenizer.json": '{"new": 1}'})
        later = push(tmp_path / "step-64", "--repo", "me/kto", "--update", url=hub.url)
        assert later.returncode == 0 and json.loads(hub.repos["me/kto"]["tokenizer.json"]) == {"new": 1}


def test_a_hub_that_refuses_is_one_line(tmp_path):
    """A message of the hub that repeats the token is shown without it. Without a token, nothing is asked."""
    checkpoint(tmp_path)
    with hub_server.serve(refuse=403) as hub:
        done = push(tmp_path, "--repo", "me/kto", url=hub.url)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "the hub could not be written" in done.stderr and "403" in done.stderr
        asked = len(hub.tokens)
        done = push(tmp_path, "--repo", "me/kto", url=hub.url, token="")
        assert done.returncode == 2 and "`hf auth login`" in done.stderr and len(hub.tokens) == asked


def test_a_dry_run_lists_files_and_card_and_needs_no_hub(tmp_path, script, monkeypatch):
    monkeypatch.setattr(script.module, "upload", None)
    directory = checkpoint(tmp_path)
    code, out, _ = script.run(tmp_path, "--repo", "me/kto", "--dry_run")
    size = sum((directory / name).stat().st_size for name in ("README.md", *EXPORT))
    assert code == 0 and f"6 files, {size:,} bytes" in out and "nothing was uploaded" in out
    listed = {line.split()[-1]: line.split()[0] for line in out.split("model card")[0].splitlines()[1:]}
    assert set(listed) == {"README.md", *EXPORT, *STAYS}
    assert {name for name, size in listed.items() if size == "stays"} == set(STAYS)
    assert listed["model.safetensors"] == "7"
    assert "tags: ['halos', 'kto']" in out and "trained with the `kto` loss" in out


def test_what_is_refused_before_anything_is_uploaded(tmp_path, script, monkeypatch):
    """Names, changed files, directories that are no export, and texts with a key in them are one line, exit 2."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(script.module, "upload", None)
    directory = checkpoint(tmp_path / "run")
    checkpoint(tmp_path / "key", **{"tokenizer.json": json.dumps({"token": TOKEN})})
    checkpoint(tmp_path / "url", **{"adapter/adapter_config.json": '{"base": "https://me:pass-word-1@host/x"}'})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "policy.pt").write_text("alone")
    manifest.write(str(tmp_path / "other"))
    for words, message in {
        (tmp_path, "--repo", "me/kto"): "has no manifest.json and no LATEST with one",
        (tmp_path / "other", "--repo", "me/kto"): "has no config.json, README.md, *.safetensors",
        (directory, "--repo", "kto"): "--repo kto has no owner; write --repo OWNER/kto",
        (directory, "--repo", "a/b/c"): "--repo a/b/c:",
        (directory, "--repo", "me/kto", "--update", "--private"): "--private is for a new repository",
        (directory,): "--repo",
        (tmp_path / "key", "--repo", "me/kto"): "tokenizer.json has a key or a password in it",
        (tmp_path / "url", "--repo", "me/kto"): "adapter_config.json has a key or a password in it",
    }.items():
        code, out, err = script.run(*words)
        assert code == 2 and message in err and err.count("\n") == 1 and out == "", (words, err)

    (directory / "model.safetensors").write_text("Weights")
    code, _, err = script.run(directory, "--repo", "me/kto", "--dry_run")
    assert code == 2 and "model.safetensors is not what was written" in err
    os.remove(directory / "tokenizer.json")
    assert "tokenizer.json is missing" in script.run(directory, "--repo", "me/kto", "--dry_run")[2]


def test_a_card_names_a_base_of_the_hub_and_no_directory(tmp_path):
    """The hub refuses a card whose base_model is a path."""
    words = ("loss=kto", "model=llama7b")
    assert "base_model: huggyllama/llama-7b\n" in run_dir.model_card(make_config(tmp_path, *words), 1, {})
    local = make_config(tmp_path, *words, f"model.name_or_path={tmp_path}")
    assert "base_model:" not in run_dir.model_card(local, 1, {})
