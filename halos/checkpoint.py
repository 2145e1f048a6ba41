"""Checkpoints: `policy.pt`, `v_head.pt`, and the Hugging Face export beside them.

The critic has its own file, `v_head.pt`, so that the policy stays a plain language model. A checkpoint is written to a
temporary directory and then renamed, so `LATEST` is always a complete checkpoint. Change this file to change what a
checkpoint contains. The run directory itself is in `halos/run_dir.py`.
"""

import copy
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from halos import adapters, chat, distributed, manifest, reward_model, run_dir
from halos.errors import UserError, first_line
from halos.files import OLD, UNFINISHED, replace_directory, writing

LATEST = "LATEST"
POLICY = "policy.pt"
V_HEAD = "v_head.pt"
ADAPTER = "adapter"


#### SAVING


def save(
    directories: Sequence[str],
    lm: PreTrainedModel,
    tokenizer,
    config: DictConfig,
    step: int,
    metrics: dict[str, float],
    export_dtype: torch.dtype,
    v_head: torch.nn.Module | None = None,
) -> None:
    """Write a checkpoint to the first directory, replacing what is there, and link its files into the others.

    A checkpoint contains:
    - `policy.pt`: {'step_idx', 'state', 'metrics'}; weights in policy_dtype, under the model's own names
    - `v_head.pt`: the same form, in float32; only if the loss has a critic, or the head of a reward model
    - a Hugging Face export with tokenizer and model card, and the run's config.yaml; that of a reward model is a
      sequence classifier, with the head
    - `adapter/`: a trained adapter in peft's layout, in float32; the weights above are merged with it

    All ranks must call this. Rank 0 writes.
    """
    state = full_state(lm, getattr(torch, config.model.policy_dtype))
    states = {POLICY: state} | ({V_HEAD: full_state(v_head, torch.float32)} if v_head is not None else {})
    adapter = adapters.own_state(lm)
    if distributed.is_main():
        _write(directories, states, adapter, lm, tokenizer, config, step, metrics, export_dtype)
    distributed.barrier()


def _write(directories, states, adapter, lm, tokenizer, config, step, metrics, export_dtype) -> None:
    for directory in directories:
        shutil.rmtree(directory + UNFINISHED, ignore_errors=True)
    unfinished = directories[0] + UNFINISHED
    try:
        with writing(directories[0]):
            _write_files(unfinished, states, adapter, lm, tokenizer, config, step, metrics, export_dtype)
            for other in directories[1:]:
                # Checkpoint files are never written in place, so two directories can safely share them.
                shutil.copytree(unfinished, other + UNFINISHED, copy_function=_link)
                replace_directory(other + UNFINISHED, other)
            replace_directory(unfinished, directories[0])
    except BaseException:
        for directory in directories:
            shutil.rmtree(directory + UNFINISHED, ignore_errors=True)
        raise


def _write_files(directory, states, adapter, lm, tokenizer, config, step, metrics, export_dtype) -> None:
    os.makedirs(directory)
    for name, content in states.items():
        # Opened here, because torch's own error does not say why a file cannot be written.
        with open(os.path.join(directory, name), "wb") as file:
            torch.save({"step_idx": step, "state": content, "metrics": metrics}, file)
    if adapter:
        adapters.write(os.path.join(directory, ADAPTER), lm, adapter)
    exported = states[POLICY]
    if config.loss.get("use_reward_head", False):
        lm = reward_model.classifier(lm.config, tokenizer.pad_token_id)
        exported = {name: (exported | states[V_HEAD])[name] for name in lm.state_dict()}
    export(directory, lm, exported, tokenizer, export_dtype)
    with open(os.path.join(directory, "README.md"), "w") as file:
        file.write(run_dir.model_card(config, step, metrics))
    run_dir.write_config(config, os.path.join(directory, run_dir.CONFIG))
    manifest.write(directory)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # file systems without hard links
        shutil.copy2(source, destination)


