"""Every causal language model of the installed transformers that can be built small: right, or refused by name."""

import inspect
import re

import pytest
import torch
from torch import nn

from copd_kernels import Head, through_head
from copd_kernels.reference import logits

transformers = pytest.importorskip("transformers")
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES  # noqa: E402

SIZES = {"vocab_size": 96, "max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 0, "head_dim": 16}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1}
# the names that configs give to the same number
SAME = {
    32: "hidden_size intermediate_size d_model n_embd d_ff ffn_dim decoder_ffn_dim encoder_ffn_dim",
    2: "num_attention_heads num_key_value_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads num_experts num_local_experts n_routed_experts",
    1: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers",
}
SIZES |= {name: value for value, names in SAME.items() for name in names.split()}
IDS = torch.tensor([[5, 6, 7]])
# whose lm_head reads another thing than the backbone makes, or whose logits are not of all that it reads
REFUSED = "hidden must be what lm_head reads|model must make logits of all that lm_head reads"
COMMON = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "cohere2",
    "granite",
    "falcon_h1",
    "hyperclovax",
    "mistral",
    "phi3",
)


def small(kind):
    """The model of a kind at a size of thousands, or None where that takes more than sizes."""
    made = CONFIG_MAPPING[kind]
    names = set(inspect.signature(made.__init__).parameters) | set(getattr(made, "attribute_map", {}))
    names = names.union(*(getattr(base, "__annotations__", {}) for base in made.__mro__))
    try:
        config = made(**{name: value for name, value in SIZES.items() if name in names})
        text = config.get_text_config()
        if text is not config:
            for name in SIZES.keys() & set().union(*(getattr(b, "__annotations__", {}) for b in type(text).__mro__)):
                setattr(text, name, SIZES[name])
        cls = getattr(transformers, CLASSES[kind])
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in cls(config).parameters()) > 2e6:
                return None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls(config).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.3)
        batch = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if config.is_encoder_decoder else {})
        with torch.no_grad():
            return model, batch, model(**batch).logits
    except Exception:  # it cannot be built or run by sizes alone, with transformers itself
        return None


@pytest.mark.parametrize("kind", CLASSES)
def test_the_head_is_the_models_own_or_refused(kind):
    made = small(kind)
    if made is None:
        assert kind not in COMMON
        pytest.skip("cannot be built, or run by itself, from sizes alone")
    model, batch, want = made
    read = {}
    with (
        torch.no_grad(),
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: read.update(hidden=args[0])),
    ):
        model(**batch)
        for give in (lambda: whole(model, batch), lambda: Head.of(model, read["hidden"])):
            try:
                got = logits(give())
            except ValueError as error:
                if kind in COMMON or not re.search(REFUSED, str(error)):
                    raise
            else:
                # padding that the model itself cuts off
                want = want[..., : got.shape[-1]]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def whole(model, batch):
    with through_head(model, lambda head: head):
        return model(**batch).logits
