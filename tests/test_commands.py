"""train.py and eval.py as a user types them, called in this process: the files they write, their error messages."""

import json
import os
import shutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import compare as compare_program
import completions_server
import eval as eval_program
import train as train_program
from halos import demo, sampling, saved_config
from halos.metrics import read_metrics
from halos.records import Records
from halos.sample_files import PartialFile
from halos.tokens import Encoder
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
        programs = {"train.py": train_program, "eval.py": eval_program, "compare.py": compare_program}
        main = programs[program].main
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
    assert set(os.listdir(cache_dir / "only")) == {"config.yaml", "data.json", "evaluations"}
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
    assert not (cache_dir / "none").exists() or set(os.listdir(cache_dir / "none")) <= {".tokens"}


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
    assert len(rows) == 6 and all(set(row) == {"prompt", "messages", "chosen", "policy", "reference"} for row in rows)
    assert all(row["prompt"].endswith("\n\nAssistant:") and row["chosen"].startswith(" ") for row in rows)
    assert any(row["policy"] != row["reference"] for row in rows)
    assert command("eval.py", *words, "-b", "1")[0] == 0
    assert json.loads((tmp_path / "base.json").read_text()) == rows
    assert json.loads((tmp_path / "base.json.bak-1").read_text()) == rows
    assert command("eval.py", *words, "-u", "false", "seed=7")[0] == 0
    others = json.loads((tmp_path / "base.json").read_text())
    assert all(row["reference"] == "" for row in others)
    assert [row["policy"] for row in others] != [row["policy"] for row in rows]


def killed_after(monkeypatch, n_batches: int) -> None:
    """Make sampling stop like a killed process, once `n_batches` batches are written and a third of a line more."""
    real = PartialFile.recorder

    def recorder(partial, keys):
        record = real(partial, keys)

        def until_killed(texts):
            nonlocal n_batches
            if not n_batches:
                partial.file.write(b'{"key": "012')
                raise KeyboardInterrupt
            n_batches -= 1
            record(texts)

        return until_killed

    monkeypatch.setattr(PartialFile, "recorder", recorder)


@pytest.mark.parametrize("n_batches", [2, 5])
def test_a_killed_eval_goes_on_where_it_was(command, run, tmp_path, monkeypatch, n_batches):
    """Killed while the policy samples, or the reference: the samples that are written are not made again.

    The texts are those of an uninterrupted command. The torn last line is cut off.
    """
    words = ["-c", run / "config.yaml", "-n", "6", "-b", "2"]
    assert command("eval.py", *words, f"samples_dir={tmp_path / 'whole'}")[0] == 0
    words.append(f"samples_dir={tmp_path / 'killed'}")
    with monkeypatch.context() as patched:
        killed_after(patched, n_batches)
        assert command("eval.py", *words)[0] == 130
    assert os.listdir(tmp_path / "killed") == ["base.partial.jsonl"]
    written = (tmp_path / "killed" / "base.partial.jsonl").read_bytes()
    assert written.count(b"\n") == 2 * n_batches and not written.endswith(b"\n")
    generated, real = [], sampling._generate

    def generate(lm, encoder, prompts, *rest):
        generated.extend(prompts)
        return real(lm, encoder, prompts, *rest)

    monkeypatch.setattr(sampling, "_generate", generate)
    code, out, err = command("eval.py", *words)
    assert code == 0, err
    assert len(generated) == 12 - 2 * n_batches
    assert os.listdir(tmp_path / "killed") == ["base.json"]
    assert (tmp_path / "killed" / "base.json").read_bytes() == (tmp_path / "whole" / "base.json").read_bytes()


def test_the_partial_file_of_other_settings_is_kept(command, run, tmp_path):
    """Samples of another seed are not taken, and not thrown away. A file that another process writes is refused."""
    partial = tmp_path / "base.partial.jsonl"
    partial.write_text('{"key": "of another seed", "text": "x"}\n')
    words = ["-c", run / "config.yaml", "-n", "2", "-u", "false", f"samples_dir={tmp_path}"]
    assert command("eval.py", *words)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["base.json", "base.partial.jsonl.bak-1"]
    with PartialFile(str(partial), []):
        mistake(command("eval.py", *words), "base.partial.jsonl is in use by another eval.py")


def test_several_samples_per_prompt(command, run, tmp_path):
    """A row for each, numbered from 0. They differ; the first ones are those of one sample per prompt."""
    words = ["-c", run / "config.yaml", "-n", "3"]
    assert command("eval.py", *words, f"samples_dir={tmp_path / '1'}")[0] == 0
    assert command("eval.py", *words, "--n_per_prompt", "3", f"samples_dir={tmp_path / '3'}")[0] == 0
    one, three = (json.loads((tmp_path / n / "base.json").read_text()) for n in "13")
    assert [row.pop("sample") for row in three] == 3 * [0, 1, 2]
    assert three[::3] == one
    assert all(len({row["policy"] for row in three[at : at + 3]}) == 3 for at in (0, 3, 6))
    assert len({row["prompt"] for row in three}) == 3
    mistake(command("eval.py", *words, "--n_per_prompt", "0"), "n_per_prompt")


