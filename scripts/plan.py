"""Will it fit? Memory and traffic of each GPU, before there is one: python scripts/plan.py model=llama13b gpus=8

It takes the words of the training command, and four of its own:

    gpus=8           processes of the run, one per GPU
    gpu_memory=80    of each GPU, as its vendor counts it (nearly GiB)
    nodes=N          machines that the GPUs are in; without it, one per 8 GPUs
    forwards=1       forwards of each GPU per microbatch: more than 1 if its share of the examples has more tokens than
                     model.max_tokens_per_forward

    python scripts/plan.py loss=dpo model=llama65b gpus=64 hsdp_replicas=1
    python scripts/plan.py model=base_model model.name=own model.name_or_path=DIR model.max_tokens_per_forward=8192
    python scripts/plan.py table > docs/scaling_tables.md

How the numbers come about is said in halos/planning.py.
"""

import math
import os
import sys
from typing import Any

from omegaconf import DictConfig

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from halos.commands import hydra_main, report_user_errors  # noqa: E402
from halos.errors import UserError  # noqa: E402
from halos.project_dir import PROJECT  # noqa: E402

GIB = 2**30
RESERVE = 0.1  # of a GPU's memory: for the CUDA context, NCCL's buffers, and the allocator's gaps
PER_NODE = 8
OWN = {"gpus": "8", "gpu_memory": "80", "nodes": "", "forwards": "1"}


def _published(model_type: str, vocab: int, hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": False,
    }


# What the config.json of the models of config/model/ say on the hub.
PUBLISHED = {
    "EleutherAI/pythia-1.4b": _published("gpt_neox", 50304, 2048, 24, 16, 8192),
    "EleutherAI/pythia-2.8b": _published("gpt_neox", 50304, 2560, 32, 32, 10240),
    "EleutherAI/pythia-6.9b": _published("gpt_neox", 50432, 4096, 32, 32, 16384),
    "EleutherAI/pythia-12b": _published("gpt_neox", 50688, 5120, 36, 40, 20480),
    "huggyllama/llama-7b": _published("llama", 32000, 4096, 32, 32, 11008),
    "huggyllama/llama-13b": _published("llama", 32000, 5120, 40, 40, 13824),
    "huggyllama/llama-30b": _published("llama", 32000, 6656, 60, 52, 17920),
    "huggyllama/llama-65b": _published("llama", 32000, 8192, 80, 64, 22016),
}


def main() -> None:
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return
    if words == ["table"]:
        print(table())
        return
    with report_user_errors():
        own = own_values(words)
    sys.argv[1:] = [word for word in words if key_of(word) not in OWN]

    @hydra_main(os.path.join(PROJECT, "config"), "config")
    def run(config: DictConfig) -> None:
        import dataloaders
        import trainers
        from halos.config import validate

        validate(config, trainers, dataloaders)
        print(report(config, **own))

    run()


#### WORDS


def key_of(word: str) -> str:
    return word.partition("=")[0]


