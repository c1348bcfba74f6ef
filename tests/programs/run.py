"""Runs a program plain and compiled, and compares all that can be seen of it.

A program is the source text of a module:

    DTYPE, WIDE     the type of its tensors, and the one for its softmax
    CALLS           the lengths (of queries, of keys) that it is called with, one after the other
    GRADIENTS       the names of the inputs whose gradients are wanted
    OPTIONS         for `attn_rewriter.Options`
    DYNAMIC         for `torch.compile`
    AS_READ         whether kernels compute masks from what was read of them (`tests/programs/as_read.py`)
    TOLERANCE       relative to the largest element of each tensor
    inputs          from lengths and a seed to a dictionary of inputs
    program, or Program     a function, or a module
    change          if there is one, what is done to the module between two calls
"""

from __future__ import annotations

import gc
import inspect
import linecache
import logging
import math
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from itertools import combinations, count
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from attn_rewriter import Backend, KernelUnavailable, Options
from attn_rewriter.contract import measured, worst
from tests.programs.as_read import as_read
from tests.running import joined, run_as_is

SECONDS = 60
"""How long one program may take."""

SETTINGS = {"DTYPE", "WIDE", "CALLS", "GRADIENTS", "OPTIONS", "DYNAMIC", "AS_READ", "TOLERANCE"}

_NUMBERS = count()

FEW = 1e-3
"""Of tensors whose elements are all smaller, rounding errors of larger ones may be left."""


class Invalid(Exception):
    """A program that can't be run in another way by which it is judged: in float64, or with its weights shown."""


@contextmanager
def _run_in_another_way() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise
    except Exception as error:
        raise Invalid(_said(error)) from error


@dataclass
class Verdict:
    """What came of a program. `kind` is one of: right, fell back (its compiler raised for a rewritten graph, and got
    the graph as it was), wrong, raised, doubted (the library warned that something which
    it had read was wrong), invalid (plain PyTorch raises), not ours (it is wrong, or raises, without the library too,
    where PyTorch compiles it)."""

    kind: str
    said: str = ""
    sites: int = 0
    fused: int = 0
    empty: bool = False
    """Whether any row of scores has no key that is not hidden."""
    refusals: Counter[str] = field(default_factory=Counter)

    @property
    def fails(self) -> bool:
        return self.kind in ("wrong", "raised")


