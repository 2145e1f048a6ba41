"""What a user can give that is broken: each case ends in one line with exit code 2, before a model loads.

Configs of runs, words of a command, weights, tokenizers, chat templates and rows. The commands run in this process, up
to the point where they would start to work.
"""

import ast
import glob
import json
import os
import re
import shutil
import struct
import sys

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import eval as eval_program
from halos import base, datafiles, launch, loading, metrics, rules, saved_config
from halos.commands import report_user_errors
from halos.errors import UserError
from helpers import PROJECT, make_config, tiny_lm
from small_runs import SMALL, make_trainer, tokenizer


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run with a checkpoint, which was not trained."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "draw_curves", lambda *args: None)
        make_trainer(folder, "kto").save()
    return folder / "run"


@pytest.fixture
def evaluate(run_directory, tmp_path, monkeypatch, capsys):
    """Run eval.py on the run with another config.yaml, up to the start of its processes: (exit code, out, err)."""
    text = (run_directory / "config.yaml").read_text()
    monkeypatch.setattr(launch, "launch", lambda *args, **settings: None)
    monkeypatch.chdir(tmp_path)

    def evaluate(change=lambda text: text, *words):
        changed = change(text)
        (run_directory / "config.yaml").write_bytes(changed if isinstance(changed, bytes) else changed.encode())
        monkeypatch.setattr(sys, "argv", ["eval.py", "-c", str(run_directory / "config.yaml"), *words])
        code = 0
        try:
            eval_program.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield evaluate
    (run_directory / "config.yaml").write_text(text)


def assert_refused(result, part: str) -> None:
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and len(err) < 1500 and err.startswith("error: "), result
    assert part in err


#### THE CONFIG OF A RUN


def with_value(key: str, value) -> object:
    """Return a function that changes one key in the text of a config. value: None deletes it"""

    def change(text: str) -> str:
        data = yaml.safe_load(text)
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        node[last] = value
        return yaml.safe_dump(data, sort_keys=False)

    return change


def without(key: str):
    def change(text: str) -> str:
        config = OmegaConf.create(text)
        parent, _, last = key.rpartition(".")
        del (OmegaConf.select(config, parent) if parent else config)[last]
        return OmegaConf.to_yaml(config)

    return change


def bombed(text: str) -> str:
    """Nine lists of nine lists ...: 9^9 values in memory, in 300 bytes."""
    names = "abcdefghij"
    lines = [
        f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]" for before, name in zip(names, names[1:], strict=False)
    ]
    return text + "a: &a [x,x]\n" + "\n".join(lines) + "\n"


