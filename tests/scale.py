"""What the two processes of `test_scale` do: PyTorch's engines around small models, each case against one process."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options, context_parallel_unshard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import attn_rewriter
from attn_rewriter.bench import models as bench_models
from attn_rewriter.bench import parallel
from attn_rewriter.context_parallel import ring
from tests import models
from tests.accuracy import assert_as_accurate, assert_the_same

HALF_AND_SINGLE = (torch.bfloat16, torch.float32)
WORLD, BATCH, LENGTH, STEPS, RATE = 2, 4, 12, 2, 1e-3
DEVICE = "cpu"  # or "cuda", in the processes that `process` is told so
FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


# ------------------------------------------------------------------------------------------- models


class Attention(nn.Module):
    """Causal, with as many heads as its projections give."""

    def __init__(self, width: int = 32, head_dim: int = 8) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        weights = (q @ k.mT * self.head_dim**-0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.norm = Attention(), nn.LayerNorm(32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.self_attn(self.norm(x), mask)


def causal_mask(ids: Tensor) -> Tensor:
    return torch.ones(ids.size(1), ids.size(1), dtype=torch.bool, device=ids.device).tril()


class Plain(nn.Module):
    """A model of nobody's library."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(models.VOCABULARY, 32), nn.Linear(32, models.VOCABULARY)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = self.embed(ids), causal_mask(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights every time."""
    if name == "llama":
        return models.build("llama", "eager", dtype).to(DEVICE).train()
    torch.manual_seed(0)
    model = Plain()
    models.randomize(model)
    return model.to(DEVICE, dtype)


def layers(model: nn.Module) -> nn.ModuleList:
    return model.layers if isinstance(model, Plain) else model.model.layers  # type: ignore[union-attr, return-value]


def call(model: nn.Module, ids: Tensor, **given: Any) -> Tensor:
    """Logits."""
    output = model(ids, **given)
    return output if isinstance(output, Tensor) else output.logits


def tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, models.VOCABULARY, (BATCH, LENGTH), generator=generator).to(DEVICE)


