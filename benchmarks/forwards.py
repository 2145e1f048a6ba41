"""Peak memory and time of a batch that runs in 1, 2 and 4 forward passes.

    python -m benchmarks.forwards

SLiC (a loss of pairs without a reference model) on 16 pairs of SHP-like lengths, with a 35M-parameter Llama in float32,
through the trainer's own `forward_backward`. Memory is what the batch adds to the peak of the model with its gradients,
measured in a process of its own for each number of passes. The chunks of logits have the same size in all of them, so
the activations of the body are what shrinks.
"""

import argparse
import multiprocessing
import resource
import time

from omegaconf import OmegaConf

from benchmarks.step import with_gradients
from benchmarks.workload import llama, shp_like_pairs
from halos import engine
from trainers import SLiCTrainer

WAYS = (1, 2, 4)  # forward passes


def trainer_of(policy, max_tokens: int) -> SLiCTrainer:
    config = {"model": {"max_tokens_per_forward": max_tokens}, "loss": {"beta": 1.0, "lambda_coef": 0.1}}
    return SLiCTrainer(policy, None, None, OmegaConf.create(config), None, None, "")


def n_passes(trainer: SLiCTrainer, batch: list) -> int:
    max_tokens = trainer.config.model.max_tokens_per_forward
    return len(engine.pieces(batch, engine.TRAINED, max_tokens, trainer.policy.device))


def peak(n_forwards: int, n_pairs: int, queue) -> None:
    """Put (forward passes that were run, MiB that the batch adds to the peak, seconds of the batch run again)."""
    policy = llama()
    policy.use_packing(True)
    with_gradients(policy)
    batch = shp_like_pairs(n_pairs, policy.vocab_size)
    total = sum(example.n_tokens for example in batch)
    trainer = trainer_of(policy, total // n_forwards)
    while n_passes(trainer, batch) > n_forwards:  # examples are not cut, so passes do not have equal lengths
        trainer.config.model.max_tokens_per_forward += 16
    trainer.forward_backward(shp_like_pairs(1, policy.vocab_size, seed=1, max_length=64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.forward_backward(batch)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    started = time.perf_counter()
    trainer.forward_backward(batch)
    queue.put((n_passes(trainer, batch), growth, time.perf_counter() - started))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_pairs", type=int, default=16)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = []
    for n_forwards in WAYS:
        queue = context.Queue()
        process = context.Process(target=peak, args=(n_forwards, args.n_pairs, queue))
        process.start()
        results.append(queue.get())
        process.join()
    _, one_memory, one_time = results[0]
    for n, memory, seconds in results:
        ratio = memory / one_memory
        print(f"{n} forward passes: peak +{memory:.0f} MiB ({ratio:.2f}), {seconds / one_time:.2f} of the time")


if __name__ == "__main__":
    main()
