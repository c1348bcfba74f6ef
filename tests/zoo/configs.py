"""Every architecture of transformers, tiny: its default config, shrunk by the names of its fields.

Nothing here knows a model by heart where a rule by name does. Where all rules together break a model, fewer are
applied (`LEVELS`), and `OVERRIDES` has the last word.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

VOCABULARY, BATCH, LENGTH = 99, 3, 13
IMAGE, PATCH, MEL, FRAMES = 16, 4, 16, 26

# ---------------------------------------------------------------------------------------------------------------
# Which architectures, and which classes

# The heads to look for, in this order: the first that an architecture has is run.
_HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "MASK_GENERATION",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "POSE_ESTIMATION",
    "TIME_SERIES_PREDICTION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    "VISUAL_QUESTION_ANSWERING",
    "RETRIEVAL",
    "TABLE_RECOGNITION",
    "TEXT_RECOGNITION",
    "TABLE_QUESTION_ANSWERING",
    "IMAGE_TO_IMAGE",
    "IMAGE_MATTING",
    "QUESTION_ANSWERING",
    "SEQUENCE_CLASSIFICATION",
    "PRETRAINING",
    "BACKBONE",
)


def _named(mapping: Any, model_type: str) -> str | None:
    """The class that a mapping of names has for a model type; the first one of several."""
    found = mapping.get(model_type)
    return found[0] if isinstance(found, (tuple, list)) else found


def _base(model_type: str) -> str | None:
    return _named(modeling_auto.MODEL_MAPPING_NAMES, model_type)


def _head(model_type: str) -> str | None:
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {}) for head in _HEADS]
    return next((name for mapping in mappings if (name := _named(mapping, model_type))), None)


def class_name(model_type: str, base: bool = False) -> str | None:
    """The class to run for a model type: its head, which holds the base model, or the base model itself."""
    return _base(model_type) or _head(model_type) if base else _head(model_type) or _base(model_type)


def folder(model_type: str) -> str:
    return configuration_auto.model_type_to_module_name(model_type)


def names() -> list[str]:
    """The model types that stand for an architecture, one or more of a folder of `transformers.models`: all that have
    a model class and are not a part of another one of the same folder."""
    types = all_types()
    parts: set[str] = set()
    for model_type in types:
        parts |= {part for part in _parts(model_type) if folder(part) == folder(model_type)} - {model_type}
    return sorted(t for t in types if t not in parts)


def all_types() -> list[str]:
    return [t for t in configuration_auto.CONFIG_MAPPING_NAMES if class_name(t)]


def _parts(model_type: str) -> Iterator[str]:
    try:
        declared = transformers.CONFIG_MAPPING[model_type].sub_configs
    except Exception:  # a model type whose module needs what is not installed
        return
    for config in declared.values():
        if getattr(config, "model_type", ""):
            yield config.model_type


def parts(model_type: str) -> list[str]:
    """The architectures inside one, that may be run by themselves."""
    config = transformers.AutoConfig.for_model(model_type)
    inner = [value.model_type for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [part for part in dict.fromkeys([*inner, *_parts(model_type)]) if part != model_type and class_name(part)]


def model_class(model_type: str, base: bool = False) -> type:
    """The class to run; where the head leaves one of several modalities out, the base model."""
    name = class_name(model_type, base)
    if name is None:
        raise LookupError("no model class")
    cls = _imported(name, model_type)
    if not base and (whole := _base(model_type)) is not None:
        whole_class = _imported(whole, model_type)
        if _modalities(whole_class) > _modalities(cls):
            return whole_class
    return cls


def _imported(name: str, model_type: str) -> Any:
    found = getattr(transformers, name, None)
    return found or getattr(importlib.import_module(f"transformers.models.{folder(model_type)}"), name)


def _modalities(cls: Any) -> set[str]:
    return set(inspect.signature(cls.forward).parameters) & {
        "input_ids",
        "pixel_values",
        "input_features",
        "input_values",
        "pixel_values_videos",
    }


# ---------------------------------------------------------------------------------------------------------------
# Shrinking

_KV_HEADS = re.compile(
    r"(num_|n_)?(\w+_)?(kv|key_value|k_v|kv_attention|key_value_attention)_?heads|multi_query_group_num"
)
# A field whose whole name matches gets the value, the first match wins. A callable is given the old value.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"chunk_size_feed_forward|num_channels|in_chans|.*_ratio|.*_coefficient|.*_cost", ...),
    (r"pad_token_id", 0),
    (r"(bos|decoder_start)_token_id", 1),
    (r"eos_token_id|sep_token_id", 2),
    (r"(mlm_)?mask_token_id", 3),
    (r".*vocab_size\w*|n_token", VOCABULARY),
    (r"num_feat_extract_layers|num_hidden_groups", ...),
    (_KV_HEADS.pattern, 2),
    (r"num_key_value_groups", ...),
    (r"mamba_(n_heads|num_heads)", 8),
    (r"(\w+_)?(num_)?attention_heads|n_heads?|num_heads|(\w+_)n_heads|num_\w*heads|num_heads_\w+", 4),
    (r"n_layers?|num_layers|num_\w*hidden_layers|(\w+_)?(encoder|decoder)_layers|depth|num_\w*(block|layer)s", 2),
    (r"layers|\w+_layers_?num|(prior|text|vision)_\w*layers", 2),
    (
        r"qk_(rope|nope)_head_dim|v_head_dim|(\w+_)?head_dim|d_kv|attention_head_(size|dim)|(key|value)_dim|kv_channels",
        8,
    ),
    (r"qk_head_dim", 16),
    (r"(q|kv|o|k|v)_lora_rank|rotary_dim", 4),
    (r"index_head_dim", 16),
    (r"index_topk", 8),
    (r"(\w+_)?(intermediate|ffn|feed_forward|inner)_(size|dim)|d_ff|ffn_hidden_size|n_inner|(\w+_)?mlp_dim", 48),
    (r"\w*(encoder|decoder)_ffn_dim|ffn_dim\w*|expert_ffn_hidden_size", 48),
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|(moe_)?top_?k|moe_topk|num_selected_experts|moe_k", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"first_k_dense_replace|\w*sparse_step|moe_layer_start_index", lambda n: min(n, 1)),
    (r"max_window_layers", 1),
    (r"(\w+_)?sliding_window(_size)?|local_window_size|(local_)?window_size", lambda n: 5),
    (r"attention_window(_size)?", 4),
    (r"attention_chunk_size|chunk_size|chunk_length", lambda n: min(n, 8)),
    (r"block_size|local_radius|global_block_size", lambda n: min(n, 4)),
    (r"max_2d_position_embeddings", 64),
    (r"(original_)?max_\w*positions?\w*|n_positions|n_ctx|max_sequence_length|max_seq_len\w*|context_length", 64),
    (r"(num_)?(mel_bins|mel_filters|mels)|n_mels", MEL),
    (r"feature_size", lambda n: n if n < 32 else 32),
    (r"linear_num_(key|value)_heads", 4),
    (r"(mamba_)?d_state|state_size|ssm_state_size|mamba_d_state", 8),
    (r"linear_(key|value)_head_dim|mamba_d_head|mamba_head_dim", 8),
    (r"num_conv_pos_embeddings", lambda n: min(n, 16)),
    (r"num_conv_pos_embedding_groups|\w*_groups", lambda n: min(n, 4)),
    (r"num_queries|num_query_tokens|num_latents|resampler_n_latents|num_detection_tokens", lambda n: min(n, 7)),
    (r"num_frames|frames_per_clip", lambda n: min(n, 4)),
    (r"codebook_size|num_prototypes|num_codevectors_per_group|num_clusters", lambda n: min(n, 32)),
    (r"type_vocab_sizes?", ...),
    (r"image_size|input_size|video_size|crop_size|img_size", lambda n: IMAGE),
    (r"\w*patch_size|tubelet_size_\w+", lambda n: min(n, PATCH)),
    (r"hidden_size|d_model|n_embd|dim|d_embed|n_embed|hidden_dim|d_hidden|embed_dim|model_dim", 32),
    (
        r"\w*(hidden|embedding|embeddings?|projection|embed|proj|output|input|feature|model)_?(size|dim|dims|channels)",
        32,
    ),
    (r"\w+_(dim|width|rank|channels)|width|lru_width|word_embed_proj_dim|output_dim|projection_dim", 32),
)
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_WIDTH = re.compile(r"hidden_size|embed_dim")
# Fields in whose order the layers of a model are told apart.
_STAGES = {"depths", "num_blocks", "encoder_layers", "decoder_layers", "layer_depths", "blocks_per_stage"}
_IMAGES = re.compile(r"image_size|input_size|video_size|crop_size|img_size|\w*patch_size")


@dataclass(frozen=True)
class Level:
    """How much is shrunk: the names of fields that are, and whether heads are grouped."""

    fields: re.Pattern[str]
    grouped: bool = True


LEVELS = (
    Level(re.compile(r".*")),
    Level(re.compile(r".*"), grouped=False),
    Level(re.compile(r"(?!.*(dim|width|channels|rank|features|groups|codebook_size|feature_size|embedding_size)).*")),
    Level(
        re.compile(r"(\w*layers?|depths?|\w*vocab_size|\w*token_id|sliding_window|\w*experts\w*|hidden_size)"),
        grouped=False,
    ),
    Level(re.compile(r"(\w*layers?|depths?|sliding_window)"), grouped=False),
)


def shrunk(config: Any, level: int = 0, overrides: dict[str, Any] | None = None) -> Any:
    """The same kind of config, tiny. `overrides` may reach into a sub-config by a dotted name."""
    overrides = overrides or {}
    given: dict[str, Any] = {}
    kept = _kept_layers(config)
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("out_features", "out_indices", "backbone_out_indices"):
            name = ""
        inner = {k.partition(".")[2]: v for k, v in overrides.items() if k.startswith(name + ".")}
        if not name or name in ("id2label", "label2id", "stage_names"):
            continue
        if isinstance(value, PreTrainedConfig) and value.model_type == "timm_backbone":
            given[name] = _resnet(value)
        elif isinstance(value, PreTrainedConfig):
            given[name] = shrunk(value, level, inner)
        elif kept and _is_per_layer(name, value, config):
            given[name] = [value[i] for i in kept]
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            given[name] = _rope(value, _has_sections(config.model_type))
        elif LEVELS[level].fields.fullmatch(name):
            small = _width_of_stages(config) if _WIDTH.fullmatch(name) else None
            small = _small(name, value) if small is None else small
            if name == "image_size" and _has_stages(config) and small is not ...:
                small = 64 if isinstance(small, int) else [64] * len(small)
            if name == "window_size" and _has_stages(config) and small is not ...:
                small = 2  # the last stage of a small image has no more
            if _KV_HEADS.fullmatch(name) and (not LEVELS[level].grouped or hasattr(config, "kv_lora_rank")):
                small = 4
            if small is not ... and small != value:
                given[name] = small
    if kept:
        given[_depth_name(config)] = len(kept)
    given |= _outlets(config, given)
    given |= {k: v for k, v in overrides.items() if "." not in k}
    _token_ids(config, given)
    return type(config)(**given)


def _outlets(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A backbone that hands out as many stages as before; one of equal layers gets as many layers."""
    features = getattr(config, "_out_features", None)
    name = _depth_name(config)
    if not features:
        wanted = getattr(config, "backbone_out_indices", None)
        return {name: len(wanted), "backbone_out_indices": [*range(len(wanted))]} if wanted and name else {}
    if not all(re.fullmatch(r"stage\d+", f) for f in features) or not name or hasattr(config, "depths"):
        return {"out_features": features}
    n = max(2, len(features), given.get(name, 0) if isinstance(given.get(name), int) else 0)
    return {name: n, "out_features": [f"stage{i}" for i in range(n - len(features) + 1, n + 1)]}


