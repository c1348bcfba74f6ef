"""The options, the same for `torch.compile(…, options=…)`, `optimize` and `patch`, checked when they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Union

from attn_rewriter import torch_private
from attn_rewriter.choose import Request, requested

Compiler = Union[str, Callable[..., Any]]


@dataclass(frozen=True)
class Options:
    """How to rewrite and compile.

    kernel: "auto", a kernel's name, or a list of names in order of preference. A kernel that was asked for by name
        and cannot compute a site raises `KernelUnavailable`.
    compiler: what compiles the rewritten graph: the name of a registered `torch.compile` backend, or a callable that
        takes `(gm, example_inputs)`.
    strict: raise `RewriteError` where something unexpected happens at a site, instead of leaving it as it is.
    autotune: time the usable kernels on each site's shapes, once, and take the fastest; what was found is kept in the
        user's cache folder (`attn_rewriter.autotune`). So do the modes "max-autotune…".
    verify: "auto" compares what was read of each mask, and of each small site, with the model's own operations on
        made-up inputs, once, when a graph is compiled (`attn_rewriter.second_opinion`); True does so for every site on
        the inputs of the first call as well, and "always" on those of each call (`attn_rewriter.verify`). Where that
        breaks the contract, a site stays as it is, with a warning. False asks for no second opinion.
    keep_weights: where a model returns its attention weights, those of the modules that these patterns match, as of
        file names, stay what they are; those of all others become empty tensors, and their attention is fused. None
        keeps all.
    mode: as in `torch.compile`, for the compiler.
    compiler_options: all other options, for the compiler.
    """

    kernel: Request = "auto"
    compiler: Compiler = "inductor"
    strict: bool = False
    autotune: bool = False
    verify: bool | str = "auto"
    keep_weights: Sequence[str] | None = None
    mode: str | None = None
    compiler_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        requested(self.kernel)
        for name in ("strict", "autotune"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False, not {getattr(self, name)!r}")
        if isinstance(self.keep_weights, str) or not all(isinstance(name, str) for name in self.keep_weights or ()):
            raise TypeError(f"keep_weights is a list of patterns of module paths, not {self.keep_weights!r}")
        if self.verify not in (False, True, "auto", "always"):
            raise ValueError(f'verify is "auto", True, "always" or False, not {self.verify!r}')
        if isinstance(self.compiler, str):
            names = [name for name in torch_private.list_backends(exclude_tags=()) if name != "attn_rewriter"]
            if self.compiler not in names:
                raise ValueError(
                    f"unknown compiler {self.compiler!r}: choose from {', '.join(names)}, or give a callable"
                )
        elif not callable(self.compiler):
            raise TypeError(f"compiler is the name of a torch.compile backend or a callable, not {self.compiler!r}")
        if self.compiler == "inductor":
            self._check_inductor()

    def _check_inductor(self) -> None:
        modes = [*torch_private.list_mode_options()]
        if self.mode is not None and self.mode not in modes:
            raise ValueError(f"unknown mode {self.mode!r}: choose from {', '.join(modes)}")
        known = {name.replace("-", "_") for name in torch_private.list_options()}
        for name in self.compiler_options:
            if name.replace("-", "_") not in known:
                raise ValueError(
                    f"unknown option {name!r}: choose from {', '.join(own_names())}, or an option of Inductor "
                    "(torch._inductor.list_options())"
                )

    @classmethod
    def of(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """From the options and mode that `torch.compile` hands to a backend.

        Raises `ValueError` for unknown options, kernels, compilers and modes, naming the valid ones.
        """
        given = dict(options or {})
        own = {name: given.pop(name) for name in own_names() if name in given}
        return cls(**{"mode": mode, **own}, compiler_options=given)


def own_names() -> tuple[str, ...]:
    """The names of the options that are this package's own."""
    return tuple(f.name for f in fields(Options) if f.name != "compiler_options")
