"""Tiny models that know nothing of a rewriter: of several libraries, of torch itself, and as people write them.

timm, vit-pytorch and open_clip import torchvision, of which there may be no build beside this PyTorch. Their models use
nothing of it, so that where it is missing, empty classes stand in for it in the test process while they are imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------
# torchvision's stand-in


class _Empty(type):
    """A class of which every attribute is its own name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def torchvision() -> Iterator[None]:
    """torchvision as it is, or for as long as this lasts a stand-in."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def made(path: str, **config: Any) -> Any:
    """An instance of a library's class; skips the test where the library is not installed."""
    name, _, cls = path.rpartition(".")
    with torchvision():
        pytest.importorskip(name.partition(".")[0])
        module = importlib.import_module(name)
    return getattr(module, cls)(**config)


# ---------------------------------------------------------------------------------------------------------------
# Inputs: a function of a generator of random numbers

Inputs = Callable[[torch.Generator], dict[str, Any]]


def floats(**shapes: tuple[int, ...]) -> Inputs:
    return lambda generator: {name: torch.randn(size, generator=generator) for name, size in shapes.items()}


def tokens(name: str = "x", length: int = 11) -> Inputs:
    return lambda generator: {name: torch.randint(0, 50, (2, length), generator=generator)}


def both(*parts: Inputs | dict[str, Any]) -> Inputs:
    """Several inputs; a dictionary is the same for every draw."""

    def draw(generator: torch.Generator) -> dict[str, Any]:
        return {name: x for part in parts for name, x in (part(generator) if callable(part) else part).items()}

    return draw


def first(n: int, *lengths: int) -> Tensor:
    """True for the first positions of each row."""
    return torch.arange(n) < torch.tensor(lengths)[:, None]


# ---------------------------------------------------------------------------------------------------------------
# The models


@dataclass(frozen=True)
class Model:
    """How to build a model, and what it computes: how many sites of each spec, or refused for which reason. Where no
    kernel on CPU computes it, `device` is imagined. `training` is the mode that it is run in."""

    build: Callable[[], nn.Module]
    inputs: Inputs
    fused: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    device: str | None = None
    training: bool = False


HEAD8, HEAD16 = "scale 0.3536", "scale 0.25"
OTHER_AXIS = "over another axis"

# -- diffusers

_LATENT = floats(sample=(2, 4, 8, 8), encoder_hidden_states=(2, 5, 24))
_TIMES = {"timestep": torch.tensor([3, 7])}
_UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "cross_attention_dim": 24, "attention_head_dim": 2, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_DIT = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "norm_num_groups": 8,
    "sample_size": 8, "patch_size": 2,
}  # fmt: skip
_JOINT = floats(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 5, 24), pooled_projections=(2, 16))


def _diffusers(name: str, eager: bool = True, **config: Any) -> Callable[[], nn.Module]:
    """A model with the processors from before SDPA; `eager=False` leaves it those that it has."""

    def build() -> nn.Module:
        model = made(f"diffusers.{name}", **config)
        for module in model.modules():
            if eager and hasattr(module, "set_processor"):
                module.set_processor(made("diffusers.models.attention_processor.AttnProcessor"))
        return model

    return build