SAVED = {
    "a null model": (with_value("model", None), "is not a run's config"),
    "a null loss": (with_value("loss", None), "is not a run's config"),
    "a null wandb": (with_value("wandb", None), "wandb=null is not a dictionary"),
    "null optimizer_kwargs": (with_value("optimizer_kwargs", None), "optimizer_kwargs=null is not a dictionary"),
    "null dataset_paths": (with_value("dataset_paths", None), "dataset_paths=null is not a dictionary"),
    "a null keep": (with_value("dataset.demo.keep", None), "dataset.demo.keep=null is not a dictionary"),
    "a null where": (with_value("dataset.demo.keep.where", None), "keep.where=null is not a dictionary"),
    "an architecture that is text": (with_value("model.architecture", "llama"), "a dictionary of fields, or null"),
    "a null size": (with_value("model.architecture.hidden_size", None), "model.architecture describes no model"),
    "no lr": (without("lr"), "lr is missing, which every run has"),
    "no model.load_from": (without("model.load_from"), "model.load_from is missing, which every run has"),
    "no exp_name": (without("exp_name"), "exp_name is missing"),
    "no loss.trainer": (without("loss.trainer"), "loss.trainer is missing"),
    "an unknown key": (with_value("topp", 1), "topp=1: there is no key topp; did you mean top_p?"),
    "an unknown key of the model": (with_value("model.max_len", 1), "did you mean model.max_length?"),
    "an unknown key of the loss": (with_value("loss.bta", 1), "did you mean loss.beta?"),
    "an unknown key of a dataset": (with_value("dataset.shp.surce", 1), "did you mean dataset.shp.source?"),
    "a number of 400 digits": (with_value("seed", 10**400), "seed=a number of more than 300 digits is too large"),
    "an infinite lr": (with_value("lr", float("inf")), "lr=inf must be"),
    "an interpolation": (with_value("loss", "${nokey}"), "is not a run's config"),
    "an interpolation of a size": (with_value("model.architecture.vocab_size", "${nokey}"), "'nokey' not found"),
    "a loop": (with_value("samples_dir", "${samples_dir}"), "samples_dir=${samples_dir}"),
    "NUL": (with_value("exp_name", "a\0b"), "has characters that are not text"),
    "tabs": (lambda text: text.replace("  ", "\t"), "cannot be read (line "),
    "one text": (lambda text: "'true'\n", "it holds one value alone: 'true'"),
    "a cut line": (lambda text: text[: text.index("max_length") + 12], "its last line has no end"),
    "a cut between lines": (lambda text: text[: text.index("  max_length")], "model.max_length is missing"),
    "a cut in a dataset": (lambda text: text[: text.rindex("    prompt_as")], "is missing, which every run has"),
    "nothing": (lambda text: "", "cannot be read (it is cut"),
    "a list": (lambda text: "- a\n- b\n", "is not a run's config"),
    "another encoding": (lambda text: text.encode("utf-16"), "not UTF-8 text"),
    "binary": (lambda text: bytes(range(256)) * 9, "cannot be read (not UTF-8 text"),
    "a key twice": (lambda text: text + "lr: 1\n", "found duplicate key lr"),
    "an object of Python": (lambda text: text + "a: !!python/object/apply:os.getcwd []\n", "cannot be read (line "),
    "a bomb": (bombed, "an alias *a, which no run writes"),
    "depth": (lambda text: text + "a: " + "[" * 20_000 + "]" * 20_000 + "\n", "more than 30 levels of nesting"),
    "length": (lambda text: text + "# " + "x" * 2**20 + "\n", "it has more than 1048576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_a_broken_config_of_a_run(evaluate, name):
    """Many of these ended in a traceback, or were accepted: a saved config was not checked for its keys."""
    change, part = SAVED[name]
    assert_refused(evaluate(change), part)


def test_a_config_that_is_whole(evaluate):
    """The same run is accepted as it was written, with Windows line ends, and with a byte order mark."""
    for change in (lambda text: text, lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text):
        assert evaluate(change)[::2] == (0, "")


def test_newer_keys_get_their_defaults_in_every_section(evaluate):
    """Before, only keys of the root and of the loss did; a run without model.export_dtype ended in a traceback."""

    def older(text: str) -> str:
        for key in "chat_template sampler_url loss.beta model.export_dtype wandb.entity dataset.shp".split():
            text = without(key)(text)
        return text

    code, out, err = evaluate(older)
    assert (code, err) == (0, "")
    assert out == (
        "the run is older than some keys, which get their defaults: chat_template=auto, dataset.shp=..., "
        "loss.beta=0.1, model.export_dtype=null, sampler_url=null, wandb.entity=null\n"
    )


WORDS = {
    "model=null": "model=null is not a dictionary",
    "loss=kto": "loss=kto is not a dictionary",
    "lr=[" + "[" * 3000: "cannot be read",
    "model.architecture.hidden_size=${nokey}": "'nokey' not found",
    "optimizer_kwargs.weight_decay=${nokey}": "'nokey' not found",
    "optimizer_kwargs.weight_decay=${loss.name}": "cannot train",
    "model.architecture.num_attention_heads=0": "model.architecture describes no model",
    "++model.architecture.num_key_value_heads=3": "num_attention_heads=8 is not a multiple of num_key_value_heads=3",
    "model.architecture.num_hidden_layers=1000000000": "is more than 10000",
    "exp_name=" + "x" * 300: "is too long: a name has at most 200 bytes",
    "exp_name=" + "é" * 101: "is too long: a name has at most 200 bytes",
    "exp_name='a/'": "has empty parts",
    "exp_name=a/./b": "has empty parts",
    "samples_dir=" + "x" * 300: "is too long: a name has at most 255 bytes",
    "samples_dir=config.yaml/x": "is not a directory",
}


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word[:40])
def test_broken_overrides(evaluate, tmp_path, word):
    (tmp_path / "config.yaml").write_text("")
    assert_refused(evaluate(lambda text: text, word), WORDS[word])


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_samples_replace_files_alone(evaluate, tmp_path, kind):
    """`eval.py --output /dev/null` renamed the device to /dev/null.bak-1, and a directory likewise."""
    path = tmp_path / "there"
    os.mkdir(path) if kind == "directory" else os.mkfifo(path)
    assert_refused(evaluate(lambda text: text, "-o", str(path)), "is not a file, but a directory or a device")
    assert os.path.lexists(path) and not glob.glob(f"{path}.bak*")


def test_what_is_checked_is_what_the_run_reads(evaluate, run_directory):
    """An interpolation in the architecture or in optimizer_kwargs reached transformers and torch as its text."""
    config = saved_config.read(str(run_directory / "config.yaml"))
    config = saved_config.overrides(config, ["model.architecture.intermediate_size=${model.architecture.hidden_size}"])
    import dataloaders
    import trainers
    from halos.config import validate

    validate(config, trainers, dataloaders)
    assert OmegaConf.to_container(config.model.architecture)["intermediate_size"] == 32
    assert base.load_config(config).intermediate_size == 32


def test_a_message_for_the_terminal_has_no_control_characters(capsys):
    """A name with an escape sequence could change the terminal's colours or title."""
    with pytest.raises(SystemExit), report_user_errors():
        raise UserError("a\x1b[31mb\0c\n d\ud83d é")
    assert capsys.readouterr().err == "error: a\\x1b[31mb\\x00c d\\ud83d é\n"


def test_the_length_of_names():
    """Endings have their place: with 55 bytes spare, names of 200 bytes are the longest, counted as UTF-8."""
    assert rules.problem_of_path("x" * 255) is None and rules.problem_of_path("a/" + "x" * 200, 55) is None
    for path, spare in (("x" * 256, 0), ("x" * 201, 55), ("é" * 101, 55), ("a/" * 2000, 0)):
        assert "is too long" in rules.problem_of_path(path, spare)
    assert "control characters" in rules.problem_of_path("a\tb")


#### WEIGHTS

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234\n"
WEIGHT = "model.layers.0.mlp.down_proj.weight"
LENGTHS = "model.max_length=96", "model.max_prompt_length=80"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_lm("llama", vocab_size=576, eos_token_id=0, pad_token_id=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def spoiled(whole_base, tmp_path):
    """Copy the base and spoil it."""

    def spoil(change):
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole_base, folder)
        change(folder)
        return make_config(tmp_path, "model=base_model", "model.name=x", f"model.name_or_path={folder}", *LENGTHS)

    return spoil


def tensors(change):
    """Return a function that changes the tensors of a folder's file of weights."""

    def spoil(folder):
        save_file(change(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})

    return spoil


def replaced(name: str, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(change):
    """Return a function that changes the header of a folder's file of weights, and leaves the rest."""

    def spoil(data: bytes) -> bytes:
        (n,) = struct.unpack("<Q", data[:8])
        text = json.dumps(change(json.loads(data[8 : 8 + n]))).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + n :]

    return replaced(FILE, spoil)


def sharded(change=lambda index: index, lost: str = ""):
    """Return a function that divides the weights into two files, and changes their index."""

    def spoil(folder):
        weights = load_file(folder / FILE)
        os.remove(folder / FILE)
        names = sorted(weights)
        halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, own in halves.items():
            if file != lost:
                save_file({name: weights[name] for name in own}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, own in halves.items() for name in own}}
        (folder / INDEX).write_text(json.dumps(change(index)))

    return spoil


