"""A tiny model with random weights, and inputs for it, made from the signature of its forward."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tests.models import randomize
from tests.zoo.configs import BATCH, FRAMES, LENGTH, LEVELS, MEL, PATCH, model_class, parts, tiny

Inputs = dict[str, Any]


@dataclass
class Subject:
    """A model that runs in eager, or a part of one, with its inputs without padding."""

    model: Any
    given: Inputs
    path: str = ""

    def inputs(self, padding: bool = False) -> Inputs:
        """With padding: as much as the model has a mask for. On the left where the model is a decoder."""
        return padded(self) if padding else dict(self.given)

    @property
    def takes_padding(self) -> bool:
        return "attention_mask" in parameters(self.model) and "input_ids" in self.given


def parameters(model: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


# ---------------------------------------------------------------------------------------------------------------
# Models


def build(config: Any, cls: type) -> Any:
    """A model with random weights that are exact in bfloat16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        make = getattr(cls, "_from_config", cls)
        model = make(config, attn_implementation="eager") if make is not cls else cls(config)
    randomize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.bfloat16())
    return model.float().eval()


def in_type(model: Any, dtype: torch.dtype) -> Any:
    """A copy with its parameters in another type. Buffers, such as rotary frequencies, stay in theirs, but for
    statistics, which a normalisation wants in the type of its weights."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        held = next(module.parameters(recurse=False), None)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and (dtype == torch.float64 or held is not None or "running" in name):
                setattr(module, name, buffer.to(dtype))
    return model


def cast(given: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another type, in any nesting."""
    if isinstance(given, dict):
        return {k: cast(v, dtype) for k, v in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(cast(v, dtype) for v in given)
    return given.to(dtype) if isinstance(given, torch.Tensor) and given.is_floating_point() else given


# ---------------------------------------------------------------------------------------------------------------
# Inputs


def configs_of(config: Any) -> Iterator[Any]:
    """A config, and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_of(value)


def find(config: Any, *names: str, default: Any = None, prefer: str = "") -> Any:
    """The first value of one of these names in a config or one inside it; the preferred kind of config first."""
    found = sorted(configs_of(config), key=lambda c: 0 if prefer and prefer in getattr(c, "model_type", "") else 1)
    for name in names:
        for inner in found:
            value = getattr(inner, name, None)
            if value is not None and not callable(value):
                return value
    return default


class Making:
    """Makes the inputs of one model, each by its name in the signature. `optional` makes those as well that most
    models do without; `transposed` puts an audio's features before its frames."""

    def __init__(self, model: Any, optional: bool = False, transposed: bool = False) -> None:
        self.model, self.config = model, model.config
        self.optional, self.transposed = optional, transposed
        self.generator = torch.Generator().manual_seed(1)
        self.n_placeholders: dict[str, int] = {}
        self.added: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.names = parameters(model)

    def all(self) -> Inputs:
        self.generator.manual_seed(1)
        makers = {**_MAKERS, **(_OPTIONAL if self.optional else {})}
        given = {name: maker(self) for name, maker in makers.items() if name in self.names}
        required = [n for n, p in self.names.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
        given |= {n: _OPTIONAL[n](self) for n in required if n not in given and n in _OPTIONAL}
        for a, b in _EXCLUSIVE:
            if a in given and b in given and b not in required:
                given.pop(b)
        if "mm_token_type_ids" in self.names and "input_ids" in given:
            given["mm_token_type_ids"] = self.kinds(given["input_ids"])
        for name, change in self.added.items():
            if name in given:
                given[name] = change(given[name])
        return {name: value for name, value in given.items() if value is not None}

    def repaired(self, error: str) -> bool:
        """Whether something else can be tried after an error."""
        found = _MISMATCH.search(error)
        if found is not None:
            name, n_tokens, n_features = found[1].lower(), int(found[2]), int(found[3])
            before = self.n_placeholders.get(name)
            width = find(self.config, "hidden_size", "d_model", default=32, prefer="text")
            after = n_features if n_tokens != n_features else n_features // width or n_features * BATCH
            self.n_placeholders[name] = after
            return before is None or (n_tokens == n_features and after < 400)
        for pattern, name, change in _REPAIRS:
            if name in self.names and name not in self.added and re.search(pattern, error):
                self.added[name] = change
                return True
        return False

    def token(self, kind: str) -> int | None:
        found = find(self.config, f"{kind}_token_id", f"{kind}_token_index", f"{kind}_token")
        return found if isinstance(found, int) else None

    def tokens(self) -> torch.Tensor:
        vocabulary = find(self.config, "vocab_size", default=60, prefer="text")
        high = min(60, vocabulary) if isinstance(vocabulary, int) and vocabulary > 5 else 60
        ids = torch.randint(4, high, (BATCH, LENGTH), generator=self.generator)
        for kind, n in self.n_placeholders.items():
            token = self.token(kind)
            if n and token is not None:
                per_row, rest = divmod(n, BATCH)
                block = torch.full((BATCH, per_row + rest), token)
                if rest:
                    block = torch.full((BATCH, n), 5)
                    block[0] = token
                ids = torch.cat([ids[:, :1], block, ids[:, 1:]], dim=1)
        return ids

    def kinds(self, ids: torch.Tensor) -> torch.Tensor:
        image, video = self.token("image"), self.token("video")
        return (ids == (-1 if image is None else image)).long() + 2 * (ids == (-1 if video is None else video)).long()

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).bfloat16().float()

    def whole(self, *shape: int, high: int = 2) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def image_size(self) -> tuple[int, int]:
        size = find(self.config, "image_size", "img_size", "crop_size", "input_size", default=64, prefer="vi")
        if isinstance(size, dict):
            size = [size.get("height", 16), size.get("width", 16)]
        if not isinstance(size, (list, tuple)):
            size = (size, size)
        if find(self.config, "backbone_config") is not None or isinstance(find(self.config, "depths"), (list, tuple)):
            size = tuple(max(64, n) for n in size[:2])
        return int(size[0]), int(size[-1])

    def channels(self) -> int:
        found = find(self.config, "num_channels", "in_channels", "in_chans", default=3, prefer="vi")
        return found if isinstance(found, int) else 3

    def patch(self) -> int:
        found = find(self.config, "spatial_patch_size", "patch_size", default=PATCH, prefer="vi")
        return found if isinstance(found, int) else found[-1]

    def pixels(self) -> torch.Tensor:
        if "image_grid_thw" in self.names or "grid_thw" in self.names:
            time = find(self.config, "temporal_patch_size", default=1, prefer="vi")
            return self.floats(BATCH * 16, self.channels() * time * self.patch() ** 2)
        if "spatial_shapes" in self.names:
            return self.floats(BATCH, 16, self.channels() * self.patch() ** 2)
        frames = find(self.config, "num_frames", "frames_per_clip")
        size = (self.channels(), *self.image_size())
        return self.floats(BATCH, frames, *size) if frames else self.floats(BATCH, *size)

    def videos(self) -> torch.Tensor:
        frames = find(self.config, "num_frames", "frames_per_clip", default=2)
        return self.floats(BATCH, frames, self.channels(), *self.image_size())

    def grid(self) -> torch.Tensor:
        return torch.tensor([[1, 4, 4]] * BATCH)

    def mel(self) -> torch.Tensor:
        names = ("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "num_mel_filters", "mel_bins")
        mel = find(self.config, *names, "feature_projection_input_dim", "input_dim", default=MEL, prefer="audio")
        n = find(self.config, "max_source_positions", prefer="audio")
        kind = str([type(c).__name__ for c in configs_of(self.config)])
        if bool(re.search(r"Whisper|Qwen2Audio|Omni|Voxtral|AudioEncoder|Flamingo", kind)) != self.transposed:
            return self.floats(BATCH, mel, 2 * n if n else FRAMES)
        return self.floats(BATCH, FRAMES * 2, mel)

    def mel_mask(self) -> torch.Tensor:
        return torch.ones(BATCH, max(self.mel().shape[1:]), dtype=torch.long)

    def wave(self) -> torch.Tensor:
        if "audio-spectrogram" in getattr(self.config, "model_type", ""):
            return self.floats(BATCH, self.config.max_length, self.config.num_mel_bins)
        return self.floats(BATCH, 260 if find(self.config, "conv_stride") else 1600)

    def boxes(self) -> torch.Tensor:
        corner = torch.randint(0, 20, (BATCH, LENGTH, 2), generator=self.generator)
        size = torch.randint(1, 20, (BATCH, LENGTH, 2), generator=self.generator)
        return torch.cat([corner, corner + size], dim=-1)

    def past(self, *more: int) -> torch.Tensor:
        lags = find(self.config, "lags_sequence", default=[0])
        return self.floats(BATCH, find(self.config, "context_length", default=24) + max(lags), *more)

    def history(self, *more: int) -> torch.Tensor:
        return self.past(*more)

    def series(self) -> torch.Tensor:
        if find(self.config, "lags_sequence"):
            return self.past()
        channels = find(self.config, "num_input_channels")
        length = find(self.config, "context_length", default=64)
        return self.floats(BATCH, length, channels) if channels else self.floats(BATCH, length)

    def image_sizes(self) -> torch.Tensor:
        return torch.tensor([self.image_size()] * BATCH)


def _decoder_tokens(making: Making) -> torch.Tensor | None:
    """For encoder-decoders, and decoders that call their tokens so."""
    if not any(getattr(c, "is_encoder_decoder", False) for c in configs_of(making.config)):
        return None
    return torch.randint(4, 33, (BATCH, LENGTH), generator=making.generator)


def _width(making: Making, *names: str, default: int = 32) -> int:
    return find(making.config, *names, default=default)


_MAKERS: dict[str, Callable[[Making], Any]] = {
    "input_ids": Making.tokens,
    "decoder_input_ids": _decoder_tokens,
    "pixel_values": Making.pixels,
    "image_grid_thw": Making.grid,
    "grid_thw": Making.grid,
    "input_features": Making.mel,
    "input_values": Making.wave,
    "bbox": Making.boxes,
    "past_values": Making.series,
}
_OPTIONAL: dict[str, Callable[[Making], Any]] = {
    "pixel_values_videos": Making.videos,
    "pixel_values_images": Making.pixels,
    "high_res_pixel_values": Making.pixels,
    "codebook_pixel_values": Making.pixels,
    "image_sizes": Making.image_sizes,
    "input_features_mask": Making.mel_mask,
    "feature_attention_mask": Making.mel_mask,
    "audio_mask": Making.mel_mask,
    "qformer_input_ids": lambda m: m.whole(BATCH, LENGTH, high=60),
    "task_inputs": lambda m: m.whole(BATCH, find(m.config, "task_seq_len", default=77), high=60),
    "visual_feats": lambda m: m.floats(BATCH, 5, _width(m, "visual_feat_dim")),
    "visual_pos": lambda m: m.floats(BATCH, 5, _width(m, "visual_pos_dim", default=4)),
    "visual_embeds": lambda m: m.floats(BATCH, 5, _width(m, "visual_embedding_dim")),
    "aspect_ratio_ids": lambda m: torch.ones(BATCH, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda m: torch.ones(BATCH, 1, find(m.config, "max_num_tiles", default=4), dtype=torch.long),
    "cross_attention_mask": lambda m: torch.ones(BATCH, LENGTH, 1, find(m.config, "max_num_tiles", default=4)).long(),
    "image_embeds_position_mask": lambda m: (
        (torch.arange(LENGTH) < find(m.config, "latent_query_num", default=5)).long().repeat(BATCH, 1)
    ),
    "spatial_shapes": lambda m: torch.tensor([[4, 4]] * BATCH),
    "pixel_attention_mask": lambda m: torch.ones(BATCH, 16, dtype=torch.long),
    "past_time_features": lambda m: m.past(find(m.config, "num_time_features", default=1)),
    "past_observed_mask": lambda m: torch.ones_like(m.past()),
    "future_values": lambda m: m.floats(BATCH, find(m.config, "prediction_length", default=6)),
    "future_time_features": lambda m: m.floats(BATCH, find(m.config, "prediction_length", default=6), 1),
    "encoder_hidden_states": lambda m: m.floats(
        BATCH, 9, _width(m, "encoder_hidden_size", "cross_attention_hidden_size", "hidden_size", "d_model")
    ),
    "inputs_embeds": lambda m: m.floats(BATCH, LENGTH, _width(m, "hidden_size", "d_model", "dim")),
    "query_embeds": lambda m: m.floats(BATCH, 5, _width(m, "hidden_size")),
    "hidden_states": lambda m: m.floats(BATCH, 16, _width(m, "hidden_size", "d_model", "embed_dim")),
    "inputs": lambda m: m.floats(BATCH, LENGTH, _width(m, "d_model", "hidden_size")),
    "states": lambda m: m.floats(BATCH, LENGTH, _width(m, "state_dim")),
    "actions": lambda m: m.floats(BATCH, LENGTH, _width(m, "act_dim")),
    "rewards": lambda m: m.floats(BATCH, LENGTH, 1),
    "returns_to_go": lambda m: m.floats(BATCH, LENGTH, 1),
    "timesteps": lambda m: torch.arange(LENGTH).repeat(BATCH, 1),
    "prompt_pixel_values": Making.pixels,
    "prompt_masks": Making.pixels,
    "flattened_patches": lambda m: torch.cat(
        [
            torch.arange(1, 13)[None, :, None].repeat(BATCH, 1, 2) % 4 + 1.0,
            m.floats(BATCH, 12, _width(m, "patch_embed_hidden_size")),
        ],
        dim=-1,
    ),
    "tokens": Making.tokens,
    "xpath_tags_seq": lambda m: m.whole(BATCH, LENGTH, find(m.config, "max_depth", default=50), high=20),
    "xpath_subs_seq": lambda m: m.whole(BATCH, LENGTH, find(m.config, "max_depth", default=50), high=20),
    "latents": lambda m: m.floats(BATCH, 9, _width(m, "hidden_size")),
}
_EXCLUSIVE = (("input_ids", "inputs_embeds"), ("input_ids", "inputs"), ("input_values", "input_features"))
_MISMATCH = re.compile(
    r"(\w+)(?: features)? and (?:\w+ tokens|placeholder tokens) do not match[:,]? *tokens: (\d+),?\s*features:? (\d+)",
    re.IGNORECASE,
)
# What to change in which input after which error.
_REPAIRS: tuple[tuple[str, str, Callable[[torch.Tensor], torch.Tensor]], ...] = (
    (r"expected [56], got [45]|expected 4, got 3|5D tensor|must have 5 dim", "pixel_values", lambda x: x[:, None]),
    (r"2, num_channels, height", "pixel_values", lambda x: x.repeat(1, 2, 1, 1, 1)),
    (r"expected 3, got 2|expected 1D|to have 1 channels|2-dimensional input", "input_values", lambda x: x[:, None]),
    (r"too many values to unpack \(expected 4|expected 4D", "pixel_values", lambda x: x[:, 0]),
    (r"expected to be in range of \[-3, 2\]|expected 4, got 3", "input_features", lambda x: x[:, None]),
)


def inputs_for(model: Any) -> Inputs:
    """Inputs that the model accepts: images get as many placeholder tokens as the model itself says they need.

    Raises what the model raises.
    """
    first: Exception | None = None
    for optional, transposed in ((False, False), (True, False), (False, True), (True, True)):
        making = Making(model, optional, transposed)
        if transposed and "input_features" not in making.names:
            continue
        for _ in range(5):
            try:
                given = making.all()
                call(model, given)
                return given
            except Exception as error:
                first = first or error
                if not making.repaired(str(error)):
                    break
    assert first is not None
    raise first


def call(model: Any, given: Inputs) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**given)


def padded(subject: Subject) -> Inputs:
    given = dict(subject.given)
    n = given["input_ids"].shape[1]
    right = is_encoder(subject.model)
    steps = torch.arange(n) if right else torch.arange(n).flip(0)
    mask = (steps < torch.tensor([n - 2 * i for i in range(BATCH)])[:, None]).long()
    given["attention_mask"] = mask
    return given


def is_encoder(model: Any) -> bool:
    config = model.config
    name = type(model).__name__
    return bool(getattr(config, "is_encoder_decoder", False)) or not re.search("CausalLM|LMHead|Conditional", name)


# ---------------------------------------------------------------------------------------------------------------


def _check_size(config: Any, cls: type) -> None:
    """Without memory: what was not shrunk enough may not fit."""
    with torch.device("meta"):
        n = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if n > 10e6:
        raise RuntimeError(f"{n / 1e6:.0f}M parameters are not tiny")


def subjects(model_type: str, base: bool = False) -> tuple[list[Subject], str]:
    """The architecture, as large as the least level of shrinking at which it runs, and a remark on how. Where it does
    not run as a whole, its text model and the towers beside it run one by one.

    Raises the error of the first level where nothing runs.
    """
    first: Exception | None = None
    for whole in (True, False):
        for level in range(len(LEVELS) if whole else 3):
            try:
                config, cls = tiny(model_type, level), model_class(model_type, base)
                if level > 1:
                    _check_size(config, cls)
                model = build(config, cls)
                if whole:
                    return [Subject(model, inputs_for(model))], f"shrunk by level {level}" if level else ""
                found = in_parts(model)
                return found, "in parts: " + ", ".join(part.path or "text" for part in found)
            except Exception as error:
                first = first or error
    assert first is not None
    found = []
    for part in parts(model_type):
        with contextlib.suppress(Exception):
            found += [replace(one, path=part) for one in subjects(part)[0]]
    if not found:
        raise first
    return found, "its parts alone: " + ", ".join(dict.fromkeys(one.path for one in found))


def in_parts(model: Any) -> list[Subject]:
    """A model without its images or sounds, and every tower that runs by itself."""
    found = []
    making = Making(model)
    with contextlib.suppress(Exception):
        given = {k: v for k, v in making.all().items() if k in ("input_ids", "decoder_input_ids", "bbox")}
        if given:
            call(model, given)
            found.append(Subject(model, given))
    covered = ""
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and not (covered and path.startswith(covered)):
            if found and not found[0].path and "input_ids" in parameters(module):
                continue
            with contextlib.suppress(Exception):
                found.append(Subject(module, inputs_for(module), path))
                covered = path + "."
    if not found:
        raise RuntimeError("no part of it runs by itself")
    return found
