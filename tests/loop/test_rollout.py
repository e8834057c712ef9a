"""Sampling, scoring and the losses built on them."""

import math
from dataclasses import replace

import pytest
import torch
from copd_cases import CPU, TASKS, cross_batch, make_branch, make_config, run
from transformers import AutoConfig

from copd import rollout as rollout_module
from copd.branch import Branch
from copd.distill import delta
from copd.lab.tasks import vocabulary
from copd.model import collate, hidden_states, load_saved
from copd.rlvr import advantages, deviation, policy_loss, token_weights
from copd.rollout import seed_of, special_tokens
from copd.settings import OPDConfig, RLVRConfig
from copd_kernels import logprob

DOMAINS = pytest.mark.parametrize("domain", ["text", "image", "video"])


def make_rollout(cfg, domain="text", seed=0, greedy=False, prompts=3):
    branch = make_branch(cfg, domain)
    rows = [branch.tasks[0].prompt(i) for i in range(prompts)]
    return branch, branch.rollout(rows, seed, greedy=greedy)


@DOMAINS
def test_sampled_log_probs_are_those_the_training_kernels_compute(tmp_path, domain):
    branch, rollout = make_rollout(make_config(tmp_path, "rollout.temperature=0.7"), domain)
    head, tokens = branch.head(rollout, list(range(len(rollout.tokens))))
    logp = logprob(head, tokens, temperature=0.7).logp
    torch.testing.assert_close(rollout.logp[rollout.mask], logp, atol=1e-5, rtol=1e-5)


@DOMAINS
def test_cached_sampling_equals_a_greedy_search_without_cache(tmp_path, domain):
    branch, rollout = make_rollout(make_config(tmp_path), domain, greedy=True)
    model, (eos, pad, media) = branch.model, branch.special
    tokens = torch.zeros(3, 0, dtype=torch.long)
    for _ in range(rollout.tokens.shape[1]):
        sequences = collate(model, rollout.prompts, pad, tokens.tolist(), left=True)
        logits = model.lm_head(hidden_states(model, sequences)[:, -1])
        logits[:, media] = -math.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    ours = rollout.tokens[::3]
    assert torch.equal(ours[rollout.mask[::3]], tokens[rollout.mask[::3]])
    assert eos


@DOMAINS
def test_hidden_states_are_those_of_transformers_own_forward(tmp_path, domain):
    branch = make_branch(make_config(tmp_path), domain)
    rows = [branch.tasks[0].prompt(i) for i in range(2)]
    ours = hidden_states(branch.model, collate(branch.model, rows, 0))
    media = {name: torch.cat([row.media[name] for row in rows]) for name in rows[0].media}
    theirs = branch.model.model(
        input_ids=torch.tensor([row.input_ids for row in rows]),
        mm_token_type_ids=torch.tensor([row.mm_token_type_ids for row in rows]),
        **media,
    ).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_prompts_of_different_lengths_and_media_share_a_batch(tmp_path, left):
    model = make_branch(make_config(tmp_path)).model
    rows = [TASKS[name](name).prompt(0) for name in ("text", "image", "video")]
    together = hidden_states(model, collate(model, rows, 0, left=left))
    for row, hidden in zip(rows, together, strict=True):
        alone = hidden_states(model, collate(model, [row], 0))[0]
        ours = hidden[-len(alone) :] if left else hidden[: len(alone)]
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


def test_rows_of_one_prompt_share_its_media(tmp_path):
    model = make_branch(make_config(tmp_path)).model
    first, second = (TASKS["image"]("image").prompt(i) for i in range(2))
    runs = []
    model.model.visual.register_forward_hook(lambda module, args, kwargs, output: runs.append(args), with_kwargs=True)
    together = hidden_states(model, collate(model, [first, second, first], 0, [[5, 6], [7], []]))
    assert len(runs) == 1
    assert len(runs[0][0]) == sum(len(row.media["pixel_values"]) for row in (first, second))
    for i, (row, after) in enumerate(((first, [5, 6]), (second, [7]), (first, []))):
        alone = hidden_states(model, collate(model, [row], 0, [after]))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_media_ids_are_never_sampled(tmp_path):
    branch = make_branch(make_config(tmp_path))
    media = torch.tensor(branch.special.media)
    assert len(media) == 4
    branch.model.lm_head.weight.data[media] *= 100
    rows = [branch.tasks[0].prompt(i) for i in range(16)]
    rollout = branch.rollout(rows, 0, samples=16)
    assert not torch.isin(rollout.tokens, media).any()


