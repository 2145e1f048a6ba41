"""The parts of benchmarks/faults.py.

forks.py     commands in forked children of a process that has imported everything, and how they end
runs.py      small runs, what is in their directories, and whether two are the same
tally.py     counts of what went wrong, and the cases that they come from
commands.py  the commands, and what each of them makes if nothing happens to it
kills.py     kills and signals at random moments, each followed by going on
clashes.py   two commands at once, and a disk that is full from a random moment on
inputs.py    malformed configs, rows, weights, sample files, journals and states
mutations.py hypothesis strategies that damage texts, bytes and structures
steady.py    memory and open files over many steps, and how long training waits for a state
"""
