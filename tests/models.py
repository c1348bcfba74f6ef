"""Tiny models of transformers with random weights, inputs for them, and their truth in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode

VOCABULARY, BATCH, LENGTH = 100, 3, 13
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_IMAGE = {**_SIZES, "image_size": 12, "patch_size": 4}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


@dataclass(frozen=True)
class Architecture:
    """A model class's config, and how many attentions its forward computes: layers × attentions in a layer."""

    auto: str
    config: dict[str, Any]
    n_sites: int = 2
    n_encoder_sites: int = 0
    kind: str = "decoder"  # or "encoder", "image", "image and text", "encoder-decoder", "speech"

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "encoder-decoder", "speech")

    @property
    def takes_padding(self) -> bool:
        return self.kind != "image"


_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "dropout": 0.0,
    "decoder_start_token_id": 1,
    **_SPECIAL,
}
_GROUPED = {**_TEXT, **_SPECIAL, "num_key_value_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("CausalLM", _GROUPED),
    "mistral": Architecture("CausalLM", {**_GROUPED, "sliding_window": 5}),
    "qwen2": Architecture("CausalLM", _GROUPED),
    "phi3": Architecture("CausalLM", {**_GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gemma": Architecture("CausalLM", {**_GROUPED, "num_key_value_heads": 1, "head_dim": 16}),
    "gpt2": Architecture(
        "CausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            **_SPECIAL,
        },
    ),
    "gpt_neox": Architecture("CausalLM", {**_TEXT, **_SPECIAL, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "opt": Architecture(
        "CausalLM",
        {**_TEXT, **_SPECIAL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "bert": Architecture("MaskedLM", {**_TEXT, **_NO_DROPOUT}, kind="encoder"),
    "vit": Architecture("ImageClassification", {**_IMAGE, **_NO_DROPOUT}, kind="image"),
    "clip": Architecture(
        "",
        {"text_config": {**_TEXT, **_SPECIAL, "eos_token_id": 2}, "vision_config": _IMAGE, "projection_dim": 32},
        n_sites=2 * 2,
        kind="image and text",
    ),
    "bart": Architecture(
        "Seq2SeqLM",
        {
            **_SEQ2SEQ,
            "max_position_embeddings": 64,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "forced_eos_token_id": None,
        },
        n_sites=2 * 1 + 2 * 2,
        n_encoder_sites=2 * 1,
        kind="encoder-decoder",
    ),
    "whisper": Architecture(
        "SpeechSeq2Seq",
        {
            **_SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": LENGTH,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        n_sites=2 * 1 + 2 * 2,
        n_encoder_sites=2 * 1,
        kind="speech",
    ),
}


def build(name: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with the same random weights for every `attention` and `dtype`."""
    architecture = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(name, **architecture.config)
    auto = getattr(transformers, "AutoModel" + (f"For{architecture.auto}" if architecture.auto else ""))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32)
    randomize(model)
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Fill a model with random weights: none of them zero, and large enough that a softmax is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (2 / max(1, parameter[0].numel())) ** 0.5)
            else:
                parameter.add_(noise * 0.1)


def inputs(
    name: str, padding: str = "", *, draw: int = 0, batch: int = BATCH, length: int = LENGTH
) -> dict[str, torch.Tensor]:
    """Random inputs; with padding at the "left" or "right" for all rows of the batch but one."""
    kind = ARCHITECTURES[name].kind
    generator = torch.Generator().manual_seed(1 + draw)

    def tokens() -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (batch, length), generator=generator) * (mask() if padding else 1)

    def mask() -> torch.Tensor:
        steps = torch.arange(length) if padding == "right" else torch.arange(length).flip(0)
        return (steps < torch.tensor([length - 2 * i for i in range(batch)])[:, None]).long()

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    given: dict[str, torch.Tensor] = {}
    if kind in ("image", "image and text"):
        given["pixel_values"] = floats(batch, 3, 12, 12)
    if kind == "speech":
        given["input_features"] = floats(batch, 8, 2 * LENGTH)
    if kind in ("decoder", "encoder", "encoder-decoder", "image and text"):
        given["input_ids"] = tokens()
        if padding:
            given["attention_mask"] = mask()
    if kind in ("encoder-decoder", "speech"):
        given["decoder_input_ids"] = tokens()
        if padding:
            given["decoder_attention_mask"] = mask()
    return given


class NothingNarrowed(TorchFunctionMode):
    """Lets no model cast float64 to float32, as nearly all do in their softmax and norms."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = args[0] if args else kwargs.get("input")
        if isinstance(held, torch.Tensor) and held.dtype == torch.float64:
            if func is torch.Tensor.float:
                return held
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in kwargs.items()}
        return func(*args, **kwargs)
