"""Dynamo's settings within `context_parallel()`, and after it, in one process. (What is computed: `test_scale.py`.)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.distributed.device_mesh import init_device_mesh

from attn_rewriter import Backend, Options, context_parallel

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
if not dist.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)
config: Any = torch._dynamo.config


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def block(mesh: Any, x: Tensor) -> Any:
    from torch.distributed.tensor.experimental import context_parallel

    return context_parallel(mesh, buffers=[x], buffer_seq_dims=[2])


def settings() -> tuple[bool, bool]:
    return config.fail_on_recompile_limit_hit, config.suppress_errors


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend=Backend(Options(compiler="eager")), **options)


def given(n: int = 1) -> Tensor:
    return torch.randn(1, 2, 64 * n, 8)


@pytest.mark.parametrize("suppress", [False, True])
def test_settings_go_back(mesh: Any, suppress: bool) -> None:
    """With the block, also where it ends with an error; and hold in each that follows, from its beginning on."""
    x = given()
    with config.patch(suppress_errors=suppress):
        before = settings()
        function = compiled(lambda x: x * 2)
        with block(mesh, x):
            function(x)
            assert settings() == (True, False)
        assert settings() == before
        with block(mesh, x):
            assert settings() == (True, False)
        assert settings() == before
        with pytest.raises(ZeroDivisionError), block(mesh, x):
            raise ZeroDivisionError
        assert settings() == before
        function(x)
        assert settings() == before


def test_the_first_compilation_is_in_a_block(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it, this package knows nothing of blocks."""
    import sys

    for name in [*context_parallel._watched]:
        module = sys.modules[name]
        for each in (context_parallel._BEGIN, context_parallel._END):
            monkeypatch.setattr(module, each, getattr(module, each).__wrapped__)
    monkeypatch.setattr(context_parallel, "_watched", set())
    x, before = given(), settings()
    with block(mesh, x):
        assert settings() == before
        compiled(lambda x: x * 2)(x)
        assert settings() == (True, False)
    assert settings() == before


def test_what_others_set_in_a_block_stays(mesh: Any) -> None:
    """Of other settings."""
    x = given()
    with config.patch(cache_size_limit=3), block(mesh, x):
        compiled(lambda x: x * 2)(x)
        assert config.cache_size_limit == 3
        with config.patch(suppress_errors=True, fail_on_recompile_limit_hit=False):
            assert settings() == (False, True)
        assert settings() == (True, False)


@config.patch(recompile_limit=2)
def test_dynamo_does_not_give_up(mesh: Any) -> None:
    """After too many compilations, of which those of other blocks count."""

    def function(x: Tensor) -> Tensor:
        return x * 2

    run = compiled(function, dynamic=False)
    run(given(1))
    for n in (2, 3, 3, 4):
        x = given(n)
        if n == 2:
            with block(mesh, x):
                run(x)
            continue
        with pytest.raises(FailOnRecompileLimitHit), block(mesh, x):
            run(x)
    assert settings() == (False, False)
    run(given(5))  # outside it runs as it is


def test_another_version(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That does not say where a block ends: then the settings stay, which is said."""
    monkeypatch.setattr(context_parallel, "_BEGIN", "no_such_function")
    x = given()
    before = config.patch(fail_on_recompile_limit_hit=False, suppress_errors=False)
    with block(mesh, x), before:
        with pytest.warns(UserWarning, match="does not say where a block"):
            compiled(lambda x: x * 2)(x)
        assert settings() == (True, False)