def test_generation_stops_when_every_row_has_ended(tmp_path):
    branch = make_branch(make_config(tmp_path, "rollout.max_new_tokens=50"))
    # EOS shares its row with the embedding: make it the answer to everything
    branch.model.lm_head.weight = torch.nn.Parameter(torch.zeros(256, 32))
    branch.model.lm_head.weight.data[2] = 0.0
    branch.special = branch.special._replace(eos=list(range(250)))
    rollout = branch.rollout([branch.tasks[0].prompt(0)], 0)
    assert rollout.tokens.shape[1] == 1
    assert not rollout.truncated.any()


def test_the_mask_ends_with_eos_and_truncated_rows_have_none(tmp_path):
    branch, rollout = make_rollout(make_config(tmp_path, "rollout.samples=32", "rollout.max_new_tokens=32"))
    for tokens, mask, truncated in zip(rollout.tokens, rollout.mask, rollout.truncated, strict=True):
        kept = tokens[mask].tolist()
        assert (kept.count(branch.special.eos[0]), kept[-1] in branch.special.eos) == (
            (0, False) if truncated else (1, True)
        )
    assert 0 < rollout.truncated.float().mean() < 1


@DOMAINS
@pytest.mark.parametrize("tokens", [1, 60, 200])
def test_a_bounded_cache_samples_what_an_unbounded_one_does(tmp_path, domain, tokens):
    limit = "rollout.max_new_tokens=24"
    whole = make_rollout(make_config(tmp_path, limit), domain, prompts=5)[1]
    parts = make_rollout(make_config(tmp_path, limit, f"rollout.cache_tokens={tokens}"), domain, prompts=5)[1]
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.mask, parts.mask)
    torch.testing.assert_close(whole.logp, parts.logp, rtol=1e-4, atol=1e-4)


def test_the_cache_stays_within_its_bound(tmp_path, monkeypatch):
    held = []
    update = rollout_module._Layer.update

    def spy(layer, *args, **kwargs):
        keys, values = update(layer, *args, **kwargs)
        held.append(keys.shape[0] * keys.shape[2])
        return keys, values

    monkeypatch.setattr(rollout_module._Layer, "update", spy)
    make_rollout(make_config(tmp_path, "rollout.max_new_tokens=24", "rollout.cache_tokens=150"), prompts=5)
    assert 75 < max(held) <= 150


def test_a_row_samples_the_same_alone_and_among_others(tmp_path):
    branch, many = make_rollout(make_config(tmp_path, "rollout.max_new_tokens=24"), prompts=6)
    few = branch.rollout([branch.tasks[0].prompt(i) for i in range(2)], 0)
    width = few.tokens.shape[1]
    assert torch.equal(many.tokens[:6, :width], few.tokens)


def test_rows_that_have_ended_leave_the_batch(tmp_path, monkeypatch):
    rows = []
    inner = rollout_module.hidden_states

    def spy(model, batch, cache):
        rows.append(len(batch.input_ids))
        return inner(model, batch, cache)

    monkeypatch.setattr(rollout_module, "hidden_states", spy)
    branch = make_branch(make_config(tmp_path, "rollout.max_new_tokens=32"))
    branch.special = branch.special._replace(eos=list(range(2, 40)))
    rollout = branch.rollout([branch.tasks[0].prompt(i) for i in range(4)], 0, samples=4)
    # one prefill a prompt, and then one forward for every token but the last of each row
    assert sum(rows) == 4 + int(rollout.mask.sum()) - 16


def test_words_are_drawn_as_often_as_they_are_likely():
    logp = torch.tensor([0.5, 0.0, 0.3, 0.0, 0.2]).log().expand(10_000, 5)
    uniform = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(rollout_module.draw(logp, uniform), minlength=5) / 10_000
    torch.testing.assert_close(counts, logp[0].exp(), atol=0.02, rtol=0)
    assert counts[1] == counts[3] == 0
    ends = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81], dtype=torch.float64)
    assert rollout_module.draw(logp[:5], ends).tolist() == [0, 0, 2, 2, 4]


def rollout_of(lengths, prompt):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return rollout_module.Rollout([prompt], len(lengths), mask.long(), mask, mask.float(), mask[:, 0])


