"""Memory and traffic of each rank of a run, before there is a GPU to try it on. `scripts/plan.py` prints them.

    setup.py        how the ranks share a run: shards, replicas, dtypes, forward passes
    sizes.py        parameters: the groups that FSDP gathers together
    measure.py      bytes of live tensors while a function runs
    activations.py  activations: what the parts of a model save and compute with, measured on fake tensors
    optimizer.py    state of an optimizer, and what its step takes beyond that
    phases.py       memory in each phase of an update; change it when the training step changes
    traffic.py      bytes that each rank sends per update
    make.py         the plan of a config
    published.py    architectures of the models in config/model/
    report.py       the printed plan of one run
    table.py        the table of docs/scaling_tables.md
    hardware.py     the table in README.md of what trains what

Nothing else in halos imports these rooms.
"""
