"""What second opinions take of the first call, compiled from empty caches:

    python -m tests.second_opinion_cost                          # on CPU: the quickstart's Llama and a BERT
    python -m tests.second_opinion_cost --device cuda --jobs 8   # the models of `bench families`, at their sizes

Seconds are those of the clock. Each model has a process of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_inductor_cache
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

import attn_rewriter
from attn_rewriter.bench import families
from attn_rewriter.second_opinion import Opinions

SMALL = {
    "quickstart": (
        AutoModelForCausalLM,
        LlamaConfig(
            vocab_size=256,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
        ),
        (1, 1024),
    ),
    "BERT": (
        AutoModel,
        BertConfig(vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8),
        (2, 128),
    ),
}
"""By name, a class, its configuration, and batch and length of the tokens."""


def model_and_inputs(name: str, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Of a name in `SMALL`, on CPU, or of a family."""
    if name not in SMALL:
        return families.build(name, "rewritten", families.Setup(device, torch.bfloat16, False, "inductor", 1))
    kind, config, size = SMALL[name]
    torch.manual_seed(0)
    tokens = torch.randint(3, 255, size)
    model = kind.from_config(config, attn_implementation="eager")
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def first_call(name: str, way: str, device: str) -> str:
    """A line: the seconds of the first call, and those of them for second opinions."""
    model, given = model_and_inputs(name, device)
    asked, on = [], Opinions.on

    def timed(self: Opinions, *site: Any) -> str:
        started = time.perf_counter()
        said = on(self, *site)
        asked.append(time.perf_counter() - started)
        return said

    Opinions.on = timed  # type: ignore[method-assign]
    step = {"forward": families.forward, "training": families.training}[way](model, given)
    with fresh_inductor_cache():
        started = time.perf_counter()
        attn_rewriter.optimize(model, dynamic=False)
        step()
        whole = time.perf_counter() - started
    report = attn_rewriter.report_of(model)
    share = f"{sum(asked):.2f} s of it ({sum(asked) / whole:.1%})"
    return f"{name}, {way}: {report.n_fused} of {report.n_sites} sites, {whole:.1f} s, {share}"


def lines(names: list[str], device: str, jobs: int) -> Iterator[str]:
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        cells = [(name, way, device) for name, way in product(names, families.COLUMNS)]
        futures = [pool.submit(first_call, *cell) for cell in cells]
        for cell, future in zip(cells, futures):
            try:
                yield future.result()
            except Exception as error:  # out of memory beside others, say
                yield f"{cell[0]}, {cell[1]}: {type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    options = parser.parse_args()
    names = [*SMALL] if options.device == "cpu" else [*families.FAMILIES]
    for line in lines(names, options.device, options.jobs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
