"""The config that a command gives, and the error message if the command is wrong.

`run("lr=abc")` does what `python train.py lr=abc` does until validate() has accepted the config. `check("lr=abc")` is
faster, because it leaves out Hydra's command line (half a second). Trainers and dataloaders are stubs, so that only the
configuration is tested; two tests at the end use the real ones.
"""

import functools
import glob
import os
import re
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

import halos.config_keys
import trainers
from halos import dataset_specs, rules
from halos.commands import hydra_main, report_user_errors
from halos.components import component, find
from halos.config import validate
from halos.errors import UserError
from halos.saved_config import add_new_keys, overrides

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = os.path.join(PROJECT, "config")
LOSSES = ("cdpo", "dpo", "kto", "ppo", "sft", "slic")  # the project's own; NAMES has all files of config/loss
NAMES = sorted(name[:-5] for name in os.listdir(f"{CONFIG}/loss"))
YAMLS = sorted(glob.glob(f"{CONFIG}/**/*.yaml", recursive=True))


def stub(name: str, base: str, **formats: str) -> types.ModuleType:
    module = types.ModuleType(name)
    setattr(module, base, type(base, (), {"data_format": None}))
    for cls, data_format in formats.items():
        setattr(module, cls, type(cls, (getattr(module, base),), {"data_format": data_format}))
    return module


TRAINERS = stub(
    "trainers",
    "BasicTrainer",
    SFTTrainer="sft",
    DPOTrainer="paired",
    CDPOTrainer="paired",
    SLiCTrainer="paired",
    KTOTrainer="unpaired",
    PPOTrainer="unpaired",
    AnyTrainer=None,
)
for trainer in ("DPOTrainer", "CDPOTrainer", "SLiCTrainer", "KTOTrainer", "PPOTrainer"):
    for demand in ("needs", "rules"):
        setattr(getattr(TRAINERS, trainer), demand, getattr(getattr(trainers, trainer), demand))
TRAINERS.helper = print
DATALOADERS = stub(
    "dataloaders",
    "DataLoader",
    SFTDataLoader="sft",
    PairedPreferenceDataLoader="paired",
    UnpairedPreferenceDataLoader="unpaired",
)
NAMED = "demo, helpsteer, hh, hh_harmless, hh_helpful, nectar, oasst, shp, ultrachat, ultrafeedback"
for dataset in ["demo", "shp", "hh", "hh_helpful", "hh_harmless", "oasst", "local"]:
    setattr(DATALOADERS, f"get_{dataset}", lambda split: None)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Type every command in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command through Hydra: returns code, out, err, and the configs of the jobs that were accepted."""
    # get_mode looks for `hydra.mode=`, which takes a third of the time; Hydra has no public way to skip it.
    monkeypatch.setattr(Hydra, "get_mode", lambda *args, **kwargs: None)

    def run(*words, task=lambda config: validate(config, TRAINERS, DATALOADERS)):
        configs = []

        @hydra_main(CONFIG, "config")
        def main(config):
            task(config)
            configs.append(config)

        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert "HYDRA_FULL_ERROR" not in os.environ
        return SimpleNamespace(code=code, out=out, err=err, configs=configs)

    return run


@functools.cache
def written(*groups):
    """Return the config of the YAML files. Cached, because Hydra needs 0.15 s for it."""
    with initialize_config_dir(CONFIG, version_base="1.3"):
        return compose("config", list(groups))


@pytest.fixture
def check(monkeypatch):
    """Check a command without Hydra's command line: returns the config that validate() accepts, or raises."""

    def check(*words):
        groups = [word for word in words if re.match("(loss|model)=", word)]
        config = written(*groups).copy()
        monkeypatch.setattr(halos.config_keys, "as_written", lambda: written(*groups))
        for word in OverridesParser.create().parse_overrides([word for word in words if word not in groups]):
            OmegaConf.update(config, word.key_or_group, word.value(), merge=True, force_add=True)
        validate(config, TRAINERS, DATALOADERS)
        return config

    return check


@pytest.fixture
def refusal(check):
    """Return the error message for a command that is refused."""

    def refusal(*words):
        with pytest.raises(UserError) as error:
            check(*words)
        return str(error.value)

    return refusal


#### DEFAULTS AND FILES


def test_defaults_of_a_real_model_are_those_of_the_original(check):
    """The numbers are those that the published models were trained with. A new key needs a line here."""
    config = OmegaConf.to_container(check("model=llama7b"), resolve=True)
    assert ", ".join(config.pop("dataset")) == NAMED
    assert config == {
        "seed": 1,
        "exp_name": "sft_llama7b",
        "mode": "train",
        "cache_dir": ".cache",
        "datasets": ["demo"],
        "strict_data": False,
        "chat_template": "auto",
        "dataset_paths": dict.fromkeys(["shp", "hh", "hh_helpful", "hh_harmless", "oasst"]),
        "n_epochs": 1,
        "n_examples": None,
        "group_prompts": False,
        "lr": 5e-7,
        "optimizer": "RMSprop",
        "optimizer_kwargs": {},
        "lr_scheduler": "constant",
        "warmup_steps": 150,
        "eval_every": 20000,
        "n_eval_examples": 512,
        "do_first_eval": True,
        "save_every": None,
        "save_every_minutes": 30,
        "keep_checkpoints": 2,
        "resume": False,
        "on_nonfinite": "stop",
        "cache_reference_logps": True,
        "intermediate_checkpoints": False,
        "overwrite": False,
        "minimum_log_interval_secs": 1.0,
        "nproc_per_node": None,
        "use_fsdp": True,
        "hsdp_replicas": None,
        "n_samples": 128,
        "top_p": 0.95,
        "temperature": 1.0,
        "samples_dir": "samples",
        "sampler": "hf",
        "sampler_url": None,
        "wandb": {"enabled": False, "entity": None, "project": "archangel"},
        "trust_remote_code": False,
        "loss": {
            "name": "sft",
            "trainer": "SFTTrainer",
            "dataloader": "SFTDataLoader",
            "use_reference_model": False,
        },
        "model": {
            "name": "llama7b",
            "name_or_path": "huggyllama/llama-7b",
            "tokenizer_name_or_path": None,
            "architecture": None,
            "load_from": None,
            "block_name": "LlamaDecoderLayer",
            "batch_size": 32,
            "gradient_accumulation_steps": 1,
            "eval_batch_size": 16,
            "policy_dtype": "float32",
            "fsdp_policy_mp": None,
            "reference_dtype": None,
            "export_dtype": None,
            "max_length": 2048,
            "max_prompt_length": 1024,
            "max_tokens_per_forward": 16384,
            "max_grad_norm": 10.0,
            "v_head_max_grad_norm": 0.10,
            "activation_checkpointing": True,
            "compile": False,
            "packing": "auto",
            "logps": "fused",
        },
    }


