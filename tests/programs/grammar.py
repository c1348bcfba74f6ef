"""Writes programs: functions and modules with several attentions, as source text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.programs import masks
from tests.programs.choices import Choices
from tests.programs.run import DROPS

IMPORTS = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
"""

RANDOM = """\
def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
"""

HELPERS = {
    "replace": "@torch._dynamo.disable\ndef replace(x):\n    x.data = x.flip(-1).logical_not().to(x.dtype)\n",
    "write": "@torch._dynamo.disable\ndef write(x):\n    x[..., 1:] = 0\n",
    "put": "@torch._dynamo.disable\ndef put(x):\n    x.set_(torch.zeros_like(x))\n",
}

INPUTS = {
    "bias": "rand(seed + 11, {H}, {n}, {m})",
    "bias2": "rand(seed + 12, {n}, {m})",
    "bias_keys": "rand(seed + 13, {B}, 1, 1, {m})",
    "tau": "rand(seed + 14, {H}, 1, 1)",
    "gate": "rand(seed + 15, {B}, {H}, {n}, 1)",
    "sinks": "rand(seed + 16, {H})",
    "pad": "torch.arange({m}) < (rand(seed + 17, {B}, 1) * {m}).abs().floor()",
    "padq": "torch.arange({n}) < (rand(seed + 18, {B}, 1) * {n}).abs().floor() + 1",
    "numbers": "(torch.arange({m}) < (rand(seed + 19, {B}, 1) * {m}).abs().floor()).long()",
    "tokens": "(torch.arange({m}) < (rand(seed + 28, {B}, 1) * {m}).abs().floor() + 1).double()",
    "lengths": "(rand(seed + 20, {B}).abs() * 2).long()",
    "documents": "(rand(seed + 21, {B}, {m}) > 0.5).cumsum(-1)",
    "documents_q": "(rand(seed + 22, {B}, {n}) > 0.5).cumsum(-1)",
    "keep": "rand(seed + 23, {B}, 1, {n}, {m}) > 0",
    "by_head": "rand(seed + 24, {B}, {H}, {n}, {m}) > 0",
    "offset": "(rand(seed + 25) * 2).long()",
    "flag": "rand(seed + 26) > 0",
    "shuffle": "rand(seed + 27, {m}).argsort()",
}
"""Inputs that a program has if it names them."""

NAMED = re.compile(rf"(?<![\w.'])({'|'.join(INPUTS)})(?![\w(]|=[^=])")

PRODUCTS = (
    "{q} @ {k}.transpose(-2, -1)",
    "{q} @ {k}.mT",
    "torch.matmul({q}, {k}.permute(0, 1, 3, 2))",
    "torch.einsum('bhid,bhjd->bhij', {q}, {k})",
    "({k} @ {q}.mT).mT",
    "torch.bmm({q}.flatten(0, 1), {k}.flatten(0, 1).mT).view({B}, {H}, {n}, {m})",
    "({q}[..., None, :] * {k}[..., None, :, :]).sum(-1)",
)

SCALES = ("{s} * 0.35", "{s}", "{s} / 3", "{s} / {k}.size(-1) ** 0.5", "0.5 * {s}", "{s}.mul_(0.3)", "-{s}")

SCORES = (
    "{s} + bias",
    "bias2 + {s}",
    "{s} - bias",
    "{s} + bias_keys",
    "{s} + (bias + bias2)",
    "{s}.add_(bias)",
    "torch.add({s}, bias2, alpha=0.5)",
    "{s} * tau",
    "{s} * gate",
    "{s} - {s}.amax(-1, keepdim=True)",
    "{s} + 1.5",
    "{s} - 0.2 * (torch.arange({n})[:, None] - torch.arange({m})).abs()",
    "{s} + torch.arange({m}) * 0.1",
    "{s} - torch.arange({n} - 1, -1, -1)[:, None] * tau",
    "{s} + torch.diff(torch.arange({m} + 1).to(torch.uint8) * 100) * 0.01",
    "{s} + bias2.tril()",
    "{s} + bias[..., shuffle]",
    "({s} + bias) * 0.5",
    "{s} + bias.detach()",
)
CURVED = (
    "2.0 * torch.tanh({s} / 2.0)",
    "torch.tanh({s} * 0.4) * 3.0",
    "{s}.clamp(-1.0, 1.25)",
    "{s}.clamp(min=-0.75)",
    "{s}.relu()",
    "torch.where({s} > 0, {s}, 0.1 * {s})",
)
"""What kernels for float64 don't compute, mostly."""

NARROWED = (
    "{x}.float().to(DTYPE)",
    "{x}.half().to(DTYPE)",
    "{x}.bfloat16().to(DTYPE)",
    "{x}.to(torch.float16).type_as({x})",
    "({x} * 4).to(torch.float8_e4m3fn).to(DTYPE)",
    "{x}.to(torch.float8_e5m2).to(DTYPE)",
    "({x} * 8).long().to(DTYPE)",
    "({x} * 8).round().to(torch.int8).to(DTYPE) / 8",
    "({x} * 8).to(torch.uint8).to(DTYPE)",
    "({x} * 8).round() / 8",
    "({x} * 3).int()",
    "{x}.to(torch.float32).to(torch.float16).to(DTYPE)",
    "{x}.half()[..., :].to(DTYPE)",
    "({x} + 1e4) - 1e4",
)
"""Through narrower types, and back."""

FILLS = ("float('-inf')", "torch.finfo(DTYPE).min", "-1e9", "-1e4", "torch.finfo(DTYPE).min / 2", "-30.0", "-3.0")
USUAL = (*FILLS, *FILLS[:3], *FILLS[:3], *FILLS[:3])

