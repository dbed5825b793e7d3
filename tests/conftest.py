"""Settings of every test."""

import torch

# What tests compute is small, and threads that wait for each other on a busy machine cost a hundred times what they gain.
torch.set_num_threads(1)