def _resnet(replaced: Any) -> Any:
    """In place of a backbone that another library would provide."""
    n = len(getattr(replaced, "out_indices", None) or getattr(replaced, "_out_indices", None) or [4])
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{i}" for i in range(5 - min(n, 4), 5)],
    )


def _small(name: str, value: Any) -> Any:
    if value is None and name in ("head_dim", "vocab_size"):
        return 8 if name == "head_dim" else VOCABULARY
    if isinstance(value, bool) or value is None:
        return ...
    if name in _STAGES and isinstance(value, (list, tuple)):
        return [min(n, 2) if isinstance(n, int) else n for n in value]
    if name in ("conv_dim", "conv_kernel", "conv_stride") and isinstance(value, (list, tuple)):
        return [32 if name == "conv_dim" else n for n in value[:3]]
    if isinstance(value, (list, tuple)) and value and _IMAGES.fullmatch(name) and isinstance(value[0], int):
        return [_small(name, n) for n in value]
    if not isinstance(value, int):
        return ...
    for pattern, small in _COMPILED:
        if pattern.fullmatch(name):
            if small is ... or value <= 1:
                return ...
            return small(value) if callable(small) else min(small, value) if name != "sliding_window" else small
    return ...


def _has_stages(config: Any) -> bool:
    names = ("depths", "blocks_per_stage", "hidden_sizes", "num_heads")
    return any(isinstance(vars(config).get(name), (list, tuple)) for name in names)


