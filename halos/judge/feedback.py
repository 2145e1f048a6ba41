"""The dataset of --export_feedback: verdicts as preference pairs, in a form that train.py reads.

`export_feedback` decides which pairs are in it. A pair needs all verdicts that were asked for, and a mean score other
than 0.5: above it the candidate is chosen, below it the baseline. So with both orders, a judge that names the same slot
twice gives no pair, and a verdict that failed or is missing is never taken for an opinion.
"""

import json
from collections import Counter
from collections.abc import Iterator

import numpy as np

from halos.judge.outputs import written
from halos.judge.samples import Pair
from halos.judge.statistics import outcomes


def export_feedback(path: str, pairs: list[Pair], scores: np.ndarray) -> None:
    """Write {prompt, chosen, rejected} per decided pair to a .jsonl, whole, and say how many there are.

    An earlier file is renamed. If there is no decided pair, nothing is written.
    scores: (n_pairs,), of the candidates, averaged over orders and judges; NaN where a verdict is missing
    """
    left_out: Counter[str] = Counter()
    rows = list(_rows(pairs, scores, left_out))
    others = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none"
    if not rows:
        print(f"{path} is not written: no pair has a better response ({others})")
        return
    with written(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(rows)} preference pairs written to {path}; left out: {others}")


def _rows(pairs: list[Pair], scores: np.ndarray, left_out: Counter[str]) -> Iterator[dict]:
    """Yield the decided pairs as rows, and count the reasons for leaving out the others.

    A conversation is written as messages, so that training renders it with its own template.
    """
    for pair, outcome in zip(pairs, outcomes(scores), strict=True):
        prompt, candidate, baseline = pair.source
        if np.isnan(outcome):
            left_out["without all verdicts"] += 1
        elif outcome == 0:
            left_out["tied"] += 1
        elif not pair.candidate.strip() or not pair.baseline.strip():
            left_out["with an empty response"] += 1
        elif pair.candidate == pair.baseline:
            left_out["with equal responses"] += 1
        else:
            chosen, rejected = (candidate, baseline) if outcome > 0 else (baseline, candidate)
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}
