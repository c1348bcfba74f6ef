"""Compiles the Triton kernels for GPUs that need not be there, which finds what the interpreter lets pass."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attn_rewriter.kernels import split_keys

TYPES = {
    **{name: "*i1" if name == "keep" else "*i64" for name in ("keep", "blocks", "counts")},
    **dict.fromkeys(("partial", "largest", "total"), "*fp32"),
}
SHARED = 99 * 1024  # of a program, in the smallest GPUs (sm_86, sm_89, sm_120)


def compiled(kernel: triton.JITFunction, capability: int, dtype: str, **constants: object) -> None:
    """Compile a kernel whose innermost strides are 1 and whose other sizes nothing is known about."""
    constants |= {name: 1 for name in kernel.arg_names if name.endswith(("_d", "_k"))}
    pointers = {"query", "key", "value", "bias", "sinks", "output"}
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}" if name in pointers else "i32")
        for name in kernel.arg_names
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": split_keys._WARPS, "num_stages": split_keys._STAGES},
    )
    assert made.metadata.shared <= SHARED, (dtype, constants, made.metadata.shared)


CASES = ((80, "bf16", 2, 16), (80, "fp32", 4, 256), (90, "fp16", 2, 256))


def main() -> None:
    for capability, dtype, item, d in CASES:
        block, rows = split_keys.tile_sizes(d, item)
        sizes = {"HEAD_DIM": d, "HEAD_DIM_V": d, "D": d, "D_V": d, "ROWS": rows, "BLOCK": block}
        numbers = {"Q_LEN": 3, "GROUP": 40, "SCALE": 0.3, "SOFTCAP": 5.0, "FACTOR": 2.0}
        read = {"KEEP_ROWS": rows, "BIAS_ROWS": rows}
        compiled(split_keys.attend_to_splits, capability, dtype, **sizes, **numbers, **read)
        whole = {"Q_LEN": 3, "NUM_HEADS": 40, "HEAD_DIM_V": d, "D_V": d, "SPLITS": split_keys._MAX_SPLITS}
        compiled(split_keys.join_splits, capability, dtype, **whole, SINKS=True)


if __name__ == "__main__":
    main()
