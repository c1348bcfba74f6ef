import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPE = torch.float64
WIDE = torch.float64
CALLS = [(8, 8)]
GRADIENTS = ["v_2n"]
OPTIONS = {"compiler": "aot_eager"}
DYNAMIC = None
AS_READ = True
TOLERANCE = 1e-06


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n, m, seed=0):
    return {
        "q_1": rand(seed + 111, 2, 2, n, 4),
        "k_1": rand(seed + 112, 2, 2, m, 4),
        "v_1": rand(seed + 113, 2, 2, m, 4),
        "tokens": (torch.arange(m) < (rand(seed + 28, 2, 1) * m).abs().floor() + 1).double(),
        "bias": rand(seed + 11, 2, n, m),
        "bias2": rand(seed + 12, n, m),
        "q_2": rand(seed + 121, 2, 2, n, 4),
        "k_2n": rand(seed + 122, 2, 2, n, 4),
        "v_2n": rand(seed + 123, 2, 2, n, 4),
    }


def program(q_1, k_1, v_1, tokens, bias, bias2, q_2, k_2n, v_2n):
    n, m = (8, 8)
    source1 = tokens * 1
    hidden2 = (source1 == 0).unsqueeze(1).unsqueeze(1)
    keep3 = ~hidden2
    s4 = q_1 @ k_1.transpose(-2, -1)
    s5 = s4 * 0.35
    s6 = s5 + bias
    s7 = bias2 + s6
    s8 = s7.add_(keep3.logical_not().to(DTYPE) * torch.finfo(DTYPE).min)
    p9 = s8.softmax(-1)
    p10 = p9.masked_fill_(~keep3, 0)
    o11 = torch.einsum("bhij,bhjd->bihd", p10, v_1).transpose(1, 2)
    x12 = torch.arange(n)
    i13 = x12.unsqueeze(-1)
    x14 = torch.arange(n)
    j15 = x14[None, :]
    keep16 = j15 <= i13
    keep17 = keep16.expand(torch.broadcast_shapes(keep16.shape, (n, n)))
    keep18 = keep17.roll((1, 1), (-1, -2))
    keep19 = (keep18 & torch.ones(n, n, dtype=torch.bool)).clone()
    keep19.copy_(keep19.flip(-1))
    keep19.copy_(keep19.flip(-1))
    s20 = q_2 @ k_2n.transpose(-2, -1)
    s21 = 0.5 * s20
    s22 = torch.where(keep19, s21, torch.full_like(s21, -1000000000.0))
    p23 = s22.softmax(-1)
    o24 = p23 @ v_2n
    o25 = o24.permute(0, 2, 1, 3).contiguous().view(2, n, -1)
    return (o25, o11)
