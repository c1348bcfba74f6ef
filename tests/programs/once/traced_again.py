import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPE = torch.float64
WIDE = torch.float64
CALLS = [(5, 7), (7, 9)]
GRADIENTS = ["q_", "k_", "v_"]
OPTIONS = {"compiler": "aot_eager"}
DYNAMIC = True
AS_READ = True
TOLERANCE = 1e-06


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n, m, seed=0):
    return {
        "q_": rand(seed + 120, 2, n, 8),
        "k_": rand(seed + 121, 2, m, 8),
        "v_": rand(seed + 122, 2, m, 8),
        "like_n": torch.zeros(n),
        "like_m": torch.zeros(m),
    }


class Program(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("causal", torch.ones(24, 24, dtype=torch.bool).tril())

    def forward(self, q_, k_, v_, like_n, like_m):
        n, m = (like_n.size(0), like_m.size(0))
        q1 = q_.unflatten(-1, (2, 4)).transpose(1, 2)
        k2 = k_.unflatten(-1, (2, 4)).transpose(1, 2)
        v3 = v_.unflatten(-1, (2, 4)).transpose(1, 2)
        keep4 = self.causal[1::2][:n, :m]

        def part2(q, k, v):
            s5 = q @ k.transpose(-2, -1)
            s6 = s5 / k.size(-1) ** 0.5
            s7 = s6.masked_fill(~keep4, -1000000000.0)
            p8 = s7.softmax(-1)
            o9 = p8 @ v
            return o9

        o10 = torch.cond(q1.sum() > 0, part2, lambda q, k, v: part2(q, k, v) * 2, (q1, k2, v3))
        return o10


def change(model):
    model.causal = model.causal.flip(-1)
