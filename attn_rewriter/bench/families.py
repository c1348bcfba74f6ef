"""Fifteen architectures at published sizes: eager under Inductor against the same eager models rewritten.

Twelve are from transformers, four layers each and with a small vocabulary. They have attention that a plain
scaled_dot_product_attention can't compute, or had none but eager code for years: sinks, softcaps, sliding windows,
ALiBi, relative positions. Three are from diffusers, with the attention processors from before SDPA. All have random
weights; dropout is 0.

    eager       torch.compile(model, backend="inductor"), attn_implementation="eager" or AttnProcessor
    sdpa        the same with AttnProcessor2_0, which diffusers takes by itself
    rewritten   the eager one through attn_rewriter

    forward     no_grad, no cache
    training    forward and backward of the model's own loss, or of what an image model answers, squared; gradients
                freed before each step

Times are medians of CUDA events after warm-up. Memory is the peak over what was allocated before the first step: the
weights and inputs. "Off by" is the root mean square of the difference from the same model run without any compiler, in
the same type, over that of its answer: of the output, or of all gradients together. That of the row "eager" is the
noise of the type; that of the row "rewritten" is larger where the model rounds and a fused kernel does not (BLOOM adds
its ALiBi in bfloat16).

    python -m attn_rewriter bench families --json families.json --markdown

Each family runs in a process of its own: one that crashes or hangs costs a cell, which then says so. With --json every
cell is written as soon as it is measured, and cells in the file are not measured again: after an interruption run the
same command again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from attn_rewriter.api import report_of
from attn_rewriter.bench import models, run
from attn_rewriter.bench.measure import Cell, Results, time_step
from attn_rewriter.bench.processes import Worker

VOCABULARY = 1024
WORD = 768
"""Features of a word, for models of images."""


@dataclass(frozen=True)
class Setup:
    """What all cells have in common."""

    device: str
    dtype: torch.dtype
    tiny: bool
    compiler: str
    repeat: int


# ----------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """A checkpoint's sizes, and what is smaller in the tiny one. `size` is a batch and its tokens, or pixels a side;
    `kind` a task of transformers' automatic classes, or a class of diffusers."""

    like: str
    kind: str
    size: tuple[int, int]
    config: Mapping[str, Any]
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tiny_size: tuple[int, int] = (2, 40)
    model_type: str = ""  # where it isn't the family's name
    library: str = "transformers"


_TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
_BERT = {**_TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 4}
_TINY_IMAGE = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}