def positions() -> Tensor:
    return torch.arange(LENGTH, device=DEVICE)[None]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each sequence."""
    return F.cross_entropy(logits.mT, labels, reduction="none").mean(-1)


# -------------------------------------------------------------------------------------- two steps


@dataclass(frozen=True)
class Seen:
    """What is compared: the losses and all gradients of each training step, and logits after them."""

    losses: list[Tensor]
    gradients: list[Tensor]
    logits: Tensor

    def all(self) -> dict[str, Any]:
        return vars(self)


def train(model: nn.Module, step: Callable[[Tensor, Tensor], Tensor], average: bool = False) -> Seen:
    """Steps of gradient descent. `step` leaves gradients, to be averaged over all processes unless an engine did that,
    and gives the losses of all sequences."""
    seen, gradients = [], []
    for i in range(STEPS):
        seen.append(step(tokens(i), tokens(100 + i)).detach())
        parameters = [p for _, p in sorted(model.named_parameters(), key=lambda item: bare(item[0]))]
        for p in parameters:
            if average:
                p.grad = mean(p.grad)
        gradients.append(torch.cat([gathered(p.grad).flatten() for p in parameters]))
        with torch.no_grad():
            for p in parameters:
                p -= RATE * p.grad
                p.grad = None
    return Seen(seen, gradients, torch.empty(0))


def bare(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def gathered(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


@cache
def alone(name: str, dtype: torch.dtype) -> Seen:
    """One process, eager, over the whole batch."""
    with models.NothingNarrowed():
        model = build(name, dtype)

        def step(ids: Tensor, labels: Tensor) -> Tensor:
            whole = losses(call(model, ids), labels)
            whole.mean().backward()
            return whole

        seen = train(model, step)
        with torch.no_grad():
            return Seen(seen.losses, seen.gradients, call(model.eval(), tokens(50)))


# ---------------------------------------------------------------------------------------- engines


@dataclass(frozen=True)
class Engine:
    """How a model is wrapped, on devices of this mesh, and whether its processes share a batch."""

    wrap: Callable[[nn.Module, DeviceMesh], nn.Module]
    mesh: tuple[int, ...] = (WORLD,)
    splits_batch: bool = True


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_in_many_buckets(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """As large models are: every parameter in a bucket of its own, at which DDPOptimizer cuts the graph."""
    wrapped = DistributedDataParallel(model)
    wrapped.bucket_bytes_cap = dist._DEFAULT_FIRST_BUCKET_BYTES = 1  # what DDPOptimizer reads; arguments are in MiB
    return wrapped


def fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    data = mesh["data"] if mesh.ndim > 1 else mesh
    for layer in layers(model):
        fully_shard(layer, mesh=data)
    return fully_shard(model, mesh=data)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    heads = mesh["heads"] if mesh.ndim > 1 else mesh
    plan: dict[str, Any] = {f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"}
    plan["self_attn.o_proj"] = RowwiseParallel()
    for layer in layers(model):
        mlp = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(layer, heads, plan | (mlp if hasattr(layer, "mlp") else {}))
    return model


def by_tp_plan(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """As transformers does for `tp_plan="auto"`, from a folder."""
    folder = SCRATCH / "model"
    if dist.get_rank() == 0:
        model.save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    made = type(model).from_pretrained(folder, tp_plan="auto", attn_implementation="eager")  # type: ignore[attr-defined]
    return made.train()


ENGINES = {
    "DDP": Engine(ddp),
    "DDP, many buckets": Engine(ddp_in_many_buckets),
    "FSDP2": Engine(fsdp),
    "TP": Engine(tensor_parallel, splits_batch=False),
    "tp_plan": Engine(by_tp_plan, splits_batch=False),
    "FSDP2 + TP": Engine(lambda model, mesh: fsdp(tensor_parallel(model, mesh), mesh), (1, WORLD), splits_batch=False),
}


def optimized_before(model: nn.Module, wrap: Callable[[nn.Module], nn.Module], compiler: str) -> nn.Module:
    return wrap(attn_rewriter.optimize(model, compiler=compiler))


def optimized_after(model: nn.Module, wrap: Callable[[nn.Module], nn.Module], compiler: str) -> nn.Module:
    return attn_rewriter.optimize(wrap(model), compiler=compiler)


def compiled(model: nn.Module, wrap: Callable[[nn.Module], nn.Module], compiler: str) -> nn.Module:
    return torch.compile(wrap(model), backend="attn_rewriter", options={"compiler": compiler})  # type: ignore[return-value]


ORDERS = {"before": optimized_before, "after": optimized_after, "torch.compile": compiled}


@dataclass(frozen=True)
class Case:
    """An engine around a model, and when it is optimised."""

    engine: str
    order: str
    model: str = "plain"
    compiler: str = "aot_eager"

    def __str__(self) -> str:
        return f"{self.engine}, {self.order}: {self.model}, {self.compiler}"

    def run(self) -> None:
        engine, order = ENGINES[self.engine], ORDERS[self.order]
        mesh = init_device_mesh(DEVICE, engine.mesh, mesh_dim_names=("data", "heads")[: len(engine.mesh)])
        with said() as lines:
            model = order(build(self.model), lambda model: engine.wrap(model, mesh), self.compiler)
            seen = self._train(model, engine.splits_batch)
        assert lines and all("causal [" in line and "-> eager" not in line for line in lines), lines
        if self.order != "torch.compile":
            report = attn_rewriter.report_of(model)
            assert report.n_fused == report.n_sites > 0, report
        assert_as_accurate(
            seen.all(), alone(self.model, torch.float32).all(), alone(self.model, torch.float64).all(), str(self)
        )

    def _train(self, model: nn.Module, splits_batch: bool) -> Seen:
        rank = dist.get_rank()

        def mine(x: Tensor) -> Tensor:
            return x.chunk(WORLD)[rank] if splits_batch else x

        def step(ids: Tensor, labels: Tensor) -> Tensor:
            with counted() if ids.equal(tokens(STEPS - 1)) else nullcontext():
                here = losses(call(model, mine(ids)), mine(labels))
            here.mean().backward()
            return joined(here.detach()) if splits_batch else here

        seen = train(model, step)
        with torch.no_grad():
            logits = call(model.eval(), mine(tokens(50)))
        return Seen(seen.losses, seen.gradients, joined(logits) if splits_batch else logits)


def mean(x: Tensor) -> Tensor:
    whole = x.detach().clone()
    dist.all_reduce(whole)
    return whole / WORLD


def joined(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@contextmanager
def said() -> Iterator[list[str]]:
    """What is logged of each site."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("attn_rewriter")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@contextmanager