APPLIED = (
    "{s}.masked_fill(~{keep}, {fill})",
    "{s}.masked_fill_(~{keep}, {fill})",
    "{s}.masked_fill({keep} == 0, {fill})",
    "torch.masked_fill({s}, {keep}.logical_not(), {fill})",
    "torch.where({keep}, {s}, {fill})",
    "torch.where(~{keep}, {fill}, {s})",
    "torch.where({keep}, {s}, torch.full_like({s}, {fill}))",
    "torch.where({keep}, {s}, torch.tensor({fill}, dtype=DTYPE))",
    "{s}.where({keep}, torch.full((), {fill}, dtype=DTYPE))",
    "{s}.masked_fill(~{keep}, torch.tensor({fill}, dtype=DTYPE))",
    "{s} + torch.zeros_like({s}).masked_fill(~{keep}, {fill})",
    "{s} + torch.where({keep}, torch.zeros((), dtype=DTYPE), {fill})",
    "{s} + torch.zeros({keep}.shape, dtype=DTYPE).masked_fill_(~{keep}, {fill})",
    "torch.where({keep}, torch.zeros((), dtype=DTYPE), {fill}) + {s}",
    "{s} + (1.0 - {keep}.to(DTYPE)) * {finite}",
    "{s} - (1.0 - {keep}.to(DTYPE)) * -({finite})",
    "{s} + (~{keep}) * {finite}",
    "{s}.add_({keep}.logical_not().to(DTYPE) * {finite})",
    "({s} * {keep}) + (~{keep}).to(DTYPE) * {finite}",
)

AFTER = (
    "{s} * 0.5",
    "{s} * 1e-5",
    "{s} * 1e-3",
    "{s} * 1e-9",
    "{s} / 1e4",
    "{s} + bias",
    "{s} * tau.abs()",
    "{s} - bias2",
    "{s} - 2.5",
    "{s} + 1e4",
    "{s} + 1e9",
    "{s}.clamp(min=-5.0)",
    "{s}.clamp(min=torch.finfo(DTYPE).min)",
    "{s}.clamp(-1e4, 1e4)",
    "20.0 * torch.tanh({s} / 20.0)",
    "torch.tanh({s} / 1e9) * 1e9",
    "{s} - {s}.amax(-1, keepdim=True)",
    "{s}.nan_to_num(neginf=-5.0)",
    "{s}.nan_to_num()",
    "torch.maximum({s}, torch.tensor(-1e4, dtype=DTYPE))",
    "{s}.half().to(DTYPE)",
    "{s}.bfloat16().to(DTYPE)",
    "{s}.to(torch.float8_e5m2).to(DTYPE)",
    "{s}.float().to(DTYPE)",
    "-{s}",
    "{s} + {s}",
)

SOFTMAX = (
    "{s}.softmax(-1)",
    "F.softmax({s}, dim=-1)",
    "torch.softmax({s}, -1, dtype=WIDE).to(DTYPE)",
    "{s}.to(WIDE).softmax(dim=3).type_as({s})",
    "{s}.mT.softmax(-2).mT",
    "{s}.exp() / {s}.exp().sum(-1, keepdim=True)",
    "torch.exp({s} - {s}.logsumexp(-1, keepdim=True))",
    "torch.cat([{s}, sinks.view(1, -1, 1, 1).expand({B}, -1, {n}, 1)], -1).softmax(-1)[..., :-1]",
    "F.pad({s}, (1, 0)).softmax(-1)[..., 1:]",
    "{s}.log_softmax(-1).exp()",
    "F.softmax(input={s}, dim=3, dtype=DTYPE)",
)

WEIGHTS = (
    "{p}.nan_to_num(0.0)",
    "{p}.nan_to_num()",
    "{p} * tau",
    "{p} * gate.sigmoid()",
    "{p} * 0.5",
    "{p} / {p}.sum(-1, keepdim=True)",
    "{p} * bias2",
    "{p}.tril()",
)
ZEROED = (
    "{p}.masked_fill(~{keep}, 0.0)",
    "{p}.masked_fill_(~{keep}, 0)",
    "torch.where({keep}, {p}, 0.0)",
    "{p} * {keep}",
    "{p}.masked_fill(~{keep}.any(-1, keepdim=True), 0.0)",
    "{p} * {keep}.any(-1, keepdim=True)",
    "torch.where({keep}.any(-1, keepdim=True), {p}, torch.zeros((), dtype=DTYPE))",
)

OUTPUTS = (
    "{p} @ {v}",
    "torch.matmul({p}, {v})",
    "torch.einsum('bhij,bhjd->bhid', {p}, {v})",
    "({v}.mT @ {p}.mT).mT",
    "torch.bmm({p}.flatten(0, 1), {v}.flatten(0, 1)).view({B}, {H}, {n}, -1)",
    "torch.einsum('bhij,bhjd->bihd', {p}, {v}).transpose(1, 2)",
)

LATER = (
    "{o}.transpose(1, 2).reshape({B}, {n}, -1)",
    "{o}.transpose(1, 2).flatten(2)",
    "{o}.permute(0, 2, 1, 3).contiguous().view({B}, {n}, -1)",
    "F.conv1d({o}.mT.reshape(-1, 1, {n}), torch.full((1, 1, 3), 0.4, dtype=DTYPE), padding=1)",
    "{o}.cumsum(-2)",
    "{o} + {o}.mean(-2, keepdim=True)",
    "{o}.roll(1, -2) * {o}",
    "{o}.mul_(2.0)",
    "{o}.flip(-2)",
    "{o}.nan_to_num()",
    "{o} + {q}.sum(-1, keepdim=True)",
    "{o}.sum(-2)",
    "torch.where({o} > 0, {o}, 0.5 * {o})",
)