def test_one_round_of_sampling_judging_and_training(command, run, cache_dir, tmp_path):
    """docs/judging.md, "One round": samples, judged by the demo's checker, train the policy with DPO.

    The rows of the dataset are the decided pairs: chosen has the higher score. Training reads all of them. With the key
    of the candidate for the baseline too, the samples of a prompt are compared with each other.
    """
    words = ["-c", run / "config.yaml", "-n", "12", "--n_per_prompt", "2", "-u", "false", f"samples_dir={tmp_path}"]
    code, _, err = command("eval.py", *words)
    assert code == 0, err
    samples = json.loads((tmp_path / "base.json").read_text())
    feedback = tmp_path / "feedback.jsonl"
    words = ["-f", tmp_path / "base.json", "-ck", "policy", "-r", tmp_path / "result.jsonl"]
    words += ["--judge", "halos.demo:check", "--judge_kind", "score", "--export_feedback", feedback]
    code, out, err = command("compare.py", *words, "-bk", "policy", "--dry_run")
    assert code == 0 and "halos.demo:check: 12 verdicts" in out, err
    code, out, err = command("compare.py", *words, "-bk", "chosen")
    assert code == 0 and f"written to {feedback}" in out and "24 pairs of 12 prompts" in out, err
    rows = [json.loads(line) for line in feedback.read_text().splitlines()]
    assert len(rows) > 4 and all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
    for row in rows:
        # As compare.py shows messages to a judge.
        prompt = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
        assert demo.check(prompt, row["chosen"]) > demo.check(prompt, row["rejected"])
    sampled = [(row["messages"], row[key]) for row in samples for key in ("policy", "chosen")]
    assert all((row["prompt"], row[side]) in sampled for row in rows for side in ("chosen", "rejected"))
    words = ["loss=dpo", f"datasets=[{feedback}]", "model.load_from=base/LATEST/policy.pt", "exp_name=round"]
    code, _, err = command("train.py", *words, f"cache_dir={cache_dir}", *SMALL)
    assert code == 0, err
    counts = json.loads((cache_dir / "round" / "data.json").read_text())
    assert sum(counts[split]["datasets"][0]["pairs"] for split in ("train", "test")) == len(rows)
    first = read_metrics(cache_dir / "round" / "metrics.jsonl")[0]
    assert first["loss/eval"] == pytest.approx(0.693147, abs=1e-6)


def test_the_form_of_alpaca_eval(command, run, tmp_path):
    """The instruction is the last user message, also of a prompt that is text. There is one output per instruction."""
    said = (("user", "Hi"), ("assistant", "Yes?"), ("user", "2+2"))
    turns = [{"role": role, "content": content} for role, content in said]
    own = write_lines(
        tmp_path / "own.jsonl", {"prompt": turns}, {"prompt": "\n\nHuman: a\n\nAssistant:"}, {"prompt": "Once"}
    )
    words = ["-c", run / "config.yaml", "-f", own, f"samples_dir={tmp_path}"]
    assert command("eval.py", *words)[0] == 0
    code, out, err = command("eval.py", *words, "--format", "alpaca_eval")
    assert code == 0 and f"3 samples written to {tmp_path}/base.alpaca_eval.json" in out, err
    rows = json.loads((tmp_path / "base.alpaca_eval.json").read_text())
    assert [row["instruction"] for row in rows] == ["2+2", "a", "Once"]
    policy = [row["policy"].strip() for row in json.loads((tmp_path / "base.json").read_text())]
    assert rows == [
        {"instruction": row["instruction"], "output": text, "generator": "base", "dataset": "own"}
        for row, text in zip(rows, policy, strict=True)
    ]
    assert command("eval.py", *words, "--format", "alpaca_eval", "-o", tmp_path / "x" / "y.json")[0] == 0
    assert json.loads((tmp_path / "x" / "y.json").read_text()) == rows
    mistake(command("eval.py", *words, "--format", "alpaca_eval", "--n_per_prompt", "2"), "one output per instruction")


@pytest.fixture
def server_words(run, tmp_path):
    """Words of eval.py for a server, without its address."""
    return ["-c", run / "config.yaml", "-n", "6", "-b", "3", "-u", "false", f"samples_dir={tmp_path}", "sampler=server"]


