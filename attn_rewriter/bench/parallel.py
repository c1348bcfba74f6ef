"""Several GPUs: a Llama under PyTorch's own engines, eager against the same eager model rewritten.

The model has the shape of Llama-3-8B, a small vocabulary, few layers and random weights. Each GPU has a process:

    eager       attn_implementation="eager", compiled by Inductor
    hand        scaled_dot_product_attention(is_causal=True) written by hand, compiled by Inductor
    rewritten   the row "eager" through attn_rewriter.optimize(model), after the model was wrapped

Columns are named engine-workload-BATCHxTOKENS, batch and tokens of all processes together:

    one         no engine: every process does everything, and waits for nobody
    fsdp        FSDP2, `fully_shard` of each layer and of the model; processes divide the batch
    tp          tensor parallelism, `parallelize_module` of each layer; processes divide the heads
    cp          `context_parallel`; processes divide the sequence. Weights are in each, gradients are averaged after
                the backward pass. Only what calls SDPA can do that: an eager model would attend to its own part

    train       forward and backward, loss over all tokens, gradients freed before each step
    prefill     no_grad, logits of the last token only

All losses of one batch and length are the same but for rounding, whatever the engine: weights and tokens are. Tokens in
a second are those of all processes; memory is the peak over what was allocated before the first step, weights and
inputs, of the process that needs most.

    python -m attn_rewriter bench parallel --json parallel.json
    python -m attn_rewriter bench parallel --columns cp-train-1x16384 --longest 1048576 --rows rewritten

With --longest each column is measured again with twice the tokens, and so on up to that many, until memory runs out.
With --json, cells in the file are not measured again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_rewriter.api import report_of
from attn_rewriter.bench import llama, models, run
from attn_rewriter.bench.measure import OUT_OF_MEMORY, Cell, Results, positive, time_step
from attn_rewriter.bench.processes import LIMIT, Worker, together
from attn_rewriter.errors import KernelUnavailable

FULL = models.Llama(32, 4096, 14336, 32, 8, vocab_size=16384, rope_theta=500000.0, max_position_embeddings=1 << 22)
TINY = models.Llama(2, 64, 128, 4, 2, vocab_size=256)
ROWS = ("eager", "hand", "rewritten")
ENGINES = ("one", "fsdp", "tp", "cp")
WORKLOADS = ("train", "prefill")
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Column(models.Column):
    """An engine, what is done, and the batch and length it is done for."""

    kinds = tuple(f"{engine}-{workload}" for engine, workload in product(ENGINES, WORKLOADS))

    @property
    def engine(self) -> str:
        return self.kind.partition("-")[0]

    @property
    def workload(self) -> str:
        return self.kind.partition("-")[2]


COLUMNS = (
    Column("fsdp-train", 2, 4096),
    Column("fsdp-train", 2, 8192),
    Column("tp-train", 1, 8192),
    Column("tp-prefill", 1, 16384),
    Column("one-train", 1, 8192),
    Column("cp-train", 1, 8192),
    Column("cp-train", 1, 65536),
    Column("cp-prefill", 1, 65536),
)
TINY_COLUMNS = tuple(Column(kind, 2, 32) for kind in Column.kinds)


@dataclass(frozen=True)
class Setup:
    """What all cells have in common."""

    sizes: models.Llama
    device: str
    dtype: torch.dtype
    compiler: str
    repeat: int
    sdpa: str | None


# ---------------------------------------------------------------------------- what a process measures


def join(rank: int, world: int, store: str, device: str) -> None:
    """Meet the other processes, the first time."""
    if dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        timeout=timedelta(seconds=LIMIT),
        world_size=world,
        rank=rank,
    )


def measure(rank: int, world: int, store: str, column: Column, row: str, how: Setup) -> Cell:
    """One cell, as one of the processes sees it."""
    if column.engine == "cp" and row == "eager":
        raise KernelUnavailable("its attention would see the keys of its own process alone")
    if column.engine == "cp" and how.device == "cpu":
        raise KernelUnavailable("context_parallel() takes CUDA's operators alone")
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AttentionInterface

    AttentionInterface.register("by_hand", llama.by_hand)
    join(rank, world, store, how.device)
    mesh = init_device_mesh(how.device, (world,))
    model = models.build(how.sizes, how.device, how.dtype, "by_hand" if row == "hand" else "eager")
    wrap(model, column.engine, mesh)
    models.compile_in_place(model, row == "rewritten", how.compiler)
    step = train(model, column, mesh) if column.workload == "train" else prefill(model, column, mesh)
    only: AbstractContextManager[object] = sdpa_kernel(SDPA[how.sdpa]) if how.sdpa else nullcontext()
    # As many readings in each process: they wait for each other.
    with models.from_scratch(how.device, how.compiler), only:
        answer, cell = time_step(step, Tensor.item, how.repeat, patience=math.inf)
    cell["answer"] = answer
    return cell | (models.rewriting(report_of(model)) if row == "rewritten" else {})


def wrap(model: Any, engine: str, mesh: Any) -> None:
    """Put a model into the hands of an engine."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if engine == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if engine == "tp":
        across: dict[str, Any] = {f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"}
        across |= {f"mlp.{x}_proj": ColwiseParallel() for x in ("gate", "up")}
        back = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        for layer in model.model.layers:
            parallelize_module(layer, mesh, across | back)


def inputs(model: Any, column: Column, mesh: Any) -> dict[str, Tensor]:
    """Random tokens, targets that are random, too (so that a sequence can be divided anywhere), and positions: those of
    this process where the batch is divided."""
    generator = torch.Generator(mesh.device_type).manual_seed(1)
    shape, vocabulary = (column.batch, column.tokens), model.config.vocab_size
    ids, targets = (torch.randint(vocabulary, shape, generator=generator, device=mesh.device_type) for _ in range(2))
    positions = torch.arange(column.tokens, device=mesh.device_type)[None]
    if column.engine == "fsdp":
        if column.batch % mesh.size():
            raise KernelUnavailable(f"{mesh.size()} processes can't divide a batch of {column.batch}")
        ids, targets = (x.chunk(mesh.size())[mesh.get_local_rank()] for x in (ids, targets))
    return {"ids": ids, "targets": targets, "positions": positions}


def parts(column: Column, mesh: Any, given: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Within, each process has its part of the sequence."""
    from torch.distributed.tensor.experimental import context_parallel

    if column.engine != "cp":
        return nullcontext()
    buffers = [*given.values()]
    return context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers))


def call(model: nn.Module, column: Column, given: dict[str, Tensor], **options: Any) -> Any:
    """With positions and without a cache, transformers would look for where one sequence ends and the next begins."""
    from transformers import DynamicCache

    if column.engine == "cp":
        options |= {"position_ids": given["positions"], "past_key_values": DynamicCache(), "use_cache": True}
    return model(given["ids"], **{"use_cache": False, **options})


def train(model: nn.Module, column: Column, mesh: Any) -> Callable[[], Tensor]:
    """A step that answers with the loss over all tokens."""
    given = inputs(model, column, mesh)
    model.train()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with parts(column, mesh, given):
            targets = given["targets"]
            loss = call(model, column, given, labels=targets, shift_labels=targets).loss
            loss.backward()
        if column.engine == "cp":
            for parameter in model.parameters():
                averaged(parameter.grad, mesh)
        return averaged(loss.detach(), mesh) if column.engine in ("fsdp", "cp") else loss.detach()

    return step


def averaged(x: Any, mesh: Any) -> Tensor:
    """Over all processes, in place."""
    dist.all_reduce(x, group=mesh.get_group())
    return x.div_(mesh.size())


def prefill(model: nn.Module, column: Column, mesh: Any) -> Callable[[], Tensor]:
    """A step that answers with the root mean square of the last token's logits, in one of the processes."""
    given = inputs(model, column, mesh)
    model.eval()

    @torch.no_grad()
    def step() -> Tensor:
        with parts(column, mesh, given):
            logits = call(model, column, given, logits_to_keep=1).logits
        return logits.float().square().mean().sqrt()

    return step


# --------------------------------------------------------------------------------------------- groups


class Group:
    """A process for each GPU; new ones after a cell that failed."""

    def __init__(self, size: int, results: Results) -> None:
        self.size, self.results = size, results
        self.workers: list[Worker] = []

    def measure(self, column: Column, row: str, how: Setup) -> Cell:
        """The first process's cell, with the time and the memory of the one that needed most; or why there is none."""
        if any(self._full(replace(column, tokens=column.tokens >> i), row) for i in range(1, 32)):
            return {"failed": OUT_OF_MEMORY}
        if not self.workers:
            self.folder = tempfile.TemporaryDirectory()
            store = str(Path(self.folder.name) / "store")
            self.workers = [Worker(partial(measure, rank, self.size, store)) for rank in range(self.size)]
        cells = together(self.workers, column, row, how)
        if any("failed" in cell for cell in cells):
            self.close()
        ended = [cell for cell in cells if "ms" not in cell]
        if ended:  # memory may run out in one, and the others wait for it
            return next((cell for cell in ended if cell.get("failed") == OUT_OF_MEMORY), ended[0])
        most = {name: max(cell[name] for cell in cells) for name in ("ms", "gib") if name in cells[0]}
        return cells[0] | most | {"tokens_per_s": column.batch * column.tokens / most["ms"] * 1e3}

    def _full(self, column: Column, row: str) -> bool:
        """Whether memory ran out in a shorter one."""
        return self.results.get(str(column), row).get("failed") == OUT_OF_MEMORY

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.close()
        if self.workers:
            self.folder.cleanup()
        self.workers = []


# --------------------------------------------------------------------------------------------- tables


def rows(results: Results) -> Iterator[list[str]]:
    """One for each cell that was measured."""
    for column, cells in results.data["cells"].items():
        base: Cell = next((cells[row] for row in ROWS if "ms" in cells.get(row, {})), {})
        for row in ROWS:
            cell = cells.get(row, {})
            if "ms" in cell:
                yield [
                    f"{column}: {row}",
                    f"{cell['tokens_per_s']:.0f}",
                    f"{cell['ms']:.1f}" + (f" ({base['ms'] / cell['ms']:.2f}×)" if cell is not base else ""),
                    f"{cell['gib']:.2f}" if "gib" in cell else "–",
                    f"{cell['compile_s']:.1f}",
                    models.sites(cell),
                    f"{cell['answer']:.6f}",
                    f"{abs(cell['answer'] / base['answer'] - 1):.1e}" if cell is not base else "–",
                ]
            elif cell:
                yield [f"{column}: {row}", run.why_not(cell), *[""] * 6]


def longest(results: Results) -> Iterator[list[str]]:
    """For each engine, workload, batch and row: the longest sequence that was measured, where a longer one failed."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    full: set[tuple[str, str]] = set()
    for name, cells in results.data["cells"].items():
        column = Column.parse(name)
        title = f"{column.engine}-{column.workload}, batch {column.batch}"
        for row, cell in cells.items():
            if "ms" in cell:
                lengths = found.setdefault((title, row), {})
                lengths["tokens"] = max(lengths.get("tokens", 0), column.tokens)
            elif cell.get("failed") == OUT_OF_MEMORY:
                full.add((title, row))
    for title, row in sorted(full):
        yield [title, row, str(found.get((title, row), {}).get("tokens", "none of them"))]


def tables(results: Results) -> Iterator[run.Table]:
    """What there is to show."""
    header = ["", "tokens / s", "ms", "GiB", "compile, s", "fused / sites", "loss, or logits", "apart"]
    yield "PyTorch's engines", header, [*rows(results)]
    if lengths := [*longest(results)]:
        yield "The longest sequence in memory", ["", "row", "tokens"], lengths


# -------------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    run.add_arguments(parser)
    run.add_choice(parser, "--rows", ROWS, ("eager", "rewritten"))
    parser.add_argument("--columns", nargs="+", type=Column.parse, help=", ".join(map(str, COLUMNS)))
    parser.add_argument("--layers", type=positive, default=8, help="of the model (%(default)s; tiny: 2)")
    parser.add_argument("--processes", type=positive, help="how many (default: one for each GPU; on a CPU 2)")
    parser.add_argument("--longest", type=positive, metavar="TOKENS", help="go on doubling the tokens up to so many")
    parser.add_argument("--sdpa", choices=SDPA, help="what PyTorch's SDPA may take (default: what it likes)")
    run.add_compiler(parser)


def doubled(columns: Sequence[Column], limit: int) -> list[Column]:
    """Each column, and the same with twice the tokens, up to the limit."""
    grown = []
    for column in columns:
        while column.tokens <= limit:
            grown.append(column)
            column = replace(column, tokens=2 * column.tokens)
    return list(dict.fromkeys(grown))


def main(options: argparse.Namespace) -> int:
    """Measure, and show what there is."""
    sizes = TINY if options.tiny else replace(FULL, num_hidden_layers=options.layers)
    how = Setup(sizes, options.device, getattr(torch, options.dtype), options.compiler, options.repeat, options.sdpa)
    columns = options.columns or (TINY_COLUMNS if options.tiny else COLUMNS)
    if options.longest:
        columns = doubled(columns, options.longest)
    size = options.processes or (torch.cuda.device_count() if options.device == "cuda" else 2)
    results = Results(options.json)
    with closing(Group(size, results)) as group:
        tasks = [
            run.Task(str(column), row, partial(group.measure, column, row, how))
            for column, row in product(columns, options.rows)
        ]
        setup = {"processes": size, "layers": sizes.num_hidden_layers} | ({"sdpa": how.sdpa} if how.sdpa else {})
        run.fill(results, tasks, lambda: models.setup(options) | setup | run.unusual(options), options.limit_s)
    run.show(results, [*tables(results)] if results.data["cells"] else [], [], options.markdown)
    return int(results.failures() > 0)
