"""The tests. Without a GPU, kernels in Triton are interpreted: it decides so when it is imported, hence here. And each
worker of pytest has one thread: several would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