def field(name: str, value):
    def change(data: bytes) -> bytes:
        return json.dumps(json.loads(data) | {name: value}).encode()

    return replaced("config.json", change)


KINDS = (torch.bool, torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn)
WEIGHTS = {
    **{
        f"a weight of kind {kind}": (
            tensors(lambda state, kind=kind: state | {WEIGHT: state[WEIGHT].to(kind)}),
            "which is no kind of weight; give a checkpoint that is not quantized",
        )
        for kind in KINDS
    },
    "no byte": (replaced(FILE, lambda data: b""), "copy or download all of them again"),
    "half": (replaced(FILE, lambda data: data[: len(data) // 2]), "copy or download all of them again"),
    "a byte less": (replaced(FILE, lambda data: data[:-1]), "copy or download all of them again"),
    "a flipped bit": (replaced(FILE, lambda data: bytes([data[0] ^ 64]) + data[1:]), "copy or download"),
    "a deep header": (replaced(FILE, lambda data: struct.pack("<Q", 90_000) + b"[" * 90_000), "cannot be loaded ("),
    "a pointer": (replaced(FILE, lambda data: LFS), f"{FILE} is a pointer of git-lfs"),
    "a pointer as config": (replaced("config.json", lambda data: LFS), "config.json is a pointer of git-lfs"),
    "a directory": (lambda folder: (os.remove(folder / FILE), os.mkdir(folder / FILE)), f"it has no {FILE}"),
    "no weights": (lambda folder: os.remove(folder / FILE), f"it has no {FILE}"),
    "another kind in the header": (
        header(lambda names: names | {WEIGHT: names[WEIGHT] | {"dtype": "I32"}}),
        "of kind I32, which is no kind of weight",
    ),
    "another shape": (tensors(lambda state: state | {WEIGHT: state[WEIGHT].T.contiguous()}), "of shape (48, 32), but"),
    "no values": (tensors(lambda state: state | {WEIGHT: state[WEIGHT][:0]}), "of shape (0, 48), but"),
    "other names": (tensors(lambda state: {f"x.{name}": one for name, one in state.items()}), "lacks the weight lm_"),
    "a lost shard": (sharded(lost="model-1.safetensors"), "cannot be loaded ("),
    "a wrong shard": (
        sharded(lambda index: index | {"weight_map": dict.fromkeys(index["weight_map"], "model-1.safetensors")}),
        "which the index says it has",
    ),
    "an index that is null": (sharded(lambda index: None), "has no weight_map"),
    "an index that is deep": (
        lambda folder: (sharded()(folder), (folder / INDEX).write_text("[" * 90_000)),
        "More than 100 levels of nesting",
    ),
    "a config that is null": (replaced("config.json", lambda data: b"null"), "cannot be loaded ("),
    "a config that is deep": (replaced("config.json", lambda data: b"[" * 90_000), "cannot be loaded ("),
    "no heads": (field("num_attention_heads", 0), "cannot be loaded ("),
    "a billion blocks": (field("num_hidden_layers", 10**9), "num_hidden_layers=1000000000 is more than 10000"),
    "a third block": (field("num_hidden_layers", 3), "lacks the weight model.layers.2"),
    "sizes that are text": (field("hidden_size", "x"), "cannot be loaded (Validation error for field 'hidden_size'"),
    "another architecture": (field("model_type", "gpt2"), "lacks the weight"),
    "an activation that is not known": (field("hidden_act", "foo"), "cannot be loaded ("),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_broken_weights_of_a_base(spoiled, name, capfd):
    """They are refused by their headers. Before, the data was read first, and integers were cast without a word."""
    spoil, part = WEIGHTS[name]
    config = spoiled(spoil)
    with pytest.raises(UserError) as error:
        loading.check_load_from(config)
    assert part in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "change",
    [
        sharded(),
        tensors(lambda state: {name: one.half() for name, one in state.items()}),
        tensors(lambda state: state | {"model.layers.0.attention.bias": torch.ones(3, dtype=torch.bool)}),
        lambda folder: (torch.save(load_file(folder / FILE), folder / "pytorch_model.bin"), os.remove(folder / FILE)),
    ],
    ids=["two files", "float16", "a mask of an old version", "pytorch_model.bin"],
)
def test_whole_weights_of_a_base(spoiled, change):
    config = spoiled(change)
    loading.check_load_from(config)
    assert loading.load_lm(config, torch.float32).num_parameters() > 0


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


POLICIES = {
    "integers": (lambda state: {"state": state | {WEIGHT: state[WEIGHT].int()}}, "of kind torch.int32"),
    "complex numbers": (lambda state: {"state": state | {WEIGHT: state[WEIGHT] + 0j}}, "of kind torch.complex64"),
    "text": (lambda state: {"state": state | {WEIGHT: "x"}}, f"{WEIGHT} is not a dense tensor"),
    "sparse": (lambda state: {"state": state | {WEIGHT: state[WEIGHT].to_sparse()}}, "is not a dense tensor"),
    "no state": (lambda state: {"state": None}, "is damaged, or not a policy.pt of this project"),
    "a tensor": (lambda state: state[WEIGHT], "is damaged, or not a policy.pt of this project"),
    "code": (lambda state: {"state": Evil()}, "is damaged, or not a policy.pt of this project"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_broken_policy_pt(run_directory, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    change, part = POLICIES[name]
    state = torch.load(run_directory / "LATEST" / "policy.pt", weights_only=True)["state"]
    torch.save(change(state), tmp_path / "policy.pt")
    with pytest.raises(UserError) as error:
        loading.check_load_from(make_config(tmp_path, *SMALL, "model.load_from=policy.pt"))
    assert part in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists("evil")


#### TOKENIZERS AND TEMPLATES

TEMPLATES = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ cycler.__init__.__globals__.os.mkdir('evil') }}": "access to attribute '__init__' of 'type' object is unsafe",
    "{{ messages.append(1) }}": "access to attribute 'append' of 'list' object is unsafe",
    "{{ 1 / 0 }}": "division by zero",
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% include '/etc/passwd' %}": "no loader for this environment",
    "{% for": "unexpected",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("place", ["file", "tokenizer"])
def test_a_template_runs_in_a_sandbox(tmp_path, monkeypatch, template, place):
    """A template that reaches for Python's classes, or cannot be rendered, is refused when the tokenizer loads."""
    monkeypatch.chdir(tmp_path)
    words = ["chat_template=mine.jinja"]
    (tmp_path / "mine.jinja").write_text(template)
    if place == "tokenizer":
        tokenizer().save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
        words = [f"model.tokenizer_name_or_path={tmp_path / 'tokenizer'}"]
    with pytest.raises(UserError) as error:
        base.load_tokenizer(make_config(tmp_path, *SMALL, *words))
    assert TEMPLATES[template] in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists("evil")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", LFS, b"[" * 90_000], ids=lambda content: str(content[:9]))
def test_a_broken_tokenizer(spoiled, file, content):
    with pytest.raises(UserError) as error:
        base.load_tokenizer(spoiled(replaced(file, lambda data: content)))
    assert "cannot be loaded (" in str(error.value) and "\n" not in str(error.value)


#### ROWS

ROWS = {
    '{"prompt": ' + "[" * 10_000 + "]" * 10_000 + "}": "More than 100 levels of nesting",
    "[" * 90_000: "More than 100 levels of nesting",
    '{"prompt": ' + '{"a":' * 101 + "1" + "}" * 101 + "}": "More than 100 levels of nesting",
    '{"prompt": ' + "9" * 5000 + "}": "Exceeds the limit (4300 digits)",
    '{"prompt": "a\0"}': "Invalid control character",
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:20])
def test_json_that_python_cannot_hold(tmp_path, row, suffix):
    """A RecursionError of the decoder, or a ValueError about digits, was a traceback."""
    path = tmp_path / f"data.{suffix}"
    path.write_text(row if suffix == "jsonl" else f"[{row}]")
    with pytest.raises(UserError, match=f"{path}:1: malformed JSON") as error:
        list(datafiles.read_rows(str(path)))
    assert ROWS[row] in str(error.value)


def test_json_of_a_hundred_levels_is_read(tmp_path):
    value = "[" * 99 + "]" * 99
    assert datafiles.from_json(f' {{"a": {value}}} ') == {"a": json.loads(value)}
    for text in ("1 2", "", "[1,]"):
        with pytest.raises(json.JSONDecodeError):
            datafiles.from_json(text)


#### CODE THAT IS NOT OURS


def calls() -> list[tuple[str, ast.Call]]:
    """Return all calls in the project, each with its place."""
    found = []
    for path in glob.glob(os.path.join(PROJECT, "**", "*.py"), recursive=True):
        if not re.search(r"/(\.venv|build|site-packages)/", path):
            with open(path) as file:
                nodes = ast.walk(ast.parse(file.read()))
            found += [(f"{path}:{node.lineno}", node) for node in nodes if isinstance(node, ast.Call)]
    return found


def test_nothing_runs_the_code_of_a_file():
    """torch.load reads weights only, no remote code is trusted unless the user says so, and YAML is safe YAML."""
    names = []
    for place, call in calls():
        name = ast.unparse(call.func)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        names.append(name)
        if name.endswith("torch.load"):
            assert given.get("weights_only") == "True", place
        assert given.get("trust_remote_code") != "True" and given.get("allow_pickle") != "True", place
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load"), place
        if name == "pickle.loads":  # what a process gives its own workers
            assert "halos/launch.py" in place
    assert names.count("torch.load") > 5
    assert make_config("").trust_remote_code is False


def test_templates_are_rendered_by_transformers_alone():
    """Its environment is a sandbox; one of jinja2's own would not be."""
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template("x")  # private: there is no public way to the environment
    assert compiled.environment.sandboxed
    for path in glob.glob(os.path.join(PROJECT, "halos", "*.py")):
        with open(path) as file:
            assert "jinja2" not in file.read(), path
