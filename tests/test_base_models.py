"""Base models as they come: their limits of length, generation settings, tied weights, and damaged files.

Each test makes a tiny base model in a directory, and loads it as a run does.
"""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from halos import chat, checkpoint, loading, metrics, positions
from halos.errors import UserError
from halos.models import PolicyModel
from helpers import ARCHITECTURES, make_config, random_examples, tiny_lm
from small_runs import CPU, SMALL, make_trainer, tokenizer

LLAMA = ARCHITECTURES["llama"]


@pytest.fixture(autouse=True)
def curves(monkeypatch):
    """Do not draw: a trainer that saves before it trains has no metrics."""
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


#### POSITIONS

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 3.0, 9.0, 20.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
# Models that change their rotary frequencies after 16 tokens. `tiny_lm` loads them with max_length=128.
CHANGING = {
    "phi3": {**LLAMA, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    "llama": {**LLAMA, "max_position_embeddings": 16, "rope_parameters": DYNAMIC},
}
every_changing_model = pytest.mark.parametrize("name", CHANGING)


def as_transformers_has_it(name: str, fixed) -> torch.nn.Module:
    """Return a model with the weights of `fixed` whose frequencies still change."""
    lm = AutoModelForCausalLM.from_config(fixed.config)
    lm.load_state_dict(fixed.state_dict())
    return lm.eval()


@every_changing_model
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_a_short_sequence_has_the_same_logps_in_any_batch(name, packs):
    """Short sequences have the same log-probs alone and beside one of 60 tokens.

    As transformers runs these models, they differ by more than 0.1 nat.
    """
    policy = PolicyModel(tiny_lm(name, **CHANGING[name])).eval()
    long = random_examples(1, (1,))[0]
    long = long._replace(responses=(long.responses[0].repeat(60)[:60],))
    short = random_examples(3, (1,), seed=1)
    n = sum(len(one.responses[0]) for one in short)

    def difference(policy) -> float:
        policy.use_packing(packs)
        with torch.no_grad():
            alone, together = (policy(policy.inputs(examples)).logps[:n] for examples in (short, [*short, long]))
        return float((alone - together).abs().max())

    assert difference(PolicyModel(as_transformers_has_it(name, policy.lm)).eval()) > 0.1
    assert difference(policy) < 1e-5


@every_changing_model
def test_the_fixed_frequencies_are_those_of_max_length_tokens(name):
    """The logits of 128 tokens, which is max_length, are those of transformers; they are other ones for 12 tokens."""
    fixed = tiny_lm(name, **CHANGING[name]).eval()
    changing = as_transformers_has_it(name, fixed)
    ids = torch.arange(128)[None] % 90
    with torch.no_grad():
        torch.testing.assert_close(fixed(ids).logits, changing(ids).logits)
        changing = as_transformers_has_it(name, fixed)
        assert (fixed(ids[:, :12]).logits - changing(ids[:, :12]).logits).abs().max() > 0.1


@every_changing_model
def test_nothing_changes_within_the_original_context(name):
    """With max_length=16 no batch changes the frequencies, so the model stays as it is."""
    lm = as_transformers_has_it(name, tiny_lm(name, **CHANGING[name]))
    before = [buffer.clone() for buffer in lm.buffers()]
    positions.fix_rotary(lm, 16)
    assert all(torch.equal(one, other) for one, other in zip(before, lm.buffers(), strict=True))
    assert positions.are_enough(lm.config, 16) and not positions.are_enough(lm.config, 17)


LIMITED = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "opt": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64,
            "ffn_dim": 32, "word_embed_proj_dim": 32},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
}  # fmt: skip


def warnings_for(model_type: str, max_length: int, **fields) -> list[str]:
    """Return the warnings of `positions.check` for a model on the meta device."""
    lm_config = AutoConfig.for_model(model_type, vocab_size=97, pad_token_id=0, **fields)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(lm_config)
    assert positions.are_enough(lm_config, max_length) == (max_length <= 64)
    return positions.check(lm, "BASE", max_length)


@pytest.mark.parametrize("name", LIMITED)
def test_a_table_of_positions_limits_max_length(name):
    """A model that reads its positions from a table of 64 rows is refused with max_length=65, in one line."""
    assert warnings_for(name, 64, **LIMITED[name]) == []
    with pytest.raises(UserError) as error:
        warnings_for(name, 65, **LIMITED[name])
    assert str(error.value) == (
        "model.max_length=65 is more than the 64 positions of BASE; "
        "use model.max_length=64 and model.max_prompt_length=32"
    )


