"""Head: what it takes, what it refuses, and what it reads from real models."""

import pytest
import torch
from kernel_cases import RUNS

from copd_kernels import Head, logprob
from copd_kernels.reference import logits
from copd_kernels.rows import load

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_softcap_is_precise_from_tiny_logits_to_infinite_ones(dtype, backend, device):
    extremes = [0.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan, 1e-30]
    z = torch.cat([torch.logspace(-6, 3, 3507, dtype=dtype), -torch.logspace(-6, 3, 3507, dtype=dtype)])
    z = torch.cat([z, torch.tensor(extremes, dtype=dtype)]).view(7, -1)  # rows of 1,003
    want = 30 * torch.tanh(z.double() / 30)
    got = z.to(device)
    load(backend).complete(got, None, 30.0, None)
    torch.testing.assert_close(got.cpu().double(), want, rtol=8 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Cohere", "Granite", "Phi"])
def test_reads_a_model_so_that_logits_are_the_models_own(transformers, family):
    special = {"Granite": {"logits_scaling": 4.0}, "Gemma2": {"final_logit_softcapping": 3.0}}.get(family, {})
    config = getattr(transformers, f"{family}Config")(**SMALL, **special)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(0, 96, (2, 5))
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        want = model(input_ids=ids).logits
    torch.testing.assert_close(logits(Head.of(model, hidden)), want, rtol=1e-4, atol=1e-5)


def test_reads_the_text_model_of_a_vision_language_model(transformers):
    text = SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    model = transformers.Qwen3VLForConditionalGeneration(config)
    head = Head.of(model, torch.randn(3, 32))
    assert head.lm_head is model.lm_head.weight
    assert head.V == 96


def test_tied_embeddings_receive_the_heads_gradient(transformers):
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, tie_word_embeddings=True))
    hidden = torch.randn(3, 32)
    logprob(Head.of(model, hidden), torch.tensor([1, 2, 3])).logp.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


BAD = [
    (TypeError, "hidden must have a floating dtype; got torch.int64", {"hidden": torch.zeros(2, 3, dtype=torch.int64)}),
    (ValueError, r"lm_head must have shape \(V, D=3\); got \(5, 4\)", {"lm_head": torch.zeros(5, 4)}),
    (ValueError, "lm_head must have at least one row", {"lm_head": torch.zeros(0, 3)}),
    (TypeError, "lm_head must have hidden's dtype torch.float32", {"lm_head": torch.zeros(5, 3).half()}),
    (ValueError, "lm_head must be on hidden's device cpu; got meta", {"lm_head": torch.zeros(5, 3, device="meta")}),
    (ValueError, r"bias must have shape \(V=5,\); got \(4,\)", {"bias": torch.zeros(4)}),
    (TypeError, "bias must have hidden's dtype", {"bias": torch.zeros(5).double()}),
    (ValueError, "scale must not be zero", {"scale": 0.0}),
    (ValueError, "softcap must be positive; got -1", {"softcap": -1.0}),
    (ValueError, "vocab_size must be in 1..5; got 6", {"vocab_size": 6}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD)
def test_bad_input_is_named(error, message, arguments):
    with pytest.raises(error, match="Head: " + message):
        Head(**{"hidden": torch.zeros(2, 3), "lm_head": torch.zeros(5, 3)} | arguments)
