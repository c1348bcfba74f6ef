"""Three models that know nothing of a rewriter, explained and rewritten as they are, forward and backward.

    python examples/third_party.py

A GPT that masks with a registered tril buffer, torch.nn's encoder, and a vision transformer with packed qkv.
"""

from __future__ import annotations

import argparse

import torch
from _common import add_options, byte_ids, compare, results, windows
from models import GPT, ViT
from torch import Tensor, nn

import attn_rewriter
from attn_rewriter.bench.measure import console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    args = parser.parse_args()

    measured = {}
    for name, (model, inputs) in third_party_models().items():
        model = model.to(args.device)
        inputs = {key: x.to(args.device) for key, x in inputs.items()}
        report = attn_rewriter.explain(model, **inputs)
        console.rule(name)
        print(report)
        attn_rewriter.optimize(model, kernel=args.kernel)
        measured[name] = compare(model, inputs, train=True)
    console.print(results(f"Forward and backward in float32 on {args.device}", measured))


def third_party_models() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """The models in training mode (dropout 0, so that runs can be compared), each with a batch for it."""
    torch.manual_seed(0)
    dim, num_heads, num_layers = 256, 4, 2
    layer = nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, dropout=0.0, batch_first=True)
    return {
        "GPT": (GPT(256, 1024, dim, num_layers, num_heads), {"ids": windows(byte_ids(), 2, 512)}),
        "Encoder": (nn.TransformerEncoder(layer, num_layers), {"src": torch.randn(2, 512, dim)}),
        "ViT": (ViT(224, 8, dim, num_layers, num_heads, 10), {"images": torch.randn(1, 3, 224, 224)}),
    }


if __name__ == "__main__":
    main()
