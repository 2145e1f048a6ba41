"""Load policy and reference model, each in its dtype.

Weights come from `model.name_or_path` (the hub or a directory). If that is null, they are random, in the architecture
`model.architecture`. `model.load_from` replaces them with a `policy.pt` of this project, a directory in Hugging Face's
layout, or a hub name. Where the base's files are, its tokenizer and its config are in `halos/base.py`, the network
itself in `halos/models.py`; reading weights into a sharded model is in `halos/weights.py`.
"""

import os
import sys
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from halos import (
    adapters,
    base,
    checkpoint,
    distributed,
    logps,
    packing_check,
    positions,
    sharding,
    weight_files,
    weights,
)
from halos.base import load_config as load_config
from halos.base import load_tokenizer as load_tokenizer
from halos.errors import UserError
from halos.models import PolicyModel, ValueHead
from halos.reward_model import RewardHead, RewardModel, classifier

# Key of a loss's YAML -> the head beside the language model.
HEADS: dict[str, type[ValueHead | RewardHead]] = {"use_value_head": ValueHead, "use_reward_head": RewardHead}

#### DTYPES


def compute_dtype(config: DictConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products.

    It is `fsdp_policy_mp` if that is set. The default is bfloat16 on CUDA, and policy_dtype elsewhere.
    """
    if config.model.fsdp_policy_mp:
        return getattr(torch, config.model.fsdp_policy_mp)
    return torch.bfloat16 if device.type == "cuda" else getattr(torch, config.model.policy_dtype)


def reference_dtype(config: DictConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of the reference model, for storage and compute: by default the policy's compute dtype."""
    if config.model.reference_dtype:
        return getattr(torch, config.model.reference_dtype)
    return compute_dtype(config, device)


def compute_dtypes(config: DictConfig, device: torch.device) -> dict[str, torch.dtype]:
    """Return what computes in which dtype, by the key of the config that decides it."""
    key = "fsdp_policy_mp" if config.model.fsdp_policy_mp else "policy_dtype"
    dtypes = {f"model.{key}": compute_dtype(config, device)}
    if config.loss.use_reference_model and config.model.reference_dtype:
        dtypes["model.reference_dtype"] = reference_dtype(config, device)
    return dtypes


#### BUILDING


def load_policy_and_reference(
    config: DictConfig,
    tokenizer,
    device: torch.device,
    policy_pt: str | None = None,
    with_reference: bool | None = None,
):
    """Load the policy, ready to train, and the frozen reference model (None without one).

    Both start from the same weights and compute in the same way, so that training starts at a log-ratio of 0. A policy
    with an adapter is its own reference model: `adapters.WithoutAdapter` has no weights of its own.

    policy_pt: a checkpoint to load into the policy instead; an adapter is merged into its weights
    with_reference: whether to load the reference model; None: if the loss uses one
    """
    with_reference = config.loss.use_reference_model if with_reference is None else with_reference
    base_dtype = load_config(config).dtype  # the checkpoint's; loading overwrites it in the model's own config
    load = _load_whole if distributed.world_size() == 1 else _load_sharded
    own_reference = with_reference and _has_adapter(config, policy_pt)
    policy, reference, float32 = load(config, tokenizer, device, policy_pt, with_reference and not own_reference)
    policy.lm.generation_config = base.generation_settings(config, policy.lm.generation_config)
    export_dtype = config.model.export_dtype or base_dtype
    if export_dtype:
        policy.export_dtype = getattr(torch, str(export_dtype).removeprefix("torch."))
    dtype = compute_dtype(config, device)
    packs, reason = packing_check.choose(policy, config.model.packing, dtype, float32)
    policy.use_packing(packs)
    policy.description = f"{'packed' if packs else 'padded, not packed'} ({reason}), computing in {dtype}"
    if reference is not None:
        reference.use_packing(packs)
        reference.eval()
    return policy, adapters.WithoutAdapter(policy) if own_reference else reference


def _has_adapter(config: DictConfig, policy_pt: str | None) -> bool:
    """Return whether the policy gets an adapter: not if it is loaded from a checkpoint, whose weights are merged."""
    return config.model.use_peft and policy_pt is None


def _add_adapter(config: DictConfig, lm: PreTrainedModel) -> None:
    pt = base.load_from_pt(config)  # the export beside it can be loaded as the adapter's base
    adapters.add(lm, config.model, config.seed, os.path.dirname(pt) if pt else base.source(config, use_load_from=True))


def _load_whole(config: DictConfig, tokenizer, device: torch.device, policy_pt: str | None, with_reference: bool):
    """Load on one process. Returns (policy, reference, packing_check.in_float32(policy) or None)."""
    lm = load_lm(config, policy_dtype(config), policy_pt=policy_pt)
    policy = build(config, lm, tokenizer, load_value_head(config, lm, policy_pt)).to(device)
    checked = packing_check.is_wanted(config.model.packing)
    float32 = packing_check.in_float32(policy) if checked else None  # before the weights are cast
    if _has_adapter(config, policy_pt):
        _add_adapter(config, policy.lm)
    sharding.prepare_policy(policy, compute_dtype(config, device), **_preparation(config))
    if not with_reference:
        return policy, None, float32
    reference = build(config, load_lm(config, reference_dtype(config, device)), tokenizer).to(device)
    return policy, reference.requires_grad_(False), float32


def _load_sharded(config: DictConfig, tokenizer, device: torch.device, policy_pt: str | None, with_reference: bool):
    """Return the same as `_load_whole` on several ranks, where each rank only ever holds its shards."""
    mesh = sharding.mesh_of(config, device)
    lm_config = load_config(config)

    def empty_lm(stored: torch.dtype) -> PreTrainedModel:
        lm = weights.empty_lm(lm_config, stored, config.trust_remote_code)
        positions.fix_rotary(lm, config.model.max_length)
        return lm

    def empty_policy(dtype: torch.dtype) -> PolicyModel:
        lm = empty_lm(policy_dtype(config))
        policy = build(config, lm, tokenizer, load_value_head(config, lm, policy_pt))
        if _has_adapter(config, policy_pt):
            _add_adapter(config, lm)
        sharding.prepare_policy(policy, dtype, mesh=mesh, **_preparation(config))
        return policy

    reference = None
    if with_reference:
        reference = build(config, empty_lm(reference_dtype(config, device)), tokenizer).requires_grad_(False)
        sharding.prepare_reference(reference, config.model.block_name, mesh)
    # If packing is checked, the policy is first built to compute in float32; its shards then move to the model that
    # trains.
    checked = packing_check.is_wanted(config.model.packing)
    dtype = compute_dtype(config, device)
    policy = empty_policy(torch.float32 if checked else dtype)
    lms = [policy.lm] + ([reference.lm] if reference is not None else [])
    for together in [lms[:1], lms[1:]] if policy_pt else [lms]:  # same weights: read once
        if together:
            opened = _open_weights(config, together[0], device, policy_pt if together[0] is policy.lm else None)
            weights.fill(together, opened, device)
    float32 = packing_check.in_float32(policy) if checked else None
    if checked and dtype != torch.float32:
        filled, policy = policy, empty_policy(dtype)
        policy.lm.load_state_dict(filled.lm.state_dict(keep_vars=True), assign=True)
    return policy, reference, float32


def _open_weights(config: DictConfig, lm: PreTrainedModel, device: torch.device, policy_pt: str | None = None):
    """Return the source of a sharded model's weights.

    If files hold the weights in the model's own form, every rank reads its part of them. Otherwise rank 0 loads and
    sends them.
    """
    if _has_adapter(config, policy_pt):
        return weights.WithAdapter(_open_base(config, base.meta_lm(config), device), config.seed)
    return _open_base(config, lm, device, policy_pt)


def _open_base(config: DictConfig, lm: PreTrainedModel, device: torch.device, policy_pt: str | None = None):
    path, source = policy_pt or base.load_from_pt(config), base.source(config, use_load_from=True)
    if path:
        return weights.FromPolicyPt(path)
    if source:
        with base.reading(base.source_key(config, True), source), distributed.first_on_each_node():
            weight_files.check(base.local(source), lm)
            found = weights.find_safetensors(base.local(source), lm)
        if found:
            return found
    whole = load_lm(config, torch.float32) if distributed.is_main() else None
    return weights.FromMainProcess(whole, device)


def policy_dtype(config: DictConfig) -> torch.dtype:
    return getattr(torch, config.model.policy_dtype)


def _preparation(config: DictConfig) -> dict[str, Any]:
    """Return the arguments of `sharding.prepare_policy` that the config contains."""
    return {name: config.model[name] for name in ("activation_checkpointing", "block_name", "compile")}


def build(config: DictConfig, lm: PreTrainedModel, tokenizer, v_head: nn.Module | None = None) -> PolicyModel:
    cls = RewardModel if isinstance(v_head, RewardHead) else PolicyModel
    model = cls(lm, getattr(logps, config.model.logps), tokenizer.pad_token_id, v_head)
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    if n_tokens > model.vocab_size:
        raise UserError(
            f"the tokenizer has {n_tokens} tokens, the model {model.vocab_size}; "
            "set model.tokenizer_name_or_path to the model's own tokenizer"
        )
    return model


#### LOADING


def load_lm(config: DictConfig, dtype: torch.dtype, use_load_from: bool = True, policy_pt: str | None = None):
    """Load a causal LM in `dtype` on the CPU.

    use_load_from: False loads the weights from before `model.load_from`
    policy_pt: a checkpoint to load instead of either
    """
    with base.building(config, use_load_from):
        lm = _load_weights(config, dtype, use_load_from, policy_pt)
        positions.fix_rotary(lm, config.model.max_length)
    return lm


def _load_weights(config: DictConfig, dtype: torch.dtype, use_load_from: bool, policy_pt: str | None):
    lm_config = load_config(config, use_load_from)
    policy_pt = policy_pt or (base.load_from_pt(config) if use_load_from else None)
    source = base.source(config, use_load_from)
    if source is None and not policy_pt:
        return _random_lm(lm_config, dtype, config.seed)
    meta, trust = base.meta_lm(config, use_load_from), config.trust_remote_code
    if policy_pt:
        state = checkpoint.load_state(policy_pt)
        _compare_state(meta, state, policy_pt)
        return _from_pretrained(type(meta), None, lm_config, dtype, trust, state_dict=state)
    directory = base.local(source or "")
    weight_files.check(directory, meta)
    return _from_pretrained(AutoModelForCausalLM, directory, lm_config, dtype, trust)


def _from_pretrained(cls, name: str | None, lm_config: PreTrainedConfig, dtype: torch.dtype, trust: bool, **kwargs):
    """Load with transformers, but raise UserError for a weight that is missing or has another shape.

    transformers would start such a weight at random, or raise an error without its name.
    """
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = cls.from_pretrained(name, config=lm_config, dtype=dtype, trust_remote_code=trust, **kwargs)
    lm, info = loaded
    if info["mismatched_keys"]:
        raise weight_files.wrong_shape(str(name), *min(info["mismatched_keys"]))
    if info["missing_keys"]:
        raise UserError(f"{name} lacks the weight {min(info['missing_keys'])}; it is not a whole checkpoint")
    return lm


def identity(config: DictConfig, use_load_from: bool = True, policy_pt: str | None = None) -> list:
    """Return what decides the weights that `load_lm` loads with these arguments, as JSON can hold it.

    Files count by name, size and time of change; reading them would take longer.
    """
    path = policy_pt or (base.load_from_pt(config) if use_load_from else None)
    source = base.source(config, use_load_from)
    directory = base.local(source) if source else ""
    files = [path] if path else []
    if not path and os.path.isdir(directory):
        files = [entry.path for entry in sorted(os.scandir(directory), key=lambda entry: entry.name)]
    status = [(os.path.basename(file), os.stat(file)) for file in files]
    architecture = OmegaConf.to_container(config.model.architecture) if source is None else None
    seed = config.seed if source is None and not path else None
    return [source, architecture, seed, [[name, found.st_size, found.st_mtime_ns] for name, found in status]]


def weights_of_run(config: DictConfig) -> list[str] | None:
    """Return the files with the weights that the run starts from: none of them if the weights are random.

    None means that there are weights, in files of a format that is unknown here.
    """
    path, source = base.load_from_pt(config), base.source(config, use_load_from=True)
    if path or source is None:
        return [path] if path else []
    with base.reading(base.source_key(config, use_load_from=True), source):
        return weight_files.all_of(base.local(source)) or None


def load_value_head(config: DictConfig, lm: PreTrainedModel, policy_pt: str | None = None) -> nn.Module | None:
    """Load the critic or the reward head, if the loss has one.

    It is the v_head.pt beside the policy's weights, or has new weights if there is none.

    lm: the model whose hidden states it reads; it may be on the meta device
    policy_pt: as in `load_lm`; then a v_head.pt must exist
    """
    cls = next((cls for key, cls in HEADS.items() if config.loss.get(key, False)), None)
    if cls is None:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        v_head = cls(lm.get_output_embeddings().weight.shape[1])
    path = _v_head_pt(config, policy_pt)
    if path and (policy_pt or os.path.exists(path)):
        state = checkpoint.load_state(path)
        _compare_state(v_head, state, path)
        v_head.load_state_dict(state)
    return v_head


def check_positions(config: DictConfig) -> None:
    """Raise UserError if sequences of `model.max_length` are too long for the model; print warnings.

    Only the config of the model is read.
    """
    lm_config = load_config(config)
    if positions.are_enough(lm_config, config.model.max_length):
        return
    source = base.source(config, use_load_from=True) or f"model.architecture.model_type={lm_config.model_type}"
    for warning in positions.check(base.meta_lm(config), source, config.model.max_length):
        if distributed.is_main():
            print(f"warning: {warning}", file=sys.stderr, flush=True)


def check_load_from(config: DictConfig) -> None:
    """Raise UserError if the weights to start from are missing, damaged, or of another architecture.

    Rank 0 reads files that have a manifest whole, to compare their checksums; of others, little more than headers.
    """
    if config.model.load_from:
        distributed.on_main(checkpoint.check_source, base.load_from_pt(config) or base.local(config.model.load_from))
    check_reference(config, use_load_from=True)
    if config.loss.get("use_reward_head", False):
        classifier(load_config(config))
    if any(config.loss.get(key, False) for key in HEADS):
        load_value_head(config, base.meta_lm(config))


def check_adapter(config: DictConfig) -> None:
    """Raise UserError if `model.lora.targets` names a layer that the model does not have."""
    if config.model.use_peft:
        adapters.find_targets(base.meta_lm(config), config.model)


def check_base(config: DictConfig, meta: PreTrainedModel, use_load_from: bool) -> None:
    """Do the same check for the safetensors files of a local base. What comes from the hub is checked when it loads."""
    source = base.source(config, use_load_from)
    if source and os.path.isdir(base.local(source)):
        with base.reading(base.source_key(config, use_load_from), source), base.quiet():
            weight_files.check(base.local(source), meta)


def check_reference(config: DictConfig, use_load_from: bool) -> None:
    """Do the same check for the weights that `load_lm` loads with these arguments."""
    meta, path = base.meta_lm(config, use_load_from), base.load_from_pt(config)
    if path and use_load_from:
        _compare_state(meta, checkpoint.load_state(path), path)
    else:
        check_base(config, meta, use_load_from)


def check_policy_pt(config: DictConfig, path: str, with_value_head: bool = False) -> None:
    """Do the same check for a given policy.pt, and for the critic beside it."""
    meta = base.meta_lm(config)
    _compare_state(meta, checkpoint.load_state(path), path)
    if with_value_head:
        load_value_head(config, meta, path)


def check_whole_copy(config: DictConfig, device: torch.device) -> None:
    """Raise UserError if the device has no room for the whole model in its compute dtype.

    Sampling needs such a copy in each process.
    """
    dtype = compute_dtype(config, device)
    meta = base.meta_lm(config)
    needed, free = sum(p.numel() for p in meta.parameters()) * dtype.itemsize, distributed.free_memory(device)
    if needed > free:
        raise UserError(
            f"sampling needs the whole model in each process, {needed / 2**30:.1f} GiB in {dtype}, and {device} has "
            f"{free / 2**30:.1f} GiB free for it; use fewer processes (nproc_per_node=1) or a larger device"
        )


def _v_head_pt(config: DictConfig, policy_pt: str | None) -> str | None:
    """Return the path that a checkpoint's critic would have; None if the model does not start from a checkpoint."""
    policy_pt = policy_pt or base.load_from_pt(config)
    directory = os.path.dirname(policy_pt) if policy_pt else config.model.load_from
    return os.path.join(directory, checkpoint.V_HEAD) if directory else None


def _random_lm(lm_config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Return a model with random weights that depend on the seed alone. They are drawn in float32 and then rounded."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return packing_check.cast_weights(AutoModelForCausalLM.from_config(lm_config, dtype=torch.float32), dtype)


def _compare_state(meta: nn.Module, state: dict, path: str) -> None:
    """Compare names and shapes of a checkpoint with the model. Raises UserError for the first difference."""
    expected = meta.state_dict()
    for key in [*expected, *state]:
        if key not in state:
            problem = f"has no {key}"
        elif key not in expected:
            problem = f"has {key}, which the model does not have"
        elif state[key].shape != expected[key].shape:
            problem = f"has {key} of shape {tuple(state[key].shape)}, the model of {tuple(expected[key].shape)}"
        elif expected[key].is_floating_point() and state[key].dtype not in weight_files.FLOAT_DTYPES:
            problem = f"has {key} of kind {state[key].dtype}, which is no kind of weight"
        else:
            continue
        raise UserError(f"{path} is a checkpoint of another architecture: it {problem}; choose the model= it is of")