def _width_of_stages(config: Any) -> Any:
    """Where a model's stages have widths or heads of their own, the width of the first; None elsewhere."""
    held = vars(config)
    heads = [
        held.get(name) for name in ("num_heads", "num_attention_heads") if isinstance(held.get(name), (list, tuple))
    ]
    if any(isinstance(held.get(name), (list, tuple)) for name in ("embed_dim_per_stage", "embed_dims", "hidden_sizes")):
        return ...
    if heads and isinstance(heads[0][0], int):
        return 8 * heads[0][0] if "embed_dim" in held else ...
    return None


def _depth_name(config: Any) -> str:
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    return next((name for name in names if isinstance(vars(config).get(name), int)), "")


def _is_per_layer(name: str, value: Any, config: Any) -> bool:
    depth = vars(config).get(_depth_name(config))
    return isinstance(value, (list, tuple)) and len(value) == depth and name not in ("out_features", "out_indices")


def _kept_layers(config: Any) -> list[int]:
    """Of a model whose layers are told apart by lists: one layer of every kind, and two at least."""
    lists = [v for k, v in vars(config).items() if not k.startswith("_") and _is_per_layer(k, v, config)]
    if not lists:
        return []
    kinds: dict[str, int] = {}
    for i, kind in enumerate(zip(*lists)):
        kinds.setdefault(str(kind), i)
    kept = sorted(kinds.values())[:6]
    return kept if len(kept) > 1 else [*kept, *range(1, 2)]


