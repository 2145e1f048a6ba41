"""Training speed side by side with TRL and with the plain way: `python -m benchmarks.throughput --help`.

__main__.py    the command: blocks of steps, one process at a time, in both orders
work.py        the batches of all ways, their lengths, and the FLOPs that they need at least
ways.py        this project's trainers, and the plain way: padded, full logits, a reference forward in each step
peer.py        TRL's trainers, on the same token ids
block.py       the process that runs one way for some steps
machine.py     load of other processes, memory, and the rate of matrix products
report.py      whether all losses agree; tables
"""
