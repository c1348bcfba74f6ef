"""The tests. Without a GPU, kernels in Triton are interpreted: it decides so when it is imported, hence here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
