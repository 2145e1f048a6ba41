"""The best evaluation of a run, by one of its metrics: when BEST/ is written, and when the patience is over."""

from typing import Any

from omegaconf import DictConfig

from halos.errors import UserError, did_you_mean

BEST = "BEST"


def check(values: dict[str, Any]) -> None:
    """Raise UserError if a flat config does not say what is compared, or which values are better."""
    metric, patience = values["best.metric"], values["best.patience"]
    if metric is None and patience is not None:
        raise UserError(f"best.patience={patience} needs a metric to compare; use for example best.metric=loss/eval")
    if metric is not None and values["best.mode"] is None:
        raise UserError(f"best.metric={metric} needs a direction: best.mode=min if a lower value is better, else max")
    if metric is not None and not values["do_first_eval"]:
        raise UserError(
            f"best.metric={metric} needs do_first_eval=true: the weights may be best before the first update"
        )


def after(best: dict[str, Any], settings: DictConfig, updates: int, metrics: dict[str, float]) -> dict[str, Any]:
    """Return what is known of the best evaluation, after one more. Raises UserError if there is no such metric.

    best: {"value", "updates" then, "worse": evaluations since then}; empty before the first
    settings: the section `best` of the config
    """
    if settings.metric is None:
        return best
    if settings.metric not in metrics and not best:
        nearest = did_you_mean(settings.metric, metrics)
        raise UserError(f"best.metric={settings.metric} is not a metric of the evaluations; {nearest}")
    value = metrics.get(settings.metric, float("nan"))
    gain = value - best.get("value", value) if settings.mode == "max" else best.get("value", value) - value
    if gain > settings.min_delta or ("value" not in best and value == value):
        return {"value": value, "updates": updates, "worse": 0}
    return {**best, "worse": best.get("worse", 0) + 1}


def patience_is_over(best: dict[str, Any], settings: DictConfig) -> bool:
    return settings.patience is not None and best.get("worse", 0) >= settings.patience


def line(best: dict[str, Any], settings: DictConfig) -> str:
    """Return why the run stops."""
    value = f"{best['value']:.4g} at step {best['updates']}, whose weights are in {BEST}" if "value" in best else "none"
    return f"stopped early: {best['worse']} evaluations without a better {settings.metric}; the best is {value}"