@dataclass
class Seen:
    """What one call can be seen to do: its outputs, the gradients of its inputs, what it wrote into these and into
    buffers."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    written: dict[str, Tensor]


def load(source: str, **replaced: Any) -> dict[str, Any]:
    """The names that a program defines. Its lines are known to tracebacks, and to Dynamo."""
    name = f"random_program_{next(_NUMBERS)}"
    linecache.cache[f"{name}.py"] = (len(source), None, source.splitlines(True), f"{name}.py")
    module = sys.modules[name] = ModuleType(name)  # from where Dynamo takes the names of what follows a graph break
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    module.__dict__.update(replaced)
    return module.__dict__


def unload() -> None:
    """Forget all programs."""
    for name in [name for name in sys.modules if name.startswith("random_program_")]:
        del sys.modules[name]
        linecache.cache.pop(f"{name}.py", None)
    torch._dynamo.reset()


def exact(source: str) -> str:
    """The same program in float64. The lowest numbers of a narrow type stay what they were, as masks they have a
    meaning."""
    dtype = next(line for line in source.splitlines() if line.startswith("DTYPE")).rpartition("= ")[2]
    lines = source.replace("torch.finfo(DTYPE)", f"torch.finfo({dtype})").splitlines()
    starts = {"DTYPE": "DTYPE = torch.float64", "WIDE ": "WIDE = torch.float64"}
    return "\n".join(starts.get(line[:5], line) for line in lines) + "\n"


class Runner:
    """A program that is called one time after the other, as it is or `compiled`."""

    def __init__(
        self,
        names: dict[str, Any],
        compiled: Callable[[Any], Any] | None = None,
        source_of_inputs: dict[str, Any] | None = None,
    ):
        self.names = names
        self.inputs = (source_of_inputs or names)["inputs"]
        self.model = names["Program"]() if "Program" in names else None
        function = self.model if self.model is not None else names["program"]
        signature = inspect.signature(self.model.forward if self.model is not None else function)
        self.parameters = [*signature.parameters]
        self.function = compiled(function) if compiled else function

    def call(self, number: int, draw: int = 0) -> Seen:
        lengths = self.names["CALLS"][number]
        if number and draw == 0 and "change" in self.names:
            with torch.no_grad():
                gc.collect()  # PyTorch exchanges no tensor that what a compilation left behind refers to weakly
                self.names["change"](self.model)
        given = self.inputs(*lengths, 1000 * number + 100000 * draw)
        dtype = self.names["DTYPE"]
        wanted = self.names["GRADIENTS"]
        given = {
            name: x.to(dtype if x.is_floating_point() else x.dtype).requires_grad_(name in wanted)
            for name, x in given.items()
            if name in self.parameters
        }
        result = self.function(**given)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        leaves = {name: x for name, x in given.items() if x.requires_grad}
        gradients = dict(zip(leaves, self._gradients(outputs, [*leaves.values()])))
        written = {name: x.detach().clone() for name, x in given.items() if not x.requires_grad}
        if self.model is not None:
            written |= {f"buffer {name}": x.detach().clone() for name, x in self.model.named_buffers()}
        return Seen([x.detach() for x in outputs], gradients, written)

    @staticmethod
    def _gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
        used = [x for x in outputs if x.requires_grad]
        if not used or not leaves:
            return [None] * len(leaves)
        generator = torch.Generator().manual_seed(1)
        ways = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in used]
        return [*torch.autograd.grad(used, leaves, ways, allow_unused=True)]


def check(source: str, options: dict[str, Any] | None = None) -> Verdict:
    """Run a program and judge it. `options` add to its own."""
    try:
        with _at_most(SECONDS), _quiet(), torch.random.fork_rng(), torch.enable_grad():
            return _checked(source, options or {})
    except TimeoutError:
        return Verdict("raised", f"it took more than {SECONDS} seconds")
    except Invalid as error:
        return Verdict("invalid", str(error))
    except Exception as error:
        return Verdict("raised", f"in the tester itself: {_said(error)}")
    finally:
        unload()


def _checked(source: str, options: dict[str, Any]) -> Verdict:
    try:
        names = load(source)
        assert names.keys() >= SETTINGS, "a setting is missing"
        plain = Runner(names)
        calls = range(len(names["CALLS"]))
        for i in calls:
            plain.call(i)
        plain = Runner(names := load(source))
        # Of rows without keys the fused kernels that PyTorch takes for `F.scaled_dot_product_attention` give wrong
        # gradients: their log-sum-exp does not hold how many keys there are beside so low a fill.
        with Rows() as rows, sdpa_kernel(SDPBackend.MATH):
            expected = [plain.call(i) for i in calls]
    except TimeoutError:
        raise
    except Exception as error:
        return Verdict("invalid", _said(error))
    options = {"compiler": run_as_is, **names["OPTIONS"], **options}
    backend = Backend(Options(**options))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with as_read() if names["AS_READ"] else nullcontext():
            found, runner, error = _compiled(source, backend, names["DYNAMIC"], expected)
    report = backend.report
    verdict = Verdict("right", "", report.n_sites, report.n_fused, rows.empty)
    verdict.refusals.update(str(s.refusals[-1]) for s in report.sites if s.kernel is None and s.refusals)
    if isinstance(error, KernelUnavailable) or "KernelUnavailable" in str(error):
        verdict.refusals["the kernel that was asked for"] += 1
        verdict.said = _said(error)
        return verdict
    ours = [str(w.message) for w in warned if str(w.message).startswith("attn_rewriter")]
    if error is not None:
        verdict.kind, verdict.said = "raised", _said(error)
    elif said := _compared(source, names, runner, found, expected, rows.rounding):
        verdict.kind, verdict.said = "wrong", said
    elif ours:
        verdict.kind, verdict.said = _warned(ours[0]), ours[0]
    if verdict.fails and (said := _without_us(source, names, options, expected, rows.rounding)):
        return Verdict("not ours", said)
    return verdict


def _warned(message: str) -> str:
    """The kind of a program whose answer is right, by a warning of the library."""
    if "after an error of its compiler" in message:
        return "fell back"
    return "raised" if "error" in message else "doubted"


def _compiled(source: str, backend: Any, dynamic: bool | None, expected: list[Seen]) -> Any:
    """What was found at each call, and the error that ended it, if any."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    found: list[Seen] = []
    runner = None
    try:
        runner = Runner(load(source), lambda f: torch.compile(f, backend=backend, dynamic=dynamic))
        found += (runner.call(i) for i in range(len(expected)))
    except TimeoutError:
        raise
    except Exception as error:
        return found, runner, error
    return found, runner, None