def _rope(value: dict[str, Any], sections: bool = False) -> dict[str, Any]:
    small = {k: _rope(v, sections) if isinstance(v, dict) else v for k, v in value.items()}
    if isinstance(small.get("mrope_section"), (list, tuple)) or (sections and "rope_theta" in small):
        half = int(8 * (small.get("partial_rotary_factor") or 1)) // 2
        n = len(small.get("mrope_section", "thw"))
        small["mrope_section"] = [half - (n - 1) * (half // n), *[half // n] * (n - 1)]
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = 32
    return small


@functools.cache
def _has_sections(model_type: str) -> bool:
    """Whether a model divides its rotary frequencies among time, height and width, in numbers that its code has a
    default for."""
    name = folder(model_type)
    spec = importlib.util.find_spec(f"transformers.models.{name}.modeling_{name}")
    return spec is not None and 'get("mrope_section"' in Path(spec.origin or "").read_text()


def _token_ids(config: Any, given: dict[str, Any]) -> None:
    """Special tokens that would lie outside of the vocabulary get a place at its end."""
    ids = [
        name
        for name, value in vars(config).items()
        if re.fullmatch(r"\w*(_token_id|_token_index|_token)", name) and isinstance(value, int)
    ]
    for place, name in enumerate(sorted(ids)):
        if getattr(config, name) >= 60 and given.get(name, VOCABULARY) >= 60:
            given[name] = VOCABULARY - 1 - place


# Families whose gradients are checked by `--train`.
TRAINED: tuple[str, ...] = (
    "llama",
    "mistral",
    "mixtral",
    "falcon",
    "gpt_neox",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "starcoder2",
    "gptj",
    "opt",
    "bloom",
    "mpt",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_oss",
    "codegen",
    "cohere",
    "cohere2",
    "olmo2",
    "stablelm",
    "glm4",
    "granite",
    "deepseek_v3",
    "xglm",
    "openai-gpt",
    "xlnet",
    "bert",
    "roberta",
    "albert",
    "electra",
    "distilbert",
    "mpnet",
    "deberta",
    "deberta-v2",
    "funnel",
    "modernbert",
    "nystromformer",
    "bart",
    "t5",
    "mt5",
    "pegasus",
    "prophetnet",
    "whisper",
    "wav2vec2",
    "wav2vec2-bert",
    "hubert",
    "vit",
    "deit",
    "beit",
    "swin",
    "swinv2",
    "clip",
    "siglip",
    "blip",
    "dinov2",
    "detr",
    "segformer",
    "layoutlm",
    "layoutlmv3",
)

_SERIES = {"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 2, 3], "num_time_features": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "dots1": {"n_routed_experts": 4, "moe_intermediate_size": 48, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "kimi_linear": {"num_expert_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 60, "IMGIMGB": 61}},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 70, "<|visual token 000000|>": 60}},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "glm5_next": {"index_topk": 16, "index_kpool": 4},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "nemo_speechlm": {"chunk_length": 64},
    "vits": {"speaking_rate": 1000.0},
    "qwen2_5_vl": {"vision_config.window_size": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "granite_speech5_ctc": {"context_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6, "max_2d_position_embeddings": 64},
    "bridgetower": {"hidden_size": 64, "text_config.hidden_size": 64, "vision_config.hidden_size": 64},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "audio-spectrogram-transformer": {"max_length": 26},
    "efficientnet": {"image_size": 64},
    "depth_pro": {"patch_size": 16},
}


def tiny(model_type: str, level: int = 0) -> Any:
    """A tiny config of a model type.

    Raises whatever the config class raises where the numbers don't fit together.
    """
    config = transformers.AutoConfig.for_model(model_type)
    return shrunk(config, level, OVERRIDES.get(model_type))
