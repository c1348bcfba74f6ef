"""What a user's script does with an installed package: it passes `mypy --strict`, and runs outside of a checkout."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

import attn_rewriter


class Attention(nn.Module):
    """Causal, by hand."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-2, -1) * query.size(-1) ** -0.5
        above = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool).triu(1)
        output: Tensor = scores.masked_fill(above, float("-inf")).softmax(-1) @ value
        return output


def main() -> None:
    warnings.simplefilter("error", UserWarning)
    model, inputs = Attention(), [torch.randn(2, 4, 16, 8) for _ in range(3)]
    expected: Tensor = model(*inputs)
    said: attn_rewriter.Report = attn_rewriter.explain(model, *inputs, device="sm_90")
    optimized = attn_rewriter.optimize(model, compiler="aot_eager", verify=True)
    torch.testing.assert_close(optimized(*inputs), expected)
    report = attn_rewriter.report_of(optimized)
    by_name = torch.compile(Attention(), backend="attn_rewriter", options={"compiler": "aot_eager"})
    torch.testing.assert_close(by_name(*inputs), expected)
    assert said.n_sites == report.n_fused == 1
    kernels: list[str | None] = [site.kernel for site in report.sites]
    print(f"attn_rewriter {attn_rewriter.__version__} at {attn_rewriter.__file__}: {kernels}")


if __name__ == "__main__":
    main()