def test_sampling_from_a_server(command, run, server_words, tmp_path):
    """The server gets the ids that sampling here gets, a seed per response, and the run's settings.

    Requests that fail with 503 or 429 are sent again.
    """
    assert command("eval.py", *server_words[:-1], "sampler=hf")[0] == 0
    here = json.loads((tmp_path / "base.json").read_text())
    encoder = Encoder(AutoTokenizer.from_pretrained(run / "LATEST"))
    ids = {row["prompt"]: encoder.prompts([row["prompt"]])[0] for row in here}
    with completions_server.serve(errors=[503, 429]) as server:
        words = [*server_words, f"sampler_url={server.url}", "top_p=0.9", "--n_per_prompt", "2"]
        code, _, err = command("eval.py", *words)
        assert code == 0, err
        rows = json.loads((tmp_path / "base.json").read_text())
        asked = {(tuple(body["prompt"]), body["seed"]): body for body in server.requests}
    assert [row["prompt"] for row in rows[::2]] == [row["prompt"] for row in here]
    assert len(asked) == len(server.requests) == 12
    assert {prompt for prompt, _ in asked} == {tuple(prompt) for prompt in ids.values()}
    for (prompt, seed), body in asked.items():
        assert body["max_tokens"] == 96 - len(prompt) and (body["top_p"], body["temperature"]) == (0.9, 1.0)
        assert body["model"] == "the-export"
        assert completions_server.text_of(list(prompt), seed) in {row["policy"] for row in rows}
    assert len({row["policy"] for row in rows}) == 12


def test_a_server_that_fails_leaves_the_samples_that_it_made(command, server_words, tmp_path):
    """A refusal ends the command in one line; the next one asks for what is missing."""
    with completions_server.serve(errors=[200, 200, 400]) as server:
        words = [*server_words, f"sampler_url={server.url}", "-b", "1"]
        mistake(command("eval.py", *words), "sampler_url=", "the test says no")
        assert (tmp_path / "base.partial.jsonl").read_text().count("\n") == 2
        made = list(server.requests)
        assert command("eval.py", *words)[0] == 0
        assert len(server.requests) == 6 and server.requests[:2] == made
    assert [name for name in os.listdir(tmp_path)] == ["base.json"]


def test_sampling_with_vllm(command, run, tmp_path, monkeypatch):
    """A stand-in for the library: it gets the export, the ids, a seed each, and the stop token."""
    words = ["-c", run / "config.yaml", "-n", "3", f"samples_dir={tmp_path}", "sampler=vllm"]
    mistake(command("eval.py", *words, "-u", "false"), "sampler=vllm", "not installed", "sampler=hf")
    calls = []

    class LLM:
        def __init__(self, model, **settings):
            self.model = model

        def generate(self, prompts, settings):
            calls.extend(zip(prompts, settings, strict=True))
            assert self.model == str(run / "LATEST")
            ids = [prompt["prompt_token_ids"][-3:] for prompt in prompts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=some)]) for some in ids]

    stand_in = ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams = LLM, SimpleNamespace
    stand_in.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    mistake(command("eval.py", *words), "sampler=vllm", "-u false")
    code, _, err = command("eval.py", *words, "-u", "false")
    assert code == 0, err
    rows = json.loads((tmp_path / "base.json").read_text())
    assert all(row["prompt"].endswith(row["policy"]) and row["policy"] for row in rows)
    eos = AutoTokenizer.from_pretrained(run / "LATEST").eos_token_id
    assert all(settings.stop_token_ids == [eos] for _, settings in calls)
    assert len({settings.seed for _, settings in calls}) == 3


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
        saved_config.locate_cache(config, path)
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
    assert [row.get("messages") for row in rows] == [None, [{"role": "user", "content": "Hi"}]]


def test_closed_form_metrics(command, run):
    """`-m eval` recomputes the numbers of the run's last evaluation from LATEST, into eval.json beside the config."""
    code, out, err = command("eval.py", "-c", run / "config.yaml", "-m", "eval")
    assert code == 0, err
    saved = json.loads((run / "eval.json").read_text())
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert saved["metadata"]["exp_name"] == "base"
    for name in ("loss/eval", "logps_eval/chosen"):
        assert saved["results"][name] == pytest.approx(last[name], rel=1e-5)
    rows = Records.read(str(run / "eval.parquet"))
    assert rows.mean_loss() == pytest.approx(saved["results"]["loss/eval"], rel=1e-5)


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
    mistake(command("eval.py", "-c", run / "config.yaml", "sampler=sever"), "did you mean 'server'?")
    mistake(command("eval.py", "-c", run / "config.yaml", "sampler=server"), "sampler_url=null", "http://")
    shutil.copy(run / "config.yaml", tmp_path)
    mistake(command("eval.py", "-c", tmp_path / "config.yaml"), "holds no checkpoint")
    mistake(command("eval.py", "-c", run / "config.yaml", "-f", tmp_path / "no.jsonl"), "no.jsonl")
