"""train.py and eval.py as a user types them, called in this process: the files they write, their error messages."""

import json
import os
import shutil
import sys

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import eval as eval_program
import train as train_program
from halos import demo
from halos.metrics import read_metrics
from helpers import ONE_BLOCK

SMALL = [*ONE_BLOCK, "n_examples=32", "lr=1e-2"]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    monkeypatch.setattr(demo, "N_PROMPTS", {"train": 300, "test": 60})


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command: command("train.py", words...) -> (exit code, stdout, stderr)."""

    def run(program: str, *words: str):
        main = {"train.py": train_program.main, "eval.py": eval_program.main}[program]
        monkeypatch.setattr(sys, "argv", [program, *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            GlobalHydra.instance().clear()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def run(command, cache_dir):
    """The directory of a finished SFT run, trained once for all tests."""
    directory = cache_dir / "base"
    if not directory.exists():
        code, _, err = command("train.py", "exp_name=base", f"cache_dir={cache_dir}", *SMALL)
        assert code == 0, err
    return directory


def mistake(result, *parts: str) -> None:
    """Assert exit code 2 and one error line on stderr, which contains all the parts."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in lines[0], lines[0]


#### TRAINING


def test_a_run_writes_what_it_promises(run):
    assert {"config.yaml", "data.json", "metrics.jsonl", "curves.png", "LATEST"} <= set(os.listdir(run))
    rows = read_metrics(run / "metrics.jsonl")
    # 32 examples in batches of 8; evaluations before the first update, after 16 examples, and after 32.
    assert [(row["mode"], row["step"], row["examples"]) for row in rows] == [
        ("eval", 0, 0),
        ("train", 1, 8),
        ("train", 2, 16),
        ("eval", 2, 16),
        ("train", 3, 24),
        ("train", 4, 32),
        ("eval", 4, 32),
    ]
    train, evaluation = rows[1], rows[0]
    assert {"loss/train", "rewards_train/chosen", "logps_train/chosen", "grad_norm", "counters/updates"} <= set(train)
    assert {"loss/eval", "rewards_eval/chosen", "logps_eval/chosen", "examples_per_second"} <= set(evaluation)
    assert train["loss/train"] == pytest.approx(-train["logps_train/chosen"])
    counts = json.loads((run / "data.json").read_text())
    assert counts["train"]["loader"]["rows"] == counts["train"]["datasets"][0]["rows"] == demo.N_PROMPTS["train"]
    with open(run / "curves.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    assert not [name for name in os.listdir(run) if "unfinished" in name or name.endswith(".old")]


def test_the_checkpoint_opens_in_transformers(run):
    policy = torch.load(run / "LATEST" / "policy.pt", weights_only=True)
    assert policy["step_idx"] == 4 and "loss/eval" in policy["metrics"]
    model = AutoModelForCausalLM.from_pretrained(run / "LATEST")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, policy["state"][name]), name
    assert AutoTokenizer.from_pretrained(run / "LATEST").eos_token_id == model.generation_config.eos_token_id
    card = (run / "LATEST" / "README.md").read_text()
    assert "`sft` loss (SFTTrainer) on demo: 4 updates" in card and "| loss/eval |" in card


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "slic", "kto", "ppo"])
def test_every_loss_trains_from_a_checkpoint(command, run, cache_dir, loss):
    """Training from the SFT weights (a path relative to cache_dir) starts at a log-ratio of 0.

    So the loss starts at -log sigmoid(0) = ln 2 = 0.693147 for DPO and cDPO, and at 1 - sigmoid(0) = 0.5 for KTO.
    """
    words = [f"loss={loss}", "model.load_from=base/LATEST/policy.pt", f"exp_name={loss}", f"cache_dir={cache_dir}"]
    code, _, err = command("train.py", *words, *SMALL, "n_examples=16")
    assert code == 0, err
    rows = read_metrics(cache_dir / loss / "metrics.jsonl")
    start = {"dpo": 0.693147, "cdpo": 0.693147, "kto": 0.5}.get(loss)
    if start:
        assert rows[0]["loss/eval"] == rows[1]["loss/train"] == pytest.approx(start, abs=1e-6)
        assert rows[0]["rewards_eval/margins"] == 0
    assert {"rewards_train/margins", "rewards_train/accuracies", "logps_train/rejected"} <= set(rows[1])


