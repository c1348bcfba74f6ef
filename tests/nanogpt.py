"""A script as nanoGPT's: knows nothing of a rewriter, compiles itself, trains with accumulated gradients, evaluates,
keeps a checkpoint, loads it again, and writes on.

    python tests/nanogpt.py OUT --dtype float32 [--compile]
"""

import argparse
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

BLOCK, VOCAB, WIDTH, HEADS, LAYERS = 24, 40, 32, 4, 2


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("bias", torch.tril(torch.ones(BLOCK, BLOCK)).view(1, 1, BLOCK, BLOCK))

    def forward(self, x):
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        k = k.view(batch, length, HEADS, width // HEADS).transpose(1, 2)
        q = q.view(batch, length, HEADS, width // HEADS).transpose(1, 2)
        v = v.view(batch, length, HEADS, width // HEADS).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.h = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -BLOCK:])
            idx = torch.cat((idx, logits[:, -1, :].argmax(-1, keepdim=True)), dim=1)
        return idx


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(1337)
    data = torch.randint(VOCAB, (500,)).sort().values
    model = GPT().to(getattr(torch, args.dtype))
    initial = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    if args.compile:
        model = torch.compile(model)

    def get_batch():
        ix = torch.randint(len(data) - BLOCK, (4,))
        return torch.stack([data[i : i + BLOCK] for i in ix]), torch.stack([data[i + 1 : i + 1 + BLOCK] for i in ix])

    losses = []
    for _ in range(3):
        for _ in range(2):
            loss = model(*get_batch())[1] / 2
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        losses.append(model(*get_batch())[1])

    state = {name.removeprefix("_orig_mod."): x for name, x in model.state_dict().items()}
    torch.save({"model": state}, args.out)
    again = GPT().to(getattr(torch, args.dtype))
    again.load_state_dict(torch.load(args.out)["model"])
    tokens = again.generate(data[:3][None], 5)
    changes = {name: x - initial[name] for name, x in state.items()}
    torch.save({"losses": torch.stack(losses), "changes": changes, "tokens": tokens}, args.out)


if __name__ == "__main__":
    main()
