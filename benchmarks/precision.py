"""Error of the log-prob of a 512-token response in bfloat16: `logps.fused`, and a bfloat16 log-softmax and sum.

    python -m benchmarks.precision

Hidden states and head have the size of a 1B model. A token has -7.5 nats on average.
"""

import argparse

import torch

from halos import logps

N, D, V = 512, 2048, 32000  # tokens, hidden size, vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for _ in range(args.rounds):
        weight = torch.randn(V, D) * 0.02
        targets = torch.randint(0, V, (N,))
        # Tilted towards the target's row: log-probs of -7.5 nats on average.
        hidden = torch.randn(N, D) + 0.16 * torch.rand(N, 1) * weight[targets] / 0.02
        exact = logps.plain(hidden.double(), weight.double(), targets).double().sum()
        half = (hidden.bfloat16(), weight.bfloat16())
        # The rounding of the inputs is not the kernel's error, so its error is against exact sums of the rounded ones.
        given = logps.plain(half[0].double(), half[1].double(), targets).double().sum()
        ours = logps.fused(*half, targets).double().sum()
        log_softmax = (half[0] @ half[1].T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        rows.append([exact, ours - exact, ours - given, log_softmax.sum().double() - given])
    table = torch.tensor(rows)
    rms = table.pow(2).mean(0).sqrt()
    mean = table[:, 0].mean() / N
    print(f"{args.rounds} responses of {N} tokens, {mean:.2f} nats a token; rms error of the sum, in nats:")
    print(f"  ours against float32 hidden states and weights   {rms[1]:.3f}")
    print(f"  ours against the same bfloat16 inputs            {rms[2]:.3f}")
    print(f"  bfloat16 log-softmax and sum, same inputs        {rms[3]:.3f}")


if __name__ == "__main__":
    main()