def own_values(words: list[str]) -> dict[str, Any]:
    texts = OWN | {key_of(word): word.partition("=")[2] for word in words if key_of(word) in OWN}
    values: dict[str, Any] = {key: whole_number(key, texts[key]) for key in ("gpus", "forwards")}
    values["nodes"] = whole_number("nodes", texts["nodes"] or str(-(-values["gpus"] // PER_NODE)))
    values["gpu_memory"] = amount("gpu_memory", texts["gpu_memory"])
    return values


def whole_number(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{key}={text} is no whole number of at least 1; use for example {key}={OWN[key] or 1}")
    return int(text)


def amount(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{key}={text} is no number above 0; use for example {key}={OWN[key]}")
    return value


def replicas_of(config: DictConfig, gpus: int, nodes: int) -> int:
    """Groups of processes that each hold all weights, as `sharding.mesh_of` makes them."""
    if not config.use_fsdp:
        return gpus
    key, replicas = ("hsdp_replicas", config.hsdp_replicas) if config.hsdp_replicas else ("nodes", nodes)
    if gpus % replicas:
        divisors = ", ".join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)
        raise UserError(f"{key}={replicas} does not divide gpus={gpus} into equal groups; use one of {divisors}")
    return replicas


def architecture(config: DictConfig) -> tuple[Any, str]:
    """The model's own config, and where it comes from.

    A published model that this machine has not downloaded is taken from the table above: asking the hub takes 20 s
    where it cannot be reached, and its answer is known.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    from halos import loading

    name, load_from = config.model.name_or_path, config.model.load_from
    if load_from and not load_from.endswith(".pt"):
        return loading.load_config(config), f"config.json of {load_from}"
    if name in PUBLISHED and try_to_load_from_cache(name, "config.json") is None:
        return AutoConfig.for_model(**PUBLISHED[name]), f"built-in facts about {name}"
    return loading.load_config(config), f"config.json of {name}" if name else "model.architecture"


#### WHAT IS PRINTED

ROWS = {  # of `planning.Memory`
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer, and its step",
    "reference": "reference model",
    "gathered": "gathered weights, unreduced gradients",
    "activations": "activations, and computing with them",
}


def report(config: DictConfig, gpus: int, gpu_memory: float, nodes: int, forwards: int) -> str:
    from halos import planning

    replicas = replicas_of(config, gpus, nodes)
    lm_config, source = architecture(config)
    plan = planning.make_plan(config, lm_config, gpus, replicas, forwards=forwards)
    where, peak = plan.peak()
    lines = [*describe(config, plan, source), "", f"{'GiB per GPU':40}{'at the most':>12}{'at the peak':>12}"]
    for name, label in ROWS.items():
        most = max(getattr(memory, name) for memory in plan.phases().values())
        lines.append(f"{label:40}{most / GIB:12.2f}{getattr(peak, name) / GIB:12.2f}")
    lines += [f"{'peak':52}{peak.total / GIB:12.2f}  in the {where}", ""]
    sent = {purpose: n_bytes / 1e9 for purpose, n_bytes in plan.wire().items() if n_bytes}
    lines.append(f"each GPU sends {sum(sent.values()):.1f} GB per update" + ": " * bool(sent))
    lines[-1] += ", ".join(f"{n_bytes:.1f} {purpose}" for purpose, n_bytes in sent.items())
    room = f"{peak.total / GIB:.1f} of {gpu_memory:g} GB, where a tenth has to be left for what is not planned"
    good = fits(plan, gpu_memory)
    lines.append(f"it fits: {room}" if good else f"it does not fit: {room}; {remedy(plan, gpu_memory)}")
    return "\n".join(lines)


def describe(config: DictConfig, plan: Any, source: str) -> list[str]:
    setup, n_parameters = plan.setup, sum(group.elements for group in plan.model.groups)
    reference = f"a reference model in {short(setup.reference)}" if setup.reference else "no reference model"
    return [
        f"{config.model.name}: {n_parameters / 1e9:.3f} billion parameters, {len(plan.model.blocks)} blocks ({source})",
        f"loss={config.loss.name}, with {reference}; {settings(config, plan.setup)}",
        f"{setup.world_size} GPUs: {setup.replicas} x {setup.shards} (replicas x shards)",
    ]


def settings(config: DictConfig, setup: Any) -> str:
    checkpointing = "" if setup.checkpointing else "no "
    return (
        f"{config.optimizer}, {short(setup.stored)} weights, {short(setup.compute)} computation, "
        f"{setup.n_tokens} tokens per forward, {checkpointing}activation checkpointing"
    )


def short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def fits(plan: Any, gpu_memory: float) -> bool:
    return plan.peak()[1].total <= (1 - RESERVE) * gpu_memory * GIB


def remedy(plan: Any, gpu_memory: float) -> str:
    """Fewer replicas, else more GPUs, if that is enough."""
    gpus, replicas = plan.setup.world_size, plan.setup.replicas
    fewer = [(gpus, n) for n in reversed(range(1, replicas)) if gpus % n == 0]
    for processes, n in fewer + [(gpus * 2**k, 1) for k in range(1, 8)]:
        if fits(plan.on(processes, n), gpu_memory):
            return f"gpus={processes} hsdp_replicas={n} does"
    return "more GPUs are no help; lower model.max_tokens_per_forward, or use model.activation_checkpointing=true"


#### THE TABLE

TABLE_MODELS = ("pythia1-4b", "pythia2-8b", "pythia6-9b", "pythia12-0b", "llama7b", "llama13b", "llama30b", "llama65b")
TABLE_GPUS = (8, 16, 64)
TABLE_HEAD = """\
<!-- written by `python scripts/plan.py table` -->

Planned memory of each GPU, in GiB at the peak of an update, and what it sends per update, with `loss=dpo` and the
defaults: {settings}.

The columns from parameters to activations add up to the peak. Most peaks are early in the backward, when few gradients
are there; those without activations are in the optimizer's step, which takes as much again as the parameters
(`++optimizer_kwargs.foreach=false` takes less, and longer). Nodes of 8 GPUs are replicas by default; the other row is
of `hsdp_replicas=1`, which shards over all GPUs. It fits if a tenth of {gpu_memory:g} GB is left for what is not
planned: the CUDA context, NCCL's buffers, and the allocator's gaps.
"""
COLUMNS = ["model", "GPUs", "replicas x shards", *ROWS, "peak", "fits", "GB sent"]


def table() -> str:
    """Markdown: the published models on 8, 16 and 64 GPUs of 80 GB."""
    from hydra import compose, initialize_config_dir

    from halos import planning

    gpu_memory = float(OWN["gpu_memory"])
    rows = [COLUMNS, ["---"] * 3 + ["--:"] * (len(COLUMNS) - 3)]
    for name in TABLE_MODELS:
        with initialize_config_dir(os.path.join(PROJECT, "config"), version_base="1.3"):
            config = compose("config", ["loss=dpo", f"model={name}"])
        plan = planning.make_plan(config, architecture(config)[0], PER_NODE, 1)
        layouts = [(gpus, replicas) for gpus in TABLE_GPUS for replicas in sorted({gpus // PER_NODE, 1}, reverse=True)]
        rows += [cells(name, plan.on(*layout), gpu_memory) for layout in layouts]
    head = TABLE_HEAD.format(settings=settings(config, plan.setup), gpu_memory=gpu_memory)
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows)])


def cells(name: str, plan: Any, gpu_memory: float) -> list[str]:
    setup, peak = plan.setup, plan.peak()[1]
    gib = [f"{getattr(peak, what) / GIB:.1f}" for what in (*ROWS, "total")]
    sent = f"{sum(plan.wire().values()) / 1e9:.0f}"
    layout = [str(setup.world_size), f"{setup.replicas} x {setup.shards}"]
    return [name, *layout, *gib, "yes" if fits(plan, gpu_memory) else "no", sent]


if __name__ == "__main__":
    main()
