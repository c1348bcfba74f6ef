"""Timing the usable kernels on a site's real shapes, once, and remembering it.

What was found is kept in a file for each device, set of versions, form and bucket of shapes, in the folder that
`ATTN_REWRITER_CACHE` names or the user's cache folder. A file is written beside and moved into its place, so that
processes that tune at the same time, or are killed, leave a whole one or none; a file that can't be read is measured
again, and a folder that can't be written costs a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from attn_rewriter.alone import by_itself
from attn_rewriter.choose import usable, with_pairs
from attn_rewriter.describe import Description
from attn_rewriter.device import Device, made_current
from attn_rewriter.emit import Operands
from attn_rewriter.errors import is_out_of_memory
from attn_rewriter.graph import tensor
from attn_rewriter.kernels import KERNELS, PAIRS
from attn_rewriter.kernels.flash import Flash
from attn_rewriter.packages import version
from attn_rewriter.progress import working
from attn_rewriter.spec import And, Compare, Mask, Not, Predicate, TensorMask
from attn_rewriter.timing import calls_in, milliseconds

log = logging.getLogger("attn_rewriter")

_READINGS, _READING_MS = 5, 10.0  # for each kernel and pass
_METHOD = 3  # of timing: files of another say something else
_PACKAGES = ("torch", "triton", "attn-rewriter", *(kernel.distribution for kernel in Flash.versions.values()))

Times = dict[str, float]
"""Milliseconds by kernel: forward, or in training forward and backward."""

_known: dict[str, Times] = {}


def times(found: Description, device: Device, *, inductor: bool = True) -> Times:
    """Of every kernel that can be chosen for a site, and of the pair that is faster than all, the fastest first; empty
    where there is nothing to choose, sizes that only the run knows, or another device than the tensors'."""
    names = usable(found.spec, found.shapes, device, inductor=inductor)
    if len(names) < 2 or not _is_static(found) or device != Device.of(tensor(found.operands["query"].node).device):  # type: ignore[union-attr]
        return {}
    about = _about(found, device, names)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    if key not in _known:
        _known[key] = _read(key, names) or _measured(found, device, names, key, about)
    return dict(sorted(_known[key].items(), key=lambda item: item[1]))


def _is_static(found: Description) -> bool:
    values = [tensor(state.node) for state in found.operands.values()]
    return not found.shapes.is_dynamic and all(
        value is not None and all(isinstance(n, int) for n in (*value.shape, *value.stride())) for value in values
    )


# ------------------------------------------------------------------------------------------------ timing


def _measured(found: Description, device: Device, names: Sequence[str], key: str, about: dict[str, Any]) -> Times:
    """Time the kernels, and keep the result."""
    passes: dict[str, tuple[float, ...]] = {}
    full = False
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []):
        for name in names:
            with working(f"timing {name} for {found.spec} at {found.shapes}"):
                try:
                    passes[name] = _time(found, device, name)
                except Exception as error:  # a kernel that fails is one less to choose from
                    log.info("%s could not be timed: %s: %s", name, type(error).__name__, error)
                    full = full or is_out_of_memory(error)
    combined = with_pairs(passes, found.spec, found.shapes, device)
    fastest = sorted(combined, key=lambda name: sum(combined[name]))[:1]
    measured = {name: sum(combined[name]) for name in (*passes, *fastest)}
    if not full:  # which is so now, and not for good
        _write(key, {**about, "milliseconds": measured})
    return measured


def _time(found: Description, device: Device, name: str) -> tuple[float, ...]:
    """Milliseconds of one kernel: of its forward pass and, where the site needs it, of its backward pass.
    (FlexAttention's block mask counts in full, though layers share it.)"""
    samples = Samples(found)
    operands = Operands(found, samples, lambda x, dtype: x.to(dtype), lambda n: n)
    held = [*operands.values()]
    wanted = [x for x in held if isinstance(x, torch.Tensor) and x.requires_grad]
    run = by_itself(KERNELS[name], found.spec, found.shapes, device, dict(operands))

    def forward() -> torch.Tensor:
        with torch.set_grad_enabled(found.shapes.needs_backward):
            return run(*held)

    def both() -> None:
        output = forward()
        if output.requires_grad:
            torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)

    cuda = device.type == "cuda"
    with made_current(operands["query"].device):
        alone = _milliseconds(forward, cuda)
        return (alone, max(_milliseconds(both, cuda) - alone, 0.0)) if found.shapes.needs_backward else (alone,)