FAMILIES = {
    "gpt_oss": Family(
        "gpt-oss-20b, 4 of its experts",
        "CausalLM",
        (4, 2048),
        {
            **_TEXT,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "num_local_experts": 4,  # all are used: the choice doesn't depend on rounding
            "num_experts_per_tok": 4,
        },
        {**_TINY, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    ),
    "gemma2": Family(
        "gemma-2-2b",
        "CausalLM",
        (1, 8192),
        {
            **_TEXT,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
        },
        {**_TINY, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    ),
    "bloom": Family(
        "bloom-7b1",
        "CausalLM",
        (4, 2048),
        {**_TEXT, "hidden_size": 4096, "n_layer": 4, "n_head": 32},
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    ),
    "gptj": Family(
        "gpt-j-6b",
        "CausalLM",
        (4, 2048),
        {**_TEXT, "n_embd": 4096, "n_layer": 4, "n_head": 16, "rotary_dim": 64},
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "initializer_range": 0.2},
    ),
    "mpt": Family(
        "mpt-7b",
        "CausalLM",
        (4, 2048),
        {**_TEXT, "d_model": 4096, "n_layers": 4, "n_heads": 32, "max_seq_len": 2048},
        {"d_model": 64, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2},
    ),
    "deberta_v2": Family(
        "deberta-v3-large",
        "MaskedLM",
        (16, 512),
        {
            **_BERT,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "relative_attention": True,
            "position_buckets": 256,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "max_position_embeddings": 512,
        },
        {**_TINY, "intermediate_size": 64, "position_buckets": 8, "max_position_embeddings": 64},
        model_type="deberta-v2",
    ),
    "swinv2": Family(
        "swinv2-tiny-window8-256",
        "ImageClassification",
        (64, 256),
        {
            "image_size": 256,
            "patch_size": 4,
            "embed_dim": 96,
            "depths": [2, 2, 2, 2],
            "num_heads": [3, 6, 12, 24],
            "window_size": 8,
            "drop_path_rate": 0.0,
            "num_labels": VOCABULARY,
        },
        {"image_size": 32, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        tiny_size=(2, 32),
    ),
    "t5": Family(
        "t5-v1_1-large",
        "Seq2SeqLM",
        (16, 1024),
        {
            **_TEXT,
            "d_model": 1024,
            "d_kv": 64,
            "d_ff": 2816,
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_heads": 16,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    ),
    "gpt_neo": Family(
        "gpt-neo-1.3B",
        "CausalLM",
        (4, 2048),
        {
            **_TEXT,
            "hidden_size": 2048,
            "num_layers": 4,
            "num_heads": 16,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 256,
            "max_position_embeddings": 2048,
        },
        {
            **{"hidden_size": 64, "num_layers": 2, "num_heads": 4, "initializer_range": 0.2},
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "falcon": Family(
        "falcon-rw-1b",
        "CausalLM",
        (4, 2048),
        {
            **_TEXT,
            "hidden_size": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
        },
        _TINY,
    ),
    "codegen": Family(
        "codegen-2B",
        "CausalLM",
        (4, 2048),
        {**_TEXT, "n_embd": 2560, "n_layer": 4, "n_head": 32, "rotary_dim": 64, "n_positions": 2048},
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "initializer_range": 0.2},
    ),
    "mpnet": Family(
        "mpnet-base",
        "MaskedLM",
        (32, 512),
        {
            **_BERT,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "max_position_embeddings": 514,
        },
        {**_TINY, "intermediate_size": 64},
    ),
    "unet": Family(
        "stable-diffusion-v1-5's UNet, 512×512 pixels",
        "UNet2DConditionModel",
        (8, 64),
        {"sample_size": 64, "cross_attention_dim": WORD},  # the rest is what diffusers has by default
        {
            **_TINY_IMAGE,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        tiny_size=(2, 8),
        library="diffusers",
    ),
    "pixart": Family(
        "PixArt-Sigma-XL-2-1024-MS, four layers, 1024×1024 pixels",
        "PixArtTransformer2DModel",
        (4, 128),
        {
            "sample_size": 128,
            "num_layers": 4,
            "out_channels": 8,
            "cross_attention_dim": 1152,
            "caption_channels": WORD,
            "use_additional_conditions": False,
        },
        {
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": 32,
        },
        tiny_size=(2, 8),
        library="diffusers",
    ),
    "vae": Family(
        "sd-vae-ft-mse, 1024×1024 pixels",
        "AutoencoderKL",
        (1, 1024),
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
        },
        {**_TINY_IMAGE, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        tiny_size=(2, 16),
        library="diffusers",
    ),
}


def build(name: str, row: str, how: Setup) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random weights and inputs for it, made where they will be used; the same every time."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    sizes = {**family.config, **(family.tiny if how.tiny else {})}
    with torch.device(how.device):
        model = LIBRARIES[family.library](name, sizes, how.dtype, row == "sdpa")
        return model, INPUTS[family.kind](*(family.tiny_size if how.tiny else family.size), how.dtype)


def of_transformers(name: str, sizes: Mapping[str, Any], dtype: torch.dtype, with_sdpa: bool) -> Any:
    """A model with eager attention, or PyTorch's own."""
    import transformers

    family = FAMILIES[name]
    config = transformers.AutoConfig.for_model(family.model_type or name, **sizes)
    auto = getattr(transformers, f"AutoModelFor{family.kind}")
    return auto.from_config(config, dtype=dtype, attn_implementation="sdpa" if with_sdpa else "eager")


def of_diffusers(name: str, sizes: Mapping[str, Any], dtype: torch.dtype, with_sdpa: bool) -> Any:
    """The same."""
    import diffusers
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model = getattr(diffusers, FAMILIES[name].kind)(**sizes).to(dtype)
    model.set_attn_processor(AttnProcessor2_0() if with_sdpa else AttnProcessor())
    return model


LIBRARIES = {"transformers": of_transformers, "diffusers": of_diffusers}


def tokens(batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """None of them special, and labels."""
    ids = torch.randint(3, VOCABULARY, (batch, length))
    return {"input_ids": ids, "labels": ids}


def two_texts(batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """For an encoder and a decoder."""
    given = tokens(batch, length, dtype)
    return {**given, "decoder_input_ids": given["input_ids"].flip(1)}


def images(batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """With their classes."""
    pixels = torch.randn(batch, 3, length, length, dtype=dtype)
    return {"pixel_values": pixels, "labels": torch.randint(VOCABULARY, (batch,))}


def pixels(batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """To be encoded and decoded."""
    return {"sample": torch.randn(batch, 3, length, length, dtype=dtype)}


def latents(batch: int, length: int, dtype: torch.dtype, image: str = "sample", words: int = 77) -> dict[str, Tensor]:
    """With a text and a time."""
    text = torch.randn(batch, words, WORD, dtype=dtype)
    times = torch.randint(1000, (batch,))
    return {image: torch.randn(batch, 4, length, length, dtype=dtype), "encoder_hidden_states": text, "timestep": times}


def padded_latents(batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """With texts of 10 words, 20 and so on."""
    given = latents(batch, length, dtype, "hidden_states", words=300)
    is_word = torch.arange(300) < 10 * (1 + torch.arange(batch)[:, None])
    return {**given, "encoder_attention_mask": is_word.to(dtype)}


INPUTS = {
    "CausalLM": tokens,
    "MaskedLM": tokens,
    "Seq2SeqLM": two_texts,
    "ImageClassification": images,
    "UNet2DConditionModel": latents,
    "PixArtTransformer2DModel": padded_latents,
    "AutoencoderKL": pixels,
}


# ------------------------------------------------------------------------------------- measurements


Step = Callable[[], dict[str, Tensor]]


def forward(model: nn.Module, given: dict[str, Tensor]) -> Step:
    """A step that answers with the output."""
    given = {name: x for name, x in given.items() if name != "labels"}
    model.eval()

    @torch.no_grad()
    def step() -> dict[str, Tensor]:
        return {"output": model(**given)[0]}

    return step


def training(model: nn.Module, given: dict[str, Tensor]) -> Step:
    """A step that answers with the gradients."""
    model.train()

    def step() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        output = model(**given)
        loss = output.loss if "labels" in given else output[0].square().mean()
        loss.backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    return step


ROWS = ("eager", "sdpa", "rewritten")
COLUMNS = {"forward": forward, "training": training}


def measure(name: str, column: str, row: str, how: Setup) -> Cell:
    """One cell: its time and memory, how far its answer is off and, where attention is rewritten, the sites."""
    model, given = build(name, row, how)
    step = COLUMNS[column](model, given)
    truth = answer_or_none(step)
    model.zero_grad(set_to_none=True)
    models.compile_in_place(model, row == "rewritten", how.compiler)
    off, cell = time_step(step, lambda answer: differences(answer, truth), how.repeat, patience=run.PATIENCE)
    return cell | off | (models.rewriting(report_of(model)) if row == "rewritten" else {})


def answer_or_none(step: Step) -> dict[str, Tensor] | None:
    """What the model answers without a compiler; nothing where that takes more memory than there is."""
    try:
        return step()
    except torch.OutOfMemoryError:
        return None


def differences(answer: dict[str, Tensor], truth: dict[str, Tensor] | None) -> Cell:
    """The root mean square of the difference over that of the truth, of all tensors together; and the tensors that
    differ most, each by itself: gradients that are 0 but for rounding, as a key's bias has, differ by about 1."""
    if truth is None:
        return {}
    if answer.keys() != truth.keys():
        raise AssertionError(f"other gradients: {sorted(answer.keys() ^ truth.keys())}")
    apart = {name: (answer[name].float() - x.float()).norm().item() for name, x in truth.items()}
    norms = {name: x.float().norm().item() for name, x in truth.items()}
    each = {name: apart[name] / max(norms[name], 1e-30) for name in truth}
    worst = sorted(each, key=lambda name: each[name], reverse=True)[:5]
    total = math.hypot(*apart.values()) / max(math.hypot(*norms.values()), 1e-30)
    return {"off_by": total, "worst": {name: each[name] for name in worst}}


# ---------------------------------------------------------------------------------------- processes


class Workers:
    """A worker for each family, or for less if a cell fails; the next one imports meanwhile."""

    def __init__(self, families: Sequence[str]) -> None:
        self.last = families[-1]
        self.family = ""
        self.busy: Worker | None = None
        self.next: Worker | None = None

    def measure(self, family: str, *task: object) -> Cell:
        """The cell, or why there is none. All of a family's cells come one after another."""
        if family != self.family:
            self.retire()
        self.busy, self.family = self.busy or self.next or Worker(measure), family
        if self.busy is self.next:
            self.next = None
        if self.next is None and family != self.last:
            self.next = Worker(measure)
        cell = self.busy.measure(family, *task)
        if "failed" in cell:
            self.retire()
        return cell

    def retire(self) -> None:
        """End the worker that is measuring."""
        if self.busy:
            self.busy.close()
        self.busy = None

    def close(self) -> None:
        """End all."""
        self.retire()
        if self.next:
            self.next.close()


# ------------------------------------------------------------------------------------------- tables


def milliseconds(cell: Cell, base: Cell) -> str:
    """The time, with the speed-up over another cell; or why there is none."""
    if "ms" not in cell:
        return run.why_not(cell) or "–"
    faster = f" ({base['ms'] / cell['ms']:.2f}×)" if "ms" in base and base is not cell else ""
    return f"{cell['ms']:.2f}{faster}"


def gibibytes(cell: Cell) -> str:
    """The peak of the memory, where it was measured."""
    return f"{cell['gib']:.2f}" if "gib" in cell else "–"


def off_by(cell: Cell) -> str:
    """How far the answer is off, where there was one to compare it with."""
    return f"{cell['off_by']:.1e}" if "off_by" in cell else "–"


def table(results: Results) -> run.Table:
    """Title, header and rows: two rows a family."""
    columns = [column for column in COLUMNS if any(key.endswith(" " + column) for key in results.data["cells"])]
    header = ["", "", *(f"{column} {what}" for column in columns for what in ("ms", "GiB", "off by")), "fused sites"]
    rows = []
    for name, family in FAMILIES.items():
        for row in ROWS:
            cells = [results.get(f"{name} {column}", row) for column in columns]
            bases = [results.get(f"{name} {column}", "eager") for column in columns]
            figures = [(milliseconds(c, base), gibibytes(c), off_by(c)) for c, base in zip(cells, bases, strict=True)]
            fused = dict.fromkeys(text for text in map(models.sites, cells) if text)  # once where the columns agree
            if any(cells):
                title = f"{name}\n{family.like}\n{'×'.join(map(str, family.size))}"
                first = name if results.data["setup"]["tiny"] else title
                rows.append([first if row == "eager" else name, row, *sum(figures, ()), "\n".join(fused)])
    return "Eager attention, as it is and rewritten, both compiled", header, rows


def remarks(results: Results) -> list[str]:
    """How much more an answer changes where attention is rewritten than where the model is only compiled. More asks for
    a look: something is wrong, or the model rounds what a kernel doesn't (BLOOM its scores with ALiBi's added)."""
    ratios = {
        column: cells["rewritten"]["off_by"] / cells["eager"]["off_by"]
        for column, cells in results.data["cells"].items()
        if "off_by" in cells.get("rewritten", {}) and cells.get("eager", {}).get("off_by")
    }
    if not ratios:
        return []
    worst = max(ratios, key=lambda column: ratios[column])
    return [f"rewritten answers are off by at most {ratios[worst]:.2f} times as much as eager ones, compiled ({worst})"]


# ------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    run.add_arguments(parser)
    run.add_choice(parser, "--families", FAMILIES)
    run.add_choice(parser, "--columns", COLUMNS)
    run.add_choice(parser, "--rows", ROWS)
    run.add_compiler(parser)


def setup(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on; ends where a library is missing."""
    for library in dict.fromkeys(FAMILIES[family].library for family in options.families):
        run.require(library, "a model")
    return run.setup(options) | {"tiny": options.tiny, "compiler": options.compiler}


def main(options: argparse.Namespace) -> int:
    """Measure, and show what there is."""
    how = Setup(options.device, getattr(torch, options.dtype), options.tiny, options.compiler, options.repeat)
    results = Results(options.json)
    with closing(Workers(options.families)) as workers:
        tasks = [
            run.Task(f"{family} {column}", row, partial(workers.measure, family, column, row, how))
            for family, column, row in product(options.families, options.columns, options.rows)
            if row != "sdpa" or FAMILIES[family].library == "diffusers"
        ]
        run.fill(results, tasks, lambda: setup(options), options.limit_s)
    run.show(results, [table(results)] if results.data["cells"] else [], remarks(results), options.markdown)
    return int(results.failures() > 0)
