"""Several processes give what one process gives: losses, metrics, weights, and checkpoints, on a CPU with gloo.

Each number of processes is started once, in a fixture. The tests compare the files that it wrote to its folder.
"""

import glob
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import distributed_workers as workers
from halos import checkpoint, loading, metrics, records
from halos.errors import UserError
from halos.launch import launch
from halos.models import PolicyModel
from halos.records import Records
from helpers import ARCHITECTURES, CONFIG_DIR, PROJECT, make_config, random_examples, tiny_lm
from small_runs import CPU, FEW, SMALL, make_trainer, moved, state_of, tokenizer

LOSSES = sorted(os.path.basename(path)[:-5] for path in glob.glob(f"{CONFIG_DIR}/loss/*.yaml"))

# The default optimizer, at a learning rate that moves the weights. A few losses have evaluations in between.
MOVES = "optimizer=RMSprop lr=1e-4 eval_every=1000"
SMOOTH = "optimizer=AdamW ++optimizer_kwargs.eps=1e-4"
COMMON = "optimizer=RMSprop lr=1e-4 do_first_eval=true eval_every=16"
CASES = {loss: f"{loss} {COMMON if loss in FEW else MOVES}" for loss in LOSSES} | {
    # Forward passes of few tokens: several per rank, with different numbers of examples, and dummies at the end.
    "forwards": f"kto {COMMON} model.max_tokens_per_forward=30",
    "accumulation": f"ppo {COMMON} loss.ppo_epochs=2 model.gradient_accumulation_steps=2 model.batch_size=4",
    "padded": f"dpo {COMMON} model.packing=false model.logps=plain",
    "checkpointing": f"dpo {COMMON} model.activation_checkpointing=true model.max_tokens_per_forward=60",
    "tied": f"dpo {COMMON} ++model.architecture.tie_word_embeddings=true",
    "replicated": f"kto {COMMON} use_fsdp=false",
    "adamw": f"dpo {COMMON} optimizer=AdamW ++optimizer_kwargs.weight_decay=0.1 ++optimizer_kwargs.eps=1e-4",
    "muon": f"ppo {COMMON} optimizer=Muon ++optimizer_kwargs.eps=1e-4",
    "lora": f"ppo {COMMON} model.use_peft=true lr=1e-2 {SMOOTH}",
}
IN_BFLOAT16 = {
    "bfloat16": f"dpo {COMMON} model.fsdp_policy_mp=bfloat16",
    "lora_bfloat16": f"dpo {COMMON} model.use_peft=true model.policy_dtype=bfloat16 lr=1e-3 optimizer=AdamW",
}
MORE = {  # on 4 processes
    "hsdp": f"ppo {COMMON} hsdp_replicas=2",
    "lora_hsdp": f"dpo {COMMON} hsdp_replicas=2 model.use_peft=true lr=1e-2 {SMOOTH}",
}


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """The folder of all cases on one process, which is this one."""
    folder = tmp_path_factory.mktemp("one")
    draw = metrics.draw_curves
    workers.train(
        str(folder), CASES | IN_BFLOAT16 | {name: words.replace("hsdp_replicas=2", "") for name, words in MORE.items()}
    )
    metrics.draw_curves = draw
    workers.sample_texts(str(folder))
    return folder


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """A Hugging Face directory of each architecture: {name: path}."""
    folder = tmp_path_factory.mktemp("architectures")
    for name in ARCHITECTURES:
        tiny_lm(name).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def sources(one, tmp_path_factory):
    """The words that select each kind of weights, {name: words}.

    A policy.pt, a Hugging Face directory, one whose weights are named as those of a bare body, one without safetensors
    (which the main process reads for all), and random weights.
    """
    latest = one / "dpo" / "run" / "LATEST"
    state = load_file(latest / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    folders = [tmp_path_factory.mktemp(name) for name in ("renamed", "pickled")]
    save_file(renamed, folders[0] / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, folders[1] / "pytorch_model.bin")
    for folder in folders:
        (folder / "config.json").write_bytes((latest / "config.json").read_bytes())
    return {
        "policy.pt": f"model.load_from={latest}/policy.pt",
        "directory": f"model.load_from={latest}",
        "renamed": f"model.load_from={folders[0]}",
        "pickled": f"model.load_from={folders[1]}",
        "random": "seed=3",
        "adapter": f"model.load_from={latest} model.use_peft=true",
    }


def started(n: int, folder, cases, directories=(), cache_dir="", sources=()):
    launch(workers.everything, str(folder), cases, dict(directories), str(cache_dir), dict(sources), nproc_per_node=n)
    return folder


@pytest.fixture(scope="session")
def two(one, directories, sources, tmp_path_factory):
    return started(2, tmp_path_factory.mktemp("two"), CASES | IN_BFLOAT16, directories, one / "dpo", sources)


@pytest.fixture(scope="session")
def three(one, tmp_path_factory):
    return started(3, tmp_path_factory.mktemp("three"), CASES)


@pytest.fixture(scope="session")
def four(one, directories, sources, tmp_path_factory):
    return started(4, tmp_path_factory.mktemp("four"), CASES | MORE, directories, one / "dpo", sources)


several = pytest.mark.parametrize(
    "folder", ["two", *(pytest.param(name, marks=pytest.mark.slow) for name in ("three", "four"))]
)


#### TRAINING


# Metrics that are not differences of log-probs.
PRECISE = ("logps_", "grad_norm", "v_head_grad_norm", "val", "returns", "lr", "step", "examples", "counters")


def assert_same_rows(rows: list[dict], expected: list[dict], rel: float = 1e-5) -> None:
    """Compare every number of every row to 1e-5; rewards and metrics made from them to 1e-5 of the log-probs.

    A reward is beta times a difference of log-probs of about -40 nats, which float32 holds to 4e-6. Near 0 it has no
    relative precision, and neither have losses, ratios and other metrics that are computed from it.
    """
    assert len(rows) == len(expected) > 3
    for row, wanted in zip(rows, expected, strict=True):
        assert set(row) == set(wanted) and row["mode"] == wanted["mode"]
        scale = max([abs(value) for name, value in wanted.items() if name.startswith("logps_")], default=1.0)
        for name, value in wanted.items():
            if name != "mode" and not metrics.is_time(name):
                absolute = 1e-7 if name.startswith(PRECISE) else rel * scale
                absolute = rel if "explained" in name else absolute  # 1 minus a ratio of about 1
                assert row[name] == pytest.approx(value, rel=rel, abs=absolute), (name, row["step"])


def ways(folder, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far the policy's weights moved, and the critic's weights at the end."""
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    critic = [tensor.double().flatten() for tensor in saved["critic"].values()]
    return moved(saved["before"], saved["after"]), torch.cat(critic) if critic else torch.zeros(0)


def assert_same_run(folder, one, name: str) -> None:
    """Compare a run with the same run on one process.

    The weights agree to 1e-5 of their norm, and to 1e-4 of the norm of their movement. A single weight may differ by
    more (1e-4): RMSprop divides by the size of the gradient, so where the gradient is close to 0, rounding counts.
    """
    (way, critic), (expected, expected_critic) = ways(folder, name), ways(one, name)
    start = torch.cat(
        [tensor.flatten() for tensor in torch.load(one / f"{name}.pt", weights_only=True)["before"].values()]
    )
    assert expected.norm() > 0.03
    assert (way - expected).norm() < 1e-5 * start.norm()
    assert (way - expected).norm() < 1e-4 * expected.norm()
    assert (way - expected).abs().max() < 1e-4
    assert (critic - expected_critic).norm() <= 1e-4 * expected_critic.norm()
    rows = [metrics.read_metrics(place / name / "run" / "metrics.jsonl") for place in (folder, one)]
    assert_same_rows(*rows)


@several
@pytest.mark.parametrize("name", CASES)
def test_several_processes_train_as_one(request, one, folder, name):
    """Several processes train as one, for every loss and every way to compute it.

    Each run has updates on several batches, the last of a single example, and at least one evaluation.
    """
    assert_same_run(request.getfixturevalue(folder), one, name)


@several
@pytest.mark.parametrize("name", [*LOSSES, "padded", "tied", "replicated"])
def test_several_processes_say_the_same_of_each_response(request, one, folder, name):
    """Every evaluation's file has the rows of one process, and pairs have its CHES scores."""
    folder = request.getfixturevalue(folder)
    scores, expected = (torch.load(place / f"{name}.pt", weights_only=True)["ches"] for place in (folder, one))
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    runs = [str(place / name / "run") for place in (folder, one)]
    assert list(records.steps(runs[0])) == list(records.steps(runs[1])) != []
    for step in records.steps(runs[0]):
        rows, expected_rows = (Records.read(records.path_of(run, step)) for run in runs)
        assert rows.id == expected_rows.id and rows.row.tolist() == expected_rows.row.tolist()
        torch.testing.assert_close(rows.logps, expected_rows.logps, rtol=1e-5, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(rows.weight, expected_rows.weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_hsdp_trains_as_one(four, one, name):
    """HSDP on four processes, as two groups that each hold all shards, trains as one process."""
    assert_same_run(four, one, name)


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bfloat16_trains_as_one_does(two, one, name):
    """In bfloat16, two processes move the weights in the direction that one does (cosine above 0.9).

    Each rank packs other sequences, which round differently: by a few percent of the movement.
    """
    way, expected = ways(two, name)[0], ways(one, name)[0]
    assert torch.cosine_similarity(way, expected, dim=0) > 0.9


#### LOADING


@several
def test_sharded_models_are_the_models(request, folder, directories):
    """Sharded models of every architecture equal the whole models: weights bit by bit, log-probs to 1e-5.

    Log-probs also need the buffers that no file contains.
    """
    if folder == "three":
        pytest.skip("two and four processes load them")
    found = torch.load(request.getfixturevalue(folder) / "architectures.pt", weights_only=True)
    assert set(found) == set(directories)
    for name, directory in directories.items():
        lm = AutoModelForCausalLM.from_pretrained(directory)
        for key, tensor in lm.state_dict().items():
            assert torch.equal(found[name]["state"][key], tensor), (name, key)
        policy = PolicyModel(lm)
        policy.use_packing(True)
        with torch.no_grad():
            logps = policy(policy.inputs(random_examples(4, (2, 1)))).logps
        torch.testing.assert_close(found[name]["logps"], logps, rtol=1e-5, atol=1e-5)


@several
def test_checkpoints_load_on_any_number_of_processes(request, one, folder, sources):
    """Policy and reference equal those that one process loads, bit by bit, and each rank holds only its share."""
    if folder == "three":
        pytest.skip("two and four processes load them")
    found = torch.load(request.getfixturevalue(folder) / "checkpoints.pt", weights_only=True)
    n = {"two": 2, "four": 4}[folder]
    for name, words in sources.items():
        config = make_config(one / "dpo", "loss=dpo", *SMALL, *words.split())
        policy, _ = loading.load_policy_and_reference(config, tokenizer(), CPU)
        for key, tensor in checkpoint.full_state(policy.lm, torch.float32).items():
            assert torch.equal(found[name]["policy"][key], tensor), (name, key)
            assert torch.equal(found[name]["reference"][key], tensor), (name, key)
        total = policy.lm.num_parameters()
        assert sum(found[name]["held"]) == total and max(found[name]["held"]) < 1.2 * total / n
        assert found[name]["packs"]
        for key in ("eos_token_id", "pad_token_id", "bos_token_id", "do_sample", "temperature", "top_p"):
            assert found[name]["generation"].get(key) == policy.lm.generation_config.to_dict().get(key), (name, key)


@several
def test_a_checkpoint_of_several_processes_is_one(request, one, folder):
    """LATEST of several processes has the files and names of one process's, an export that opens, and the critic."""
    folder = request.getfixturevalue(folder)
    for name in ("dpo", "ppo", "tied", "lora"):
        theirs, ours = (place / name / "run" / "LATEST" for place in (one, folder))
        assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
        state = checkpoint.load_state(str(ours / "policy.pt"))
        expected = torch.load(folder / f"{name}.pt", weights_only=True)["after"]
        assert list(state) == list(checkpoint.load_state(str(theirs / "policy.pt")))
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
        lm = AutoModelForCausalLM.from_pretrained(ours)
        assert all(torch.equal(lm.state_dict()[key], tensor) for key, tensor in expected.items())


def test_a_checkpoint_of_several_processes_goes_on_in_one(two, tmp_path):
    """A checkpoint of two processes loads in one process: policy and critic, bit by bit."""
    words = (f"model.load_from={two}/ppo/run/LATEST/policy.pt",)
    trainer = make_trainer(tmp_path, "ppo", *words)
    saved = torch.load(two / "ppo.pt", weights_only=True)
    assert all(torch.equal(tensor, saved["after"][name]) for name, tensor in state_of(trainer).items())
    critic = checkpoint.full_state(trainer.policy.v_head, torch.float32)
    assert all(torch.equal(tensor, saved["critic"][name]) for name, tensor in critic.items())


#### SAMPLING, STOPPING, FAILING, JOINING


@several
def test_one_rank_can_stop_all(request, folder):
    """If the last rank alone wants to stop after the second update, all ranks stop, evaluate, and save."""
    folder = request.getfixturevalue(folder) / "stopped" / "run"
    rows = metrics.read_metrics(folder / "metrics.jsonl")
    assert [(row["mode"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("eval", 2)]
    assert torch.load(folder / "LATEST/policy.pt", weights_only=True)["step_idx"] == 2


@several
def test_samples_do_not_depend_on_the_number_of_processes(request, one, folder):
    """Samples are the same on any number of processes, in the order of the prompts. Equal prompts get different texts.

    The last of the 11 prompts equals the first.
    """
    texts = torch.load(request.getfixturevalue(folder) / "texts.pt", weights_only=True)
    assert texts == torch.load(one / "texts.pt", weights_only=True) and len(texts) == 11
    assert texts[0] != texts[10]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_processes(tmp_path):
    """A loss that is not finite ends all processes with one error.

    not_finite/ has the weights from before, and the 8 examples.
    """
    with pytest.raises(UserError, match="the loss is not finite after 1 updates"):
        launch(workers.diverge, str(tmp_path), nproc_per_node=2)
    assert torch.load(tmp_path / "run/not_finite/policy.pt", weights_only=True)["step_idx"] == 1
    assert len(json.loads((tmp_path / "run/not_finite/examples.json").read_text())) == 8


def python(*words) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_commands_on_two_processes(tmp_path):
    """train.py, and eval.py in both modes, with nproc_per_node=2 give the results of one process."""
    words = "loss=dpo n_examples=128 n_eval_examples=64 eval_every=64".split()
    python("train.py", *words, f"cache_dir={tmp_path}", "exp_name=run", "nproc_per_node=2")
    config = tmp_path / "run" / "config.yaml"
    results, samples = [], []
    for n in (2, 1):
        python("eval.py", "-c", config, "-m", "eval", f"nproc_per_node={n}")
        results.append(json.loads((tmp_path / "run" / "eval.json").read_text())["results"])
        folder = tmp_path / f"samples_{n}"
        python("eval.py", "-c", config, "-n", 10, "-b", 4, f"samples_dir={folder}", f"nproc_per_node={n}")
        samples.append(json.loads((folder / "run.json").read_text()))
    assert samples[0] == samples[1] and len(samples[0]) == 10
    last = metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    for name, value in results[1].items():
        if not metrics.is_time(name):
            assert results[0][name] == pytest.approx(value, rel=1e-5, abs=1e-4)
            assert last[name] == pytest.approx(value, rel=1e-5, abs=1e-4)


def torchrun(*words: str, nodes: int = 1, processes: int = 2) -> list[str]:
    """Run a script under torchrun, one agent per node, all on this machine; return the output of each agent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={processes}"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=test", "--local-addr=127.0.0.1"]
    started = [
        subprocess.Popen([*agent, *words], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(nodes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return outputs


@pytest.mark.slow
def test_two_nodes_train_as_one_process(tmp_path):
    """train.py under two torchrun agents of two processes each (HSDP over two nodes) gives the numbers of one process.

    Each line is printed once.
    """
    words = "loss=kto n_examples=256 n_eval_examples=64 lr=1e-4 warmup_steps=0 optimizer=RMSprop".split()
    outputs = torchrun("train.py", *words, f"cache_dir={tmp_path}", "exp_name=nodes", nodes=2)
    assert sum(output.count("4 processes on CPU, 2 nodes") for output in outputs) == 1
    python("train.py", *words, f"cache_dir={tmp_path}", "exp_name=alone")
    assert_same_rows(*(metrics.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("nodes", "alone")))


#### MEMORY

LARGE = (
    "loss=sft exp_name=large model.packing=false model.architecture.vocab_size=16000 "
    "model.architecture.hidden_size=1024 model.architecture.intermediate_size=2816 "
    "model.architecture.num_hidden_layers=4"
)


def anonymous_pss(pid: int) -> int:
    """Return the bytes of a process that are not pages of files; pages shared with other processes count in part."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        kilobytes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in file)}
    return 1024 * (int(kilobytes["Pss_Anon"]) + int(kilobytes["Pss_Shmem"]))


class Watch(threading.Thread):
    """The memory of all processes of `load_large` together: idle, at its peak, and loaded."""

    def __init__(self, folder, n: int):
        super().__init__(daemon=True)
        self.folder, self.n = folder, n
        self.idle = self.peak = self.loaded = 0

    def run(self) -> None:
        self.idle = self.total(self.pids("idle"))
        pids = self.pids("idle")
        (self.folder / "idle-seen").touch()
        while len(list(self.folder.glob("loaded-[0-9]"))) < self.n:
            self.peak = max(self.peak, self.total(pids))
        self.loaded = self.total(pids)
        self.peak = max(self.peak, self.loaded)
        (self.folder / "loaded-seen").touch()

    def pids(self, state: str) -> list[int]:
        while len(files := list(self.folder.glob(f"{state}-[0-9]"))) < self.n or not all(f.read_text() for f in files):
            time.sleep(0.01)
        return [int(file.read_text()) for file in files]

    def total(self, pids: list[int]) -> int:
        return sum(map(anonymous_pss, pids))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["policy.pt", "directory"])
def test_loading_holds_the_model_once(tmp_path, form, capsys):
    """While 4 processes load 336 MB of float32 weights, together they hold at most 1.5 times that.

    The memory of idle processes and pages of files are not counted.
    """
    config = make_config(tmp_path, *LARGE.split())
    lm = loading.load_lm(config, torch.float32)
    weight = 4 * lm.num_parameters()
    lm.save_pretrained(tmp_path / "directory")
    torch.save({"step_idx": 0, "state": lm.state_dict(), "metrics": {}}, tmp_path / "policy.pt")
    del lm
    watch = Watch(tmp_path, 4)
    watch.start()
    launch(workers.load_large, str(tmp_path), f"{LARGE} model.load_from={tmp_path / form}", nproc_per_node=4)
    watch.join()
    peak, loaded = (watch.peak - watch.idle) / weight, (watch.loaded - watch.idle) / weight
    with capsys.disabled():
        print(f" {form}: {weight / 2**20:.0f} MiB of weights; peak {peak:.2f}, in the end {loaded:.2f} times that")
    assert 0.9 < loaded <= peak < 1.5
