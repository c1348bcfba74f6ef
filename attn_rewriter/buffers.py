"""What a compiled graph takes for granted of its inputs, and what makes that sound.

Models of the GPT-2 era register their causal mask as a buffer. What it holds is known when a graph is compiled, but
not that it stays so. So every call of a graph that was rewritten by a buffer's contents checks that it still has the
very tensor that was read, in the state that it was in then (`State`); another tensor, or another state, is read again
and must say the same. Where it does not, the graph as it was before is compiled and called instead.

A mask that another graph made is known by what was proved there (`handed_on.py`), which every call of that graph notes
about the very tensor that it returns, in its state. Here too every call checks that it was handed such a tensor.
Where nothing was proved but that it is a mask, as one that depends on the positions that a model is given, it is read
as buffers are, once for each mask: the layers of a model share one.

A graph is first compiled for what is held then, a causal mask say. Where a call finds something else, it is compiled
once more, for all noted masks that hold zero and a number that masks, wherever they hold which; and then for any. (To
the graph that is compiled once more, buffers are inputs like any other.)

And what was rewritten within `context_parallel()` computes nothing else outside of it, nor the other way round: a call
from elsewhere compiles the graph as it was before, there. So does one where a level of forward-mode AD is alive.

A tensor's state has its version, which counts every write that PyTorch sees, and where in which memory it lies: memory
can be exchanged (`x.data = y`, `set_`, `swap_tensors`) or moved (`resize_`) without a write. PyTorch does not see what
is written through `buffer.data`, a storage, or memory that a tensor shares with something else (NumPy, another
process): after such a write, call `torch.compiler.reset()`, as for anything else that `torch.compile` takes to be
constant.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from attn_rewriter.context_parallel import Ring, ring
from attn_rewriter.forward_ad import forward_gradients
from attn_rewriter.torch_private import FakeTensor, is_functorch_wrapped_tensor

Compiled = Callable[..., Any]
Recompile = Callable[[GraphModule], Compiled]

_KEY = "attn_rewriter_buffer"
_RETRIES = 8
"""How many times a buffer may turn out to say something else before it is not looked at any more: to look at a tensor
means to wait for its device."""


@dataclass(frozen=True)
class Contents:
    """`inside` where `lower <= column - row <= upper` (None leaves a side open), `outside` elsewhere; or, `scattered`,
    one of the two, anywhere; or numbers of which no more is known than how large they are, `within`."""

    inside: Any
    outside: Any = None
    lower: int | None = None
    upper: int | None = None
    scattered: bool = False
    within: float | None = None

    def held_by(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor holds this."""
        if self.within is not None:
            return bool((tensor.detach().abs() <= self.within).all())
        if not self.scattered:
            return contents(tensor) == self
        with torch.no_grad():
            return bool(((tensor == self.inside) | (tensor == self.outside)).all())

    def tensor(self, sizes: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """A tensor of these sizes that holds this, of the type of another one and on its device."""
        assert not self.scattered
        rows, columns = torch.arange(sizes[-2])[:, None], torch.arange(sizes[-1])
        lower = -math.inf if self.lower is None else self.lower
        upper = math.inf if self.upper is None else self.upper
        inside = (columns - rows >= lower) & (columns - rows <= upper)
        held = torch.full((sizes[-2], sizes[-1]), self.outside, dtype=like.dtype)
        return held.masked_fill(inside, self.inside).expand(*sizes).clone().to(like.device)


def contents(tensor: torch.Tensor, weakly: bool = False) -> Contents | None:
    """What a tensor holds, if it is one number or a banded matrix, or a batch of the same one; or if it is zero and one
    negative number, as additive masks are (`weakly`: this alone)."""
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    if tensor.is_complex() or tensor.is_quantized or tensor.requires_grad:  # what is read gets no gradient
        return None
    return (None if weakly else _banded(tensor)) or _scattered(tensor)


def _scattered(tensor: torch.Tensor) -> Contents | None:
    if not tensor.is_floating_point():
        return None
    found = Contents(0.0, tensor.min().item(), scattered=True)
    return found if found.outside < 0 and found.held_by(tensor) else None


def _banded(tensor: torch.Tensor) -> Contents | None:
    with torch.no_grad():
        matrix = tensor.reshape(-1, *(1, 1, *tensor.shape)[-2:])[0]
        if matrix.numel() != tensor.numel() and not torch.equal(tensor, matrix.expand_as(tensor)):
            return None
        if not torch.equal(matrix[1:, 1:], matrix[:-1, :-1]):
            return None
        diagonals = torch.cat([matrix[:, 0].flip(0), matrix[0, 1:]])  # from the lower left to the upper right
        starts = (diagonals[1:] != diagonals[:-1]).nonzero().flatten()[:3].tolist()
        values = [diagonals[0].item(), *(diagonals[i + 1].item() for i in starts)]
    if any(value != value for value in values):
        return None
    ends = [i - (matrix.size(0) - 1) for i in starts]
    if not ends:
        return Contents(values[0])
    if len(ends) == 1:
        return Contents(values[0], values[1], None, ends[0])
    if len(ends) == 2 and values[0] == values[2]:
        return Contents(values[1], values[0], ends[0] + 1, ends[1])
    return None


class State(NamedTuple):
    """All that must be the same for a tensor to hold what it held."""

    storage: int  # the address, of which a `Memory` sees to it that it is not another one's
    version: int
    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    negated: bool

    @staticmethod
    def of(tensor: Any) -> State | None:
        """None for tensors that do not say when they change, or are no plain tensors."""
        if type(tensor) is FakeTensor:  # of a graph that is compiled in parts: each call asks again, for real tensors
            return State(tensor.untyped_storage()._cdata, tensor._version, 0, tensor.shape, (), 0, tensor.dtype, False)
        if type(tensor) is not torch.Tensor or tensor.is_inference() or is_functorch_wrapped_tensor(tensor):
            return None
        if tensor.layout != torch.strided:
            return None
        memory = tensor.untyped_storage()._cdata, tensor._version, tensor.data_ptr()
        offset = int(tensor.storage_offset())
        return State(*memory, tensor.shape, tensor.stride(), offset, tensor.dtype, tensor.is_neg())


class Memory:
    """What was said of tensors, for as long as they are in the state that they were in.

    It holds no reference to a tensor, as PyTorch exchanges none that anybody has a weak reference to
    (`torch.utils.swap_tensors`), and writes nothing on it, as that would be pickled with a model. A tensor is known by
    its identity and its storage. Of that it has a weak reference, so that no other storage gets the same address while
    it is remembered; a tensor that got the identity of another one has another storage, or is in another state.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[StorageWeakRef, State, Any]] = {}
        self._enough = 64

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, tensor: torch.Tensor, state: State, said: Any) -> None:
        """Say something of a tensor in a state that it was in before anybody looked at it."""
        if len(self._held) >= self._enough:
            self._held = {key: held for key, held in [*self._held.items()] if not held[0].expired()}
            self._enough = max(64, 2 * len(self._held))
        storage = tensor.untyped_storage()
        if storage._cdata == state.storage:
            self._held[id(tensor)] = StorageWeakRef(storage), state, said

    def said(self, tensor: Any, state: State) -> Any:
        """What was said of a tensor in this state, which it is in now; None where nothing was."""
        _, known, said = self._held.get(id(tensor), (None, None, None))
        return said if known == state else None


def _magnitude(tensor: torch.Tensor) -> Contents | None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    largest = tensor.detach().abs().max().item()
    return Contents(None, within=2.0 ** math.ceil(math.log2(max(largest, 1.0)))) if math.isfinite(largest) else None


class Buffer:
    """One buffer among the inputs of a graph. `read` says what it holds, and from then on `holds` must be asked."""

    def __init__(self, tensor: torch.Tensor, weakly: bool = False) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._weakly = weakly
        self._contents: Contents | None = None
        self._seen = Memory()
        self._retries = _RETRIES
        self._is_looked_at = False
        self.is_read = False

    def read(self) -> Contents | None:
        if not self._is_looked_at and self._tensor is not None:
            self._is_looked_at = True
            self._keep(lambda tensor: contents(tensor, self._weakly))
        self.is_read = self._contents is not None
        return self._contents if self._contents is None or self._contents.within is None else None

    def largest(self) -> float:
        """A power of two that no number in it exceeds, where no more is known of it; infinity if there is none."""
        if self.read() is None and self._contents is None and self._tensor is not None:
            self._keep(_magnitude)
            self._tensor = None  # there is nothing else to look for
        self.is_read = self._contents is not None
        known = self._contents.within if self._contents is not None else None
        return math.inf if known is None else known

    def _keep(self, look: Callable[[torch.Tensor], Contents | None]) -> None:
        assert self._tensor is not None
        state = State.of(self._tensor)
        if state is not None:
            self._contents = look(self._tensor)
            self._seen.keep(self._tensor, state, self._contents)

    def close(self) -> None:
        """Nobody will read it any more."""
        self._tensor = None

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor holds what was read."""
        state = State.of(tensor)
        if state is None:
            return False
        assert self._contents is not None
        if self._seen.said(tensor, state) == self._contents:
            return True
        if not self._retries or not self._contents.held_by(tensor):
            self._retries = max(0, self._retries - 1)
            return False
        self._seen.keep(tensor, state, self._contents)
        return True


UNPROVED = object()
"""What is said of a mask that has to be looked at."""

_known = Memory()


def note(tensor: torch.Tensor, held: Any) -> None:
    """Say what a mask holds, as it is now: `Contents`, or `UNPROVED`."""
    if (state := State.of(tensor)) is not None:
        _known.keep(tensor, state, held)


def noted(tensor: Any) -> Any:
    """What was said that a tensor holds, if it is still in that state; None where nothing was said."""
    return None if (state := State.of(tensor)) is None else _known.said(tensor, state)


class HandedOn:
    """An input that another graph made, and what is known about it: as a `Buffer`, but for how it is known."""

    def __init__(self, held: Contents) -> None:
        self._contents = held
        self.is_read = False

    def read(self) -> Contents:
        self.is_read = True
        return self._contents

    def close(self) -> None:
        """As a `Buffer`."""

    def holds(self, tensor: Any) -> bool:
        return noted(tensor) == self._contents


def _around() -> tuple[Ring | None, bool]:
    """What a graph is compiled for besides its inputs, and Dynamo does not guard on: the ring of `context_parallel()`,
    and whether a level of forward-mode AD is alive."""
    return ring(), forward_gradients()


class Buffers:
    """The buffers and the known masks among the inputs of a graph, which `buffer_of` finds while it is rewritten.
    `original` is the graph as it was before."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], weakly: bool = False) -> None:
        self.gm = gm
        self.original = kept(gm)
        self._here = _around()
        self._inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self._buffers: dict[int, Buffer | HandedOn] = {}
        for i, (node, given) in enumerate(zip(self._inputs, example_inputs)):
            held = noted(given)
            if isinstance(held, Contents) and not weakly:
                self._buffers[i] = HandedOn(held)
            elif type(given) is torch.Tensor and (held is not None or _is_buffer(node)):
                self._buffers[i] = Buffer(given, weakly)

    def __enter__(self) -> Buffers:
        for i, buffer in self._buffers.items():
            self._inputs[i].meta[_KEY] = buffer
        return self

    def __exit__(self, *_: Any) -> None:
        forget(self.gm)
        self._inputs.clear()
        for buffer in self._buffers.values():
            buffer.close()

    def guarded(self, compiled: Compiled, compile_elsewhere: Recompile, compile_original: Recompile) -> Compiled:
        """A call of `compiled` where all that was read still holds. Where something else is around, the original graph
        is compiled there; where an input holds something else, `compile_original` compiles it."""
        original, here = self.original, self._here
        trusted = [(i, buffer) for i, buffer in self._buffers.items() if buffer.is_read]
        others: dict[Any, Compiled] = {}

        def call(*args: Any) -> Any:
            around = _around()
            if around == here and all(buffer.holds(args[i]) for i, buffer in trusted):
                return compiled(*args)
            if around not in others:
                again = compile_original if around == here else compile_elsewhere
                others[around] = again(copied(original))  # Dynamo would take the same code for compiled already
            return others[around](*args)

        return call


def copied(gm: GraphModule) -> GraphModule:
    """A graph of its own, with the same tensors; without Dynamo's weak references to those that it is called with."""
    held = [x for module in gm.modules() for x in (*vars(module).values(), *module.buffers(), *module.parameters())]
    made = copy.deepcopy(gm, {id(x): x for x in held if isinstance(x, torch.Tensor)})
    for node in _nodes(made):
        node.meta.pop("grapharg", None)
    return made


def kept(gm: GraphModule) -> GraphModule:
    """A copy that may be kept until it is traced once more: nothing is known of its values any more, as these hold
    what PyTorch knew of all tensors while it compiled."""
    made = copied(gm)
    for node in _nodes(made):
        node.meta = {key: node.meta[key] for key in ORIGIN if key in node.meta}
    return made


ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack")
"""What Dynamo says of where in the model a node comes from."""


def _nodes(gm: GraphModule) -> Iterator[Node]:
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def buffer_of(node: Node) -> Buffer | HandedOn | None:
    """The buffer or the mask that a graph's input stands for, if it may be read."""
    return node.meta.get(_KEY)


def forget(gm: GraphModule) -> None:
    """Let a graph's inputs be read by value no more."""
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.pop(_KEY, None)


def _is_buffer(node: Node) -> bool:
    """Whether Dynamo found a graph's input among the buffers of a module."""
    base = getattr(getattr(node, "_dynamo_source", None), "base", None)
    name = getattr(base, "name", "")
    return str(name() if callable(name) else name).endswith("._buffers")