def _milliseconds(step: Callable[[], Any], cuda: bool) -> float:
    """Launching not counted: in a model, one thing is launched while another runs."""
    step()
    calls = calls_in(_READING_MS, step, cuda=cuda)
    return statistics.median(milliseconds(step, calls, held_ms=2 * _READING_MS, cuda=cuda) for _ in range(_READINGS))


class Samples:
    """Tensors that lie in memory like those of the graph: random numbers, and masks that hide as little as they can,
    as nothing is known of their contents."""

    def __init__(self, found: Description) -> None:
        self._contents: dict[Any, float] = {}
        names: dict[str, float] = {}
        for mask in (m for m in found.spec.modifiers if isinstance(m, Mask)):
            self._keep(mask.keep, True, names, found.shapes.kv_len)
            if mask.tensor is not None:
                names[str(mask.tensor)] = float(mask.form == "keep")
        for name, content in names.items():
            self._contents[found.operands[name].node] = content

    def _keep(self, predicate: Predicate, wanted: bool, names: dict[str, float], kv_len: Any) -> None:
        """What the tensors of a predicate must hold for it to be as wanted. (Keys from 0 on are all kept, and so are
        those up to a length, offset or position as large as the last one, and those of one document.)"""
        match predicate:
            case Not(term):
                self._keep(term, not wanted, names, kv_len)
            case And(terms):
                for term in terms:
                    self._keep(term, wanted, names, kv_len)
            case TensorMask(tensor=name, additive=additive):
                names[str(name)] = float(wanted != additive)
            case Compare(left, right, relation):
                low, high = (left, right) if wanted else (right, left)
                equal = relation == ("eq" if wanted else "ne")
                for side, content in ((low, 0), (high, 0 if equal else kv_len)):
                    names.update((str(values.tensor), float(content)) for values in side.values())

    def __call__(self, node: Any) -> Any:
        """A tensor like a node's, or whatever else an operand is."""
        like = tensor(node)
        if like is None or not isinstance(node, Node):
            return node
        held = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride()))
        flat = torch.full((held,), self._contents.get(node, 1.0), device=like.device).to(like.dtype)
        if like.dtype.is_floating_point and node not in self._contents:
            flat.normal_()
        return flat.as_strided(like.shape, like.stride()).requires_grad_(like.requires_grad)


# ----------------------------------------------------------------------------------------------- keeping


def _about(found: Description, device: Device, names: Sequence[str]) -> dict[str, Any]:
    """All that the times depend on, lengths up to the next power of two."""
    shapes = replace(found.shapes, q_len=_bucket(found.shapes.q_len), kv_len=_bucket(found.shapes.kv_len))
    return {
        "method": _METHOD,
        "device": [device.type, device.capability, device.name, torch.get_num_threads()],
        "versions": {name: version(name) or "" for name in _PACKAGES},
        "spec": repr(found.spec),
        "shapes": repr(shapes),
        "kernels": sorted(names),
        "deterministic": torch.get_deterministic_debug_mode(),
    }


def _bucket(length: Any) -> int:
    return 1 << (length - 1).bit_length()


def folder() -> Path:
    """Where the files are."""
    if given := os.environ.get("ATTN_REWRITER_CACHE"):
        return Path(given)
    import platformdirs  # wanted by nobody who does not tune

    return Path(platformdirs.user_cache_dir("attn_rewriter"))


def _read(key: str, names: Sequence[str]) -> Times:
    path: Any = f"{key}.json"
    try:
        path = folder() / path
        held = json.loads(path.read_text())["milliseconds"]
        return {name: float(held[name]) for name in held if name in names or name in PAIRS}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:
        warnings.warn(f"attn_rewriter ignores {path}: {type(error).__name__}: {error}", stacklevel=2)
        return {}


def _write(key: str, held: dict[str, Any]) -> None:
    parent: Any = "the user's cache folder"
    beside: str | None = None
    try:
        parent = folder()
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=parent, suffix=".partial", delete=False) as file:
            beside = file.name
            json.dump(held, file, indent=1)
        os.replace(beside, parent / f"{key}.json")
    except Exception as error:
        reason = getattr(error, "strerror", None) or error  # without the name, so that it is said once for a folder
        warnings.warn(f"attn_rewriter can't keep what it timed in {parent}: {reason}", stacklevel=2)
        if beside is not None:
            with suppress(OSError):
                os.unlink(beside)
