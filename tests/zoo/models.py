"""A tiny model with random weights, and inputs for it, made from the signature of its forward."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from tests.zoo.configs import BATCH, FRAMES, IMAGE, LENGTH, LEVELS, MEL, model_class, parts, tiny

Inputs = dict[str, Any]


@dataclass
class Subject:
    """A model that runs in eager, with its inputs without padding."""

    model_type: str
    model: Any
    given: Inputs
    note: str = ""
    parts: list[Subject] = field(default_factory=list)

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
    """Random weights, none of them zero, and large enough that a softmax is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        make = getattr(cls, "_from_config", cls)
        model = make(config, attn_implementation="eager") if make is not cls else cls(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim >= 2:
                    parameter.copy_(noise * (2 / max(1, parameter[0].numel())) ** 0.5)
                else:
                    parameter.add_(noise * 0.1)
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
    """Makes the inputs of one model, each by its name in the signature."""

    def __init__(self, model: Any, n_placeholders: dict[str, int]) -> None:
        self.model, self.config = model, model.config
        self.generator = torch.Generator().manual_seed(1)
        self.n_placeholders = n_placeholders
        self.names = parameters(model)

    def all(self) -> Inputs:
        given = {name: maker(self) for name, maker in _MAKERS.items() if name in self.names}
        if "decoder_input_ids" in given and not self.config.is_encoder_decoder and "decoder" not in str(
            type(self.config)
        ).lower() and len(given) > 2:
            given.pop("decoder_input_ids")
        given = {name: value for name, value in given.items() if value is not None}
        for a, b in _EXCLUSIVE:
            if a in given and b in given:
                given.pop(b)
        return given

    def tokens(self) -> torch.Tensor:
        ids = torch.randint(4, 60, (BATCH, LENGTH), generator=self.generator)
        for name, n in self.n_placeholders.items():
            token = find(self.config, f"{name}_token_id", f"{name}_token_index", f"{name}_token")
            if n and isinstance(token, int):
                per_row, rest = divmod(n, BATCH)
                if rest:
                    per_row, rest = 0, n
                block = torch.full((BATCH, per_row), token)
                ids = torch.cat([ids[:, :1], block, ids[:, 1:]], dim=1)
                if rest:
                    block = torch.full((BATCH, rest), 5)
                    block[0] = token
                    ids = torch.cat([ids[:, :1], block, ids[:, 1:]], dim=1)
        return ids

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

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

    def pixels(self) -> torch.Tensor:
        if "image_grid_thw" in self.names or "grid_thw" in self.names:
            patch = find(self.config, "patch_size", default=PATCH, prefer="vi")
            time = find(self.config, "temporal_patch_size", default=1, prefer="vi")
            return self.floats(BATCH * 16, self.channels() * time * patch * patch)
        frames = find(self.config, "num_frames", "frames_per_clip")
        size = (self.channels(), *self.image_size())
        return self.floats(BATCH, frames, *size) if frames else self.floats(BATCH, *size)

    def grid(self) -> torch.Tensor:
        return torch.tensor([[1, 4, 4]] * BATCH)

    def mel(self) -> torch.Tensor:
        mel = find(self.config, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "num_mel_filters",
                   "mel_bins", "input_dim", default=MEL, prefer="audio")
        frames = find(self.config, "max_source_positions", prefer="audio")
        kind = type(self.model).__name__ + str([type(c).__name__ for c in configs_of(self.config)])
        if re.search(r"Whisper|Qwen2Audio|Omni|Voxtral|AudioEncoder|Flamingo", kind):
            return self.floats(BATCH, mel, 2 * frames if frames else FRAMES)
        return self.floats(BATCH, FRAMES * 2, mel)

    def wave(self) -> torch.Tensor:
        if "audio-spectrogram" in getattr(self.config, "model_type", ""):
            return self.floats(BATCH, self.config.max_length, self.config.num_mel_bins)
        return self.floats(BATCH, 260)

    def boxes(self) -> torch.Tensor:
        corner = torch.randint(0, 20, (BATCH, LENGTH, 2), generator=self.generator)
        size = torch.randint(1, 20, (BATCH, LENGTH, 2), generator=self.generator)
        return torch.cat([corner, corner + size], dim=-1)

    def image_sizes(self) -> torch.Tensor:
        return torch.tensor([self.image_size()] * BATCH)


def _decoder_tokens(making: Making) -> torch.Tensor:
    return torch.randint(4, 60, (BATCH, LENGTH), generator=making.generator)


_MAKERS: dict[str, Callable[[Making], Any]] = {
    "input_ids": Making.tokens,
    "decoder_input_ids": _decoder_tokens,
    "pixel_values": Making.pixels,
    "image_grid_thw": Making.grid,
    "grid_thw": Making.grid,
    "input_features": Making.mel,
    "input_values": Making.wave,
    "bbox": Making.boxes,
    "image_sizes": Making.image_sizes,
}
_EXCLUSIVE = (("input_values", "input_features"), ("pixel_values", "input_features"))
_MISMATCH = re.compile(r"(\w+)(?: features)? and (?:\w+ tokens|placeholder tokens) do not match:?,? "
                       r"tokens: (\d+),?\s*features:? (\d+)", re.IGNORECASE)


def inputs_for(model: Any) -> Inputs:
    """Inputs that the model accepts: images get as many placeholder tokens as the model itself says they need.

    Raises what the model raises.
    """
    n_placeholders: dict[str, int] = {}
    for _ in range(3):
        given = Making(model, n_placeholders).all()
        try:
            call(model, given)
            return given
        except (ValueError, RuntimeError) as error:
            found = _MISMATCH.search(str(error))
            if found is None:
                raise
            n_placeholders[found[1].lower()] = int(found[3])
    call(model, given)
    return given


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
    if n > 40e6:
        raise RuntimeError(f"{n / 1e6:.0f}M parameters are not tiny")


def subject(model_type: str, base: bool = False) -> Subject:
    """The architecture as large as the least level of shrinking at which it runs.

    Raises the error of the first level where none does.
    """
    first: Exception | None = None
    for level in range(len(LEVELS)):
        try:
            config, cls = tiny(model_type, level), model_class(model_type, base)
            if level:
                _check_size(config, cls)
            model = build(config, cls)
            return Subject(model_type, model, inputs_for(model), f"level {level}" if level else "")
        except Exception as error:
            first = first or error
    assert first is not None
    raise first
