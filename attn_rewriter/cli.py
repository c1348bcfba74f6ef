"""`python -m attn_rewriter`: run an unmodified script with its attention rewritten, see what this machine can do, or
measure it."""

from __future__ import annotations

import argparse
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from attn_rewriter import torch_private
from attn_rewriter.choose import Choice, choose, order
from attn_rewriter.device import Device
from attn_rewriter.kernels import KERNELS
from attn_rewriter.kernels.flash import Flash, missing
from attn_rewriter.packages import TESTED, untested, version
from attn_rewriter.patching import patch
from attn_rewriter.progress import working
from attn_rewriter.spec import AttentionSpec, Band, Bias, Mask, Scale, Shapes, Softcap, TensorMask

_PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-3", "flash-attn-4", "attn-rewriter")

_CAUSAL = AttentionSpec((Scale(128**-0.5), Mask(None, Band(None, 0), "keep")))
_PADDED = AttentionSpec((Scale(128**-0.5), Mask("mask0", TensorMask("mask0", ("batch", "key")), "keep")))
_DROPPED = replace(_PADDED, dropout_p=0.1)
_CAPPED = AttentionSpec((Scale(256**-0.5), Softcap(50.0), Mask(None, Band(None, 0), "keep")))
_BIASED = AttentionSpec((Scale(128**-0.5), Bias("bias0")))
_SITUATIONS = (
    ("prefill, causal", _CAUSAL, Shapes(1, 32, 32, 4096, 4096, 128, 128, torch.bfloat16)),
    ("training, causal, GQA", _CAUSAL, Shapes(4, 32, 8, 4096, 4096, 128, 128, torch.bfloat16, True)),
    ("decode, one query", AttentionSpec((Scale(128**-0.5),)), Shapes(8, 32, 8, 1, 8192, 128, 128, torch.bfloat16)),
    ("encoder, key padding", _PADDED, Shapes(32, 12, 12, 512, 512, 64, 64, torch.float16)),
    ("the same, training with dropout", _DROPPED, Shapes(32, 12, 12, 512, 512, 64, 64, torch.float16, True)),
    ("prefill, softcap", _CAPPED, Shapes(1, 8, 4, 4096, 4096, 256, 256, torch.bfloat16)),
    ("training, softcap", _CAPPED, Shapes(1, 8, 4, 4096, 4096, 256, 256, torch.bfloat16, True)),
    ("bias, float32", _BIASED, Shapes(8, 12, 12, 512, 512, 64, 64, torch.float32)),
)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m attn_rewriter", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run an unmodified script with its attention rewritten")
    run.add_argument("--kernel", default="auto", help="auto (default), or names in order, separated by commas")
    run.add_argument("--compiler", default="inductor", help="the torch.compile backend that follows (inductor)")
    run.add_argument("--autotune", action="store_true", help="time the usable kernels and take the fastest")
    run.add_argument("--strict", action="store_true", help="raise where something unexpected happens")
    run.add_argument("--quiet", action="store_true", help="do not print the table of sites at the end")
    run.add_argument("--html", type=Path, metavar="FILE", help="write the sites to a page as well")
    run.add_argument("script", type=Path)
    run.add_argument("args", nargs=argparse.REMAINDER, help="the script's own arguments")
    doctor_parser = commands.add_parser("doctor", help="what this machine has, and what would be chosen and why")
    doctor_parser.add_argument("--device", help="imagine another device: cpu, mps, sm_80, sm_90, gfx942, …")
    bench = commands.add_parser("bench", help="measure kernels and forms of attention on this machine")
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["bench"]:
        _add_benchmarks(bench)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return options.main(options)
    if options.command == "doctor":
        return doctor(options.device)
    return run_script(options)


