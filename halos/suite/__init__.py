"""The suite: rows of losses, with and without SFT, trained under equal budgets, tuned equally, and compared.

settings.py     Suite: what is compared, from settings/*.yaml and the words of scripts/suite.py
plan.py         Run: the words of its commands; which runs there are; how settings are tried
stages.py       from the start to the results: prompts, base, tuning, comparison, A/A
runner.py       do what is missing: commands in forked workers, and how long the rest takes
measures.py     what is measured of a run, per prompt and per held-out pair
contrasts.py    differences of rows over seeds and prompts: intervals, smallest difference, A/A
findings.py     the comparisons that are made, and the scores of all rows as matrices
report.py       table.md and table.json
figure.py       suite.png
commands.py     the commands as text: --print

`scripts/suite.py` hands in the programs (train.py, eval.py, compare.py) and the modules trainers and dataloaders. Other
rooms of halos do not import these.
"""
