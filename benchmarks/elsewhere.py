"""lm-evaluation-harness beside this project: the same log-probs of the same responses, from an export.

    python -m benchmarks.elsewhere .cache/sft_tiny/LATEST         needs `pip install lm_eval`
    python -m benchmarks.elsewhere write                          writes assets/lm_eval/halos_demo.jsonl again

Both score the responses of assets/lm_eval/halos_demo.jsonl, in float32 on a CPU: the harness by its task, with the
chat template where the export has one; the project by its own rendering, encoding, and packed forward pass. The end of
a response (EOS, or the end of turn) is left out here, since the harness does not score it. The harness counts white
space at the end of a prompt, such as the line break after `<|im_start|>assistant`, as part of the response.
"""

import json
import os
import sys
from importlib.util import find_spec

from halos.project_dir import PROJECT

FOLDER = os.path.join(PROJECT, "assets", "lm_eval")
ROWS = os.path.join(FOLDER, "halos_demo.jsonl")
N_ROWS = 64


def rows() -> list[dict[str, str]]:
    """Return the first pairs of the demo's test split whose prompt is one question."""
    from dataloaders import get_demo

    singles = [example for example in get_demo("test").examples.values() if len(example.prompt) == 1 and example.pairs]
    return [
        {"question": one.prompt[0]["content"], "chosen": one.generations[i], "rejected": one.generations[j]}
        for one in singles[:N_ROWS]
        for i, j in one.pairs[:1]
    ]


def of_the_harness(directory: str, has_template: bool) -> tuple[list[list[float]], float]:
    """Return the log-likelihoods [chosen, rejected] of each row by lm_eval, and its accuracy."""
    import lm_eval

    task = "halos_demo_chat" if has_template else "halos_demo"
    done = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": directory, "dtype": "float32"},
        tasks=[task],
        task_manager=lm_eval.tasks.TaskManager(include_path=FOLDER),
        apply_chat_template=has_template,
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
    )
    samples = sorted(done["samples"][task], key=lambda sample: sample["doc_id"])
    logps = [[response[0] for response in sample["filtered_resps"]] for sample in samples]
    return logps, done["results"][task]["acc,none"]


def of_the_project(directory: str, blank_at_the_end: bool) -> list[list[float]]:
    """Return the log-probs [chosen, rejected] of each row by the project's own code.

    blank_at_the_end: count white space at the end of a prompt as part of the response
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from halos.chat import Renderer
    from halos.examples import Example
    from halos.models import PolicyModel
    from halos.tokens import Encoder, Role, TokenizedExample

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = PolicyModel(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)).eval()
    model.use_packing(True)
    renderer, encoder = Renderer(tokenizer), Encoder(tokenizer)
    logps = []
    for row in rows():
        example = Example([{"role": "user", "content": row["question"]}], [row["chosen"], row["rejected"]])
        text = renderer.prompt(example)
        whole, stripped = encoder.prompt_arrays([text, text.rstrip()])
        prompt = stripped if blank_at_the_end else whole
        responses = [
            np.array([*whole[len(prompt) :], *ids], np.int32) for ids in encoder.responses(renderer.responses(example))
        ]
        tokenized = TokenizedExample(prompt, tuple(responses), (Role.CHOSEN, Role.REJECTED))
        with torch.no_grad():
            per_token = model(model.inputs([tokenized])).logps.split(tokenized.n_targets)
        logps.append([tokens[:-1].sum().item() for tokens in per_token])
    return logps


def compare(directory: str) -> None:
    """Print the largest difference of a log-prob, and the accuracy by both."""
    has_template = any("chat_template" in name for name in os.listdir(directory))
    theirs, accuracy = of_the_harness(directory, has_template)
    for blank_at_the_end in (False, True):
        ours = of_the_project(directory, blank_at_the_end)
        differences = [abs(a - b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True)]
        right = sum(chosen > rejected for chosen, rejected in ours) / len(ours)
        print("white space at the end of the prompt", "counted:" if blank_at_the_end else "not counted:")
        print(f"  first row, chosen: lm_eval {theirs[0][0]:.6f}, this project {ours[0][0]:.6f}")
        print(f"  {len(differences)} responses differ by at most {max(differences):.2g} nats")
        print(f"  accuracy: lm_eval {accuracy:.4f}, this project {right:.4f}")


def write() -> None:
    with open(ROWS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if sys.argv[1] == "write":
        write()
    elif find_spec("lm_eval") is None:
        sys.exit("lm_eval is not installed; pip install lm_eval")
    else:
        compare(sys.argv[1])