def test_micro_batches_hold_every_row_once_within_their_bound_and_pad_little(tmp_path):
    """Lengths are log-normal with a mean of a quarter of the limit."""
    prompt = TASKS["text"]("text").prompt(0)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(128, generator=generator).exp() * 512 / 4 / math.exp(0.5)).long().clamp(1, 512).tolist()
        rollout = rollout_of(drawn, prompt)
        lengths = rollout.lengths()
        assert lengths == [len(prompt.input_ids) + n for n in drawn]
        groups = rollout.micro_batches(4096)
        assert sorted(row for rows in groups for row in rows) == list(range(128))
        assert all(rows == sorted(rows) for rows in groups)
        assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= 4096 for rows in groups)
        computed = sum(len(rows) * max(lengths[row] for row in rows) for rows in groups)
        assert rollout.computed(4096) == computed <= 1.10 * sum(lengths)
        assert [len(rows) for rows in rollout.micro_batches(1)] == [1] * 128


def test_sampling_depends_on_its_seed_alone(tmp_path):
    cfg = make_config(tmp_path)
    torch.manual_seed(1)
    first = make_rollout(cfg)[1]
    torch.manual_seed(2)
    assert torch.equal(make_rollout(cfg)[1].tokens, first.tokens)
    assert not torch.equal(make_rollout(cfg, seed=1)[1].tokens, first.tokens)
    assert seed_of("a", 1) != seed_of("a", 2)


def test_special_tokens_come_from_tokenizer_and_config(tmp_path):
    branch = make_branch(make_config(tmp_path))
    eos, pad, media = branch.special
    assert (eos, pad, sorted(media)) == ([2], 0, [252, 253, 254, 255])


def test_a_model_without_end_or_padding_is_sampled_to_the_limit(tmp_path):
    branch = make_branch(make_config(tmp_path))
    branch.model.generation_config.eos_token_id = None
    tokenizer = vocabulary.tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    assert special_tokens(branch.model, tokenizer)[:2] == ([], 0)
    branch.special = special_tokens(branch.model, tokenizer)
    rollout = branch.rollout([branch.tasks[0].prompt(0)], 0)
    assert rollout.truncated.all()
    assert rollout.mask.all()


def test_no_deprecated_argument_reaches_the_model(tmp_path, recwarn):
    make_rollout(make_config(tmp_path), "image")
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


