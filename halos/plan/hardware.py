"""The table in README.md of what trains what: the fewest GPUs on which each model of config/model/ fits."""

from collections.abc import Iterable

from halos.plan.phases import Plan
from halos.plan.report import GIB, fits
from halos.plan.table import MODELS, planned

MEMORIES = (24, 48, 80, 141)  # GB of a GPU: for example RTX 4090, L40S, H100, H200
GPUS = (1, 2, 4, 8, 16, 32, 64)


def hardware(config_dir: str, models: Iterable[str] = MODELS) -> str:
    """The table in Markdown.

    config_dir: the absolute path of the project's config/
    """
    rows = [["model", *(f"{memory} GB" for memory in MEMORIES)], ["---", *["--:"] * len(MEMORIES)]]
    for name in models:
        _, plan = planned(config_dir, name)
        rows.append([f"`{name}`", *(fewest(plan, memory) for memory in MEMORIES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fewest(plan: Plan, gpu_memory: float) -> str:
    """The least number of GPUs that share all weights, and the peak of each in GiB."""
    for gpus in GPUS:
        shared = plan.on(gpus, 1)
        if fits(shared, gpu_memory):
            return f"{gpus} ({shared.peak()[1].total / GIB:.0f})"
    return f"over {GPUS[-1]}"
