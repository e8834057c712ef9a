"""Sampling: what comes out of it, at what cost, and that the loss will see the same log-probs."""

import math

import pytest
import torch
from copd_cases import TASKS, make_branch, make_config

from copd import rollout as rollout_module
from copd.lab.tasks import vocabulary
from copd.model import collate, hidden_states
from copd.rollout import seed_of, special_tokens
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
