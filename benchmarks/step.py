"""Time and memory of a DPO step: packed and fused, against the plain padded path and against a bare model.

    python -m benchmarks.step

A 35M-parameter Llama with a 32k vocabulary, 8 pairs of SHP-like lengths, float32. The ways take turns, and the ratios
are medians over the rounds, since the speed of a shared machine drifts. Memory is what a step adds to the peak of the
model with its gradients, measured in a process of its own for each way.
"""

import argparse
import multiprocessing
import resource
import statistics
import time

import torch

from benchmarks.workload import dpo_backward, llama, shp_like_pairs
from halos import logps


def bare(policy, examples) -> None:
    """Run forward and backward pass of the packed tokens through model(...), with logits at response positions only."""
    inputs = policy.inputs(examples)
    logits = policy.lm(
        input_ids=inputs.input_ids,
        position_ids=inputs.position_ids,
        layout=inputs.layout,
        use_cache=False,
        logits_to_keep=inputs.target_positions,
    ).logits
    torch.nn.functional.cross_entropy(logits[0], inputs.targets).backward()


def packed(policy, examples) -> None:
    policy.use_packing(True)
    policy.token_logps = logps.fused
    dpo_backward(policy, examples)


def padded(policy, examples) -> None:
    policy.use_packing(False)
    dpo_backward(policy, examples)


def bare_packed(policy, examples) -> None:
    policy.use_packing(True)
    bare(policy, examples)


WAYS = {"packed": packed, "padded": padded, "bare": bare_packed}


def with_gradients(policy) -> None:
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)


def peak_memory(way: str, n_pairs: int, queue) -> None:
    """Put the MiB that a step adds to the peak of a process that has run a small step."""
    policy = llama()
    with_gradients(policy)
    WAYS[way](policy, shp_like_pairs(1, policy.vocab_size, seed=1, max_length=64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](policy, shp_like_pairs(n_pairs, policy.vocab_size))
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--n_pairs", type=int, default=8)
    args = parser.parse_args()

    memory = {}
    context = multiprocessing.get_context("spawn")
    for way in WAYS:
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(way, args.n_pairs, queue))
        process.start()
        memory[way] = queue.get()
        process.join()

    policy = llama()
    with_gradients(policy)
    examples = shp_like_pairs(args.n_pairs, policy.vocab_size)
    prompts = [len(example.prompt) for example in examples]
    responses = [len(response) for example in examples for response in example.responses]
    print(f"{policy.lm.num_parameters() / 1e6:.1f}M parameters; prompts of {prompts}, responses of {responses} tokens")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.rounds + 1):
        for way, step in WAYS.items():
            started = time.perf_counter()
            step(policy, examples)
            seconds[way].append(time.perf_counter() - started)
    seconds = {way: times[1:] for way, times in seconds.items()}  # the first round warms up
    for way, times in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds["packed"], times, strict=True)]
        print(
            f"{way:7} {statistics.median(times):6.2f} s   packed takes {statistics.median(ratios):.2f} of it "
            f"({min(ratios):.2f} to {max(ratios):.2f})   peak +{memory[way]:.0f} MiB"
        )


if __name__ == "__main__":
    main()