def test_mode_eval_evaluates_only(command, run, cache_dir):
    words = ["mode=eval", "model.load_from=base/LATEST/policy.pt", "exp_name=only", f"cache_dir={cache_dir}", *SMALL]
    code, out, _ = command("train.py", *words)
    assert code == 0 and "loss/eval: " in out
    assert set(os.listdir(cache_dir / "only")) == {"config.yaml", "data.json"}
    trained = read_metrics(run / "metrics.jsonl")[-1]["loss/eval"]
    assert float(out.split("loss/eval: ")[1].split()[0]) == pytest.approx(trained, rel=1e-5)


def test_an_existing_run_is_refused_and_moved_only_when_asked(command, run, cache_dir):
    before = (run / "metrics.jsonl").read_bytes()
    words = ["train.py", "exp_name=base", f"cache_dir={cache_dir}", *SMALL, "n_examples=8"]
    mistake(command(*words), "already holds a run", "overwrite=true")
    copy = cache_dir / "again"
    shutil.copytree(run, copy)
    words[1] = "exp_name=again"
    assert command(*words, "overwrite=true")[0] == 0
    assert (cache_dir / "again.bak-1" / "metrics.jsonl").read_bytes() == before


def test_a_failed_start_leaves_no_run_directory(command, cache_dir):
    mistake(command("train.py", "datasets=[nowhere.jsonl]", "exp_name=x", f"cache_dir={cache_dir}"), "nowhere.jsonl")
    assert not (cache_dir / "x").exists()