PAIRED, UNPAIRED = "PairedPreferenceDataLoader", "UnpairedPreferenceDataLoader"


@pytest.mark.parametrize(
    ("loss", "trainer", "loader", "reference", "hyperparameters"),
    [
        ("dpo", "DPOTrainer", PAIRED, True, {"beta": 0.1}),
        ("cdpo", "CDPOTrainer", PAIRED, True, {"beta": 0.1, "epsilon": 0.2}),
        (
            "kto",
            "KTOTrainer",
            UNPAIRED,
            True,
            {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        ),
        ("slic", "SLiCTrainer", PAIRED, False, {"beta": 1.0, "lambda_coef": 0.1}),
    ],
)
def test_losses(check, loss, trainer, loader, reference, hyperparameters):
    names = {"name": loss, "trainer": trainer, "dataloader": loader, "use_reference_model": reference}
    assert check(f"loss={loss}").loss == names | hyperparameters


def test_ppo(check):
    """PPO has the original's values, except for its KL estimator: k3 cannot be negative, the original's k1 can."""
    assert check("loss=ppo").loss == {
        "name": "ppo",
        "trainer": "PPOTrainer",
        "dataloader": UNPAIRED,
        "use_reference_model": True,
        "use_value_head": True,
        "ppo_epochs": 1,
        "cliprange": 0.5,
        "lam": 0.95,
        "gamma": 0.99,
        "critic_coef": 0.01,
        "KL_coef": 0.1,
        "kl_estimator": "k3",
    }


def test_models_differ_in_names_only(check):
    """Every published model has the defaults of base_model.yaml. Only tiny has its own."""
    repositories = {
        "pythia1-4b": ("EleutherAI/pythia-1.4b", "GPTNeoXLayer"),
        "pythia2-8b": ("EleutherAI/pythia-2.8b", "GPTNeoXLayer"),
        "pythia6-9b": ("EleutherAI/pythia-6.9b", "GPTNeoXLayer"),
        "pythia12-0b": ("EleutherAI/pythia-12b", "GPTNeoXLayer"),
        "llama7b": ("huggyllama/llama-7b", "LlamaDecoderLayer"),
        "llama13b": ("huggyllama/llama-13b", "LlamaDecoderLayer"),
        "llama30b": ("huggyllama/llama-30b", "LlamaDecoderLayer"),
        "llama65b": ("huggyllama/llama-65b", "LlamaDecoderLayer"),
    }
    files = {os.path.basename(path)[:-5] for path in glob.glob(f"{CONFIG}/model/*.yaml")}
    assert files == {*repositories, "base_model", "tiny"}
    common = OmegaConf.to_container(written("model=llama7b").model)
    for name, (repository, block) in repositories.items():
        config = check(f"model={name}")
        assert config.model == common | {"name": name, "name_or_path": repository, "block_name": block}
        assert (config.lr, config.optimizer) == (5e-7, "RMSprop")


def test_tiny_sets_keys_of_the_root_and_the_command_line_sets_them_again(check):
    tiny = check()
    assert (tiny.loss.name, tiny.model.name, tiny.exp_name, tiny.datasets) == ("sft", "tiny", "sft_tiny", ["demo"])
    assert tiny.optimizer == "AdamW" and tiny.lr > 5e-7
    assert tiny.model.architecture.model_type == "llama" and tiny.model.name_or_path is None
    again = written("lr=0.25", "optimizer=SGD", "eval_every=128", "model.max_length=32")
    assert (again.lr, again.optimizer, again.eval_every) == (0.25, "SGD", 128)
    assert (again.model.max_length, again.model.batch_size) == (32, tiny.model.batch_size)


OURS = [path for path in YAMLS if not path.startswith(f"{CONFIG}/loss/") or os.path.basename(path)[:-5] in LOSSES]


@pytest.mark.parametrize("path", OURS, ids=[os.path.relpath(path, CONFIG) for path in OURS])
def test_every_key_has_a_comment(path):
    """Every key in the project's own YAML files has a comment. A researcher's own YAML need not have any."""
    text_indent = None  # indent of the key whose value is a block of text, while inside the block
    for number, line in enumerate(open(path).read().splitlines(), start=1):
        indent = len(line) - len(line.lstrip())
        if text_indent is not None and (not line.strip() or indent > text_indent):
            continue
        text_indent = None
        key = re.match(r"\s*([\w-]+):", line)
        if key and key[1] != "defaults":
            assert re.search(r"\S\s+# \w|:\s+# \w", line), f"{path}:{number} has no comment: {line}"
            text_indent = indent if re.search(r":\s+\|", line) else None


def test_a_new_loss_brings_its_own_keys(run, tmp_path):
    """The keys of a new loss's YAML are known, and no others. A key with a number accepts any number.

    The rules of other losses do not apply: gamma=3 is accepted, although PPO's gamma is at most 1.
    """
    os.makedirs(tmp_path / "mine/loss")
    (tmp_path / "mine/loss/ipo.yaml").write_text(
        "name: ipo\ntrainer: AnyTrainer\ndataloader: PairedPreferenceDataLoader\nuse_reference_model: true\ntau: 1\n"
        "gamma: 0.5  # of its own, and no matter for PPO's rule of a gamma\n"
    )
    (config,) = run("--config-dir", "mine", "loss=ipo", "loss.tau=0.5", "loss.gamma=3").configs
    assert (config.loss.tau, config.loss.gamma) == (0.5, 3)
    not_a_number = run("--config-dir", "mine", "loss=ipo", "loss.tau=nan")
    assert not_a_number.err == "error: loss.tau=nan is not a number; give one\n"
    unknown = run("--config-dir", "mine", "loss=ipo", "++loss.tua=0.5")
    assert unknown.err == "error: loss.tua=0.5: there is no key loss.tua; did you mean loss.tau?\n"


#### COMMANDS OF SEED.md


def test_the_walk_through(run):
    result = run(
        *"loss=kto model=llama7b datasets=[shp,hh,oasst] exp_name=kto_llama7b mode=train ++cache_dir=c".split()
    )
    (config,) = result.configs
    assert (config.loss.trainer, config.model.name_or_path) == ("KTOTrainer", "huggyllama/llama-7b")
    assert (config.datasets, config.exp_name) == (["shp", "hh", "oasst"], "kto_llama7b")
    assert (config.mode, config.cache_dir) == ("train", "c")


def test_load_from(check, tmp_path):
    """`model.load_from` takes an existing policy.pt, by its full path or its path in cache_dir, and any hub name."""
    os.makedirs(tmp_path / "models/sft_llama7b/LATEST")
    policy = tmp_path / "models/sft_llama7b/LATEST/policy.pt"
    policy.touch()
    for path in [str(policy), "sft_llama7b/LATEST/policy.pt", "ContextualAI/archangel_sft_llama7b"]:
        words = ["loss=kto", "model=llama7b", f"++cache_dir={tmp_path}/models", f"++model.load_from={path}"]
        assert check(*words).model.load_from == path


def test_the_node_config_is_the_root(run, refusal):
    """`config.KEY` is KEY, as the FAQ has it: with one plus sign or two, and for keys of a group."""
    (config,) = run("++config.intermediate_checkpoints=true", "+config.model.batch_size=128").configs
    assert config.intermediate_checkpoints is True and config.model.batch_size == 128 and "config" not in config
    assert refusal("++config.overwrit=true") == "overwrit=true: there is no key overwrit; did you mean overwrite?"


@pytest.mark.parametrize(
    "words",
    [
        "n_epochs=null n_examples=640",
        "++optimizer_kwargs.weight_decay=0.1",
        "optimizer_kwargs={} optimizer=Adafactor",
        "++optimizer_kwargs={betas:[0.9,0.95],fused:true} lr_scheduler=cosine",
        "++model.architecture.num_key_value_heads=2 ++model.architecture.tie_word_embeddings=true",
        "model=base_model model.name=qwen model.name_or_path=Qwen/Qwen2.5-0.5B",
        "model.architecture=null model.name_or_path=Qwen/Qwen2.5-0.5B model.tokenizer_name_or_path=null",
        "++loss.average_log_prob=true lr=0 temperature=0 top_p=1",
        "model.packing=true model.logps=plain model.max_grad_norm=inf model.policy_dtype=bfloat16",
        "model.export_dtype=float16 model.fsdp_policy_mp=float32 model.reference_dtype=bfloat16",
        "loss.trainer=AnyTrainer loss.dataloader=UnpairedPreferenceDataLoader",
        "exp_name=suite/kto_${lr}",
    ],
)
def test_accepted(check, words):
    check(*words.split())


#### REFUSED COMMANDS

# (the words of a command, the error message).
REFUSED_BY_HYDRA = [
    (
        "loss.bta=0.2 loss=kto",
        "loss.bta=0.2: there is no key loss.bta; did you mean loss.beta?",
    ),
    (
        "wandb={projekt:x}",
        "wandb.projekt={projekt:x}: there is no key wandb.projekt; did you mean wandb.project?",
    ),
    (
        "config.lr=1",
        "config.lr=1: there is no key config.lr; did you mean lr?",
    ),
    (
        "~lr",
        "lr was removed from the config, and every run needs it; give it a value instead",
    ),
    (
        "~foo",
        "~foo: there is no key foo; leave it out",
    ),
    (
        "+lr=1",
        "+lr: there is such a key already; leave out the +",
    ),
    (
        "optimizer_kwargs.eps=1",
        "optimizer_kwargs.eps=1 adds a key, which takes two plus signs; write ++optimizer_kwargs.eps=1",
    ),
    (
        "hydra.foo=1",
        "Could not override 'hydra.foo': Key 'foo' not in 'HydraConf'",
    ),
    (
        "loss=kot",
        f"loss=kot: there is no config/loss/kot.yaml; did you mean 'kto'? (one of: {', '.join(NAMES)})",
    ),
    (
        "model=lama7b",
        "model=lama7b: there is no config/model/lama7b.yaml; did you mean 'llama7b'? (one of: "
        "base_model, llama13b, llama30b, llama65b, llama7b, pythia1-4b, pythia12-0b, pythia2-8b, "
        "pythia6-9b, tiny)",
    ),
    (
        "los=kto",
        "los=kto: there is no key los; did you mean loss?",
    ),
    (
        "+loss=kto",
        "+loss: there is a loss already; leave out the +",
    ),
    (
        "lr",
        "lr is not key=value; write a list as key=[a,b], and quote odd text: 'key=\"a, b\"'",
    ),
    (
        "datasets=shp,hh",
        "datasets=shp,hh has several values; write datasets=[shp,hh] for a list, or add -m for a run with each",
    ),
    (
        "lr=range(1,3)",
        "lr=range(1,3) stands for several runs; add -m to run them",
    ),
    (
        "--lr 1e-6",
        "--lr is not a flag; keys have no dashes (lr=1e-6), and --hydra-help lists the flags",
    ),
    (
        "loss=kto -m lr=1",
        "lr=1 stands apart from the other key=value words; put flags such as -m before all of them",
    ),
    (
        "--cfg job -m",
        "Only one of --run, --multirun, --cfg, --info and --shell_completion can be specified",
    ),
]

REFUSED = [
    (
        "++batch_size=8",
        "batch_size=8: there is no key batch_size; did you mean model.batch_size?",
    ),
    (
        "++lrr=1",
        "lrr=1: there is no key lrr; did you mean lr?",
    ),
    (
        "++loss.bta=0.2 loss=kto",
        "loss.bta=0.2: there is no key loss.bta; did you mean loss.beta?",
    ),
    (
        "+modle.batch_size=8",
        "modle.batch_size=8: there is no key modle.batch_size; did you mean model.batch_size?",
    ),
    (
        "model.lr=1",
        "model.lr=1: there is no key model.lr; did you mean lr?",
    ),
    (
        "++zzz=1",
        "zzz=1: there is no key zzz; `python train.py --cfg job` shows the keys",
    ),
    (
        "model=base_model",
        "model.name=??? has no default; add model.name=VALUE to the command, or set it in its YAML file",
    ),
    (
        "lr=abc",
        "lr=abc must be a number of at least 0",
    ),
    (
        "lr=",
        "lr= must be a number of at least 0",
    ),
    (
        "lr=true",
        "lr=true must be a number of at least 0",
    ),
    (
        "lr=-1e-3",
        "lr=-0.001 must be a number of at least 0",
    ),
    (
        "lr=nan",
        "lr=nan must be a number of at least 0",
    ),
    (
        "lr=inf",
        "lr=inf must be a number of at least 0",
    ),
    (
        "top_p=0",
        "top_p=0 must be a number above 0 and at most 1",
    ),
    (
        "top_p=1.5",
        "top_p=1.5 must be a number above 0 and at most 1",
    ),
    (
        "temperature=-0.1",
        "temperature=-0.1 must be a number of at least 0",
    ),
    (
        "seed=-1",
        "seed=-1 must be a whole number of at least 0",
    ),
    (
        "warmup_steps=1.5",
        "warmup_steps=1.5 must be a whole number of at least 0",
    ),
    (
        "n_samples=0",
        "n_samples=0 must be a whole number of at least 1",
    ),
    (
        "n_epochs=abc",
        "n_epochs=abc must be a whole number of at least 1, or null",
    ),
    (
        "n_examples=0",
        "n_examples=0 must be a whole number of at least 1, or null",
    ),
    (
        "n_epochs=null",
        "n_epochs=null and n_examples=null: the run would never end; set one, such as n_epochs=1",
    ),
    (
        "model.batch_size=8.5",
        "model.batch_size=8.5 must be a whole number of at least 1",
    ),
    (
        "model.max_grad_norm=0",
        "model.max_grad_norm=0 must be a number above 0",
    ),
    (
        "overwrite=1",
        "overwrite=1 must be true or false",
    ),
    (
        "wandb=true",
        "wandb=true is not a dictionary; use for example wandb={enabled:false,entity:null,project:archangel}",
    ),
    (
        "cache_dir=null",
        "cache_dir=null must be text",
    ),
    (
        "model.load_from=3",
        "model.load_from=3 must be text or null",
    ),
    (
        "model.packing=yes",
        "model.packing=yes must be true, false or auto",
    ),
    (
        "mode=trian",
        "mode=trian is not known; did you mean 'train'? (one of: eval, train)",
    ),
    (
        "lr_scheduler=cosin",
        "lr_scheduler=cosin is not known; did you mean 'cosine'? (one of: constant, cosine, linear)",
    ),
    (
        "model.logps=fast",
        "model.logps=fast is not known; choose one of: fused, plain",
    ),
    (
        "model.policy_dtype=bf16",
        "model.policy_dtype=bf16 is not known; did you mean 'bfloat16'? (one of: bfloat16, float32)",
    ),
    (
        "model.policy_dtype=float16",
        "model.policy_dtype=float16 needs loss scaling, which is not supported; use bfloat16 or float32",
    ),
    (
        "model.policy_dtype=null",
        "model.policy_dtype=null is not known; choose one of: bfloat16, float32",
    ),
    (
        "model=llama7b eval_every=20001",
        "eval_every=20001 is not a multiple of model.batch_size=32; use eval_every=20000 or 20032",
    ),
    (
        "model=llama7b model.gradient_accumulation_steps=4",
        "eval_every=20000 is not a multiple of model.batch_size=32 x "
        "model.gradient_accumulation_steps=4 (128); use eval_every=19968 or 20096",
    ),
    (
        "model=llama7b eval_every=10",
        "eval_every=10 is not a multiple of model.batch_size=32; use eval_every=32",
    ),
    (
        "model=llama7b model.max_prompt_length=2048",
        "model.max_prompt_length=2048 is not below model.max_length=2048, so a long prompt leaves no "
        "room for its response; use model.max_prompt_length=1024",
    ),
    (
        "model.architecture.max_position_embeddings=8 model.max_length=16 model.max_prompt_length=8",
        "model.max_length=16 is more than model.architecture.max_position_embeddings=8; use "
        "model.max_length=8 or raise the other",
    ),
    (
        "exp_name=.tokens",
        "exp_name=.tokens starts with a dot, as the caches in cache_dir do; use a plain name, and "
        "cache_dir=DIR to keep runs elsewhere",
    ),
    (
        "exp_name=../x",
        "exp_name=../x leaves cache_dir; use a plain name, and cache_dir=DIR to keep runs elsewhere",
    ),
    (
        "exp_name=a/../../x",
        "exp_name=a/../../x leaves cache_dir; use a plain name, and cache_dir=DIR to keep runs elsewhere",
    ),
    (
        "exp_name=/tmp/x",
        "exp_name=/tmp/x leaves cache_dir; use a plain name, and cache_dir=DIR to keep runs elsewhere",
    ),
    (
        "exp_name=",
        "exp_name= is not a directory name; use letters, such as exp_name=run_1",
    ),
    (
        "exp_name=7",
        "exp_name=7 is not a directory name; use letters, such as exp_name=run_1",
    ),
    (
        "cache_dir=/dev/null/x",
        "cache_dir=/dev/null/x cannot be used, since /dev/null is not a directory; use another cache_dir=DIR",
    ),
    (
        "loss.trainer=DPOTrianer",
        "loss.trainer=DPOTrianer is not defined in trainers.py; did you mean 'DPOTrainer'? (one of: "
        "AnyTrainer, CDPOTrainer, DPOTrainer, KTOTrainer, PPOTrainer, SFTTrainer, SLiCTrainer)",
    ),
    (
        "loss.trainer=helper",
        "loss.trainer=helper is not a subclass of BasicTrainer in trainers.py; choose one of: AnyTrainer, "
        "CDPOTrainer, DPOTrainer, KTOTrainer, PPOTrainer, SFTTrainer, SLiCTrainer",
    ),
    (
        "loss.trainer=BasicTrainer",
        "loss.trainer=BasicTrainer is not a subclass of BasicTrainer in trainers.py; did you mean "
        "'SLiCTrainer'? (one of: AnyTrainer, CDPOTrainer, DPOTrainer, KTOTrainer, PPOTrainer, "
        "SFTTrainer, SLiCTrainer)",
    ),
    (
        "loss.dataloader=SFTLoader",
        "loss.dataloader=SFTLoader is not defined in dataloaders.py; did you mean 'SFTDataLoader'? (one "
        "of: PairedPreferenceDataLoader, SFTDataLoader, UnpairedPreferenceDataLoader)",
    ),
    (
        "chat_template=mine.jinja",
        "chat_template=mine.jinja: there is no such file; give auto, none, or the path of a Jinja file",
    ),
    ("loss=dpo loss.beta=-5", "loss.beta=-5 must be a number above 0"),
    ("loss=kto loss.beta=0", "loss.beta=0 must be a number above 0"),
    ("loss=dpo loss.beta=nan", "loss.beta=nan is not a number; give one"),
    ("loss=kto loss.desirable_weight=-1", "loss.desirable_weight=-1 must be a number of at least 0"),
    ("loss=kto loss.beta=inf", "loss.beta=inf must be a number above 0"),
    ("loss=cdpo loss.epsilon=5", "loss.epsilon=5 must be a number from 0 to 0.5"),
    ("loss=slic loss.lambda_coef=-3", "loss.lambda_coef=-3 must be a number of at least 0"),
    (
        "loss=sft loss.trainer=SLiCTrainer loss.dataloader=PairedPreferenceDataLoader",
        "loss.beta is missing, and loss.trainer=SLiCTrainer needs it; add it to the YAML",
    ),
    *(
        (
            f"loss={loss} loss.use_reference_model=false",
            f"loss.use_reference_model=false: loss.trainer={trainer} needs it; use loss.use_reference_model=true",
        )
        for loss, trainer in (("dpo", "DPOTrainer"), ("cdpo", "CDPOTrainer"), ("kto", "KTOTrainer"))
    ),
    ("loss=ppo loss.ppo_epochs=0", "loss.ppo_epochs=0 must be a whole number of at least 1"),
    ("loss=ppo loss.cliprange=1.5", "loss.cliprange=1.5 must be a number above 0 and at most 1"),
    ("loss=ppo loss.gamma=2", "loss.gamma=2 must be a number from 0 to 1"),
    ("loss=ppo loss.lam=-0.1", "loss.lam=-0.1 must be a number from 0 to 1"),
    ("loss=ppo loss.KL_coef=-1", "loss.KL_coef=-1 must be a number of at least 0"),
    ("loss=ppo loss.kl_estimator=k2", "loss.kl_estimator=k2 must be k3 or k1"),
    (
        "loss=ppo loss.use_value_head=false",
        "loss.use_value_head=false: loss.trainer=PPOTrainer needs it; use loss.use_value_head=true",
    ),
    (
        "loss=dpo loss.dataloader=UnpairedPreferenceDataLoader",
        "loss.dataloader=UnpairedPreferenceDataLoader gives unpaired data, and loss.trainer=DPOTrainer "
        "needs paired; use loss.dataloader=PairedPreferenceDataLoader",
    ),
    (
        "datasets=[demp]",
        f"datasets=[demp]: demp is not known; did you mean 'demo'? (one of: {NAMED}), or a path or hub name",
    ),
    (
        "datasets=[local]",
        f"datasets=[local]: local is not known; choose one of: {NAMED}, or a path or hub name",
    ),
    (
        "datasets=[]",
        "datasets=[] must be a list of names or paths, such as datasets=[demo]",
    ),
    (
        "datasets=hh",
        "datasets=hh is not a list; use for example datasets=[demo]",
    ),
    (
        "datasets=[hh,hh]",
        "datasets=[hh,hh] has hh twice; name each dataset once",
    ),
    (
        "datasets=[mine.jsonl]",
        "datasets=[mine.jsonl]: mine.jsonl does not exist; give a file, a folder, or a hub name",
    ),
    (
        "datasets=[data/mine.csv.gz]",
        "datasets=[data/mine.csv.gz]: data/mine.csv.gz does not exist; give a file, a folder, or a hub name",
    ),
    (
        "datasets=[./mine]",
        "datasets=[./mine]: ./mine does not exist; give a file, a folder, or a hub name",
    ),
    (
        "dataset.shp.surce=/data",
        "dataset.shp.surce=/data: there is no key dataset.shp.surce; did you mean dataset.shp.source?",
    ),
    (
        "++dataset.ssp.source=/data",
        "dataset.ssp.source=/data: there is no key dataset.ssp.source; did you mean dataset.demo.source?",
    ),
    (
        "dataset.shp.weight=0",
        "dataset.shp.weight=0 must be a number above 0",
    ),
    (
        "dataset.nectar.form=rank",
        "dataset.nectar.form=rank must be auto, pairwise_feedback, binary_feedback, pairs, ranked, feedback, rated, "
        "messages, completion, instruction or text",
    ),
    (
        "dataset.nectar.pairs=best",
        "dataset.nectar.pairs=best must be all, best-worst or adjacent",
    ),
    (
        "dataset.shp.reader=get_spp",
        "dataset.shp.reader=get_spp is not defined in dataloaders.py; did you mean 'get_shp'? (one of: get_demo, "
        "get_hh, get_hh_harmless, get_hh_helpful, get_oasst, get_shp)",
    ),
    (
        "dataset.shp.form=pairs",
        "dataset.shp.form has no effect, since get_shp reads the rows itself; leave it out, or use "
        "dataset.shp.reader=null",
    ),
    (
        "datasets=[nectar] dataset.nectar.source=null",
        "dataset.nectar.source=null: nothing to read; give a file, a folder or a hub name",
    ),
    (
        "strict_data=1",
        "strict_data=1 must be true or false",
    ),
    (
        "dataset_paths.shp=/nowhere",
        "dataset_paths.shp=/nowhere does not exist; give a local copy, or null",
    ),
    (
        "++dataset_paths.ssp=/nowhere",
        "dataset_paths.ssp=/nowhere: no such dataset; did you mean 'shp'? (one of: demo, helpsteer, "
        "hh, hh_harmless, hh_helpful, nectar, oasst, shp, ultrachat, ultrafeedback)",
    ),
    (
        "model.load_from=/x/policy.pt",
        "model.load_from=/x/policy.pt: /x/policy.pt does not exist; give the path of a local copy, or a "
        "name on the hub",
    ),
    (
        "model.load_from=x/policy.pt cache_dir=c",
        "model.load_from=x/policy.pt: c/x/policy.pt does not exist; give the path of a local copy, or a "
        "name on the hub",
    ),
    (
        "model.load_from=./x",
        "model.load_from=./x: ./x does not exist; give the path of a local copy, or a name on the hub",
    ),
    (
        "model.architecture=null",
        "model.name_or_path=null: nothing to load; give a hub name or a local folder",
    ),
    (
        "model.name_or_path=Qwen/Qwen2.5-0.5B",
        "model.name_or_path=Qwen/Qwen2.5-0.5B is given with a model that has an architecture of its own, whose "
        "settings would stay (model.tokenizer_name_or_path=assets/tiny_tokenizer lr=0.0012 model.max_length=256); use "
        "model=base_model model.name=qwen2.5-0.5b model.name_or_path=Qwen/Qwen2.5-0.5B",
    ),
    (
        "model.tokenizer_name_or_path=null",
        "model.tokenizer_name_or_path=null: a model of random weights has none; name a tokenizer",
    ),
    (
        "++model.architecture.hiden_size=8",
        "model.architecture.hiden_size=8 is not a field of LlamaConfig; did you mean 'hidden_size'?",
    ),
    (
        "model.architecture.model_type=lama",
        "model.architecture.model_type=lama is not an architecture; did you mean 'llama'?",
    ),
    (
        "optimizer=AdamX",
        "optimizer=AdamX is not defined in torch.optim; did you mean 'Adam'? (one of: ...",
    ),
    (
        "optimizer=lr_scheduler",
        "optimizer=lr_scheduler is not a subclass of Optimizer in torch.optim; ...",
    ),
    (
        "++optimizer_kwargs.lr=0.1",
        "optimizer_kwargs.lr=0.1 is the key lr; use lr=0.1",
    ),
    (
        "++optimizer_kwargs.weight_decay=-1",
        "optimizer=AdamW optimizer_kwargs={weight_decay:-1} cannot train: Invalid weight_decay value: "
        "-1; use for example optimizer=AdamW",
    ),
    (
        "optimizer=LBFGS",
        "optimizer=LBFGS cannot train: ...",
    ),
    (
        "optimizer=SparseAdam",
        "optimizer=SparseAdam cannot train: SparseAdam does not support dense gradients...",
    ),
    (
        "loss.beta=x loss=kto",
        "loss.beta=x is not a number; use for example loss.beta=0.1",
    ),
    (
        "samples_dir=''",
        "samples_dir= must be text",
    ),
    (
        "exp_name=${foo}",
        "exp_name=${foo}: Interpolation key 'foo' not found; name an existing key in full, such as ${model.name}",
    ),
    (
        "++optimizer_kwargs.weight_decy=0.1",
        "optimizer_kwargs.weight_decy=0.1 is not an argument of AdamW; did you mean 'weight_decay'? (one of: ...",
    ),
]


@pytest.mark.parametrize(("words", "expected"), REFUSED_BY_HYDRA, ids=[words for words, _ in REFUSED_BY_HYDRA])
def test_refused_by_hydra(run, words, expected):
    result = run(*words.split())
    assert (result.code, result.configs, result.err) == (2, [], f"error: {expected}\n")


@pytest.mark.parametrize(("words", "expected"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refused(refusal, words, expected):
    """A refused command has its message. An expected message that ends in `...` gives only the beginning.

    The rest of such a message comes from torch, or lists names of torch.
    """
    message = refusal(*words.split())
    assert message.startswith(expected[:-3]) if expected.endswith("...") else message == expected


def test_a_missing_policy_is_answered_with_those_there_are(refusal, tmp_path):
    os.makedirs(tmp_path / "c/sft_tiny/LATEST")
    (tmp_path / "c/sft_tiny/LATEST/policy.pt").touch()
    assert refusal("model.load_from=sft/LATEST/policy.pt", "cache_dir=c") == (
        "model.load_from=sft/LATEST/policy.pt: c/sft/LATEST/policy.pt does not exist; c has sft_tiny/LATEST/policy.pt"
    )


def test_a_broken_yaml_is_named_with_its_line(run, tmp_path):
    os.makedirs(tmp_path / "mine/loss")
    (tmp_path / "mine/loss/bad.yaml").write_text("name: bad\n beta: :\n")
    result = run("--config-dir", "mine", "loss=bad")
    where = f"{tmp_path}/mine/loss/bad.yaml, line 2"
    assert (result.code, result.err) == (2, f"error: {where}: mapping values are not allowed here; correct the file\n")


def test_hub_names_and_globs_are_datasets(check):
    names = ["HuggingFaceH4/ultrafeedback_binarized", "allenai/tulu:math", "/data/*.jsonl"]
    assert check(f"datasets=[{','.join(names)}]").datasets == names


def test_a_new_dataset_is_a_yaml(run, tmp_path):
    """A YAML in config/dataset of --config-dir is a dataset, with the keys of base_dataset.yaml that it leaves out."""
    os.makedirs(tmp_path / "mine/dataset")
    (tmp_path / "mine/dataset/ours.yaml").write_text("source: /data/ours\ncolumns: {prompt: question}\n")
    words = ["datasets=[ours,shp]", "dataset.ours.weight=0.5", "dataset.shp.source=/data/SHP"]
    (config,) = run("--config-dir", "mine", *words, "++dataset.ours.columns.chosen=good").configs
    ours = config.dataset.ours
    assert (ours.source, ours.weight, ours.form) == ("/data/ours", 0.5, "auto")
    assert ours.columns == {"prompt": "question", "chosen": "good"}
    assert (config.dataset.shp.source, config.dataset.shp.reader) == ("/data/SHP", "get_shp")
    assert dataset_specs.spec_of(config, "shp").source == "/data/SHP"
    unknown = run("--config-dir", "mine", "datasets=[our]")
    assert unknown.err.startswith("error: datasets=[our]: our is not known; did you mean 'ours'? (one of: demo, ")


def test_what_a_dataset_is_read_from(check, tmp_path):
    """dataset_paths.NAME comes before dataset.NAME.source; a path or a hub name has the keys of base_dataset.yaml."""
    words = "dataset.hh.source=/b", f"dataset_paths.shp={tmp_path}", "datasets=[shp,hh,a/b,demo]"
    config = check(*words)
    sources = [dataset_specs.spec_of(config, name).source for name in config.datasets]
    assert sources == [str(tmp_path), "/b", "a/b", None]
    assert dataset_specs.spec_of(config, "a/b").form == "auto"


def test_the_group_dataset_is_not_for_choosing(run):
    assert run("dataset=shp").err == "error: dataset=shp is not how datasets are chosen; use datasets=[shp]\n"


@pytest.mark.parametrize("file", ["mine.json", "mine.jsonl", "mine.parquet", "mine", "data/mine"])
def test_local_files_are_datasets(check, tmp_path, file):
    os.makedirs(tmp_path / "data")
    (tmp_path / file).touch()
    assert check(f"datasets=[{file},demo]").datasets == [file, "demo"]


#### HYDRA'S FLAGS AND EXIT CODES


def test_nothing_is_left_behind(run, tmp_path):
    """Hydra leaves no outputs/, multirun/ or .hydra/: nothing for a single run, a record in cache_dir for a sweep."""
    run("loss=kto")
    assert os.listdir(tmp_path) == []
    sweep = run("-m", "loss=kto,dpo", "exp_name='x_${loss.name}'")
    assert [(c.exp_name, c.loss.trainer) for c in sweep.configs] == [("x_kto", "KTOTrainer"), ("x_dpo", "DPOTrainer")]
    assert os.listdir(tmp_path) == [".cache"] and os.listdir(tmp_path / ".cache") == [".sweep"]


def test_flags_that_show_and_stop(run, tmp_path):
    shown = run("loss=kto", "--cfg", "job")
    assert (shown.code, shown.configs) == (0, []) and OmegaConf.create(shown.out).loss.beta == 0.1
    help_text = run("--help").out
    assert f"loss: {', '.join(NAMES)}" in help_text and "Align a language model" in help_text
    assert "complete" in run("-sc", "install=bash").out
    assert os.listdir(tmp_path) == []


def test_a_sweep_goes_on_after_a_failed_job_and_says_which_it_was(run):
    result = run("-m", "seed=-1,2,-3")
    assert result.code == 2 and [c.seed for c in result.configs] == [2]
    assert result.err.splitlines() == [
        "error: seed=-1 must be a whole number of at least 0",
        "job #0 failed: seed=-1",
        "error: seed=-3 must be a whole number of at least 0",
        "job #2 failed: seed=-3",
    ]


def by_seed(config):
    """A task whose seed decides how it ends."""
    if config.seed == 1:
        print("environment:", os.environ.get("HYDRA_FULL_ERROR"))
    if config.seed == 2:
        raise UserError("two\n\nlines")
    if config.seed == 3:
        raise ZeroDivisionError("a bug")
    if config.seed == 4:
        sys.exit(7)
    if config.seed == 5:
        raise KeyboardInterrupt


def test_the_ways_that_a_task_ends(run):
    """A task can end normally, by a UserError, a bug, sys.exit, or an interrupt; each has its exit code and stderr.

    HYDRA_FULL_ERROR, which makes Hydra raise its errors, must not reach processes that the task starts.
    """
    assert run("seed=1", task=by_seed).out == "environment: None\n"
    mistake, bug, leave, stop = (run(f"seed={seed}", task=by_seed) for seed in [2, 3, 4, 5])
    assert (mistake.code, mistake.err) == (2, "error: two lines\n")
    assert bug.code == 1 and bug.err.startswith("Traceback") and bug.err.endswith("ZeroDivisionError: a bug\n")
    assert (leave.code, leave.err) == (7, "")
    assert (stop.code, stop.err) == (130, "interrupted\n")


def test_an_interrupt_ends_a_sweep(run):
    result = run("-m", "seed=5,6", task=by_seed)
    assert (result.code, result.err, result.configs) == (130, "interrupted\n", [])


def test_full_errors_on_demand(monkeypatch):
    with pytest.raises(SystemExit, match="2"), report_user_errors():
        raise UserError("x")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match="x"), report_user_errors():
        raise UserError("x")


def test_overrides_of_a_saved_config():
    saved = OmegaConf.create({"top_p": 0.95, "seed": 1, "datasets": ["demo"], "model": {"load_from": None}})
    changed = overrides(saved, ["top_p=0.9", "++seed=3", "datasets=[hh,shp]", "model.load_from=x"])
    assert changed == {"top_p": 0.9, "seed": 3, "datasets": ["hh", "shp"], "model": {"load_from": "x"}}
    assert saved.top_p == 0.95
    for word, message in {
        "topp=1": "topp=1: there is no key topp; did you mean top_p?",
        "load_from=x": "load_from=x: there is no key load_from; did you mean model.load_from?",
        "top_p": "'top_p' is not an assignment; write key=value, for example top_p=0.9",
        "top_p=high": "top_p=high must be a number above 0 and at most 1",
        "datasets=[a": "'datasets=[a' cannot be read; write a list as key=[a,b]",
    }.items():
        with pytest.raises(UserError) as error:
            overrides(saved, [word])
        assert str(error.value) == message


def test_component_returns_the_class():
    assert component(torch.optim, "SGD", torch.optim.Optimizer, "optimizer") is torch.optim.SGD


def test_a_saved_config_is_validated_without_hydra():
    """eval.py reads config.yaml. Values are checked as always; keys were checked when the run began."""
    saved = OmegaConf.create(OmegaConf.to_yaml(written("loss=kto"), resolve=True))
    validate(saved, TRAINERS, DATALOADERS)
    saved.top_p = 2
    with pytest.raises(UserError, match="top_p=2 must be"):
        validate(saved, TRAINERS, DATALOADERS)


def test_a_saved_run_of_another_base_model_can_be_evaluated():
    """A run that was trained with model=tiny and model.name_or_path=X has both in its config, and stays valid."""
    saved = OmegaConf.create(OmegaConf.to_yaml(written("loss=kto"), resolve=True))
    saved.model.name_or_path = "Qwen/Qwen2.5-0.5B"
    validate(saved, TRAINERS, DATALOADERS)


#### WITH THE REAL train.py


@pytest.mark.parametrize("path", glob.glob(f"{CONFIG}/loss/*.yaml"), ids=os.path.basename)
def test_every_loss_is_valid_with_the_real_classes(monkeypatch, path):
    monkeypatch.syspath_prepend(PROJECT)
    import dataloaders
    import trainers

    validate(written(f"loss={os.path.basename(path)[:-5]}").copy(), trainers, dataloaders)


def test_help_and_mistakes_are_fast(tmp_path):
    """`--help` and an error message need neither torch nor transformers, which take seconds to import."""
    program = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {PROJECT!r})\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    for words, code, err in [("--help", 0, ""), ("loss=kot", 2, "error: loss=kot: there is no config/loss/kot.yaml")]:
        start = f"import sys; sys.argv = ['{PROJECT}/train.py', '{words}']\n"
        done = subprocess.run([sys.executable, "-c", start + program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code and done.stderr.startswith(err), done.stderr
    assert os.listdir(tmp_path) == []


def test_the_config_of_an_earlier_run_gets_the_keys_that_are_newer(capsys):
    """With their defaults, and named. What the run has stays as it is."""
    saved = written("loss=kto").copy()
    OmegaConf.update(saved, "lr", 0.5)
    with open_dict(saved):
        del saved["chat_template"], saved.loss["desirable_weight"]
    add_new_keys(saved)
    assert (saved.chat_template, saved.loss.desirable_weight, saved.lr) == ("auto", 1.0, 0.5)
    assert capsys.readouterr().out.endswith("defaults: chat_template=auto, loss.desirable_weight=1.0\n")
    add_new_keys(saved)
    assert not capsys.readouterr().out


def test_a_loss_keeps_the_demands_of_the_one_it_extends(run, tmp_path, monkeypatch):
    """A subclass with a rule of its own: DPO's beta is still above 0, and its reference model still needed."""
    child = type("ChildTrainer", (TRAINERS.DPOTrainer,), {"rules": {"decay": rules.number(above=0)}, "needs": ()})
    monkeypatch.setattr(TRAINERS, "ChildTrainer", child, raising=False)
    os.makedirs(tmp_path / "mine/loss")
    (tmp_path / "mine/loss/child.yaml").write_text(
        "name: child\ntrainer: ChildTrainer\ndataloader: PairedPreferenceDataLoader\nuse_reference_model: true\n"
        "beta: 0.1\ndecay: 1\n"
    )
    words = ("--config-dir", "mine", "loss=child")
    assert len(run(*words).configs) == 1
    assert run(*words, "loss.beta=-5").err == "error: loss.beta=-5 must be a number above 0\n"
    assert run(*words, "loss.decay=0").err == "error: loss.decay=0 must be a number above 0\n"
    assert "loss.use_reference_model=false" in run(*words, "loss.use_reference_model=false").err


def test_a_name_with_dots_is_a_class_of_another_file(tmp_path, monkeypatch):
    """`trainer: my_losses.MyTrainer` is found on the path; a wrong module or class is one line."""
    (tmp_path / "my_losses.py").write_text("from trainers import DPOTrainer\nclass MyTrainer(DPOTrainer): ...\n")
    (tmp_path / "broken.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = component(trainers, "my_losses.MyTrainer", trainers.BasicTrainer, "loss.trainer")
    assert mine is find(trainers, "my_losses.MyTrainer") and mine.mro()[1] is trainers.DPOTrainer
    assert find(trainers, "KTOTrainer") is trainers.KTOTrainer
    for name, problem in {
        "my_losses.MyTrianer": "is not defined in my_losses.py; did you mean 'MyTrainer'?",
        "my_loses.MyTrainer": "there is no module 'my_loses'; a name with dots is that of a file",
        "..MyTrainer": "there is no module",
        "os.getcwd": "is not a subclass of BasicTrainer in os.py",
    }.items():
        with pytest.raises(UserError, match=f"loss.trainer={re.escape(name)}.*{re.escape(problem)}"):
            component(trainers, name, trainers.BasicTrainer, "loss.trainer")
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        component(trainers, "broken.MyTrainer", trainers.BasicTrainer, "loss.trainer")