DIFFUSERS = {
    "unet": Model(
        _diffusers("UNet2DConditionModel", **_UNET), both(_LATENT, _TIMES), {HEAD8: 6, HEAD16: 2}
    ),
    "unet_masked": Model(
        _diffusers("UNet2DConditionModel", **_UNET),
        both(_LATENT, _TIMES, {"encoder_attention_mask": first(5, 5, 3)}),
        {HEAD8: 3, f"{HEAD8}, bias": 3, HEAD16: 1, f"{HEAD16}, bias": 1},
    ),
    "unet_upcast": Model(
        _diffusers("UNet2DConditionModel", upcast_attention=True, **_UNET),
        both(_LATENT, _TIMES),
        {HEAD8: 6, HEAD16: 2},
    ),
    "vae": Model(
        _diffusers("AutoencoderKL", block_out_channels=(16,), norm_num_groups=8),
        floats(sample=(2, 3, 8, 8)),
        {HEAD16: 2},
    ),
    "dit": Model(
        _diffusers("DiTTransformer2DModel", num_embeds_ada_norm=10, out_channels=4, **_DIT),
        both(floats(hidden_states=(2, 4, 8, 8)), _TIMES, {"class_labels": torch.tensor([1, 2])}),
        {HEAD8: 2},
    ),
    "pixart_masked": Model(
        _diffusers("PixArtTransformer2DModel", cross_attention_dim=32, caption_channels=24, out_channels=8, **_DIT),
        both(
            floats(hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 5, 24)),
            {**_TIMES, "encoder_attention_mask": first(5, 5, 3)},
        ),
        {HEAD8: 2, f"{HEAD8}, bias": 2},
    ),
    "sd3": Model(
        _diffusers(
            "SD3Transformer2DModel", eager=False, sample_size=8, patch_size=2, in_channels=4, out_channels=4,
            num_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24,
            caption_projection_dim=32, pooled_projection_dim=16,
        ),
        both(_JOINT, _TIMES),
        {HEAD8: 2},
    ),
    "flux": Model(
        _diffusers(
            "FluxTransformer2DModel", eager=False, patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        both(
            floats(hidden_states=(2, 16, 4), encoder_hidden_states=(2, 5, 24), pooled_projections=(2, 16)),
            {"timestep": torch.tensor([0.25, 0.75]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)},
        ),
        {HEAD16: 2},
    ),
}  # fmt: skip

# -- timm

