import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPE = torch.float64
WIDE = torch.float64
CALLS = [(5, 7)]
GRADIENTS = ["q", "k", "v"]
OPTIONS = {"kernel": "sdpa"}
DYNAMIC = None
AS_READ = True
TOLERANCE = 1e-06


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n, m, seed=0):
    return {"q": rand(seed + 101, 2, 4, n, 8), "k": rand(seed + 102, 2, 4, m, 8), "v": rand(seed + 103, 2, 4, m, 8)}


def program(q, k, v):
    n, m = (5, 7)
    keep1 = torch.ones(n, m).tril().bool()
    keep2 = torch.arange(m).tile((n, 1)) < 3
    keep3 = keep1.masked_fill(keep2, True)
    keep4 = keep3 | (torch.arange(m) == 0)
    s5 = q @ k.transpose(-2, -1)
    s6 = s5 / 3
    s7 = s6 - (1.0 - keep4.to(DTYPE)) * -torch.finfo(DTYPE).min
    x8 = torch.arange(n)
    x9 = torch.as_tensor(x8, dtype=torch.int8)
    x10 = torch.neg(x9)
    i11 = x10[:, None]
    x12 = torch.arange(125, 125 + m).to(torch.int8)
    j13 = x12[None, :]
    keep14 = (j13 <= i11) >= (i11 == j13)
    keep15 = torch.ones(n, m).tril() - torch.eye(n, m) > -0.5
    keep16 = keep14.to(torch.int8) * 100 + keep15.to(torch.int8) * 100 > 0
    keep17 = torch.masked_fill(keep16.float(), ~keep16, -1000000000.0) > 0
    s18 = s7 + (1.0 - keep17.to(DTYPE)) * torch.finfo(DTYPE).min
    p19 = s18.softmax(-1)
    s20 = q * 0.7 @ k.transpose(-2, -1)
    s21 = 0.5 * s20
    s22 = s21 + torch.where(keep4, torch.zeros((), dtype=DTYPE), float("-inf"))
    p23 = s22.softmax(-1)
    o24 = (p19 - 0.4 * p23) @ v
    return o24