def write_lines(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_local_pairs_and_feedback(command, run, cache_dir, tmp_path):
    """Eight prompts in one file without a split column: some are held out for testing, and all of them are used."""
    rows = [{"prompt": f"Say {n}.", "chosen": f" {n}", "rejected": " no"} for n in range(8)]
    path = write_lines(tmp_path / "pairs.jsonl", *rows)
    words = [f"datasets=[{path}]", f"cache_dir={cache_dir}", *SMALL]
    code, out, err = command("train.py", "loss=dpo", "exp_name=pairs", *words)
    assert code == 0, err
    counts = json.loads((cache_dir / "pairs" / "data.json").read_text())
    assert counts["train"]["loader"]["rows"] + counts["test"]["loader"]["rows"] == 8
    mistake(
        command("train.py", "loss=dpo", "exp_name=y", f"datasets=[{tmp_path / 'f.jsonl'}]", f"cache_dir={cache_dir}"),
        "f.jsonl",
    )
    feedback = [
        {"prompt": [{"role": "user", "content": f"Say {n}."}], "completion": str(n), "label": n % 3 == 0}
        for n in range(8)
    ]
    path = write_lines(tmp_path / "feedback.jsonl", *feedback)
    words[0] = f"datasets=[{path}]"
    assert command("train.py", "loss=kto", "exp_name=feedback", *words)[0] == 0
    mistake(command("train.py", "loss=dpo", "exp_name=z", *words), "PairedPreferenceDataLoader", "binary feedback")


#### MISTAKES


@pytest.mark.parametrize(
    "words, parts",
    {
        "loss=ktoo": ["ktoo", "did you mean 'kto'"],
        "model=lama7b": ["lama7b", "did you mean 'llama7b'"],
        "datasets=[shpp]": ["shpp", "did you mean 'shp'"],
        "++loss.bta=0.2": ["bta"],
        "loss.trainer=DPOTrianer": ["DPOTrianer", "did you mean 'DPOTrainer'"],
        "loss=dpo loss.dataloader=UnpairedPreferenceDataLoader": ["unpaired", "paired"],
        "++optimizer_kwargs.weight_decy=0.1": ["weight_decy", "weight_decay"],
        "eval_every=20001": ["20001", "model.batch_size"],
        "model.max_prompt_length=300": ["300", "max_length"],
        "model.load_from=gone/policy.pt": ["gone/policy.pt", "does not exist"],
        "model.tokenizer_name_or_path=/no/such/tokenizer": ["/no/such/tokenizer"],
        "model.name_or_path=/no/such/model": ["/no/such/model", "model=base_model"],
        "model=base_model model.name=x model.name_or_path=/no/such/model": ["/no/such/model"],
        "exp_name=../outside": ["../outside"],
    }.items(),
)
def test_mistakes_are_one_line(command, cache_dir, words, parts):
    mistake(command("train.py", *words.split(), f"cache_dir={cache_dir / 'none'}"), *parts)
    assert not (cache_dir / "none").exists() or os.listdir(cache_dir / "none") == [".tokens"]


def test_too_few_positions_are_found_before_anything_loads(command, cache_dir, tmp_path):
    """GPT-2 has 1024 positions, and max_length is 2048: that is one line, from a directory without any weights."""
    GPT2Config(vocab_size=576).save_pretrained(tmp_path)
    words = [f"model.name_or_path={tmp_path}", "model.tokenizer_name_or_path=assets/tiny_tokenizer"]
    result = command("train.py", "model=base_model", "model.name=gpt2", *words, f"cache_dir={cache_dir / 'none'}")
    mistake(result, "model.max_length=2048 is more than the 1024 positions", "use model.max_length=1024")
    assert not (cache_dir / "none" / "sft_gpt2").exists()


def test_damaged_checkpoints(command, run, cache_dir, tmp_path):
    """A checkpoint that is cut short, and one of another width, are refused; the first differing key is named."""
    whole = (run / "LATEST" / "policy.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole[: len(whole) // 2])
    words = ["exp_name=damaged", f"cache_dir={cache_dir}", *SMALL]
    mistake(command("train.py", f"model.load_from={cut}", *words), "cut.pt", "damaged")
    words += ["model.architecture.hidden_size=64", f"model.load_from={run}/LATEST/policy.pt"]
    mistake(command("train.py", *words), "another architecture", "model.embed_tokens.weight", "32")


def test_a_file_error_names_the_line(command, cache_dir, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen"\n')
    mistake(command("train.py", "loss=dpo", f"datasets=[{path}]", f"cache_dir={cache_dir}"), "broken.jsonl:2", "JSON")


#### EVALUATION


def test_samples(command, run, tmp_path):
    """`-n` samples that many prompts of the test split; another batch size gives the same texts.

    An earlier file of samples is kept as .bak-1. Another seed gives other texts, and `-u false` leaves the reference
    empty.
    """
    words = ["-c", run / "config.yaml", "-m", "sample", "-n", "6", f"samples_dir={tmp_path}"]
    code, out, err = command("eval.py", *words, "-b", "4")
    assert code == 0 and f"6 samples written to {tmp_path}/base.json" in out, err
    rows = json.loads((tmp_path / "base.json").read_text())
    assert len(rows) == 6 and all(set(row) == {"prompt", "chosen", "policy", "reference"} for row in rows)
    assert all(row["prompt"].endswith("\n\nAssistant:") and row["chosen"].startswith(" ") for row in rows)
    assert any(row["policy"] != row["reference"] for row in rows)
    assert command("eval.py", *words, "-b", "1")[0] == 0
    assert json.loads((tmp_path / "base.json").read_text()) == rows
    assert json.loads((tmp_path / "base.json.bak-1").read_text()) == rows
    assert command("eval.py", *words, "-u", "false", "seed=7")[0] == 0
    others = json.loads((tmp_path / "base.json").read_text())
    assert all(row["reference"] == "" for row in others)
    assert [row["policy"] for row in others] != [row["policy"] for row in rows]


def test_a_relative_cache_dir_is_where_the_run_is(tmp_path, monkeypatch):
    """A relative cache_dir is located by the path of the run's config, from any working directory.

    An absolute one, and one that the path does not contain because the run was moved, stay as they are.
    """
    monkeypatch.chdir(tmp_path)
    cases = {
        ("x/.cache/a/config.yaml", ".cache"): f"{tmp_path}/x/.cache",
        ("x/.cache/a/step-8/config.yaml", "./.cache"): f"{tmp_path}/x/.cache",
        ("x/moved/a/config.yaml", ".cache"): ".cache",
        ("x/my.cache/a/config.yaml", ".cache"): ".cache",
        ("x/.cache/a/config.yaml", "/models"): "/models",
    }
    for (path, cache_dir), located in cases.items():
        config = OmegaConf.create({"cache_dir": cache_dir, "exp_name": "a"})
        eval_program.locate_cache(config, path)
        assert config.cache_dir == located, path


def test_reference_is_the_hubs_model_or_the_one_that_was_loaded(command, run, cache_dir, tmp_path):
    """For a DPO run that started from `base`, `-s false` samples from `base` as the reference.

    The default samples from the random weights that `base` itself started from.
    """
    if not (cache_dir / "dpo").exists():
        pytest.skip("needs the dpo run of the test above")
    words = ["-n", "4", f"samples_dir={tmp_path}"]
    for name, more in (("base", []), ("dpo", ["-s", "false"])):
        assert command("eval.py", "-c", cache_dir / name / "config.yaml", *words, *more)[0] == 0
    base, dpo = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("base", "dpo"))
    assert [row["reference"] for row in dpo] == [row["policy"] for row in base]
    assert command("eval.py", "-c", cache_dir / "dpo" / "config.yaml", *words)[0] == 0
    dpo = json.loads((tmp_path / "dpo.json").read_text())
    assert [row["reference"] for row in dpo] == [row["reference"] for row in base]


def test_own_prompts(command, run, tmp_path):
    path = write_lines(tmp_path / "own.jsonl", {"prompt": "Once"}, {"prompt": [{"role": "user", "content": "Hi"}]})
    code, _, err = command("eval.py", "-c", run / "config.yaml", "-f", path, f"samples_dir={tmp_path}", "-u", "false")
    assert code == 0, err
    rows = json.loads((tmp_path / "base.json").read_text())
    assert [row["prompt"] for row in rows] == ["Once", "\n\nHuman: Hi\n\nAssistant:"]


def test_closed_form_metrics(command, run):
    """`-m eval` recomputes the numbers of the run's last evaluation from LATEST, into eval.json beside the config."""
    code, out, err = command("eval.py", "-c", run / "config.yaml", "-m", "eval")
    assert code == 0, err
    saved = json.loads((run / "eval.json").read_text())
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert saved["metadata"]["exp_name"] == "base"
    for name in ("loss/eval", "logps_eval/chosen"):
        assert saved["results"][name] == pytest.approx(last[name], rel=1e-5)


def test_a_run_with_a_critic(command, run, cache_dir, tmp_path):
    """The critic is saved with the run. Evaluation needs it, and sampling does not."""
    words = ["loss=ppo", "model.load_from=base/LATEST/policy.pt", "exp_name=critic", f"cache_dir={cache_dir}", *SMALL]
    code, _, err = command("train.py", *words)
    assert code == 0, err
    directory = cache_dir / "critic"
    code, out, err = command("eval.py", "-c", directory / "config.yaml", "-m", "eval")
    assert code == 0, err
    results = json.loads((directory / "eval.json").read_text())["results"]
    last = read_metrics(directory / "metrics.jsonl")[-1]
    for name in ("loss/eval", "val_eval/mean", "rewards_eval/margins"):
        assert results[name] == pytest.approx(last[name], rel=1e-4, abs=1e-6)
    os.remove(directory / "LATEST" / "v_head.pt")
    mistake(command("eval.py", "-c", directory / "config.yaml", "-m", "eval"), "v_head.pt does not exist")
    words = ["-n", "2", "-u", "false", f"samples_dir={tmp_path}"]
    assert command("eval.py", "-c", directory / "config.yaml", *words)[0] == 0


def test_intermediate_checkpoints_are_evaluated_by_their_own_config(command, run, cache_dir, tmp_path):
    words = ["exp_name=steps", "intermediate_checkpoints=true", f"cache_dir={cache_dir}", *SMALL]
    assert command("train.py", *words)[0] == 0
    steps = cache_dir / "steps"
    assert {"step-2", "step-4", "LATEST"} <= set(os.listdir(steps))
    words = ["-n", "2", "-u", "false", f"samples_dir={tmp_path}"]
    assert command("eval.py", "-c", steps / "step-2" / "config.yaml", *words)[0] == 0
    assert os.listdir(tmp_path) == ["steps_step-2.json"]
    assert command("eval.py", "-c", steps / "step-2" / "config.yaml", "-m", "eval")[0] == 0
    result = json.loads((steps / "step-2" / "eval.json").read_text())["results"]["loss/eval"]
    middle = [row for row in read_metrics(steps / "metrics.jsonl") if row["mode"] == "eval" and row["step"] == 2]
    assert result == pytest.approx(middle[0]["loss/eval"], rel=1e-5)


def test_mistakes_of_eval(command, run, tmp_path):
    mistake(command("eval.py", "-c", tmp_path / "config.yaml"), "does not exist", "-c")
    mistake(command("eval.py", "-c", run / "config.yaml", "top_pp=0.9"), "top_pp", "did you mean top_p?")
    mistake(command("eval.py", "-c", run / "config.yaml", "-n", "0"), "n_samples")
    shutil.copy(run / "config.yaml", tmp_path)
    mistake(command("eval.py", "-c", tmp_path / "config.yaml"), "holds no checkpoint")
    mistake(command("eval.py", "-c", run / "config.yaml", "-f", tmp_path / "no.jsonl"), "no.jsonl")