def test_rotary_positions_beyond_the_config_are_a_warning():
    (warning,) = warnings_for("llama", 65, **{**LLAMA, "max_position_embeddings": 64})
    assert warning == (
        "model.max_length=65 is more than max_position_embeddings=64 of BASE, and the model may read longer sequences "
        "badly; to cut them, use model.max_length=64 and model.max_prompt_length=32"
    )


def test_warnings_are_printed_at_the_start(tmp_path, capsys):
    """`check_positions` needs no weights: the directory has a config.json only."""
    AutoConfig.for_model("llama", **LLAMA).save_pretrained(tmp_path)
    words = ["model=base_model", "model.name=x", f"model.name_or_path={tmp_path}"]
    loading.check_positions(make_config(tmp_path, *words))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: model.max_length=2048 is more than max_position_embeddings=128 of {tmp_path}, ")
    loading.check_positions(make_config(tmp_path, *words, "model.max_length=128"))
    assert capsys.readouterr().err == ""


def test_fixed_frequencies_are_said():
    """The warning says from which length on, and for which sequences."""
    fields = CHANGING["phi3"] | {"original_max_position_embeddings": 64}
    (warning,) = warnings_for("phi3", 65, **fields)
    assert "more than the 64 tokens of the first set of rotary frequencies of BASE; all sequences" in warning
    assert warning.endswith("use model.max_length=64 and model.max_prompt_length=32")
    fields = CHANGING["llama"] | {"max_position_embeddings": 64}
    (warning,) = warnings_for("llama", 65, **fields)
    assert "more than the 64 tokens of the first set of rotary frequencies of BASE; all sequences" in warning


def test_frequencies_that_cannot_be_fixed_are_refused():
    """Phi-3.5-MoE computes more from the longest position than the frequencies, so fixing these is not enough."""
    rope = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3, "original_max_position_embeddings": 64}
    fields = LLAMA | {"rope_parameters": rope, "num_local_experts": 2}
    assert warnings_for("phimoe", 64, **fields) == []
    with pytest.raises(UserError, match="log-probs would depend on the longest sequence of a batch; use model.max_len"):
        warnings_for("phimoe", 65, **fields)


#### THE EXPORT


def base(folder, generation: dict | None = None, **fields) -> str:
    """Save a tiny model with the vocabulary of the tiny tokenizer, as a directory of the hub has it."""
    directory = str(folder / "base")
    tiny_lm("llama", **{"vocab_size": 576, "eos_token_id": 0, "pad_token_id": 1, **fields}).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    if generation is not None:
        with open(os.path.join(directory, "generation_config.json"), "w") as file:
            json.dump(generation, file)
    return directory


def exported(folder, *words: str, generation: dict | None = None, **fields) -> tuple[str, dict]:
    """Build a trainer from such a base, and save. Returns the directory, and its generation_config.json."""
    trainer = make_trainer(folder, "sft", f"model.name_or_path={base(folder, generation, **fields)}", *words)
    trainer.save()
    latest = os.path.join(folder, "run", "LATEST")
    with open(os.path.join(latest, "generation_config.json")) as file:
        return latest, json.load(file)


def test_a_tied_head_is_exported_once(tmp_path):
    """In bfloat16, the file of a tied model has the embedding once, and the size that the base's file has.

    It loads back with the same weights bit by bit. policy.pt has both names, and one storage for them.
    """
    words = ["model.export_dtype=bfloat16", "model.policy_dtype=float32"]
    latest, _ = exported(tmp_path, *words, tie_word_embeddings=True)
    stored = load_file(os.path.join(latest, "model.safetensors"))
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored
    n_weights = loading.load_lm(make_config(tmp_path, f"model.name_or_path={latest}"), torch.float32).num_parameters()
    assert sum(tensor.numel() for tensor in stored.values()) == n_weights
    lm = AutoModelForCausalLM.from_pretrained(latest)
    state = checkpoint.load_state(os.path.join(latest, "policy.pt"))
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert lm.state_dict().keys() == state.keys() and lm.dtype == torch.bfloat16
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in lm.state_dict().items())