def _without_us(
    source: str, names: dict[str, Any], options: dict[str, Any], expected: list[Seen], rounding: float
) -> str:
    """What is wrong where PyTorch compiles the program without the library."""
    found, runner, error = _compiled(source, options["compiler"], names["DYNAMIC"], expected)
    return _said(error) if error is not None else _compared(source, names, runner, found, expected, rounding)


def _compared(
    source: str, names: dict[str, Any], runner: Runner, found: list[Seen], expected: list[Seen], rounding: float
) -> str:
    for number, (a, b) in enumerate(zip(found, expected)):
        if DROPS in source:
            said = _dropped(source, number, a)
        elif names["DTYPE"] == torch.float64:
            said = difference(a, b, max(names["TOLERANCE"], rounding))
        else:
            said = _within_the_contract(source, names, runner, number, a, b)
        if said:
            return f"call {number + 1}: {said}" if len(found) > 1 else said
    return ""


class Rows(TorchFunctionMode):
    """Sees whether plain code has rows in which every key is hidden, and how much the rounding of its scores can do in
    float64: of -1e11 that is added to all scores of a row, five digits of these are left."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = False
        self.rounding = 0.0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("softmax", "exp", "logsumexp") and args:
            self._see(args[0])
        elif function is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            mask = kwargs["attn_mask"]
            self._see(mask if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf))
        elif function is F.multi_head_attention_forward:
            added, hidden = kwargs.get("attn_mask"), kwargs.get("key_padding_mask")
            scores = torch.zeros(())
            if added is not None:
                scores = scores + (torch.zeros(()).where(~added, -torch.inf) if added.dtype == torch.bool else added)
            if hidden is not None:
                scores = scores + torch.zeros(()).where(~hidden, -torch.inf)[:, None]
            self._see(scores)
        return function(*args, **kwargs)

    def _see(self, scores: Tensor) -> None:
        if not (scores.is_floating_point() and scores.ndim and scores.numel()):
            return
        scores = scores.detach().double()
        self.empty = self.empty or bool((scores.amax(-1) < LOW).any())
        partly = scores.where(scores.abs() < SWALLOWING, 0.0).abs().max().item()
        self.rounding = max(self.rounding, 8 * torch.finfo(torch.float64).eps * partly)


LOW = -5e3
"""Scores of keys that are hidden are below."""

SWALLOWING = 1e17
"""Nothing is left in float64 of scores to which as much is added."""


def difference(found: Seen, expected: Seen, tolerance: float) -> str:
    """Where what was found is not what was expected; "" if it is."""
    if len(found.outputs) != len(expected.outputs):
        return f"{len(found.outputs)} outputs instead of {len(expected.outputs)}"
    for i, (a, b) in enumerate(zip(found.outputs, expected.outputs)):
        if said := _off(a, b, tolerance, strict=True):
            return f"output {i} {said}"
    for name, b in expected.gradients.items():
        a = found.gradients[name]
        if a is None and b is None:
            continue
        zero = torch.zeros_like(a if a is not None else b)
        if said := _off(zero if a is None else a, zero if b is None else b, tolerance, strict=False):
            return f"the gradient of {name} {said}"
    for name, b in expected.written.items():
        if said := _off(found.written[name], b, tolerance, strict=True):
            return f"{name} {said}, after the call"
    return ""


def _off(a: Tensor, b: Tensor, tolerance: float, strict: bool) -> str:
    """How a tensor is off; where it is expected to be NaN, only if `strict` does it have to be. Else it may also be NaN
    where zero is expected beside NaN: a gradient that is no number may reach what a mask hides."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {a.dtype} {[*a.shape]} instead of {b.dtype} {[*b.shape]}"
    if not b.is_floating_point():
        return "" if torch.equal(a, b) else f"differs in {int((a != b).sum())} of {b.numel()} elements"
    nan = b.isnan()
    if strict and bool((extra := nan & ~a.isnan()).any()):
        return f"is a number in {int(extra.sum())} places, not NaN"
    if bool((extra := b.isinf() & (a != b)).any()):
        return f"is not infinite in {int(extra.sum())} places"
    finite = b.isfinite()
    if not strict and bool(nan.any()):
        finite &= ~(a.isnan() & (b == 0))
    if not bool(finite.any()):
        return ""
    largest = b[finite].abs().max().item()
    off = (a[finite] - b[finite]).abs().max().item()  # NaN if any of `a` is
    return "" if off <= tolerance * (largest + FEW) else f"is off by {off:.2g}, the largest element is {largest:.2g}"


