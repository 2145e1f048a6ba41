"""Numbers and counts in words, as the terminal and the page both show them."""

import numpy as np

from halos.inspection.alarms import percent
from halos.inspection.numbers import Split
from halos.inspection.pairs import CommonPrompts
from halos.inspection.spans import Kind, Shown, Span
from halos.tokens import Role


def length_table(split: Split) -> dict[str, dict[str, int]]:
    """Return the median, 95 % point and maximum of all lengths before truncation: {what: {label: tokens}}."""
    return {
        f"{name} tokens": {
            "median": int(np.median(values)),
            "95 %": int(np.quantile(values, 0.95)),
            "longest": int(values.max()),
        }
        for name, values in lengths(split).items()
    }


def lengths(split: Split) -> dict[str, np.ndarray]:
    """Return the lengths before truncation of prompts (one per row), responses by role, and whole sequences."""
    responses = split.responses
    by_role = {str(role): responses.response[responses.of(role)] for role in (Role.CHOSEN, Role.REJECTED)}
    found = {
        "prompt": responses.prompt[responses.is_first],
        **by_role,
        "prompt + response": responses.prompt + responses.response,
    }
    return {name: values for name, values in found.items() if len(values)}


def facts(split: Split) -> dict[str, str]:
    """Return the counts that are not about one dataset, as text: {label: value}."""
    tokens, found, bias = split.tokens, split.repetition, split.bias
    lines = {
        "tokens padded": f"{tokens.padded:,}",
        "tokens packed": f"{tokens.packed:,}",
        "tokens packed, prompts shared": (
            f"{tokens.shared:,} (sharing saves {100 * tokens.saved_by_sharing:.1f} %, all {100 * tokens.saved:.1f} %)"
        ),
        "empty responses": f"{split.empty:,} ({percent(split.empty, len(split.responses.row))})",
        "responses without a token to train on": f"{split.untrained:,}",
    }
    if found.judgments:
        lines |= {
            "duplicates dropped, within / between datasets": f"{found.dropped:,} / {found.merged:,}",
            "duplicates but for case and white space": f"{found.near:,}",
            "contradictions": f"{found.contradictions:,} ({found.near_contradictions:,} but for case and white space)",
            "responses both chosen and rejected": f"{found.both:,}",
        }
    if bias:
        lines |= {
            "pairs equal after truncation": f"{split.equal_after_truncation:,} of {bias.pairs:,}",
            "chosen is longer": (
                f"{percent(bias.longer, bias.longer + bias.shorter)} of the pairs ({bias.longer:,} longer, "
                f"{bias.shorter:,} shorter, {bias.ties:,} ties)"
            ),
            "mean tokens of chosen / rejected": (
                f"{bias.mean_chosen:,.1f} / {bias.mean_rejected:,.1f} "
                f"(difference {bias.mean_chosen - bias.mean_rejected:+,.1f})"
            ),
        }
    return lines


def common_line(common: CommonPrompts) -> str:
    return (
        f"test prompts that are training prompts: {common.exact:,} of {common.test_prompts:,} "
        f"({percent(common.exact, common.test_prompts)}); {common.near:,} "
        f"({percent(common.near, common.test_prompts)}) but for case and white space"
    )


def heading(row: Shown) -> str:
    return f"row {row.number}: {row.example.id} ({', '.join(row.why)})"


def sizes(spans: list[Span]) -> str:
    """Say how many tokens there are, and how many are cut and trained on."""
    kinds = [span.kind for span in spans for _ in range(span.stands_for)]
    n_cut, n_trained = kinds.count(Kind.CUT), kinds.count(Kind.TRAINED) + kinds.count(Kind.END)
    cut = f", {n_cut:,} cut" if n_cut else ""
    return f"{len(kinds):,} tokens{cut}" + (f", {n_trained:,} trained on" if n_trained else "")
