import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPE = torch.float16
WIDE = torch.float32
CALLS = [(5, 7), (7, 9)]
GRADIENTS = ["q", "kn", "vn", "q_", "k_", "v_"]
OPTIONS = {}
DYNAMIC = None
AS_READ = False
TOLERANCE = 1e-06


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n, m, seed=0):
    return {
        "q": rand(seed + 101, 2, 2, n, 8),
        "kn": rand(seed + 102, 2, 2, n, 8),
        "vn": rand(seed + 103, 2, 2, n, 8),
        "q_": rand(seed + 120, 2, n, 16),
        "k_": rand(seed + 121, 2, m, 16),
        "v_": rand(seed + 122, 2, m, 16),
        "by_head": rand(seed + 24, 2, 2, n, m) > 0,
        "pad": torch.arange(m) < (rand(seed + 17, 2, 1) * m).abs().floor(),
        "lengths": (rand(seed + 20, 2).abs() * 2).long(),
        "like_n": torch.zeros(n),
        "like_m": torch.zeros(m),
    }


def program(q, kn, vn, q_, k_, v_, by_head, pad, lengths, like_n, like_m):
    n, m = (like_n.size(0), like_m.size(0))
    x1 = torch.arange(n)
    i2 = x1[:, None]
    x3 = torch.flip(torch.arange(n), dims=(0,))
    x4 = x3.to(torch.int8) + 125
    x5 = 3 - x4.to(torch.uint8)
    j6 = x5[None, :]
    keep7 = i2.half() * 300 - j6.half() * 300 > -1
    mask8 = torch.zeros(keep7.shape, dtype=DTYPE).masked_fill(~keep7, torch.finfo(DTYPE).min)
    o9 = F.scaled_dot_product_attention(q, kn, vn, attn_mask=mask8, scale=1.0)
    q10 = q_.unflatten(-1, (2, 8)).transpose(1, 2)
    k11 = k_.unflatten(-1, (2, 8)).transpose(1, 2)
    v12 = v_.unflatten(-1, (2, 8)).transpose(1, 2)
    keep13 = by_head & pad[:, None, None, :]
    keep14 = (torch.arange(m)[None, :] < lengths[:, None])[:, None, None, :]
    keep15 = torch.where(keep13, 0.0, -1000000000.0) + torch.where(keep14, 0.0, -1000000000.0) > -1
    keep16 = keep15.expand(torch.broadcast_shapes(keep15.shape, (n, m)))
    keep17 = torch.diff(keep16.byte(), axis=-1, append=keep16[..., -1:].byte()) < 1
    keep18 = keep17 | ~keep17.any(-1, keepdim=True)
    s19 = q10 @ k11.mT
    s20 = 0.5 * s19
    s21 = s20.masked_fill(~keep18, float("-inf"))
    keep22 = torch.full((n, m), -1000000000.0).triu(diagonal=1) > -1
    s23 = torch.where(keep22, torch.zeros((), dtype=DTYPE), torch.finfo(DTYPE).min) + s21
    p24 = s23.softmax(-1)
    o25 = torch.einsum("bhij,bhjd->bhid", p24, v12)
    return (o9, o25)