def test_group_advantages_sum_to_zero_and_vanish_for_equal_rewards():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    advantage = advantages(reward, RLVRConfig(advantage_eps=0.0))
    torch.testing.assert_close(advantage[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    advantage = advantages(reward, RLVRConfig())
    assert advantage.sum(1).abs().max() < 1e-6
    assert (advantage[1] == 0).all()
    assert (advantages(torch.ones(3, 1), RLVRConfig()) == 0).all()
    assert advantages(reward, RLVRConfig(normalize_advantage=False))[0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_token_weights_average_over_sequences_or_over_tokens():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    by_sequence = token_weights(mask, RLVRConfig())
    torch.testing.assert_close(by_sequence.sum(1), torch.tensor([1 / 3, 1 / 3, 0.0]))
    torch.testing.assert_close(token_weights(mask, RLVRConfig(loss_aggregation="token"))[mask], torch.full((5,), 0.2))


def test_on_the_first_update_the_gradient_is_reinforce():
    logp = torch.randn(6, requires_grad=True)
    advantage, weight = torch.randn(6), torch.rand(6)
    loss, _ = policy_loss(logp, logp.detach(), advantage, weight, RLVRConfig())
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, -weight * advantage)


def test_the_clip_stops_the_gradient_on_each_side_as_in_the_paper():
    old = torch.zeros(4)
    logp = torch.tensor([0.79, 1.29, 0.79, 1.29]).log().requires_grad_()
    advantage = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    loss, clipped = policy_loss(logp, old, advantage, torch.full((4,), 0.25), RLVRConfig())
    (gradient,) = torch.autograd.grad(loss, logp)
    assert (gradient == 0).tolist() == [True, True, False, False]
    assert {name: value.item() for name, value in clipped.items()} == {
        "clip_ratio/low_mean": 0.25,
        "clip_ratio/high_mean": 0.25,
    }


def test_delta_is_clamped_where_the_config_says_so():
    teacher, student = torch.tensor([-1.0, -20.0]), torch.tensor([-2.0, -1.0])
    assert delta(teacher, student, OPDConfig()).tolist() == [1.0, -19.0]
    assert delta(teacher, student, OPDConfig(delta_clamp=5.0)).tolist() == [1.0, -5.0]


def test_the_sampled_signal_is_the_reverse_kl_gradient_in_expectation(tmp_path):
    """Every word of one position, weighted by its probability, gives the exact gradient of KL(student || teacher)."""
    student = torch.randn(50, requires_grad=True)
    teacher = torch.randn(50).log_softmax(-1)
    logp = student.log_softmax(-1)
    loss, _ = policy_loss(logp, logp.detach(), teacher - logp.detach(), logp.detach().exp(), RLVRConfig(), clip=False)
    (sampled,) = torch.autograd.grad(loss, student, retain_graph=True)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), student)
    torch.testing.assert_close(sampled, exact, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("value", [0.7, 1e6 + 0.1, -3.3e-5, 1 / 3])
def test_equal_rewards_are_no_advantage_whatever_they_are(value):
    reward = torch.full((2, 8), value)
    reward[1, 3] = torch.nan
    assert torch.equal(advantages(reward, RLVRConfig()), torch.zeros(2, 8))
    assert torch.equal(deviation(reward), torch.zeros(2))


def test_a_completion_without_reward_has_no_advantage_and_does_not_touch_the_others():
    reward = torch.tensor([[0.0, 1.0, 1.0, torch.nan]])
    known = advantages(reward[:, :3], RLVRConfig())
    torch.testing.assert_close(advantages(reward, RLVRConfig()), torch.cat([known, torch.zeros(1, 1)], 1))


@pytest.mark.parametrize("kind", ["t5", "mllama", "clip", "florence2"])
def test_a_model_that_does_not_read_tokens_alone_is_refused(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model: path must hold a decoder that reads tokens.*; got '{kind}' in"):
        load_saved(tmp_path)


def test_the_sampled_signal_keeps_no_more_of_the_teacher_than_the_overlap_needs(tmp_path):
    settings = ("micro_batch_tokens=1", "opd.overlap_tokens=3", "rollout.max_new_tokens=4")
    kept = {}
    for signal in ("sampled", "reverse"):
        student = make_branch(make_config(tmp_path, f"opd.signal={signal}", *settings))
        teacher = make_branch(make_config(tmp_path, f"opd.signal={signal}", *settings), "image", seed=1)
        batch = cross_batch(student, teacher, 0)
        kept[signal] = sum(map(len, batch.lesson.teachers[0].states))
        assert sum(map(len, batch.lesson.teachers[0].likeliest)) == 3
        assert sum(map(len, batch.lesson.teachers[0].logp)) == batch.rollout.mask.sum()
        assert math.isfinite(student.learn([batch])["overlap"])
    assert kept["sampled"] == 0 < kept["reverse"]


def test_a_sampler_of_other_log_probs_is_corrected_up_to_the_cap(tmp_path):
    """Half the sampled tokens were four times less likely to the sampler than to the policy, the rest as likely."""
    gradients = {}
    for cap in ("null", 100.0, 2.0):
        branch = make_branch(make_config(tmp_path, f"rlvr.importance_cap={cap}"))
        batch = branch.native_batch(0)
        batch.advantage = torch.linspace(-1, 1, len(batch.rollout.tokens))
        batch.rollout.logp = scored(branch, batch.rollout)
        batch.rollout.logp[::2] -= math.log(4)
        branch._backward(batch)
        gradients[cap] = torch.cat([p.grad.flatten() for p in branch.parameters if p.grad is not None])
        metrics = branch.learn([batch])
        share = batch.rollout.mask[::2].sum() / batch.rollout.mask.sum()
        assert metrics["importance_sampling_ratio/max"] == pytest.approx(4, rel=1e-4)
        assert metrics["importance_sampling_ratio/mean"] == pytest.approx(float(1 + 3 * share), rel=1e-4)
        assert metrics["importance_sampling_ratio/truncated"] == (pytest.approx(float(share)) if cap == 2.0 else 0)
    # the loss is linear in the weight: 1 + 3 a without truncation, 1 + a with
    odd = (gradients[100.0] - gradients["null"]) / 3
    torch.testing.assert_close(gradients[2.0], gradients["null"] + odd, rtol=1e-3, atol=1e-6)
    assert odd.abs().max() > 1e-4


def scored(branch, rollout):
    logp = torch.zeros_like(rollout.logp)
    head, tokens = branch.head(rollout, list(range(len(rollout.tokens))))
    logp[rollout.mask] = logprob(head, tokens).logp.detach()
    return logp


def test_a_cap_must_be_above_zero(tmp_path):
    with pytest.raises(ValueError, match=r"rlvr.importance_cap must be above 0, or null; got 0"):
        make_config(tmp_path, "rlvr.importance_cap=0")