REGIONS = {
    "none": "",
    "no_grad": "with torch.no_grad():",
    "set_grad_enabled(False)": "with torch.set_grad_enabled(False):",
    "set_grad_enabled(True)": "with torch.set_grad_enabled(True):",
    "autocast": "with torch.autocast('cpu', torch.bfloat16):",
    "autocast, not enabled": "with torch.autocast('cpu', enabled=False):",
    "inference": "with torch.inference_mode():",
    "checkpoint": "checkpoint({f}, {q}, {k}, {v}, use_reentrant=False)",
    "checkpoint, keeping no random state": (
        "checkpoint({f}, {q}, {k}, {v}, use_reentrant=False, preserve_rng_state=False)"
    ),
    "cond": "torch.cond(flag, {f}, lambda q, k, v: {f}(q * 0.5, k, v), ({q}, {k}, {v}))",
    "cond of a number": "torch.cond({q}.sum() > 0, {f}, lambda q, k, v: {f}(q, k, v) * 2, ({q}, {k}, {v}))",
    "nested region": "torch.compiler.nested_compile_region({f})({q}, {k}, {v})",
    "called twice": "{f}({q}, {k}, {v}) + {f}({q} * 0.5, {k}, {v})",
}

EXPORTED = {
    "plain": "return self.attend(q, k, v, bias2)",
    "autocast": (
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "            return self.attend(q, k, v, bias2) + 0.0 * bias2.sum()"
    ),
    "no_grad": "with torch.no_grad():\n            o = self.attend(q, k, v, bias2)\n        return o + q.sum() * 0.1",
    "autocast and no_grad": (
        "with torch.autocast('cpu', torch.bfloat16), torch.no_grad():\n"
        "            o = self.attend(q, k, v, bias2)\n        return o * 1.0"
    ),
    "enable_grad in no_grad": (
        "with torch.no_grad():\n            x = q * 2\n            with torch.enable_grad():\n"
        "                o = self.attend(x, k, v, bias2)\n        return o * 1.0"
    ),
    "autocast that ends": (
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "            with torch.autocast('cpu', enabled=False):\n"
        "                return self.attend(q, k, v, bias2) + 0.0"
    ),
}

OPERANDS = (
    "apart",
    "grouped",
    "keys are queries",
    "one tensor for all",
    "keys are values",
    "packed, chunk",
    "packed, unbind",
    "views of one buffer",
    "overlapping views",
    "sequence first",
    "heads split",
    "query written after",
)

KINDS = ("softmax", "sdpa", "differential", "summed", "mha", "module", "vmap", "exported")

SDPA_MASKS = ("bool", "none", "float", "is_causal")


@dataclass
class Lengths:
    """What the lengths of queries and of keys are called, in the program; `n` is `m` where `same`."""

    n: str = "n"
    m: str = "m"
    same: bool = False


@dataclass
class Keep:
    """A mask that has a name. With a `source`, that is a tensor from which `again` computes what is hidden."""

    name: str
    lengths: Lengths
    source: str = ""
    again: str = ""
    hidden: str = ""


@dataclass
class Writer:
    """A program as far as it is written."""

    choose: Choices
    batch: int = 2
    heads: int = 2
    groups: int = 1
    head_dim: int = 4
    dtype: str = "float64"
    drops: bool = False
    n_lines: int = 0
    tolerance: float = 1e-9
    depth: int = 1
    in_function: bool = False
    lines: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    top: list[str] = field(default_factory=list)
    kept: list[Keep] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def let(self, stem: str, text: str, lengths: Lengths | None = None, **names: object) -> str:
        """A line that gives an expression a name; a name alone stays what it is."""
        text = self.filled(text, lengths, **names)
        if text.isidentifier():
            return text
        self.n_lines += 1
        name = f"{stem}{self.n_lines}"
        self.line(f"{name} = {text}")
        return name

    def filled(self, text: str, lengths: Lengths | None = None, **names: object) -> str:
        """A template with sizes and names in it. Inputs that it names are added to the program's; those of other
        lengths have other names."""
        at = lengths or Lengths()
        sizes = {"B": self.batch, "H": self.heads, "n": at.n, "m": at.m}

        def found(match: re.Match[str]) -> str:
            name = match[0] + {"m": "", "n": "_n", "l": "_l"}[at.m]
            self.inputs.setdefault(name, INPUTS[match[0]].format(**sizes))
            return name

        return NAMED.sub(found, text.format(**{**sizes, **names}))

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(head)
        self.depth += 1
        yield
        self.depth -= 1


# ---------------------------------------------------------------------------------------------------------------
# Masks


def positions(w: Writer, length: str) -> str:
    x = w.let("x", w.choose("positions", masks.POSITIONS, 0.3), L=length)
    for number in range(w.choose("number of maps", (0, 1, 2), 0.2)):
        x = w.let("x", w.choose(f"map {number}", masks.MAPS), x=x)
    return x


def relation(w: Writer, at: Lengths) -> str:
    """A mask `[n, m]` that compares positions."""
    with w.choose.within("queries"):
        i = positions(w, at.n)
        i = w.let("i", w.choose("column", masks.COLUMNS, 0.25), at, p=i)
    with w.choose.within("keys"):
        j = positions(w, at.m)
        j = w.let("j", w.choose("row", masks.ROWS, 0.25), at, p=j)
    return w.let("keep", w.choose("relation", masks.RELATIONS, 0.5), at, i=i, j=j)


