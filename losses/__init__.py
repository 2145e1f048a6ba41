"""Losses of the literature beyond those of `trainers.py`, by family. A YAML names them as `losses.dpo.IPOTrainer`.

dpo.py              DPO's relatives: pairs, and a reference model
reference_free.py   pairs, without a reference model
tokens.py           pairs, and losses of single tokens
unpaired.py         single responses
sft.py              imitation
reward.py           reward models
"""