def counted(calls: int = 2) -> Iterator[None]:
    """Every attention of the forward pass within is a fused one, whatever was compiled when."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints when it starts and stops
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        yield
    names = [event.name for event in trace.events()]
    assert DEVICE != "cpu" or names.count(FUSED) == calls, (names.count(FUSED), names.count("aten::_softmax"))
    assert "aten::_softmax" not in names


CASES = [
    *(Case(engine, order) for engine in ("DDP", "FSDP2", "TP") for order in ORDERS),
    Case("FSDP2 + TP", "before"),
    Case("DDP, many buckets", "after"),
    *(Case(engine, "after", "llama") for engine in ("FSDP2", "tp_plan")),
    Case("FSDP2", "before", compiler="inductor"),
]

# -------------------------------------------------------------------------------- context parallel


@dataclass(frozen=True)
class Parts:
    """Each process holds a part of the sequence. The model may also be called outside, and within once more."""

    model: str
    compiler: str = "eager"
    leaves: bool = False
    sharded: bool = False
    balanced: bool = True
    dtype: torch.dtype = torch.float32

    def run(self) -> None:
        mesh = init_device_mesh(DEVICE, (WORLD,))
        made = build(self.model, self.dtype)
        with balanced(self.balanced), said() as lines:
            model = attn_rewriter.optimize(fsdp(made, mesh) if self.sharded else made, compiler=self.compiler)

            def step(ids: Tensor, labels: Tensor) -> Tensor:
                with in_parts(mesh, ids, labels, where := positions()):
                    here = losses(self._call(model, ids, where), labels)
                    here.mean().backward()
                return mean(here)

            seen = train(model, step, average=not self.sharded)
            model.eval()
            eager, exact = alone(self.model, self.dtype), alone(self.model, torch.float64)
            with torch.no_grad():
                logits = self._logits(model, mesh)
                if self.leaves:
                    for again in (self._call(model, tokens(50), positions()), self._logits(model, mesh)):
                        assert_as_accurate(again, eager.logits, exact.logits, str(self))
        assert lines and all("causal [" in line and "-> eager" not in line for line in lines), lines
        seen = Seen(seen.losses, seen.gradients, logits)
        assert_as_accurate(seen.all(), eager.all(), exact.all(), str(self))

    def _logits(self, model: nn.Module, mesh: DeviceMesh) -> Tensor:
        ids, where = tokens(50), positions()
        with in_parts(mesh, ids, where):
            logits = self._call(model, ids, where)
            return context_parallel_unshard(mesh, [logits], [1])[0]

    def _call(self, model: nn.Module, ids: Tensor, where: Tensor) -> Tensor:
        if self.model == "plain":
            return call(model, ids)
        # With positions but no cache, transformers would look for where one sequence ends and the next one begins.
        return call(model, ids, position_ids=where, past_key_values=DynamicCache(), use_cache=True)


def in_parts(mesh: DeviceMesh, *tensors: Tensor) -> Any:
    return context_parallel(mesh, buffers=[*tensors], buffer_seq_dims=[1] * len(tensors))


@contextmanager
def balanced(yes: bool) -> Iterator[None]:
    """Whether each process holds a piece of the first half and one of the second, which are equally long to compute."""
    before, _cp_options.enable_load_balance = _cp_options.enable_load_balance, yes
    try:
        yield
    finally:
        _cp_options.enable_load_balance = before


@dataclass(frozen=True)
class NotInParts:
    """What a part says nothing about the whole of raises within `context_parallel`, and is fused outside of it."""

    name: str
    attention: Callable[[Tensor], Tensor]
    reason: str

    def __str__(self) -> str:
        return self.name

    def run(self) -> None:
        mesh = init_device_mesh(DEVICE, (WORLD,))
        function = attn_rewriter.optimize(self.attention, compiler="eager")
        x = torch.randn(2, 4, LENGTH, 8, device=DEVICE)
        function(x)
        assert attn_rewriter.report_of(function).n_fused == 1
        with (
            pytest.raises(BackendCompilerFailed, match=f"keys of its own process alone.*{self.reason}"),
            context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]),
        ):
            function(x)


def causal(x: Tensor, window: int = 1 << 20) -> Tensor:
    scores = x @ x.mT
    steps = torch.arange(x.size(-2), device=x.device)
    distance = steps - steps[:, None]
    return scores.masked_fill((distance > 0) | (distance <= -window), float("-inf")).softmax(-1)


def causal_of_more(x: Tensor) -> Tensor:
    """Of a process's own keys, as many are seen as it has queries."""
    keys = torch.cat([x, x], 2)
    scores = x @ keys.mT
    steps = torch.arange(keys.size(-2), device=x.device)
    return scores.masked_fill(steps > steps[: x.size(-2), None], float("-inf")).softmax(-1) @ keys


