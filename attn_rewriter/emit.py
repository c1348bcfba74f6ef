"""Put a kernel's operations in the place of a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Node

from attn_rewriter.describe import Description
from attn_rewriter.device import Device
from attn_rewriter.errors import Refusal, Refused, refuse
from attn_rewriter.find import Site
from attn_rewriter.graph import Facts, call, size, tensor
from attn_rewriter.kernels import Kernel
from attn_rewriter.kernels.blocks import AsNode, in_memory
from attn_rewriter.kernels.twice import twice_differentiable
from attn_rewriter.patterns.axes import Step, extent, plan
from attn_rewriter.spec import Size, same
from attn_rewriter.splice import Splice, run
from attn_rewriter.torch_private import GuardOnDataDependentSymNode


def emit(
    site: Site, found: Description, kernel: Kernel, device: Device, facts: Facts, twice: bool = False
) -> Node | Refusal:
    """Rewrite one site, so that it can be differentiated `twice`, and return the fused call. On a refusal or an
    exception the graph is as it was."""
    output = site.output
    expected = tensor(output)
    assert expected is not None
    try:
        with Splice(facts, output, site.anchor) as splice:
            exposed = _exposed(found, facts)

            def of(node: Any) -> Any:
                return _as_it_is(splice.stand_in(node)) if node in exposed else splice.stand_in(node)

            operands = Operands(found, of, splice.as_type, splice.size)
            result = kernel(found.spec, found.shapes, device, operands)
            fused: Node = result.node  # type: ignore[attr-defined]
            if twice:
                splice.value(result)
                result = twice_differentiable(result, found.spec, found.shapes, device, operands)
            result = arrange(result, plan(found.layout.of("output"), found.output), splice.size)
            result = splice.as_type(result, expected.dtype)
            if expected.requires_grad and (_leaves(output, facts) or not facts.unchanged(output)):
                result = torch.ops.attn_rewriter.in_memory.default(result)
            _check(splice.value(result), expected)
            if not _interchangeable(splice.value(result), output, facts):
                result = _in_memory_as(expected, result)
                if not _strides_agree(splice.value(result), expected):
                    refuse("emit", "the model's output lies in memory in a way that can't be made", output)
            splice.replace(output, result, found.interior)
    except Refused as refused:
        return refused.refusal
    except GuardOnDataDependentSymNode:
        return Refusal("emit", "the kernel would decide by a size that only the run knows", output)
    fused.meta["attn_rewriter"] = kernel.name
    return fused


def narrowed(site: Site, found: Description, facts: Facts) -> Refusal | None:
    """Why a fused call in the place of a site would be less exact: autocast would round its operands."""
    output = tensor(site.output)
    assert output is not None
    autocast = facts.autocast(site.output, output.device.type)
    if autocast is None or found.shapes.dtype in (autocast, torch.float64):
        return None
    return Refusal("emit", f"autocast would compute in {autocast} what needs {found.shapes.dtype}", site.output)


def _leaves(node: Node, facts: Facts) -> bool:
    """Whether a tensor, or what may be a view of it, leaves the graph, for someone to write into. A kernel keeps its
    output for its backward pass, and Inductor would neither ask whether that has changed, nor make a clone (2.13)."""
    viewed = (user for user in node.users if (found := call(user)) is not None and found.name in _VIEWS)
    return facts.is_seen_outside(node) or any(_leaves(user, facts) for user in viewed)


_PRODUCT = ("query", "key", "value")


def _exposed(found: Description, facts: Facts) -> set[Node]:
    """Biases and masks that a backward pass reads again, where eager code needs its weights alone, and that the graph,
    or who calls it, may have written into by then."""
    if not found.shapes.needs_backward:
        return set()
    nodes = {state.node for name, state in found.operands.items() if name not in _PRODUCT}
    return {x for x in nodes if isinstance(x, Node) and (facts.is_seen_outside(x) or not facts.unchanged(x))}


class _AsItIs(AsNode):
    """A copy that Inductor does not see through: of the source it would keep a view, and never ask whether it has
    changed (2.13)."""

    __name__ = "as_it_is"
    is_shared = True

    def run(self, x: torch.Tensor) -> torch.Tensor:
        once = x
        for dim, stride in enumerate(x.stride()):
            once = once.narrow(dim, 0, 1) if isinstance(stride, int) and stride == 0 else once
        return in_memory(once).expand(x.shape)


_as_it_is = _AsItIs()


class Operands(Mapping[Any, Any]):
    """A kernel's tensors, or stand-ins for them, and the sizes that are symbols; each is made when the kernel asks for
    it, and once. `of` gives what stands for a node, `as_type` converts it, `size` gives a size as an argument."""

    def __init__(
        self,
        found: Description,
        of: Callable[[Any], Any],
        as_type: Callable[[Any, torch.dtype], Any],
        size: Callable[[Size], Any],
    ) -> None:
        self._found, self._of, self._as_type, self._size = found, of, as_type, size
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: Any) -> Any:
        if isinstance(name, sympy.Expr):
            return self._size(name)
        if name not in self._made:
            state = self._found.operands[name]
            held = self._of(state.node)
            if state.dtype is None:
                return held
            if name in _PRODUCT or name in self._found.spec.numeric:
                held = self._as_type(held, self._found.shapes.dtype)
            elif (device := self._device("query")) != self._device(name):  # a mask was read through a move
                held = held.to(device)
            steps = plan(state.dims, self._found.layout.of(name), broadcast=name not in _PRODUCT)
            held = arrange(held, steps, self._size)
            kv_len, keys = self._found.shapes.kv_len, extent(self._found.layout.key)
            if not same(kv_len, keys):
                seen = slice(self._size(kv_len))
                if name in ("key", "value"):
                    held = held[:, :, seen]
                elif any(atom.axis == "key" for atom in state.atoms):
                    held = held[..., seen]
            self._made[name] = held
        return self._made[name]

    def _device(self, name: str) -> torch.device | None:
        value = tensor(self._found.operands[name].node)
        return None if value is None else value.device

    def __iter__(self) -> Iterator[str]:
        return iter(self._found.operands)

    def __len__(self) -> int:
        return len(self._found.operands)


def arrange(held: Any, steps: list[Step], size: Callable[[Size], Any]) -> Any:
    """Carry a plan out on a tensor or its stand-in."""
    for name, args in steps:
        if name == "unflatten":
            args = (args[0], _with_one_free(args[1], size))
        elif name == "expand":
            args = tuple(map(size, args))
        held = getattr(held, name)(*args)
    return held


def _with_one_free(sizes: tuple[Size, ...], size: Callable[[Size], Any]) -> tuple[Any, ...]:
    """Sizes for `unflatten`, with -1 for one that is symbolic."""
    symbolic = [i for i, n in enumerate(sizes) if not isinstance(n, int)]
    return tuple(-1 if symbolic[:1] == [i] else size(n) for i, n in enumerate(sizes))


def _check(new: torch.Tensor, old: torch.Tensor) -> None:
    same_shape = new.ndim == old.ndim and all(same(size(m), size(n)) for m, n in zip(new.shape, old.shape))
    if not same_shape or (new.dtype, new.device) != (old.dtype, old.device):
        refuse("emit", f"the kernel gives {new.dtype} {tuple(new.shape)}, the model has {old.dtype} {tuple(old.shape)}")


_VIEWS = {"permute", "transpose", "reshape", "copy", "getitem"}
_BLIND = {"matmul", "baddbmm"}  # products do not show how their arguments lie in memory


def _strides_agree(new: torch.Tensor, old: torch.Tensor) -> bool:
    layouts = zip(new.shape, new.stride(), old.stride())
    return all(size(n) == 1 or same(size(a), size(b)) for n, a, b in layouts)


def _interchangeable(new: torch.Tensor, old: Node, facts: Facts, *, alone: bool = True) -> bool:
    """Whether nothing downstream of `old` can tell that `new` may lie otherwise in memory.

    Views are followed to where the strides agree again, as after `transpose(1, 2).contiguous()`. Whatever else sees
    other strides (a `view` that would raise, an output of the graph, an elementwise operation that passes them on)
    can tell. So can whoever writes into what was a copy and now is a view, or has two of them (not `alone`).
    """
    reference = tensor(old)
    if reference is None:
        return False
    if _strides_agree(new, reference):
        return True
    alone = alone and len(old.users) == 1
    for user in old.users:
        found = call(user)
        if (found is not None and found.name in _BLIND) or getattr(user.target, "__name__", "") == "linear":
            continue
        expected = tensor(user)
        if found is None or found.name not in _VIEWS or user.args[:1] != (old,) or expected is None:
            return False
        mode = getattr(new, "fake_mode", None)
        try:
            seen = run(user, mode, lambda node: new if node is old else node.meta["example_value"])
        except (RuntimeError, ValueError):
            return False
        if not _interchangeable(seen, user, facts, alone=alone):
            return False
        if _shares(seen, new) != _shares(expected, reference) and not (alone and facts.unchanged(user)):
            return False
    return True


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _in_memory_as(expected: torch.Tensor, result: Any) -> Any:
    """Lay a stand-in out in memory with its dimensions in the same order as another tensor's."""
    strides = [size(stride) for stride in expected.stride()]
    order = [*range(len(strides))]
    if all(isinstance(stride, int) for stride in strides):
        order.sort(key=lambda i: -strides[i])
    if order == sorted(order):
        return result.contiguous()
    return result.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])