def base(w: Writer, at: Lengths) -> str:
    kind = w.choose("base", ("relation", "matrix", "padding", "buffer"), 0.55)
    if kind == "relation":
        return relation(w, at)
    if kind == "matrix":
        return w.let("keep", w.choose("matrix", masks.MATRICES), at)
    if kind == "padding":
        return w.let("keep", w.choose("padding", masks.PADDING), at)
    text = w.choose("buffer", [*masks.BUFFERS])
    name = re.search(r"self\.(\w+)", text)
    assert name
    w.buffers[name[1]] = masks.BUFFERS[text]
    return w.let("keep", text, at)


def mask(w: Writer, at: Lengths) -> Keep:
    """A new mask, or one that is there already."""
    shared = [keep for keep in w.kept if keep.lengths == at]
    if shared and w.choose.chance("a mask is shared", 0.5):
        return shared[-1]
    if w.choose.chance("a mask's source is written later", 0.12):
        text = w.choose("source", [*masks.SOURCES])
        x = w.let("source", masks.SOURCES[text], at)
        hidden = w.let("hidden", text, at, x=x)
        keep = Keep(w.let("keep", f"~{hidden}"), at, x, text, hidden)
    else:
        keep = Keep(_mask(w, at), at)
    if not w.in_function:
        w.kept.append(keep)
    return keep


def _mask(w: Writer, at: Lengths) -> str:
    with w.choose.within("one"):
        a = base(w, at)
    if w.choose.chance("two masks", 0.22):
        with w.choose.within("two"):
            b = base(w, at)
        a = w.let("keep", w.choose("combination", masks.COMBINATIONS), at, a=a, b=b)
    a = w.let("keep", w.choose("round trip", masks.ROUND_TRIPS, 0.15), at, a=a)
    if w.choose.chance("rearranged", 0.12):
        a = w.let("keep", f"{a}.expand(torch.broadcast_shapes({a}.shape, ({at.n}, {at.m})))")
        a = w.let("keep", w.choose("rearrangement", masks.REARRANGED), at, a=a)
    if w.choose.chance("written", 0.1):
        a = w.let("keep", f"({a} & torch.ones({at.n}, {at.m}, dtype=torch.bool)).clone()")
        for number in range(w.choose("number of writes", (1, 2))):
            w.line(w.filled(w.choose(f"write {number}", masks.WRITES), at, a=a))
    if w.choose.chance("every row has a key", 0.25):
        some = {
            "the first key": "{a} | (torch.arange({m}) == 0)",
            "a diagonal": "{a} | torch.eye({n}, {m}, dtype=torch.bool) | (torch.arange({m}) == 1)",
            "where there is none, all": "{a} | ~{a}.any(-1, keepdim=True)",
        }
        a = w.let("keep", w.choose("rows have", some, 0.3), at, a=a)
    return a


# ---------------------------------------------------------------------------------------------------------------
# Attention