# ---------------------------------------------------------------------------------------------------------------
# In narrow types: the contract


def _within_the_contract(
    source: str, names: dict[str, Any], runner: Runner, number: int, found: Seen, eager: Seen
) -> str:
    """Few elements' errors are luck, so that what is off in one draw is looked at in several."""
    if said := _forms_differ(found, eager):
        return said
    drawn: list[tuple[Any, Any, Any]] = []
    said = ""
    changed = "change" in names or any(not torch.equal(a, b) for a, b in _written(runner, number, found))
    truth_names = load(exact(source))
    for n in (1, 4, 16) if not changed else (1,):
        for draw in range(len(drawn), n):
            a, b = (found, eager) if draw == 0 else (runner.call(number, draw), Runner(names).call(number, draw))
            narrow = names["DTYPE"]

            def rounded(*args: Any, narrow: torch.dtype = narrow) -> dict[str, Tensor]:
                given = names["inputs"](*args)
                return {k: x.to(narrow).double() if x.is_floating_point() else x for k, x in given.items()}

            truth = Runner(truth_names, source_of_inputs={"inputs": rounded})
            with _run_in_another_way():
                for earlier in range(number):
                    truth.call(earlier)
                exactly = truth.call(number, draw)
            drawn.append((_floats(a), _floats(b), _floats(exactly)))
        said = _beyond([joined(results) for results in zip(*drawn)])
        if not said:
            return ""
    return said


def _written(runner: Runner, number: int, found: Seen) -> Iterator[tuple[Tensor, Tensor]]:
    given = runner.inputs(*runner.names["CALLS"][number], 1000 * number)
    for name, x in found.written.items():
        if name in given:
            yield given[name].to(x.dtype), x


