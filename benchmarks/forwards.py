"""Peak memory and time of one step whose batch runs in 1, 2 and 4 forwards.

    python -m benchmarks.forwards

SLiC (a loss of pairs without a reference model) on 16 pairs of SHP-like lengths, a 35M-parameter Llama in float32,
through the trainer's own step. Memory is the growth of the peak over the model with its gradients, each way in a
process of its own. The logits are one chunk of the same size in all of them, so what shrinks is the body's activations.
"""

import multiprocessing
import resource
import time

from omegaconf import OmegaConf

from benchmarks.step import with_gradients
from benchmarks.workload import llama, shp_like_pairs
from trainers import SLiCTrainer

N_PAIRS = 16
WAYS = (1, 2, 4)


def trainer_of(policy, max_tokens: int) -> SLiCTrainer:
    config = {"model": {"max_tokens_per_forward": max_tokens}, "loss": {"beta": 1.0, "lambda_coef": 0.1}}
    return SLiCTrainer(policy, None, None, OmegaConf.create(config), None, None, "")


def peak(n_forwards: int, queue) -> None:
    """(forwards that were run, MiB by which the step raises the peak, seconds of a second step)."""
    policy = llama()
    policy.use_packing(True)
    with_gradients(policy)
    batch = shp_like_pairs(N_PAIRS, policy.vocab_size)
    total = sum(example.n_tokens for example in batch)
    trainer = trainer_of(policy, total // n_forwards)
    while len(trainer.forwards(batch)) > n_forwards:  # examples are not cut, so that runs are not quite equal
        trainer.config.model.max_tokens_per_forward += 16
    trainer.forward_backward(shp_like_pairs(1, policy.vocab_size, seed=1, max_length=64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.forward_backward(batch)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    started = time.perf_counter()
    trainer.forward_backward(batch)
    queue.put((len(trainer.forwards(batch)), growth, time.perf_counter() - started))


def main() -> None:
    context = multiprocessing.get_context("spawn")
    results = []
    for n_forwards in WAYS:
        queue = context.Queue()
        process = context.Process(target=peak, args=(n_forwards, queue))
        process.start()
        results.append(queue.get())
        process.join()
    _, one_memory, one_time = results[0]
    for n, memory, seconds in results:
        print(f"{n} forwards: peak +{memory:.0f} MiB ({memory / one_memory:.2f}), {seconds / one_time:.2f} of the time")


if __name__ == "__main__":
    main()
