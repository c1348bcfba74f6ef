import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPE = torch.float64
WIDE = torch.float64
CALLS = [(5, 7), (5, 7), (5, 7)]
GRADIENTS = ["q", "kn", "vn", "bias2_n", "buffer_2"]
OPTIONS = {"compiler": "aot_eager"}
DYNAMIC = None
AS_READ = True
TOLERANCE = 1e-09


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n, m, seed=0):
    return {
        "q": rand(seed + 101, 2, 1, n, 4),
        "kn": rand(seed + 102, 2, 1, n, 4),
        "vn": rand(seed + 103, 2, 1, n, 4),
        "documents_q_n": (rand(seed + 22, 2, n) > 0.5).cumsum(-1),
        "documents_n": (rand(seed + 21, 2, n) > 0.5).cumsum(-1),
        "bias2_n": rand(seed + 12, n, n),
        "buffer_2": rand(seed + 121, 2, 1, n + 2 * m, 4),
        "padq": torch.arange(n) < (rand(seed + 18, 2, 1) * n).abs().floor() + 1,
        "pad": torch.arange(m) < (rand(seed + 17, 2, 1) * m).abs().floor(),
    }


class Program(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("visible", torch.arange(24) % 3 != 1)

    def forward(self, q, kn, vn, documents_q_n, documents_n, bias2_n, buffer_2, padq, pad):
        n, m = (5, 7)
        with torch.set_grad_enabled(True):
            keep1 = (documents_q_n[:, None, :, None] == documents_n[:, None, None, :]) & torch.ones(
                n, n, dtype=torch.bool
            ).tril()
            s2 = q @ kn.mT
            s3 = s2.mul_(0.3)
            s4 = s3 - (1.0 - keep1.to(DTYPE)) * -torch.finfo(DTYPE).min
            keep5 = (F.one_hot(documents_q_n, 9) @ F.one_hot(documents_n, 9).mT)[:, None] > 0
            keep6 = ~~keep5
            s7 = s4 + torch.where(keep6, torch.zeros((), dtype=DTYPE), torch.finfo(DTYPE).min)
            s8 = s7 * 1e-09
            s9 = s8 - bias2_n
            p10 = s9.softmax(-1)
            o11 = p10 @ vn
        q_2 = buffer_2[:, :, 0 : 0 + n]
        k_2 = buffer_2[:, :, 1 : 1 + m]
        v_2 = buffer_2[:, :, 2 : 2 + m]
        with torch.set_grad_enabled(True):
            keep12 = self.visible[:m]
            s13 = q_2 @ k_2.transpose(-2, -1)
            s14 = s13 * 0.35
            s15 = s14.masked_fill(~keep12, float("-inf"))
            keep16 = padq[:, None, :, None] * pad[:, None, None, :]
            s17 = s15 - (1.0 - keep16.to(DTYPE)) * -torch.finfo(DTYPE).min
            p18 = s17.softmax(-1)
            o19 = p18 @ v_2
        return (o19, o11)


def change(model):
    model.visible = model.visible.flip(-1)