def full_state(lm: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the whole state dict on the CPU, in `dtype`. Tied weights are one tensor under two names.

    An adapter is merged into the copies; the weights themselves stay as they are. Sharded tensors are gathered one at a
    time. Only rank 0 keeps them; on other ranks the result is empty.
    """
    copies: dict[int, torch.Tensor | None] = {}
    state = {}
    adapted = adapters.layers(lm)
    for name, tensor in adapters.plain_state(lm).items():
        if id(tensor) not in copies:
            copy = distributed.whole(tensor.detach())
            copy = adapters.merged(copy, adapted[name]) if name in adapted else copy
            to_dtype = dtype if copy.is_floating_point() else copy.dtype
            copies[id(tensor)] = copy.to("cpu", to_dtype) if distributed.is_main() else None
        state[name] = copies[id(tensor)]
    return {name: copy for name, copy in state.items() if copy is not None}


def export(directory: str, lm: PreTrainedModel, state: dict, tokenizer, dtype: torch.dtype) -> None:
    """Write the files that `from_pretrained` opens: config, safetensors, tokenizer, and generation settings.

    A tied weight is stored once. A reward model generates nothing, and has no settings.
    """
    own: Any = getattr(lm, "generation_config", None)
    lm.generation_config = GenerationConfig()
    try:
        lm.save_pretrained(directory, state_dict=cast_state(state, dtype))
    finally:
        lm.generation_config = own
    if own is not None:
        _write_generation_settings(directory, own, tokenizer)
    _set_dtype(os.path.join(directory, "config.json"), dtype)
    tokenizer.save_pretrained(directory)


def _write_generation_settings(directory: str, of_base: GenerationConfig, tokenizer) -> None:
    """Write the settings of the base, with all ids that end a response as eos_token_id."""
    settings = copy.deepcopy(of_base)
    stops = chat.stop_token_ids(tokenizer, settings.eos_token_id)
    settings.eos_token_id = stops if len(stops) > 1 else stops[0]
    settings.pad_token_id = tokenizer.pad_token_id
    # Not by its own save_pretrained, which raises for settings of the base that contradict each other.
    settings.to_json_file(os.path.join(directory, GENERATION_CONFIG_NAME), keys_to_pop=["compile_config"])


def cast_state(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the state in `dtype`. A tensor under two names stays one, so that transformers finds tied weights."""
    tensors = {id(tensor): tensor for tensor in state.values()}
    cast = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    return {name: cast[id(tensor)] for name, tensor in state.items()}


# Settings that matter only if generation samples, with the values that change nothing.
SAMPLING_DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def say_that_it_samples(settings: GenerationConfig) -> GenerationConfig:
    """Set do_sample to true where it is not set and a setting of sampling is.

    Old checkpoints, such as Vicuna 1.5, set a temperature alone. transformers ignores it then, and refuses to save it.
    """
    values = {name: getattr(settings, name, None) for name in SAMPLING_DEFAULTS}
    if settings.do_sample is None and any(v not in (None, SAMPLING_DEFAULTS[name]) for name, v in values.items()):
        settings.do_sample = True
    return settings


def _set_dtype(path: str, dtype: torch.dtype) -> None:
    """Write the exported dtype into config.json. transformers writes the dtype of the model in memory instead."""
    with open(path) as file:
        settings = json.load(file)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    with open(path, "w") as file:
        json.dump(settings, file, indent=2, sort_keys=True)


#### FINDING


def newest_whole(run: str) -> str:
    """Return the newest whole checkpoint of a run directory: LATEST, what was LATEST before, or the last step-N.

    Prints a warning for each newer one that is damaged. Raises UserError if there is no whole one.
    """
    if not os.path.isdir(os.path.join(run, LATEST)):
        run_dir.recover_if_dead(run)
    damages: list[str] = []
    for directory in _newest_first(run):
        try:
            check_whole(directory)
        except UserError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            print(f"warning: {damage}; {directory} is used instead", file=sys.stderr, flush=True)
        return directory
    if damages:
        raise UserError(f"{damages[0]}; the run has no whole checkpoint, so train it again")
    raise UserError(f"{run} holds no checkpoint ({LATEST}/{POLICY}); train the run first, or give another -c")


def _newest_first(run: str) -> list[str]:
    """Return the directories of a run that hold a policy.pt."""
    names = os.listdir(run) if os.path.isdir(run) else []
    steps = sorted((int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)), reverse=True)
    directories = [os.path.join(run, name) for name in (LATEST, LATEST + OLD, *(f"step-{step}" for step in steps))]
    return [directory for directory in directories if os.path.isfile(os.path.join(directory, POLICY))]


def check_whole(directory: str) -> None:
    """Raise UserError if the weights of a checkpoint are damaged. Without a manifest, the header of the file counts."""
    if manifest.is_complete(directory):
        _check_weights(directory, lambda name: name == POLICY)
    else:
        load_state(os.path.join(directory, POLICY))


def check_source(path: str) -> None:
    """Raise UserError if weights to start from, a policy.pt or a directory, are not what their manifest says.

    The message names the whole checkpoints beside them. Weights without a manifest pass.
    """
    directory = os.path.dirname(path) if path.endswith(".pt") else os.path.normpath(path)
    run = os.path.dirname(directory)
    if os.path.isdir(run) and not os.path.exists(path):
        run_dir.recover_if_dead(run)
    if not manifest.is_complete(directory):
        return
    try:
        _check_weights(
            directory, lambda name: name == POLICY if path.endswith(".pt") else name.endswith(".safetensors")
        )
    except manifest.Damaged as damage:
        whole = ", ".join(other for other in _newest_first(run) if _is_whole(other))
        raise UserError(
            f"{damage}; {f'whole are {whole}' if whole else 'no other checkpoint beside it is whole'}"
        ) from None


def _check_weights(directory: str, wanted: Callable[[str], bool]) -> None:
    """Compare weights with their manifest. The critic is among them if it is there: who only samples may delete it."""
    has_critic = os.path.isfile(os.path.join(directory, V_HEAD))
    manifest.check(directory, lambda name: wanted(name) or (name == V_HEAD and has_critic))


def _is_whole(directory: str) -> bool:
    try:
        check_whole(directory)
    except UserError:
        return False
    return True


#### LOADING


def load_state(path: str) -> dict[str, torch.Tensor]:
    """Load the weights from a `policy.pt` or `v_head.pt`, memory-mapped.

    Raises UserError if the file is missing, damaged, or not a checkpoint of this project.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"{path} does not exist; model.load_from takes a policy.pt (absolute or relative to cache_dir), "
            "a directory in Hugging Face's layout, or a hub name"
        )
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state = content["state"] if isinstance(content, dict) else {}
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
                raise TypeError(f"{name} is not a dense tensor")
        if not state:
            raise ValueError("it has no 'state'")
        return state
    except Exception as error:  # the file can hold anything, so reading it can raise anything
        reason = first_line(error)[:120]
        raise UserError(
            f"{path} is damaged, or not a policy.pt of this project ({type(error).__name__}: {reason}); "
            "use another checkpoint, for example one of a step-N directory"
        ) from error
