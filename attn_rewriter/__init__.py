"""Fused attention for unmodified models: a `torch.compile` backend that reads eager attention out of FX graphs.

>>> model = attn_rewriter.optimize(model)                   # or torch.compile(model, backend="attn_rewriter")
>>> print(attn_rewriter.explain(model, **inputs))
"""

from attn_rewriter.api import explain, optimize, report_of
from attn_rewriter.backend import Backend
from attn_rewriter.device import Device
from attn_rewriter.errors import AttnRewriterError, KernelUnavailable, Refusal, RewriteError
from attn_rewriter.options import Options
from attn_rewriter.patching import Patch, patch, unpatch
from attn_rewriter.report import Report
from attn_rewriter.sites import SiteReport
from attn_rewriter.spec import AttentionSpec

__version__ = "0.2.0"

__all__ = [
    "AttentionSpec",
    "AttnRewriterError",
    "Backend",
    "Device",
    "KernelUnavailable",
    "Options",
    "Patch",
    "Refusal",
    "Report",
    "RewriteError",
    "SiteReport",
    "__version__",
    "explain",
    "optimize",
    "patch",
    "report_of",
    "unpatch",
]