_TIMM = {"img_size": 32, "num_classes": 5}
_FLAT = {**_TIMM, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_WINDOWS = {**_TIMM, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
_IMAGE = floats(x=(2, 3, 32, 32))


def _timm(path: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        fused = made("timm.layers.use_fused_attn")
        made("timm.layers.set_fused_attn", enable=False)
        try:
            return made(f"timm.{path}", **config)
        finally:
            made("timm.layers.set_fused_attn", enable=fused)

    return build


TIMM = {
    "vit": Model(_timm("models.vision_transformer.VisionTransformer", **_FLAT), _IMAGE, {HEAD8: 2}),
    "vit_pooled": Model(
        _timm(
            "models.vision_transformer.VisionTransformer", qk_norm=True, global_pool="map", class_token=False, **_FLAT
        ),
        _IMAGE,
        {HEAD8: 3},
    ),
    "swin": Model(
        _timm("models.swin_transformer.SwinTransformer", **_WINDOWS),
        _IMAGE,
        {f"{HEAD8}, bias": 1, f"{HEAD8}, bias, bias": 1, f"{HEAD16}, bias": 2},
    ),
    "swin_v2": Model(
        _timm("models.swin_transformer_v2.SwinTransformerV2", **_WINDOWS),
        _IMAGE,
        {"scale tensor, bias": 3, "scale tensor, bias, bias": 1},
    ),
    "beit": Model(
        _timm("models.beit.Beit", use_rel_pos_bias=True, use_abs_pos_emb=False, **_FLAT), _IMAGE, {f"{HEAD8}, bias": 2}
    ),
    "eva": Model(_timm("models.eva.Eva", use_rot_pos_emb=True, **_FLAT), _IMAGE, {HEAD8: 2}),
    "sam": Model(
        _timm(
            "models.vision_transformer_sam.VisionTransformerSAM",
            use_rel_pos=True, window_size=2, global_attn_indexes=(1,), **_FLAT,
        ),
        _IMAGE,
        {f"{HEAD8}, bias": 2},
    ),
    "coatnet": Model(
        _timm("create_model", model_name="coatnet_rmlp_nano_rw_224", **_TIMM), _IMAGE, {"scale 0.1768, bias": 9}
    ),
    "xcit": Model(_timm("models.xcit.Xcit", **{**_FLAT, "depth": 1}), _IMAGE, {"scale tensor": 1, HEAD8: 2}),
    # Its talking heads are linear layers over scores and weights; only the attention of the class token is read.
    "cait": Model(_timm("models.cait.Cait", **_FLAT), _IMAGE, {HEAD8: 2}),
    "mvit": Model(
        _timm("create_model", model_name="mvitv2_tiny", **_TIMM), _IMAGE, refused={"modified in place": 10}
    ),
}  # fmt: skip

# -- x-transformers


def _x(attention: str = "Decoder", **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = made(f"x_transformers.{attention}", dim=32, depth=2, heads=4, attn_dim_head=8, **config)
        return made("x_transformers.TransformerWrapper", num_tokens=50, max_seq_len=32, attn_layers=layers)

    return build


_CAUSAL = f"{HEAD8}, causal"
_SCORES_USED = "scores are also used"
X_TRANSFORMERS = {
    "encoder": Model(_x("Encoder"), tokens(), {HEAD8: 2}),
    "encoder_masked": Model(_x("Encoder"), both(tokens(), {"mask": first(11, 11, 7)}), {f"{HEAD8}, key padding": 2}),
    "decoder_masked": Model(_x(), both(tokens(), {"mask": first(11, 11, 7)}), {f"{HEAD8}, key padding, causal": 2}),
    "decoder_cross": Model(
        _x(cross_attend=True),
        both(tokens(), floats(context=(2, 5, 32)), {"context_mask": first(5, 5, 3)}),
        {_CAUSAL: 2, f"{HEAD8}, key padding": 2},
    ),
    "decoder_flash": Model(
        _x(attn_flash=True), both(tokens(), {"mask": first(11, 11, 7)}), {f"{HEAD8}, causal and key padding": 2}
    ),
    "alibi": Model(_x(alibi_pos_bias=True, alibi_num_heads=3), tokens(), {f"{HEAD8}, bias, causal": 2}),
    "t5_bias": Model(_x(rel_pos_bias=True), tokens(), {f"{HEAD8}, bias, causal": 2}),
    "rotary": Model(_x(rotary_pos_emb=True), tokens(), {_CAUSAL: 2}),
    "qk_norm": Model(_x(attn_qk_norm=True), tokens(), {"scale 10, causal": 2}),
    "one_kv_head": Model(_x(attn_one_kv_head=True), tokens(), {_CAUSAL: 2}),
    "kv_heads": Model(_x(attn_kv_heads=2), tokens(), {_CAUSAL: 2}),
    "memory_keys": Model(_x(attn_num_mem_kv=3), tokens(), {f"{_CAUSAL}, offset 3": 2}),
    "zero_key": Model(_x(attn_add_zero_kv=True), tokens(), {f"{_CAUSAL}, offset 1": 2}),
    "sinks": Model(_x(attn_head_learned_sink=True), tokens(), {f"{_CAUSAL}, sinks": 2}),
    "gates": Model(_x(attn_gate_values=True, attn_head_scale=True), tokens(), {_CAUSAL: 2}),
    "value_dim": Model(_x(attn_value_dim_head=16), tokens(), {_CAUSAL: 2}),
    "softclamp": Model(_x(attn_softclamp_logits=True), tokens(), {f"{HEAD8}, softcap 50, causal": 2}, device="sm_90"),
    "talking_heads_before": Model(_x(attn_pre_talking_heads=True), tokens(), refused={_SCORES_USED: 2}),
    "talking_heads_after": Model(_x(attn_post_talking_heads=True), tokens(), refused={"no rule reads": 2}),
    "sparse_topk": Model(_x(attn_sparse_topk=3), tokens(), refused={_SCORES_USED: 2}),
    "selective": Model(_x(attn_selective=True), tokens(), refused={_SCORES_USED: 2}),
}

# -- vit-pytorch

_VIT = {
    "image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 32, "dim_head": 8
}  # fmt: skip
_IMG = floats(img=(2, 3, 16, 16))


def _vit(path: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: made(f"vit_pytorch.{path}", **config)


def _of_many_sizes(generator: torch.Generator) -> dict[str, Any]:
    sizes = [[(8, 8), (8, 16)], [(16, 16)]]
    return {"batched_images": [[torch.randn(3, *size, generator=generator) for size in row] for row in sizes]}


VIT_PYTORCH = {
    "vit": Model(_vit("vit.ViT", **_VIT), _IMG, {HEAD8: 2}),
    "simple_vit": Model(_vit("simple_vit.SimpleViT", **_VIT), _IMG, {HEAD8: 2}),
    "qk_norm": Model(_vit("simple_vit_with_qk_norm.SimpleViT", **_VIT), _IMG, {"plain": 2}),
    "small_dataset": Model(
        _vit("vit_for_small_dataset.ViT", **_VIT), _IMG, {"scale tensor, inverted mask tensor [query, key]": 2}
    ),
    "cross_vit": Model(
        _vit(
            "cross_vit.CrossViT", image_size=16, num_classes=5, depth=1, sm_dim=32, lg_dim=32, sm_patch_size=4,
            sm_enc_depth=1, sm_enc_heads=4, sm_enc_mlp_dim=32, sm_enc_dim_head=8, lg_patch_size=8, lg_enc_depth=1,
            lg_enc_heads=4, lg_enc_mlp_dim=32, lg_enc_dim_head=8, cross_attn_depth=1, cross_attn_heads=4,
            cross_attn_dim_head=8,
        ),
        _IMG,
        {HEAD8: 4},
    ),
    "levit": Model(
        _vit("levit.LeViT", image_size=32, num_classes=5, stages=1, dim=32, depth=1, heads=2, mlp_mult=2),
        floats(img=(2, 3, 32, 32)),
        {"scale 0.1768, bias": 1},
    ),
    "max_vit": Model(
        _vit("max_vit.MaxViT", num_classes=5, dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1), window_size=2),
        floats(x=(2, 3, 16, 16)),
        {f"{HEAD8}, bias": 4},
    ),
    "navit": Model(_vit("na_vit.NaViT", **_VIT), _of_many_sizes, {"mask tensor [batch, query, key]": 3}),
    "xcit": Model(_vit("xcit.XCiT", cls_depth=1, **_VIT), _IMG, {"scale tensor": 2, HEAD8: 1}),
    "cait": Model(_vit("cait.CaiT", cls_depth=1, **_VIT), _IMG, refused={OTHER_AXIS: 3}),
    "deepvit": Model(_vit("deepvit.DeepViT", **_VIT), _IMG, refused={OTHER_AXIS: 2}),
}  # fmt: skip

# -- torch

_LAYER = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dropout": 0.0, "batch_first": True}
_FUTURE = nn.Transformer.generate_square_subsequent_mask(11)
_PADDED = ~first(11, 11, 7)
_PADDING = f"{HEAD8}, inverted key padding"


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), 2)


class _First(nn.Module):
    """Multi-head attention that asks for the weights and uses the output alone."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)

    def forward(self, query: Tensor, key: Tensor, **masks: Any) -> Tensor:
        return self.attention(query, key, key, **masks)[0]


_SELF, _CROSS = floats(src=(2, 11, 32)), floats(query=(2, 11, 32), key=(2, 11, 32))
# Without a word on `is_causal`, PyTorch looks at the contents of a mask, which breaks the graph inside of torch.nn,
# where Dynamo does not begin another one: then nothing is compiled.
_SAID = {"tgt_is_causal": True, "memory_is_causal": False}
TORCH = {
    "encoder": Model(_encoder, _SELF, {HEAD8: 2}),
    "encoder_training": Model(_encoder, _SELF, {HEAD8: 2}, training=True),
    "encoder_padded": Model(_encoder, both(_SELF, {"src_key_padding_mask": _PADDED}), {_PADDING: 2}, training=True),
    "encoder_causal": Model(_encoder, both(_SELF, {"mask": _FUTURE, "is_causal": True}), {_CAUSAL: 2}, training=True),
    "decoder": Model(
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**_LAYER), 1),
        both(
            floats(tgt=(2, 11, 32), memory=(2, 5, 32)),
            {"tgt_mask": _FUTURE, "memory_key_padding_mask": ~first(5, 5, 3), **_SAID},
        ),
        {_CAUSAL: 1, _PADDING: 1},
    ),
    "transformer": Model(
        lambda: nn.Transformer(32, 4, 1, 1, 48, 0.0),
        both(floats(src=(5, 2, 32), tgt=(11, 2, 32)), {"tgt_mask": _FUTURE, **_SAID}),
        {HEAD8: 2, _CAUSAL: 1},
        training=True,
    ),
    "attention": Model(_First, _CROSS, {HEAD8: 1}),
    "attention_sequence_first": Model(lambda: _First(False), _CROSS, {HEAD8: 1}, training=True),
    "attention_padded": Model(_First, both(_CROSS, {"key_padding_mask": _PADDED}), {_PADDING: 1}, training=True),
    "attention_causal": Model(_First, both(_CROSS, {"attn_mask": _FUTURE}), {f"{HEAD8}, bias": 1}, training=True),
    "attention_masked": Model(
        _First,
        both(_CROSS, {"attn_mask": _FUTURE < 0, "key_padding_mask": _PADDED}),
        {f"{HEAD8}, inverted mask tensor [query, key], inverted key padding": 1},
    ),
    "attention_weights": Model(
        lambda: nn.MultiheadAttention(32, 4, batch_first=True),
        floats(query=(2, 11, 32), key=(2, 11, 32), value=(2, 11, 32)),
        refused={"weights are also returned": 1},
    ),
}

# -- open_clip


class Contrastive(nn.Module):
    """Two towers and their loss, as open_clip's own training calls them."""

    def __init__(self, tower: str, loss: str, vision: dict[str, Any], text: dict[str, Any], **config: Any) -> None:
        super().__init__()
        vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 12, **vision}
        text = {"layers": 2, "width": 32, "heads": 4, "vocab_size": 50, "context_length": 11, **text}
        self.towers = made(f"open_clip.{tower}", embed_dim=32, vision_cfg=vision, text_cfg=text, **config)
        weights = {"caption_loss_weight": 1.0, "clip_loss_weight": 1.0} if loss == "CoCaLoss" else {}
        self.loss = made(f"open_clip.loss.{loss}", **weights)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        found = self.towers(image, text)
        return (self.loss(**found) if isinstance(found, dict) else self.loss(*found)), found


def _clip(*args: Any, **config: Any) -> Callable[[], nn.Module]:
    return lambda: Contrastive(*args, **config)


_PAIRS = both(floats(image=(3, 3, 12, 12)), lambda g: {"text": torch.randint(1, 50, (3, 11), generator=g)})
_POOLED = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 3}
OPEN_CLIP = {
    "clip": Model(_clip("CLIP", "ClipLoss", {}, {}), _PAIRS, {HEAD8: 2, _CAUSAL: 2}, training=True),
    "siglip": Model(
        _clip("CLIP", "SigLipLoss", {}, {"no_causal_mask": True, "pool_type": "last"}, init_logit_bias=-1.0),
        _PAIRS,
        {HEAD8: 4},
        training=True,
    ),
    "qk_norm": Model(
        _clip("CLIP", "ClipLoss", {"qk_norm": True, "scale_heads": True}, {"qk_norm": True}),
        _PAIRS,
        {HEAD8: 2, _CAUSAL: 2},
        training=True,
    ),
    "coca": Model(
        _clip(
            "coca_model.CoCa", "CoCaLoss", {**_POOLED, "output_tokens": True}, {"output_tokens": True},
            multimodal_cfg={"width": 32, "heads": 4, "layers": 1, "context_length": 10, "dim_head": 8},
        ),
        _PAIRS,
        {HEAD8: 4, _CAUSAL: 3},
        training=True,
    ),
}  # fmt: skip

