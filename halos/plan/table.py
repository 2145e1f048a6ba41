"""The table of docs/scaling_tables.md: every model of config/model/ on 8, 16 and 64 GPUs."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from halos.plan.make import make_plan
from halos.plan.phases import Plan
from halos.plan.published import architecture
from halos.plan.report import GIB, ROWS, fits, settings
from halos.plan.setup import GPUS_PER_NODE
from halos.plan.traffic import bytes_sent

MODELS = ("pythia1-4b", "pythia2-8b", "pythia6-9b", "pythia12-0b", "llama7b", "llama13b", "llama30b", "llama65b")
GPUS = (8, 16, 64)
GPU_MEMORY = 80.0
COLUMNS = ["model", "GPUs", "replicas x shards", *ROWS, "peak", "fits", "GB sent"]
HEAD = """\
<!-- written by `python scripts/plan.py table` -->

Planned memory of each GPU, in GiB at the peak of an update, and what it sends per update, with `loss=dpo` and the
defaults: {settings}.

The columns from parameters to activations add up to the peak. Most peaks are early in the backward, when few gradients
are there; those without activations are in the optimizer's step, which takes as much again as the parameters
(`++optimizer_kwargs.foreach=false` takes less, and longer). Nodes of 8 GPUs are replicas by default; the other row is
of `hsdp_replicas=1`, which shards over all GPUs. It fits if a tenth of {gpu_memory:g} GB is left for what is not
planned: the CUDA context, NCCL's buffers, and the allocator's gaps.
"""


def table(config_dir: str) -> str:
    """The table in Markdown.

    config_dir: the absolute path of the project's config/
    """
    rows = [COLUMNS, ["---"] * 3 + ["--:"] * (len(COLUMNS) - 3)]
    for name in MODELS:
        config, plan = planned(config_dir, name)
        layouts = [(gpus, replicas) for gpus in GPUS for replicas in sorted({gpus // GPUS_PER_NODE, 1}, reverse=True)]
        rows += [cells(name, plan.on(*layout)) for layout in layouts]
    head = HEAD.format(settings=settings(config, plan.setup), gpu_memory=GPU_MEMORY)
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows)])


def planned(config_dir: str, model: str) -> tuple[DictConfig, Plan]:
    """The config of DPO with the defaults, and its plan on one node."""
    with initialize_config_dir(config_dir, version_base="1.3"):
        config = compose("config", ["loss=dpo", f"model={model}"])
    return config, make_plan(config, architecture(config)[0], GPUS_PER_NODE, 1)


def cells(name: str, plan: Plan) -> list[str]:
    """One row of the table."""
    setup, peak = plan.setup, plan.peak()[1]
    gib = [f"{getattr(peak, field) / GIB:.1f}" for field in (*ROWS, "total")]
    sent = f"{sum(bytes_sent(plan.model, setup).values()) / 1e9:.0f}"
    layout = [str(setup.world_size), f"{setup.replicas} x {setup.shards}"]
    return [name, *layout, *gib, "yes" if fits(plan, GPU_MEMORY) else "no", sent]