def _add_benchmarks(bench: argparse.ArgumentParser) -> None:
    with working("importing the benchmarks"):  # which no other command needs
        from attn_rewriter.bench import attention, decode, families, generate, llama, masks, parallel

    benchmarks = bench.add_subparsers(dest="benchmark", required=True)
    for module in (attention, masks, decode, llama, families, generate, parallel):
        name, about = module.__name__.rpartition(".")[2], module.__doc__ or ""
        parser = benchmarks.add_parser(
            name,
            help=about.partition(":")[0],
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        parser.set_defaults(main=module.main)


def run_script(options: argparse.Namespace) -> int:
    """Run a script as `__main__` under `patch()`."""
    script: Path = options.script
    if not script.is_file():
        print(f"there is no script {str(script)!r}", file=sys.stderr)
        return 2
    if options.html is not None and not options.html.parent.is_dir():
        print(f"there is no folder {str(options.html.parent)!r} for --html", file=sys.stderr)
        return 2
    html = options.html and options.html.resolve()  # wherever the script goes
    kernels = options.kernel.split(",") if "," in options.kernel else options.kernel
    sys.argv = [str(script), *options.args]
    sys.path[0] = str(script.parent.resolve())
    given = {"compiler": options.compiler, "strict": options.strict, "autotune": options.autotune}
    with patch(kernel=kernels, **given) as patched:
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            if not options.quiet:
                Console(stderr=True).print(patched.report)
            if html is not None:
                html.write_text(patched.report.to_html())
    return 0


def doctor(device: str | None = None) -> int:
    """Print device, capability, packages, and the choice for some common situations."""
    console = Console()
    here = Device.parse(device) if device else Device.current()
    about: dict[str, Any] = {"device": str(here), "python": sys.version.split()[0]}
    about |= {name: version(name) or "not installed" for name in _PACKAGES}
    about["torch, tested"] = " to ".join(TESTED)
    if torch.backends.cudnn.is_available():
        about["cudnn"] = torch.backends.cudnn.version()
    registered = "attn_rewriter" in torch_private.list_backends(exclude_tags=())
    about['torch.compile(backend="attn_rewriter")'] = "found" if registered else "not found: install the package"
    found = Table(title="This machine", title_justify="left", show_header=False)
    for name, value in about.items():
        found.add_row(name, str(value))
    console.print(found)
    choices = Table(title=f"What would be chosen on {here}", title_justify="left")
    for column in ("situation", "shapes", "kernel", "why not the others"):
        choices.add_column(column, overflow="fold")
    for name, spec, shapes in _SITUATIONS:
        choice = choose(spec, shapes, here)
        chosen = choice.kernel.name if isinstance(choice, Choice) else "eager"
        choices.add_row(name, str(shapes), chosen, "\n".join(_others(chosen, spec, shapes, here)))
    console.print(choices)
    for extra, situations in _gains(here).items():
        pre = "--pre " if extra == "flash4" else ""
        console.print(f"pip install {pre}'attn-rewriter\\[{extra}]' would be faster for: {'; '.join(situations)}")
    if said := untested():
        console.print(said)
    return 0


def _gains(device: Device) -> dict[str, list[str]]:
    """Extras that are not installed, and the situations in which a kernel of theirs would be taken."""
    gains: dict[str, list[str]] = {}
    for name, spec, shapes in _SITUATIONS:
        for kernel in map(KERNELS.__getitem__, order(spec, shapes, device)):
            reasons = kernel.refusals(spec, shapes, device)
            if isinstance(kernel, Flash):
                absent = version(kernel.distribution) is None and missing(
                    kernel.distribution, kernel.module, kernel.at_least
                )
                if kernel.extra and reasons == [absent]:
                    gains.setdefault(kernel.extra, []).append(name)
                break
            if not reasons:
                break
    return gains


def _others(chosen: str, spec: AttentionSpec, shapes: Shapes, device: Device) -> list[str]:
    lines = []
    for name, kernel in KERNELS.items():
        reasons = kernel.refusals(spec, shapes, device)
        if name != chosen:
            later = "comes later in the order" if name in order(spec, shapes, device) else "only when asked for by name"
            lines.append(f"{name}: {'; '.join(reasons) or later}")
    return lines
