"""`patch()`: existing `torch.compile` calls, and models that transformers makes, go through the rewriter."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from attn_rewriter.api import calling, compile_in_place
from attn_rewriter.backend import Backend
from attn_rewriter.buffers import UNPROVED, note
from attn_rewriter.options import Options
from attn_rewriter.packages import once_imported
from attn_rewriter.report import Report

_MODELS, _GENERATION = "transformers.modeling_utils", "transformers.generation.utils"


class Patch:
    """A patch that is in force, until `unpatch()` or the end of its `with` block."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._backends: list[Backend] = []
        self._undo: list[Callable[[], None]] = []
        self._inside = threading.local()
        self._set(torch, "compile", functools.wraps(torch.compile)(functools.partial(self._compile, torch.compile)))
        self._undo.append(once_imported(_MODELS, self._patch_models))
        self._undo.append(once_imported(_GENERATION, self._patch_generation))

    @property
    def report(self) -> Report:
        """All sites of the graphs that were compiled under this patch."""
        return Report.joined(backend.report for backend in self._backends)

    def undo(self) -> None:
        """Put everything back. Models that were compiled meanwhile stay as they are."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unpatch(self)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append(functools.partial(setattr, owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    def _backend(
        self, mode: str | None = None, options: Mapping[str, Any] | None = None, *, is_model: bool = True
    ) -> Backend:
        """The names in `keep_weights` are those of a whole model, whose caller gets what it returns. Of what someone
        compiles, a layer perhaps, neither is known: there all weights are kept."""
        all_kept = {} if is_model else {"keep_weights": None}
        self._backends.append(Backend(Options.of({**(options or {}), **self._options, **all_kept}, mode)))
        return self._backends[-1]

    def _compile(
        self,
        original: Callable[..., Any],
        model: Any = None,
        *,
        backend: Any = "inductor",
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if backend != "inductor":
            return original(model, backend=backend, mode=mode, options=options, **kwargs)
        backend = self._backend(mode, options, is_model=_owner(model) in _in_place)
        return original(self._uncompiled(model), backend=backend, **kwargs)

    def _uncompiled(self, model: Any) -> Any:
        """A model that the patch compiled in place, as it was: of two compilations the inner one counts, and it is the
        outer one that was asked for. `generate` compiles the call of a model once more, for single tokens and with CUDA
        graphs: then what is in place stays, for prompts."""
        owner = _owner(model)
        if owner is None or owner not in _in_place:
            return model
        if getattr(model, "__func__", None) is type(owner).__call__:
            return calling(owner)
        owner._compiled_call_impl = None
        _in_place.discard(owner)
        return model

    def _patch_generation(self, module: ModuleType) -> None:
        """What makes `generate` fast; on another version of transformers it is slower at worst."""
        prepare_inputs = module.GenerationMixin.__dict__.get("prepare_inputs_for_generation")
        if prepare_inputs is not None:
            self._set(module.GenerationMixin, "prepare_inputs_for_generation", _with_masks_noted(prepare_inputs))
        prepare_cache = module.GenerationMixin.__dict__.get("_prepare_static_cache")
        if prepare_cache is not None and "prefill_chunk_size" in inspect.signature(prepare_cache).parameters:
            self._set(module.GenerationMixin, "_prepare_static_cache", _before_its_prompt(prepare_cache))

    def _patch_models(self, module: ModuleType) -> None:
        for name in ("from_pretrained", "_from_config"):
            made = module.PreTrainedModel.__dict__[name].__func__
            self._set(module.PreTrainedModel, name, classmethod(self._optimized(made)))

    def _optimized(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Optimise what a class method of transformers returns, but not the models that it makes on the way."""

        @functools.wraps(make)
        def wrapper(cls: type, *args: Any, **kwargs: Any) -> Any:
            outermost = not getattr(self._inside, "busy", False)
            self._inside.busy = True
            try:
                made = make(cls, *args, **kwargs)
            finally:
                if outermost:
                    self._inside.busy = False
            if outermost:
                model = made[0] if isinstance(made, tuple) else made  # output_loading_info=True
                compile_in_place(model, self._backend())
                _in_place.add(model)
            return made

        return wrapper


def _owner(model: Any) -> nn.Module | None:
    """The module that is compiled, or whose method is."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _before_its_prompt(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """A static cache is made before the prompt that fills it. Made within a compiled prompt, it would not be marked as
    staying where it is, and the graph of a new token, which writes into it, would run without CUDA graphs."""

    @functools.wraps(prepare)
    def early(model: Any, *args: Any, prefill_chunk_size: int | None = None, **kwargs: Any) -> Any:
        if prefill_chunk_size is None and model in _in_place:
            prefill_chunk_size = 1  # any number says that prompts are compiled
        return prepare(model, *args, prefill_chunk_size=prefill_chunk_size, **kwargs)

    return early


def _with_masks_noted(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """A prompt's masks may be looked at: for a static cache they are made outside of what is compiled. (Those of single
    tokens differ from one to the next, and looking takes time.)"""

    @functools.wraps(prepare)
    def noted(*args: Any, **kwargs: Any) -> Any:
        given = prepare(*args, **kwargs)
        if torch.compiler.is_compiling():  # the masks are made by a graph
            return given
        for name in ("attention_mask", "decoder_attention_mask"):
            masks = given.get(name)
            if isinstance(masks, dict):  # by kinds of layers
                given[name] = {kind: _noted(mask) for kind, mask in masks.items()}
            elif masks is not None:
                given[name] = _noted(masks)
        return given

    return noted


def _noted(mask: Any) -> Any:
    """A mask, which may be looked at if it is that of a prompt. A tensor of inference mode does not count what is
    written into it; a copy that is made outside of it does, wherever that happens."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.size(-2) < 2:
        return mask
    if mask.is_inference():
        with torch.inference_mode(False):
            mask = mask.clone()
    note(mask, UNPROVED)
    return mask


_patches: list[Patch] = []
_in_place: WeakSet[nn.Module] = WeakSet()
"""What patches have compiled."""


def patch(**options: Any) -> Patch:
    """From here on, `torch.compile` with its default backend rewrites attention, and so do models from transformers'
    `from_pretrained` and `from_config`; both also in code that knows nothing of this package.

    The options are those of `optimize`: kernel, compiler, strict, autotune, mode and the compiler's. Used as a context
    manager, the patch ends with the block. Its `report` says what was rewritten. `keep_weights` is for the models that
    transformers makes: of what other code compiles, all weights are kept.

    Raises `ValueError` for unknown options.
    """
    Options.of(options)
    _patches.append(Patch(options))
    return _patches[-1]


def unpatch(which: Patch | None = None) -> None:
    """End a patch, the last one by default. Without a patch there is nothing to do."""
    while _patches:
        ended = _patches.pop()
        ended.undo()
        if which in (None, ended):
            return
