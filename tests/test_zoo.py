"""Forty architectures of the zoo, of as many families: what is read, that the answers are right, that nothing breaks.

`python -m tests.zoo` does the same for all of them.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.zoo import run, table

transformers.logging.set_verbosity_error()

NAMES = [
    "llama",
    "mistral",
    "mixtral",
    "falcon",
    "gpt_neox",
    "phi",
    "phi3",
    "qwen2",
    "gemma",
    "starcoder2",
    "gptj",
    "opt",
    "bloom",
    "gpt_bigcode",
    "bart",
    "t5",
    "mt5",
    "whisper",
    "bert",
    "xlnet",
    "deberta",
    "gemma2",
    "gpt_oss",
    "gpt_neo",
    "mpt",
    "codegen",
    "xglm",
    "deepseek_v3",
    "qwen3_moe",
    "layoutlmv3",
    "funnel",
    "swin",
    "vit",
    "segformer",
    "detr",
    "clip",
    "llava",
    "wav2vec2",
    "wav2vec2-bert",
    "beit",
]

# What is not read yet: a part of the reason. A name leaves when a rule for it comes.
UNREAD: dict[str, str] = {}


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str) -> None:
    """All attention is read, or is known not to be; the results keep to the contract; Dynamo breaks the graph no more
    than without the rewriter."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        row = run.check(name, quick=True)
    finally:
        torch.set_num_threads(n_threads)
        run.reset()
    assert "not_built" not in row, row["not_built"]
    verdicts = {name: result["verdict"] for name, result in row["runs"].items()}
    assert set(verdicts.values()) <= {"right", "unstable"}, row["runs"]
    assert not row["adds_breaks"]
    sites = table.sites_of(row)
    assert sites
    for site in sites:
        if site["computes"] is None:
            assert name in UNREAD and UNREAD[name] in site["why"], f"{site['source']}: {site['why']}"
    unread = [site for site in sites if site["computes"] is None]
    assert unread or name not in UNREAD, f"{name} is read now: take it out of UNREAD"