def _forms_differ(found: Seen, eager: Seen) -> str:
    for i, (a, b) in enumerate(zip(found.outputs, eager.outputs)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {a.dtype} {[*a.shape]} instead of {b.dtype} {[*b.shape]}"
        if not b.is_floating_point() and not torch.equal(a, b):
            return f"output {i} differs"
    return ""


def _floats(seen: Seen) -> dict[str, Tensor]:
    named = {f"output {i}": x for i, x in enumerate(seen.outputs)}
    named |= {f"the gradient of {name}": x for name, x in seen.gradients.items() if x is not None}
    return {name: x for name, x in named.items() if x.is_floating_point() and x.numel()}


def _beyond(results: list[dict[str, Tensor]]) -> str:
    """What is further off than the contract allows. Where plain code has no finite number, nothing is asked."""
    found, eager, truth = results
    gradients = [name for name in truth if name.startswith("the gradient")]
    for name in truth:
        if name not in found or name not in eager:
            continue
        a, b, t = found[name], eager[name], truth[name]
        ok = b.isfinite() & t.isfinite()
        if not bool(ok.any()):
            continue
        a, b, t = (x.masked_fill(~ok, 0.0) for x in (a, b, t))
        comparison = worst(measured(a, b, t.double()))
        allowed = comparison.allowed
        if name in gradients:  # which may be differences of larger ones that cancel
            others = [truth[other] for other in gradients]
            unit = torch.finfo(b.dtype).eps * max(x.nan_to_num(0.0, 0.0, 0.0).abs().max().item() for x in others)
            allowed = max(allowed, unit)
        if not comparison.error <= allowed:
            return f"{name} is off by {comparison.error:.2g}, the contract allows {allowed:.2g}"
    return ""


# ---------------------------------------------------------------------------------------------------------------
# Dropout: which weights were kept is read off the outputs, and plain code is run with just these

DROPS = "# drops"
"""A program that drops weights says so, and returns in the end the outputs of its attentions, in order. Their values
are identity matrices, so that the outputs are the weights that were kept."""


class Kept(TorchFunctionMode):
    """Plain code that keeps given weights, in the order of the calls; without any, it keeps all."""

    def __init__(self, kept: list[Tensor] | None = None) -> None:
        super().__init__()
        self.kept = iter(kept) if kept is not None else None
        self.ps: list[float] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout and (p := kwargs.get("p", args[1] if len(args) > 1 else 0.5)):
            return self._apply(args[0], p)
        if function is F.scaled_dot_product_attention and (p := kwargs.pop("dropout_p", 0.0)):
            query, key, value = args[:3]
            eye = torch.eye(key.shape[-2], dtype=value.dtype).expand(*key.shape[:-1], -1)
            weights = self._apply(F.scaled_dot_product_attention(query, key, eye, *args[3:], **kwargs), p)
            return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return function(*args, **kwargs)

    def _apply(self, weights: Tensor, p: float) -> Tensor:
        self.ps.append(p)
        return weights if self.kept is None else weights * next(self.kept).to(weights.dtype) / (1 - p)


def _dropped(source: str, number: int, found: Seen) -> str:
    names = load(source, checkpoint=lambda function, *args, **kwargs: function(*args))
    runner = Runner(names)
    for earlier in range(number):
        runner.call(earlier)
    with Kept() as whole, _run_in_another_way():
        every = Runner(names).call(number)
    sites = len(whole.ps)
    kept = [x != 0 for x in found.outputs[len(found.outputs) - sites :]]
    weights = every.outputs[len(every.outputs) - sites :]
    for i, (k, w, p) in enumerate(zip(kept, weights, whole.ps)):
        able = w.abs() > 1e-12
        n, kept_n = int(able.sum()), int((k & able).sum())
        if abs(kept_n - n * (1 - p)) > 6 * math.sqrt(n * p * (1 - p)) + 1:
            return f"attention {i} keeps {kept_n} of {n} weights, its dropout is {p}"
    for (i, a), (j, b) in combinations(enumerate(kept), 2):
        if a.shape == b.shape and torch.equal(a, b):
            both = int(((weights[i].abs() > 1e-12) & (weights[j].abs() > 1e-12)).sum())
            if both * min(whole.ps[i], 1 - whole.ps[i]) > 25:
                return f"attentions {i} and {j} drop the same weights"
    with Kept(kept):
        expected = Runner(names).call(number)
    return difference(found, expected, names["TOLERANCE"])


# ---------------------------------------------------------------------------------------------------------------


def _said(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # where FX prints errors of graphs
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def over(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
