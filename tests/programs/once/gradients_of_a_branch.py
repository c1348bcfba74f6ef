import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPE = torch.float64
WIDE = torch.float64
CALLS = [(5, 7), (5, 7)]
GRADIENTS = ["q", "k", "v"]
OPTIONS = {"kernel": "sdpa", "compiler": "aot_eager"}
DYNAMIC = None
AS_READ = False
TOLERANCE = 1e-09


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n, m, seed=0):
    return {
        "q": rand(seed + 101, 2, 2, n, 4),
        "k": rand(seed + 102, 2, 2, m, 4),
        "v": rand(seed + 103, 2, 2, m, 4),
        "low": torch.full((n, m), -30.0).triu(1),
    }


def program(q, k, v, low):
    n, m = (5, 7)
    keep1 = 1 - torch.ones(n, m, dtype=torch.uint8).triu(1) * 2 == 1

    def part0(q, k, v):
        s2 = q @ k.transpose(-2, -1)
        s3 = -s2
        s4 = low + s3
        p5 = s4.softmax(-1)
        o6 = p5 @ v
        return o6

    o7 = torch.cond(q.sum() > 0, part0, lambda q, k, v: part0(q, k, v) * 2, (q, k, v))
    return o7
