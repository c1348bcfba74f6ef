"""`device_map`: models that accelerate puts on several devices, and whose weights may wait elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attn_rewriter
from tests import models

big_modeling = pytest.importorskip("accelerate.big_modeling")
hooks = pytest.importorskip("accelerate.hooks")

BLOCKS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
CPU = torch.device("cpu")


def on_devices(model: nn.Module, folder: Path) -> None:
    """The hooks of a model that is divided between devices, here all the same."""
    devices = dict.fromkeys(("", *BLOCKS), CPU)
    hooks.attach_align_device_hook_on_blocks(model, execution_device=devices, offload=dict.fromkeys(devices, False))


def hooks_on_blocks_alone(model: nn.Module, folder: Path) -> None:
    """Without those within a layer, whose modules are all on its device."""
    on_devices(model, folder)
    for layer in model.model.layers:  # type: ignore[union-attr]
        for child in layer.children():
            hooks.remove_hook_from_submodules(child)


def offloaded(model: nn.Module, folder: Path) -> None:
    """A layer's weights in a file, the others' in memory, each loaded for its call."""
    where = dict.fromkeys(BLOCKS, "cpu") | {"model.layers.1": "disk"}
    big_modeling.dispatch_model(model, where, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize(
    ("wrap", "order", "fused"),
    [
        (hooks_on_blocks_alone, "before", True),
        (hooks_on_blocks_alone, "after", True),
        (on_devices, "after", False),
        (offloaded, "before", False),
    ],
)
def test_hooks(wrap: Callable[[nn.Module, Path], None], order: str, fused: bool, tmp_path: Path) -> None:
    """accelerate's hooks are not compiled, and break the graph. Where one is on each projection, the weights of an
    attention are still alive at its end, as far as Dynamo can see: it stays as it is, and says so."""
    torch._dynamo.reset()
    model: Any = models.build("llama", "eager")
    given = {**models.inputs("llama"), "use_cache": False}
    with torch.no_grad():
        expected = model(**given).logits
        if order == "before":
            attn_rewriter.optimize(model, compiler="eager")
        wrap(model, tmp_path)
        if order == "after":
            attn_rewriter.optimize(model, compiler="eager")
        for _ in range(2):
            torch.testing.assert_close(model(**given).logits, expected)
    sites = attn_rewriter.report_of(model).sites
    if fused:
        assert {(site.module, str(site.spec), site.kernel) for site in sites} == {
            ("self_attn", "scale 0.3536, causal", "sdpa")
        }
    else:
        assert sites and {site.reasons for site in sites} == {("the attention weights are also returned",)}