def own_call(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=1.0)


@dataclass(frozen=True)
class GivingUp:
    """After too many compilations Dynamo runs a model as it is. Within `context_parallel` it raises."""

    def run(self) -> None:
        mesh = init_device_mesh(DEVICE, (WORLD,))
        function = attn_rewriter.optimize(lambda x: causal(x) @ x, compiler="eager", dynamic=False)

        def at_length(n: int) -> None:
            x = torch.randn(2, 4, LENGTH * n, 8, device=DEVICE)
            with context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
                function(x)

        limit = torch._dynamo.config.recompile_limit
        for n in range(limit):
            at_length(n + 1)
        with pytest.raises(FailOnRecompileLimitHit):
            at_length(limit + 1)


@dataclass(frozen=True)
class LeftAlone:
    """A model that calls SDPA itself has `DTensor`s there, within `context_parallel`: PyTorch does the rest."""

    def run(self) -> None:
        mesh = init_device_mesh(DEVICE, (WORLD,))
        whole = torch.randn(2, 4, LENGTH, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        x = whole.clone()
        function = attn_rewriter.optimize(own_call, compiler="aot_eager")
        with context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
            (found,) = context_parallel_unshard(mesh, [function(x)], [2])
        assert_as_accurate(found, own_call(whole), own_call(whole.double()))
        (site,) = attn_rewriter.report_of(function).sites
        assert site.kernel is None and "DTensors" in site.reasons[0], site


@dataclass(frozen=True)
class Distributed:
    """So has a model that is handed `DTensor`s, in eager code as well."""

    def run(self) -> None:
        mesh = init_device_mesh(DEVICE, (WORLD,))
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(2, 4, LENGTH, 8, generator=generator, dtype=torch.float64).to(DEVICE)
        function = attn_rewriter.optimize(lambda x: (x @ x.mT).softmax(-1) @ x, compiler="aot_eager")
        for placement in (Shard(0), Shard(1), Replicate()):
            x = distribute_tensor(whole, mesh, [placement])
            try:
                x @ x.mT
            except RuntimeError:  # PyTorch 2.11 has no product of heads on several GPUs
                continue
            assert_the_same(function(x).full_tensor(), (whole @ whole.mT).softmax(-1) @ whole)
        report = attn_rewriter.report_of(function)
        assert report.n_sites and all("DTensors" in site.reasons[0] for site in report.sites), report


def widened(model: nn.Module) -> nn.Module:
    """In float64, but for buffers, which are tables for the rotation."""
    for p in model.parameters():
        p.data = p.data.double()
    return model


@dataclass(frozen=True)
class Benchmark:
    """What `bench parallel` times has the same loss in parts as in one."""

    def run(self) -> None:
        mesh = init_device_mesh(DEVICE, (WORLD,))

        def answers(engine: str, prepared: Callable[[nn.Module], nn.Module]) -> Tensor:
            found: list[Tensor] = []
            for workload in parallel.WORKLOADS:
                model = prepared(bench_models.build(parallel.TINY, DEVICE, torch.float32))
                column = parallel.Column(f"{engine}-{workload}", 2, 2 * LENGTH)
                step = getattr(parallel, workload)(model, column, mesh)
                found.append(step())
                assert step().equal(found[-1]), column
            compared = 2 if dist.get_rank() == 0 else 1  # the last token is with the first process
            return torch.stack(found[:compared])

        fused = answers("cp", partial(attn_rewriter.optimize, compiler="eager"))
        eager = answers("one", lambda model: model)
        with models.NothingNarrowed():
            assert_as_accurate(fused, eager, answers("one", widened))


PARTS = [
    Parts("plain", compiler="inductor"),
    Parts("plain", leaves=True, sharded=True, balanced=False),
    Parts("plain", leaves=True),
    Parts("llama", compiler="aot_eager"),
    NotInParts("window", lambda x: causal(x, 3) @ x, "sliding window"),
    NotInParts("dropout", lambda x: F.dropout(causal(x), 0.5) @ x, "no dropout"),
    NotInParts("other keys", lambda x: (x @ x[:, :, 1:].mT).softmax(-1) @ x[:, :, 1:], "as many queries as keys"),
    NotInParts("more keys", causal_of_more, "as many queries as keys"),
    NotInParts("bias", lambda x: (x @ x.mT + x.sum(-1, keepdim=True)).softmax(-1) @ x, "bias"),
    GivingUp(),
    LeftAlone(),
    Distributed(),
    Benchmark(),
]
PARTS_ON_GPUS = [
    *(Parts(model, compiler="inductor", dtype=dtype) for model in ("plain", "llama") for dtype in HALF_AND_SINGLE),
    *(case for case in PARTS if not isinstance(case, Parts)),
    NotInParts(
        "float32 in odd parts", lambda x: ((y := x[:, :, 8:]) @ y.mT).softmax(-1) @ y, "a multiple of 64 tokens, not "
    ),
]


def ring_on_cpu() -> None:
    """PyTorch's ring takes CUDA's operators alone (`custom_ops` of its module, torch 2.13): here it takes the CPU's
    too, which give and need the same, its output and logsumexp."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    implementation = sys.modules[context_parallel_unshard.__module__]

    def handler(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = next(x for x in args if isinstance(x, DTensor))
        mesh, scale = first.device_mesh, kwargs.get("scale")
        given = [x.to_local() if isinstance(x, DTensor) else x for x in args]
        if operator is forward:
            query, key, value, dropout_p, is_causal = (*given, *(0.0, False)[len(given) - 3 :])
            found = implementation._templated_ring_attention(
                mesh.get_group(), 2, forward, query, key, value, is_causal, dropout_p=dropout_p, scale=scale
            )
        else:
            gradient, query, key, value, output, logsumexp, dropout_p, is_causal = given[:8]
            found = implementation._templated_ring_attention_backward(
                mesh.get_group(),
                2,
                lambda query, key, value, **rest: backward(
                    *(rest["grad_out"], query, key, value, rest["out"], rest["logsumexp"]),
                    *(rest["dropout_p"], rest["is_causal"]),
                    scale=rest["scale"],
                ),
                *(gradient, "grad_out", query, key, value, output, logsumexp, is_causal),
                dropout_p=dropout_p,
                scale=scale,
            )
        return tuple(DTensor.from_local(x, mesh, first.placements, run_check=False) for x in found)

    implementation.custom_ops.update({forward: handler, backward: handler})


# --------------------------------------------------------------------------------------- processes

SCRATCH = Path()


def process(rank: int, folder: Path, table: str, device: str) -> None:
    """One of the two: run all cases of a table, and write what went wrong."""
    global SCRATCH, DEVICE, LENGTH
    SCRATCH, DEVICE = folder, device
    if device == "cuda":
        LENGTH = 128  # in float32 the ring takes multiples of 64 tokens there
        torch.cuda.set_device(rank)
    else:
        ring_on_cpu()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))  # as torchrun does, for transformers
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        f"file://{folder / 'store'}",
        timedelta(minutes=10),  # for which a process may compile while the other one waits
        world_size=WORLD,
        rank=rank,
    )
    failures: dict[str, str] = {}
    for case in globals()[table]:
        torch._dynamo.reset()
        try:
            case.run()
        except Exception:
            failures[str(case)] = traceback.format_exc(limit=-6)
        if ring() is not None:  # PyTorch 2.11 stays in a block that was left by an exception
            sys.modules[context_parallel_unshard.__module__]._disable_context_parallel_dispatcher_impl()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()
