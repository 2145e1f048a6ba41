"""How far bfloat16 moves the log-prob of a 512-token response: ours, and as a bfloat16 log-softmax and sum would.

    python -m benchmarks.precision

Hidden states and head of the size of a 1B model, spread so that a token has about the log-prob it has in text.
"""

import torch

from halos import logps

N, D, V, ROUNDS = 512, 2048, 32000, 16


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for _ in range(ROUNDS):
        weight = torch.randn(V, D) * 0.02
        targets = torch.randint(0, V, (N,))
        # Towards the target's row: log-probs of about -2 nats on average, as a trained model has.
        hidden = torch.randn(N, D) + 0.16 * torch.rand(N, 1) * weight[targets] / 0.02
        exact = logps.plain(hidden.double(), weight.double(), targets).double().sum()
        half = (hidden.bfloat16(), weight.bfloat16())
        # What bfloat16 inputs themselves change is no fault of the kernel: the error is against exact sums of those.
        given = logps.plain(half[0].double(), half[1].double(), targets).double().sum()
        ours = logps.fused(*half, targets).double().sum()
        log_softmax = (half[0] @ half[1].T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        rows.append([exact, ours - exact, ours - given, log_softmax.sum().double() - given])
    table = torch.tensor(rows)
    rms = table.pow(2).mean(0).sqrt()
    print(
        f"{ROUNDS} responses of {N} tokens, {table[:, 0].mean() / N:.2f} nats a token; rms error of the sum, in nats:"
    )
    print(f"  ours against float32 hidden states and weights   {rms[1]:.3f}")
    print(f"  ours against the same bfloat16 inputs            {rms[2]:.3f}")
    print(f"  bfloat16 log-softmax and sum, same inputs        {rms[3]:.3f}")


if __name__ == "__main__":
    main()