@pytest.mark.parametrize("in_config", [False, True], ids=["generation_config.json", "config.json"])
def test_a_temperature_without_do_sample_is_exported(tmp_path, in_config):
    """Vicuna 1.5 has a temperature and no do_sample: the export has do_sample=true, and all other settings.

    transformers raises an error if it saves such settings after a change: all training was lost. Old checkpoints have
    them in config.json.
    """
    settings = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "repetition_penalty": 1.2}
    if in_config:
        directory = base(tmp_path)
        os.remove(os.path.join(directory, "generation_config.json"))
        path = os.path.join(directory, "config.json")
        with open(path) as file:
            fields = json.load(file)
        with open(path, "w") as file:
            json.dump(fields | settings, file)
        trainer = make_trainer(tmp_path, "sft", f"model.name_or_path={directory}")
        trainer.save()
        saved = GenerationConfig.from_pretrained(tmp_path / "run" / "LATEST").to_dict()
    else:
        _, saved = exported(tmp_path, generation=settings)
    assert {name: saved[name] for name in settings} == settings
    assert saved["do_sample"] is True and (saved["eos_token_id"], saved["pad_token_id"]) == (0, 1)


def test_settings_that_contradict_each_other_are_exported_as_they_are(tmp_path):
    """Settings that transformers would refuse to save do not stop the export."""
    settings = {"do_sample": False, "temperature": 0.6, "early_stopping": True, "length_penalty": 0.8}
    _, saved = exported(tmp_path, generation=settings)
    assert {name: saved[name] for name in settings} == settings


def test_the_export_keeps_every_stop_token(tmp_path):
    """The base stops at 4 and 0, and the tokenizer's EOS is 0: the export stops at both, EOS first.

    The settings are the base's as well if training goes on from a policy.pt.
    """
    latest, saved = exported(tmp_path, generation={"eos_token_id": [4, 0], "top_k": 7, "do_sample": True})
    assert saved["eos_token_id"] == [0, 4] and saved["top_k"] == 7
    words = [f"model.name_or_path={tmp_path / 'base'}", f"model.load_from={latest}/policy.pt", "exp_name=next"]
    make_trainer(tmp_path, "sft", *words).save()
    saved = GenerationConfig.from_pretrained(tmp_path / "next" / "LATEST")
    assert saved.eos_token_id == [0, 4] and saved.top_k == 7


def test_the_end_of_a_turn_comes_first(tmp_path):
    """The token with which the chat template ends a turn, then the tokenizer's EOS, 0, then the base's others."""
    trainer = make_trainer(tmp_path, "sft", f"model.name_or_path={base(tmp_path, {'eos_token_id': [4, 0]})}")
    state, chats = checkpoint.full_state(trainer.policy.lm, torch.float32), copy.deepcopy(tokenizer())
    chats.add_special_tokens({"additional_special_tokens": ["<end>"]})
    chats.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    end = chats.convert_tokens_to_ids("<end>")
    checkpoint.export(str(tmp_path), trainer.policy.lm, state, chats, torch.float32)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [end, 0, 4]
    assert chat.stop_token_ids(tokenizer(), None) == chat.stop_token_ids(tokenizer(), 0) == [0]


#### DAMAGED FILES


def refusal(folder, directory: str) -> str:
    with pytest.raises(UserError) as error:
        loading.load_policy_and_reference(make_config(folder, *SMALL, f"model.name_or_path={directory}"), None, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_config_that_does_not_fit_the_weights(tmp_path):
    """The first weight of another shape is named."""
    directory = base(tmp_path)
    path = os.path.join(directory, "config.json")
    with open(path) as file:
        fields = json.load(file)
    with open(path, "w") as file:
        json.dump(fields | {"intermediate_size": 40}, file)
    assert refusal(tmp_path, directory) == (
        f"{directory} has model.layers.0.mlp.down_proj.weight of shape (32, 48), but its config.json describes "
        "(32, 40); its files do not belong together, so copy or download all of them again"
    )


def test_a_pointer_of_git_lfs(tmp_path):
    """A clone without git-lfs has a small text file in the place of each weight file."""
    directory = base(tmp_path)
    with open(os.path.join(directory, "model.safetensors"), "w") as file:
        file.write("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234\n")
    message = refusal(tmp_path, directory)
    assert "model.safetensors is a pointer of git-lfs, not the file itself; run `git lfs pull` there" in message


def test_a_safetensors_file_that_is_cut(tmp_path):
    directory = base(tmp_path)
    path = os.path.join(directory, "model.safetensors")
    with open(path, "rb+") as file:
        file.truncate(os.path.getsize(path) // 2)
    assert refusal(tmp_path, directory).startswith(f"model.name_or_path={directory} cannot be loaded (")


def test_a_weight_that_is_missing(tmp_path):
    directory = base(tmp_path)
    path = os.path.join(directory, "model.safetensors")
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, metadata={"format": "pt"})
    assert "lacks the weight model.norm.weight" in refusal(tmp_path, directory)
