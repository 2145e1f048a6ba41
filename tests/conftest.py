"""Settings for every test: one thread per process, and no network."""

import os

import torch

# Set before anything imports transformers, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
