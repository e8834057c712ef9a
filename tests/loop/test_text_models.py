"""Text models of other families than the lab's: the same loop runs them all, or says why not."""

from dataclasses import replace

import pytest
import torch
from copd_cases import CPU, TASKS, make_config, run
from transformers import AutoConfig

from copd.branch import Branch
from copd.lab.tasks import vocabulary
from copd.model import OWN_CACHE, load_saved
from copd_kernels import logprob

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 256}


SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}


TEXT = {
    "Qwen3": {},
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Phi3": {},
    "Gemma3Text": {"sliding_window": 4},
    "GPTNeoX": {"num_key_value_heads": 2},
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Gemma2": {"sliding_window": 4},
    "Granite": {},
    "Cohere2": {"sliding_window": 4, "num_hidden_layers": 4},
    "Mamba": {"state_size": 4},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "Qwen3Next": {
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


@pytest.mark.parametrize("family", TEXT)
def test_a_text_only_model_trains_by_the_same_code(tmp_path, family):
    """Whatever it calls its layers; greedy completions are those of its own `generate`."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES | TEXT[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    vocabulary.tokenizer().save_pretrained(tmp_path)
    results = run(make_config(tmp_path, f"model.path={tmp_path}", domains=("text", "text2")))
    assert set(results["final"]) == {"base", "text", "text2", "merged"}
    cfg = make_config(tmp_path, "rollout.max_new_tokens=6")
    branch = Branch("text", [TASKS["text"]("text")], model, vocabulary.tokenizer(), cfg, CPU)
    prompt = branch.tasks[0].prompt(0)
    greedy = branch.rollout([prompt], 0, 1, greedy=True)
    ids = torch.tensor([prompt.input_ids])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    own = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    assert torch.equal(greedy.tokens[0][greedy.mask[0]], own)
    # prompts of several lengths, rows that end at several times: sampler and loss see the same
    prompts = [
        replace(prompt, input_ids=prompt.input_ids[n:], mm_token_type_ids=prompt.mm_token_type_ids[n:])
        for n in (0, 2, 5)
    ]
    rollout = branch.rollout(prompts, 0, 4)
    head, tokens = branch.head(rollout, list(range(12)))
    logp = logprob(head, tokens, temperature=cfg.rollout.temperature).logp
    torch.testing.assert_close(rollout.logp[rollout.mask], logp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "knob", "value"),
    [
        ("Gemma2", "final_logit_softcapping", 5.0),
        ("Granite", "logits_scaling", 8.0),
        ("Cohere2", "logit_scale", 0.0625),
        ("Qwen3", "tie_word_embeddings", False),
    ],
)
def test_the_sampler_and_the_loss_read_one_head(tmp_path, family, knob, value):
    """Softcap and scale, and a head of its own that is not the embedding, whose logits are far from flat."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    special = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "attn_implementation": "eager"}
    options = sizes | heads | special | {knob: value}
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.get_output_embeddings().weight.data *= 20
    cfg = make_config(tmp_path)
    branch = Branch("text", [TASKS["text"]("text")], model, vocabulary.tokenizer(), cfg, CPU)
    rollout = branch.rollout([branch.tasks[0].prompt(i) for i in range(3)], 0)
    head, tokens = branch.head(rollout, list(range(len(rollout.tokens))))
    logp = logprob(head, tokens, temperature=cfg.rollout.temperature).logp
    assert logp.std() > 0.03
    torch.testing.assert_close(rollout.logp[rollout.mask], logp, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["t5", "mllama", "clip", "florence2"])
def test_a_model_that_does_not_read_tokens_alone_is_refused(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model: path must hold a decoder that reads tokens.*; got '{kind}' in"):
        load_saved(tmp_path)


@pytest.mark.parametrize("kind", OWN_CACHE)
def test_a_model_with_a_cache_of_its_own_is_refused(tmp_path, kind):
    AutoConfig.for_model(kind, is_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model: path must hold a decoder that .* DynamicCache; got '{kind}' in"):
        load_saved(tmp_path)