# -- as people write it


class GPTAttention(nn.Module):
    """nanoGPT's, with the mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = (y.view(b, t, 4, c // 4).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
        return self.proj((att @ v).transpose(1, 2).contiguous().view(b, t, c))


class MultiHead(nn.Module):
    """One attention class for decoders and encoders."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.norm = causal, nn.LayerNorm(32)
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (to(y).unflatten(-1, (4, 8)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        energy = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(8)
        if self.causal:
            n = energy.shape[-1]
            energy = energy.masked_fill(torch.ones(n, n, device=x.device).tril() == 0, -1e20)
        weights = torch.softmax(energy, dim=3)
        return x + self.out(torch.einsum("bhql,bhld->bqhd", weights, v).flatten(2))


class Decoder(nn.Module):
    """A GPT: token and position embeddings, blocks, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.blocks, self.head = nn.Sequential(MultiHead(True), MultiHead(True)), nn.Linear(32, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))))


class VisionTransformer(nn.Module):
    """A ViT: patches, a class token, blocks, a classification."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 32, 4, stride=4), nn.Parameter(torch.zeros(1, 1, 32))
        self.blocks, self.head = nn.Sequential(MultiHead(False), MultiHead(False)), nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1))[:, 0])


class EinopsAttention(nn.Module):
    """One class for self and cross attention, with einops."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        rearrange = pytest.importorskip("einops").rearrange
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=4) for y in (self.q(x), k, v))
        attn = (torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5).softmax(dim=-1)
        return self.out(rearrange(torch.einsum("bhij,bhjd->bhid", attn, v), "b h n d -> b n (h d)"))


class LatentAttention(nn.Module):
    """`AttnBlock` of CompVis/latent-diffusion, found in many repositories: one head over the pixels, [B, C, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, 16)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(16, 16, kernel_size=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        k = k.reshape(b, c, h * w)
        w_ = torch.bmm(q, k) * (int(c) ** (-0.5))
        w_ = nn.functional.softmax(w_, dim=2).permute(0, 2, 1)
        h_ = torch.bmm(v.reshape(b, c, h * w), w_).reshape(b, c, h, w)
        return x + self.proj_out(h_)


class LatentHeadsAttention(nn.Module):
    """Multi-head latent attention as in DeepSeek: the dimensions of query and key, and of value, differ."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down, self.up, self.rope = (nn.Linear(32, n) for n in (4 * 24, 8, 4 * 32, 8))
        self.up, self.out = nn.Linear(8, 4 * 32), nn.Linear(4 * 16, 32)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 24).transpose(1, 2)
        k, v = self.up(self.down(x)).view(b, t, 4, 32).transpose(1, 2).split([16, 16], dim=-1)
        k = torch.cat([k, self.rope(x).view(b, 1, t, 8).expand(b, 4, t, 8)], dim=-1)
        scores = torch.matmul(q, k.transpose(2, 3)) * 24**-0.5
        scores = scores + torch.full((t, t), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, -1))


class DifferentialAttention(nn.Module):
    """The difference of two softmaxes before one value (https://arxiv.org/abs/2410.05258)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.weight = nn.Linear(32, 96), nn.Linear(32, 32), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        (q1, q2), (k1, k2) = (y.view(b, t, 2, 2, 8).permute(2, 0, 3, 1, 4) for y in (q, k))
        v = v.view(b, t, 2, 16).transpose(1, 2)
        first, second = (torch.softmax(q @ k.mT * 8**-0.5, dim=-1) for q, k in ((q1, k1), (q2, k2)))
        return self.out(((first - self.weight.sigmoid() * second) @ v).transpose(1, 2).flatten(2))


_X = floats(x=(2, 11, 32))
WRITTEN = {
    "decoder": Model(Decoder, lambda g: {"x": torch.randint(50, (2, 11), generator=g)}, {f"{HEAD8}, causal": 2}),
    "vision_transformer": Model(VisionTransformer, floats(image=(2, 3, 12, 16)), {HEAD8: 2}),
    "gpt": Model(GPTAttention, _X, {f"{HEAD8}, causal": 1}),
    "einops": Model(EinopsAttention, both(_X, floats(context=(2, 5, 32))), {HEAD8: 1}),
    "latent_diffusion": Model(LatentAttention, floats(x=(2, 16, 4, 5)), {HEAD16: 1}),
    "latent_heads": Model(LatentHeadsAttention, _X, {"scale 0.2041, causal": 1}),
    "differential": Model(DifferentialAttention, _X, {HEAD8: 1, f"{HEAD8}, gate": 1}),
}

MODELS = {
    f"{library}-{name}": model
    for library, models in {
        "diffusers": DIFFUSERS,
        "timm": TIMM,
        "x_transformers": X_TRANSFORMERS,
        "vit_pytorch": VIT_PYTORCH,
        "open_clip": OPEN_CLIP,
        "torch": TORCH,
        "written": WRITTEN,
    }.items()
    for name, model in models.items()
}
