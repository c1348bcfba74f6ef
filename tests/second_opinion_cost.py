"""What a second opinion takes of the first call, in CPU time: `python -m tests.second_opinion_cost`."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

import attn_rewriter
from attn_rewriter.second_opinion import Opinions

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 1000,
}
MODELS = {
    "Llama": (AutoModelForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=4)),
    "BERT": (AutoModel, BertConfig(**SIZES)),
}


def first_call(kind: Any, config: Any, training: bool) -> tuple[float, float, int]:
    """Seconds of the first call, those of them for second opinions, and how many sites were fused."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation="eager").train(training)
    tokens = torch.randint(3, 999, (2, 128))
    asked, on = [], Opinions.on

    def timed(self: Opinions, *site: Any) -> str:
        started = time.process_time()
        said = on(self, *site)
        asked.append(time.process_time() - started)
        return said

    Opinions.on = timed  # type: ignore[method-assign]
    try:
        started = time.process_time()
        attn_rewriter.optimize(model)
        with torch.set_grad_enabled(training):
            output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0]
            if training:
                output.sum().backward()
        return time.process_time() - started, sum(asked), attn_rewriter.report_of(model).n_fused
    finally:
        Opinions.on = on  # type: ignore[method-assign]


def main() -> None:
    for name, (kind, config) in MODELS.items():
        for training in (False, True):
            whole, asked, n_fused = first_call(kind, config, training)
            way = "training" if training else "inference"
            print(
                f"{name}, {way}: {n_fused} sites, {whole:.1f} s, {asked:.2f} s of it ({asked / whole:.1%})", flush=True
            )


if __name__ == "__main__":
    main()