def operands(w: Writer, number: int) -> tuple[str, str, str, Lengths]:
    """Query, key and value `[batch, heads, length, head_dim]`, and what their lengths are called."""
    at = w.choose("lengths", {"n, m": Lengths(), "n, n": Lengths("n", "n", True), "n, l": Lengths("n", "l")}, 0.55)
    b, h, d, g = w.batch, w.heads, w.head_dim, w.groups
    s = "" if w.choose.chance("operands are shared", 0.6) or number == 0 else f"_{number}"
    t = s + {"m": "", "n": "n", "l": "l"}[at.m]
    value_dim = at.m if w.drops else d
    new_value = (
        f"torch.eye({value_dim}).expand({b}, {h}, -1, -1).clone()"
        if w.drops
        else f"rand(seed + 1{number}3, {b}, {h}, {at.m}, {d})"
    )
    options = OPERANDS[:2] if w.drops else OPERANDS
    how = w.choose(
        "operands", options if at.same else [x for x in options if "packed" not in x and "all" not in x], 0.5
    )
    apart = {
        f"q{s}": f"rand(seed + 1{number}1, {b}, {h}, {at.n}, {d})",
        f"k{t}": f"rand(seed + 1{number}2, {b}, {h}, {at.m}, {d})",
        f"v{t}": new_value,
    }
    q, k, v = apart
    if how == "grouped" and g > 1 and not w.drops:
        one = w.let("k", w.choose("groups", GROUPS), x=f"kg{t}", G=g, KV=h // g, m=at.m)
        two = w.let("v", w.choose("groups of values", GROUPS), x=f"vg{t}", G=g, KV=h // g, m=at.m)
        w.inputs |= {
            q: apart[q],
            f"kg{t}": f"rand(seed + 1{number}2, {b}, {h // g}, {at.m}, {d})",
            f"vg{t}": f"rand(seed + 1{number}3, {b}, {h // g}, {at.m}, {d})",
        }
        return q, one, two, at
    if how == "one tensor for all":
        w.inputs[q] = apart[q]
        return q, q, q, at
    if how == "keys are queries" and at.same:
        w.inputs |= {q: apart[q], v: apart[v]}
        return q, q, v, at
    if how == "keys are values":
        w.inputs |= {q: apart[q], k: apart[k]}
        return q, k, k, at
    if how.startswith("packed"):
        w.inputs[f"qkv{s}"] = f"rand(seed + 1{number}1, {b}, n, {3 * h * d})"
        parts = f"q{s}, k{t}, v{t}"
        if how == "packed, chunk":
            w.line(f"{parts} = (x.view({b}, n, {h}, {d}).transpose(1, 2) for x in qkv{s}.chunk(3, -1))")
        else:
            w.line(f"{parts} = qkv{s}.view({b}, n, 3, {h}, {d}).permute(2, 0, 3, 1, 4).unbind(0)")
        return q, k, v, at
    if how in ("views of one buffer", "overlapping views"):
        n, m = at.n, at.m
        w.inputs[f"buffer{t}"] = f"rand(seed + 1{number}1, {b}, {h}, {n} + 2 * {m}, {d})"
        starts = ("0", n, f"{n} + {m}") if how == "views of one buffer" else ("0", "1", "2")
        lengths = (n, m, m)
        for name, start, length in zip((q, k, v), starts, lengths):
            w.line(f"{name} = buffer{t}[:, :, {start}:{start} + {length}]")
        return q, k, v, at
    if how == "sequence first":
        w.inputs |= {
            f"{x}_": f"rand(seed + 1{number}{i}, {b}, {length}, {h}, {d})"
            for i, (x, length) in enumerate(zip((q, k, v), (at.n, at.m, at.m)))
        }
        return (*(w.let(x[0], f"{x}_.transpose(1, 2)") for x in (q, k, v)), at)
    if how == "heads split":
        w.inputs |= {
            f"{x}_": f"rand(seed + 1{number}{i}, {b}, {length}, {h * d})"
            for i, (x, length) in enumerate(zip((q, k, v), (at.n, at.m, at.m)))
        }
        return (*(w.let(x[0], f"{x}_.unflatten(-1, ({h}, {d})).transpose(1, 2)") for x in (q, k, v)), at)
    w.inputs |= apart
    return q, k, v, at


GROUPS = (
    "{x}.repeat_interleave({G}, dim=1)",
    "{x}[:, :, None].expand({B}, {KV}, {G}, {m}, -1).reshape({B}, {H}, {m}, -1)",
    "{x}.unsqueeze(2).expand(-1, -1, {G}, -1, -1).flatten(1, 2)",
    "{x}.repeat(1, {G}, 1, 1)",
)


def weights(w: Writer, q: str, k: str, at: Lengths, keep: Keep | None) -> str:
    """Lines from query and key to attention weights."""
    choose = w.choose
    s = w.let("s", choose("product", PRODUCTS, 0.35), at, q=q, k=k)
    s = w.let("s", choose("scale", SCALES, 0.4), s=s, k=k)
    for number in range(choose("number of steps", (0, 1, 2), 0.3)):
        s = w.let("s", choose(f"step {number}", SCORES), at, s=s)
    if choose.chance("scores are curved", 0.03 if w.dtype == "float64" else 0.2):
        s = w.let("s", choose("curve", CURVED), at, s=s)
    if choose.chance("scores are narrowed", 0.05):
        s = _narrowed(w, "scores", s)
    if keep is not None:
        s = masked(w, s, at, keep)
    written = keep is not None and keep.source and choose.chance("its source is written", 0.7)
    late = bool(written) and choose.chance("after the softmax", 0.5)
    if keep is not None and written and not late:
        w.line(w.filled(choose("source write", masks.SOURCE_WRITES), at, x=keep.source))
    p = w.let("p", choose("softmax", SOFTMAX, 0.25), at, s=s)
    if choose.chance("weights are narrowed", 0.05):
        p = _narrowed(w, "weights", p)
    if keep is not None and written:
        if late:
            w.line(w.filled(choose("source write", masks.SOURCE_WRITES), at, x=keep.source))
        again = w.let("hidden", keep.again, at, x=keep.source)
        if choose.chance("zeroed by what is kept", 0.5):
            p = w.let("p", choose("zeroed again", ZEROED), at, p=p, keep=w.let("keep", f"~{again}"))
        else:
            p = w.let("p", f"{p}.masked_fill({again}, 0.0)")
    elif keep is not None and choose.chance("weights are zeroed", 0.12):
        p = w.let("p", choose("zeroed", ZEROED), at, p=p, keep=keep.name)
    if choose.chance("weights are changed", 0.06):
        p = w.let("p", choose("change of weights", WEIGHTS), at, p=p)
    return p


def _narrowed(w: Writer, what: str, x: str) -> str:
    how = w.choose(f"narrowed {what}", NARROWED)
    if ".float()" in how or "float32" in how:
        w.tolerance = max(w.tolerance, 1e-5)
    return w.let(x[0], how, x=x)


def masked(w: Writer, s: str, at: Lengths, keep: Keep) -> str:
    choose = w.choose
    fill = choose("fill", USUAL, 0.6)
    finite = fill if "inf'" not in fill else "-1e9"
    if keep.hidden and not choose.chance("applied by what is kept", 0.5):
        s = w.let("s", f"{s}.masked_fill({keep.hidden}, {fill})")
    else:
        how = choose("applied", APPLIED, 0.55)
        s = w.let("s", how, at, s=s, keep=keep.name, fill=fill, finite=finite)
    if choose.chance("another mask after it", 0.12):
        with choose.within("another"):
            other = Keep(_mask(w, at), at)
            fill = choose("fill", (fill, *USUAL))
            finite = fill if "inf'" not in fill else "-1e9"
            s = w.let("s", choose("applied", APPLIED), at, s=s, keep=other.name, fill=fill, finite=finite)
    often = 0.16 if w.dtype == "float64" else 0.3
    if w.dtype != "float64" and choose.chance("scaled down after it", 0.25):
        s = w.let("s", choose("scale after it", ("{s} * 1e-5", "{s} / 1e4", "{s} * 1e-3", "{s} * 1e-9")), s=s)
    for number in range(choose("number of steps after it", (0, 1, 2), often)):
        step = choose(f"step after it {number}", AFTER)
        if ".float()" in step:
            w.tolerance = max(w.tolerance, 1e-5)
        s = w.let("s", step, at, s=s)
    return s


def attend(w: Writer, kind: str, number: int, q: str, k: str, v: str, at: Lengths, keep: Keep | None) -> str:
    """Lines of an attention; the name of its output."""
    choose = w.choose
    p_drop = choose("dropout", (0.5, 0.2, 0.5, 0.7)) if w.drops else 0.0
    if kind == "sdpa":
        options = [x for x in SDPA_MASKS if keep is not None or x in ("none", "is_causal")]
        how = choose("mask of SDPA", options, 0.5)
        said = {"none": "", "is_causal": ", is_causal=True"}.get(how, "")
        if how == "bool":
            assert keep
            said = f", attn_mask={keep.name}"
        elif how == "float":
            assert keep
            fill = choose("fill", USUAL, 0.6)
            added = w.let(
                "mask", "torch.zeros({keep}.shape, dtype=DTYPE).masked_fill(~{keep}, {fill})", keep=keep.name, fill=fill
            )
            added = w.let(
                "mask", choose("with", ("{a}", "{a} + bias", "{a} - bias2", "bias + {a}", "2 * {a}"), 0.4), at, a=added
            )
            said = f", attn_mask={added}"
        said += choose("scale of SDPA", ("", ", scale=0.3", ", scale=1.0"), 0.4)
        said += f", dropout_p={p_drop}" if w.drops else choose("dropout of SDPA", ("", ", dropout_p=0.0"), 0.2)
        o = w.let("o", f"F.scaled_dot_product_attention({q}, {k}, {v}{said})")
    elif kind == "differential":
        with choose.within("first"):
            one = weights(w, q, k, at, keep)
        with choose.within("second"):
            two = weights(w, k if at.same and choose.chance("roles change", 0.3) else f"({q} * 0.7)", k, at, keep)
        how = choose(
            "difference", ("({a} - 0.4 * {b}) @ {v}", "{a} @ {v} - 0.4 * ({b} @ {v})", "({a} - tau * {b}) @ {v}")
        )
        o = w.let("o", how, at, a=one, b=two, v=v)
    elif kind == "summed":
        with choose.within("first"):
            one = weights(w, q, k, at, keep)
        with choose.within("second"):
            two = weights(w, q, f"({k} + 1)", at, keep if choose.chance("both masked", 0.7) else None)
        sums = ("{a} @ {v} + {b} @ {v}", "({a} + {b}) @ {v}", "{a} @ {v} + {b} @ ({v} * 2)", "({a} * {b}) @ {v}")
        o = w.let("o", choose("sum", sums), at, a=one, b=two, v=v)
    else:
        p = weights(w, q, k, at, keep)
        if w.drops:
            p = w.let("p", f"F.dropout({p}, {p_drop})")
        elif choose.chance("dropout of nothing", 0.1):
            none = (
                "F.dropout({p}, 0.0)",
                "F.dropout({p}, 0.3, training=False)",
                "F.dropout({p}, p=0.2, training=False)",
            )
            p = w.let("p", choose("no dropout", none), p=p)
        o = w.let("o", choose("output", OUTPUTS, 0.3), at, p=p, v=v)
    if w.drops:
        w.raw.append(o)
    return o


def multihead(w: Writer, kind: str, number: int) -> str:
    """`nn.MultiheadAttention`, or the function that it calls."""
    choose = w.choose
    b, e, h = w.batch, w.heads * w.head_dim, w.heads
    at = Lengths()
    w.inputs |= {"xq": f"rand(seed + 51, {b}, n, {e})", "xk": f"rand(seed + 52, {b}, m, {e})"}
    hides = choose("hidden keys", ("no", "padding", "mask", "float mask", "both"), 0.7)
    said = ""
    if hides in ("padding", "both"):
        said += f", key_padding_mask={w.let('hidden', '~pad', at)}"
    if hides in ("mask", "both"):
        two = w.let("hidden", choose("matrix", [f"~({x})" for x in masks.MATRICES]), at)
        said += f", attn_mask={two}"
    if hides == "float mask":
        two = w.let(
            "mask",
            choose(
                "float matrix",
                [
                    f"torch.zeros({{n}}, {{m}}, dtype=DTYPE).masked_fill({x} == 0, {f})"
                    for x in masks.MATRICES[:12]
                    for f in FILLS[:4]
                ],
            ),
            at,
        )
        said += f", attn_mask={two}"
    said += choose("need_weights", (", need_weights=False", ""), 0.3)
    if kind == "module":
        w.modules["mha"] = f"nn.MultiheadAttention({e}, {h}, batch_first=True, dtype=DTYPE)"
        return w.let("o", f"self.mha(xq, xk, xk{said})[0]")
    w.inputs |= {
        "w_in": f"rand(seed + 53, {3 * e}, {e}) * 0.3",
        "b_in": f"rand(seed + 54, {3 * e})",
        "w_out": f"rand(seed + 55, {e}, {e})",
    }
    extra = choose(
        "extra keys",
        ("None, None, False", "None, None, True", "b_in[:8].view(1, 1, 8), b_in[8:16].view(1, 1, 8), False"),
        0.2,
    )
    return w.let(
        "o",
        f"F.multi_head_attention_forward(xq.transpose(0, 1), xk.transpose(0, 1), xk.transpose(0, 1), {e}, {h}, "
        f"w_in, b_in, {extra}, 0.0, w_out, None, training=True{said})[0].transpose(0, 1)",
    )


def vmapped(w: Writer) -> str:
    w.inputs |= {
        "q": f"rand(seed + 1, {w.batch}, {w.heads}, n, {w.head_dim})",
        "k": f"rand(seed + 2, {w.batch}, {w.heads}, m, {w.head_dim})",
        "v": f"rand(seed + 3, {w.batch}, {w.heads}, m, {w.head_dim})",
    }
    keep = relation(w, Lengths())
    over = w.choose("over", ("", ", in_dims=(0, None, 0)", ", in_dims=1"), 0.4)
    f = f"lambda q, k, v: (q @ k.mT * 0.4).masked_fill(~{keep}, -1e4).softmax(-1) @ v"
    return w.let("o", f"torch.vmap({f}{over})(q, k{'[0]' if 'None' in over else ''}, v)")


def exported(w: Writer) -> str:
    """A part that was exported, with a region in it."""
    b, h, d = w.batch, w.heads, w.head_dim
    w.inputs |= {name: f"rand(seed + {i}, {b}, {h}, {x}, {d})" for i, (name, x) in enumerate(zip("qkv", "nmm"), 1)}
    w.filled("bias2")
    inner = {
        "softmax": "(q @ k.transpose(-1, -2) * 0.35 + b).softmax(-1) @ v",
        "lifted": "(q @ k.transpose(-1, -2) * 0.35 + (b + 333.3)).softmax(-1) @ v",
        "sdpa": "F.scaled_dot_product_attention(q, k, v, attn_mask=b.to(q.dtype))",
        "causal": "(q @ k.mT + b).masked_fill(torch.ones_like(b).triu(1) > 0, -1e4).softmax(-1) @ v",
    }
    region = w.choose("region of an exported part", EXPORTED)
    attend = w.choose("attention of an exported part", inner, 0.6)
    w.top.append(
        f"class Part(nn.Module):\n    def attend(self, q, k, v, b):\n        return {attend}\n\n"
        f"    def forward(self, q, k, v, bias2):\n        {region}\n"
    )
    w.top.append(
        "EXAMPLE = inputs(*CALLS[0])\n"
        "EXAMPLE = {name: EXAMPLE[name].to(DTYPE) for name in ('q', 'k', 'v', 'bias2')}\n"
        "PART = torch.export.export(Part(), (), EXAMPLE).module()\n"
    )
    return w.let("o", "PART(q=q, k=k, v=v, bias2=bias2)")


def site(w: Writer, number: int) -> tuple[str, str, Lengths]:
    """One attention, with what is around it: the names of its output, and of its query."""
    choose = w.choose
    often = {"softmax": 30, "sdpa": 7, "differential": 3, "summed": 3, "mha": 2, "module": 2, "vmap": 1, "exported": 1}
    kinds = [x for x, n in often.items() for _ in range(n) if not w.drops or x in ("softmax", "sdpa")]
    kind = choose("kind", kinds)
    if kind in ("mha", "module"):
        return multihead(w, kind, number), "", Lengths()
    if kind == "vmap":
        return vmapped(w), "", Lengths()
    if kind == "exported":
        return exported(w), "", Lengths()
    q, k, v, at = operands(w, number)
    has_mask = choose.chance("masked", 0.85)
    narrow = w.dtype != "float64"
    regions = {
        x: y
        for x, y in REGIONS.items()
        if not (narrow and x == "autocast" and w.dtype == "float16")
        and not (w.drops and ("twice" in x or "cond" in x or "nested" in x))
    }
    region = choose("region", regions, 0.25)
    if choose.chance("query is written before", 0.04):
        q, k, v = (w.let(x[0], f"{x} * 1") for x in (q, k, v))
        w.line(
            choose(
                "write of an operand",
                (f"{k}[:, :, 0] = 1.0", f"{q}.mul_(2.0)", f"{v}.zero_()", f"{k}.copy_({k}.flip(2))"),
            )
        )
    inside = bool(region) and choose.chance("mask is made inside", 0.5)
    keep = None if inside or not has_mask else mask(w, at)
    if not inside:
        between(w, number, keep)
    if not region:
        keep = mask(w, at) if inside and has_mask else keep
        o = attend(w, kind, number, q, k, v, at, keep)
    elif region.startswith("with"):
        with w.block(region):
            keep = mask(w, at) if inside and has_mask else keep
            o = attend(w, kind, number, q, k, v, at, keep)
    else:
        f = f"part{number}"
        w.in_function = True
        raws = len(w.raw)
        with w.block(f"def {f}(q, k, v):"):
            keep = mask(w, at) if inside and has_mask else keep
            w.line(f"return {attend(w, kind, number, 'q', 'k', 'v', at, keep)}")
        w.in_function = False
        o = w.let("o", region, f=f, q=q, k=k, v=v)
        w.raw[raws:] = [o] * (len(w.raw) - raws)
    w.kept = [x for x in w.kept if x.name not in (keep.name if inside and keep else "")]
    if choose.chance("an operand is written after", 0.03):
        w.line(choose("write after", (f"{o} = {o} * 1", f"{o}.add_(1.0)")) if w.raw == [] else f"{o} = {o} * 1")
    return o, q, at


def between(w: Writer, number: int, keep: Keep | None) -> None:
    """What comes between a mask and its use: another graph, perhaps a write."""
    how = w.choose("between", ("nothing", "graph break", "graph break and write", "write"), 0.16)
    if "graph break" in how:
        w.line("torch._dynamo.graph_break()")
    if "write" in how and keep is not None:
        writes = ("replace({a})", "write({a})", "put({a})", "{a}.data = ~{a}", *masks.WRITES)
        name = w.let("keep", "({a} & torch.ones({n}, {m}, dtype=torch.bool)).clone()", keep.lengths, a=keep.name)
        if "graph break" in how:
            w.line("torch._dynamo.graph_break()")
        keep.name = name
        w.line(w.filled(w.choose("write between", writes), keep.lengths, a=name))


def program(seed: str, plain: Collection[str] = (), forced: Mapping[str, int] | None = None) -> tuple[str, Choices]:
    """The source of a random program, and the choices that made it."""
    choose = Choices(seed, plain, forced)
    dtype = choose("dtype", ("float64", "float32", "float16", "bfloat16", "float16"), 0.16)
    w = Writer(
        choose,
        batch=choose("batch", (2, 1, 3), 0.4),
        heads=(heads := choose("heads", (2, 1, 4), 0.4)),
        groups=2 if heads > 1 else 1,
        head_dim=choose("head_dim", (4, 8), 0.3),
        dtype=dtype,
        drops=dtype == "float64" and choose.chance("dropout is above 0", 0.06),
    )
    outputs: list[str] = []
    there = [number for number, often in ((1, 0.4), (2, 0.2)) if choose.chance(f"attention {number} is there", often)]
    first = not there or choose("attention 0 is there", (False, True), 0.85)
    for number in [0] * first + there:
        with choose.within(f"attention {number}"):
            if outputs and choose.chance("graph break before", 0.08):
                w.line("torch._dynamo.graph_break()")
            o, q, at = site(w, number)
            if not w.drops and q and choose.chance("changed later", 0.3):
                o = w.let("o", choose("later", LATER), at, o=o, q=q)
            outputs.append(o)
    if len(outputs) > 1:
        if choose.chance("outputs in another order", 0.4):
            outputs.reverse()
        if not w.drops and choose.chance("outputs are added", 0.15):
            outputs = [" + ".join(f"{o}.sum(-1)" for o in outputs)]
    if not w.drops and choose.chance("a bias is an output", 0.03) and "bias" in w.inputs:
        outputs.append("bias * 2")
    return text(w, [*outputs, *w.raw]), choose


def text(w: Writer, outputs: list[str]) -> str:
    choose = w.choose
    body = "\n".join(w.lines)
    n, m = choose("n and m", ((5, 7), (5, 5), (6, 4), (4, 8), (1, 6), (8, 8)), 0.6)
    is_module = bool(w.buffers or w.modules)
    calls = choose("calls", (1, 2, 3), 0.5 if w.buffers else 0.12)
    sizes = choose("sizes", ("one", "several", "dynamic"), 0.12)
    lengths = [
        (n + 2 * i * (sizes != "one"), m + 2 * i * (sizes != "one"))
        for i in range(max(calls, 1 + (sizes == "several")))
    ]
    floats = [
        name
        for name, x in w.inputs.items()
        if x.startswith(("rand", "torch.eye")) and not re.search(r"> 0$|argsort|long|floor|cumsum", x)
    ]
    wanted = choose("gradients", ("all", "none", "some", "one"), 0.45)
    some = {
        "all": floats,
        "none": [],
        "some": [x for x in floats if choose.chance(f"of {x}", 0.5)],
        "one": floats[-1:],
    }[wanted]
    source = body + "".join(w.inputs.values())
    tolerance = max(w.tolerance, 1e-6 if "1e9" in source else w.tolerance)
    wide = w.dtype if w.dtype == "float64" else "float32"
    narrow = w.dtype != "float64"
    kernel = choose(
        "kernel", ("auto", "sdpa", "flex") if narrow and wanted == "none" else ("auto", "sdpa", "reference"), 0.25
    )
    as_read = choose("masks are computed as they were read", (False, True), 0.6)
    compiler = choose("compiler", ("as it is", "aot_eager"), 0.35)
    options = {
        **({"kernel": kernel} if kernel != "auto" else {}),
        **({"compiler": compiler} if compiler != "as it is" else {}),
    }
    parameters = ", ".join(w.inputs)
    first = [] if "l" not in re.findall(r"\bl\b", body) else ["    l = m + 2"]
    used = [*w.inputs]
    if sizes == "one":
        first.insert(0, f"    n, m = {n}, {m}")
    else:
        first.insert(0, "    n, m = like_n.size(0), like_m.size(0)")
        parameters += ", like_n, like_m"
        used += ["like_n", "like_m"]
    entries = "".join(f'        "{name}": {x},\n' for name, x in w.inputs.items())
    entries += '        "like_n": torch.zeros(n),\n        "like_m": torch.zeros(m),\n' if sizes != "one" else ""
    extra = "    l = m + 2\n" if re.search(r"\bl\b", entries) else ""
    parts = [
        IMPORTS,
        (f"{DROPS} weights\n" if w.drops else "")
        + f"DTYPE = torch.{w.dtype}\nWIDE = torch.{wide}\nCALLS = {lengths}\nGRADIENTS = {some}\nOPTIONS = {options}\n"
        f"DYNAMIC = {True if sizes == 'dynamic' else None}\nAS_READ = {as_read}\nTOLERANCE = {tolerance}\n",
        RANDOM,
        f"def inputs(n, m, seed=0):\n{extra}    return {{\n{entries}    }}\n",
        *w.top,
        *(helper for name, helper in HELPERS.items() if re.search(rf"\b{name}\(", body)),
    ]
    lines = [*first, *w.lines, f"    return {', '.join(outputs)}"]
    if is_module:
        made = [f"self.register_buffer({name!r}, {x})" for name, x in w.buffers.items()]
        made += [f"self.{name} = {x}" for name, x in w.modules.items()]
        init = "\n".join(
            f"        {x}" for x in ["super().__init__()", *(["torch.manual_seed(0)"] if w.modules else []), *made]
        )
        forward = "\n".join("    " + line for line in lines)
        parts.append(
            f"class Program(nn.Module):\n    def __init__(self):\n{init}\n\n"
            f"    def forward(self, {parameters}):\n{forward}\n"
        )
        if w.buffers and len(lengths) > 1:
            name = choose("changed buffer", sorted(w.buffers))
            change = choose("change", masks.CHANGES).format(b=f"model.{name}")
            parts.append(f"def change(model):\n    {change}\n")
    else:
        parts.append(f"def program({parameters}):\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)
