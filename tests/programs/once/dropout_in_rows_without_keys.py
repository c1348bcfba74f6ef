import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# drops weights
DTYPE = torch.float64
WIDE = torch.float64
CALLS = [(5, 7)]
GRADIENTS = ["q", "kn", "vn", "q_1", "k_1l", "v_1l"]
OPTIONS = {"kernel": "sdpa"}
DYNAMIC = None
AS_READ = False
TOLERANCE = 1e-06


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n, m, seed=0):
    l = m + 2
    return {
        "q": rand(seed + 101, 1, 4, n, 8),
        "kn": rand(seed + 102, 1, 4, n, 8),
        "vn": torch.eye(n).expand(1, 4, -1, -1).clone(),
        "numbers_n": (torch.arange(n) < (rand(seed + 19, 1, 1) * n).abs().floor()).long(),
        "q_1": rand(seed + 111, 1, 4, n, 8),
        "k_1l": rand(seed + 112, 1, 4, l, 8),
        "v_1l": torch.eye(l).expand(1, 4, -1, -1).clone(),
        "padq_l": torch.arange(n) < (rand(seed + 18, 1, 1) * n).abs().floor() + 1,
    }


def program(q, kn, vn, numbers_n, q_1, k_1l, v_1l, padq_l):
    n, m = 5, 7
    l = m + 2
    keep1 = (numbers_n > 0)[:, None, None, :]
    s2 = q @ kn.transpose(-2, -1)
    s3 = 0.5 * s2
    s4 = s3 + 1.5
    s5 = torch.where(keep1, s4, torch.full_like(s4, -1e9))
    p6 = s5.softmax(-1)
    p7 = F.dropout(p6, 0.5)
    o8 = torch.matmul(p7, vn)
    keep9 = padq_l[:, None, :, None].expand(1, 1, n, l)
    s10 = q_1 @ k_1l.transpose(-2, -1)
    s11 = s10 * 0.35
    s12 = s11 + torch.zeros_like(s11).masked_fill(~keep9, torch.finfo(DTYPE).min)
    p13 = s12.softmax(-1)
    p14 = F.dropout(p13, 0.5)
    o15 = (v_1l.mT @ p14.mT).mT
    return o8, o15, o8, o15
