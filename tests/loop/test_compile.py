"""Blocks compiled by `torch.compile`: the same numbers, and no trace in what is saved.

`aot_eager` captures what `inductor` would, forward and backward, without a minute of C++; `eager` captures forwards.
"""

from dataclasses import replace

import pytest
import torch
from copd_cases import make_branch, make_config, reward_longer
from torch._dynamo.utils import counters

from copd import checkpoint
from copd.adapter import Adapter, lora_config
from copd.branch import Branch
from copd.lab.tasks import vocabulary
from copd.lab.tiny import build_tiny
from copd.weights import blocks_of


@pytest.fixture(autouse=True)
def captured():
    """What was compiled, from nothing."""
    torch.compiler.reset()
    counters.clear()
    yield counters["stats"]
    torch.compiler.reset()


def rewarded(branch):
    branch.tasks[0].reward = reward_longer
    return branch


def compare(plain, compiled, captured):
    """The same samples by the model as it is; then gradients and scores, by compiled blocks."""
    batch, again = rewarded(plain).native_batch(0), rewarded(compiled).native_batch(0)
    assert torch.equal(batch.rollout.logp, again.rollout.logp)
    assert not captured["unique_graphs"]
    found = []
    for branch, own in ((plain, batch), (compiled, again)):
        with branch.active(learns=True):
            branch._backward(own)
        found.append([master.grad for master in branch.master])
    assert captured["unique_graphs"] > 0
    assert max(gradient.abs().max() for gradient in found[0] if gradient is not None) > 1e-3
    for own, ours in zip(*found, strict=True):
        assert (own is None) == (ours is None)
        if own is not None:
            torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()
    assert not counters["graph_break"]
    return batch.rollout


@pytest.mark.parametrize(
    ("domain", "settings"),
    [
        ("text", ("model.compile=aot_eager",)),
        ("image", ("model.compile=eager", "model.activation_checkpointing=true")),
    ],
)
def test_compiled_blocks_sample_score_and_learn_the_same(tmp_path, captured, domain, settings):
    cfg = make_config(tmp_path, *settings)
    plain = replace(cfg, model=replace(cfg.model, compile=None))
    branches = make_branch(plain, domain), make_branch(cfg, domain)
    rollout = compare(*branches, captured)
    torch.testing.assert_close(*(branch.score(rollout).logp for branch in branches), rtol=1e-4, atol=1e-5)


def test_branches_that_are_adapters_share_compiled_blocks_each_with_its_own_delta(tmp_path, captured):
    settings = ("model.adapter={rank: 2, alpha: 4}", "model.freeze_vision=true")
    made = []
    for more in ((), ("model.compile=eager",)):
        cfg = make_config(tmp_path, *settings, *more)
        base = build_tiny(cfg.model, 0)
        lora = lora_config(base, cfg.model)
        branches = []
        for seed, name in enumerate(("one", "two")):
            branch = make_branch(cfg, "text")
            weights = Adapter(base, name, lora, seed)
            with torch.no_grad():
                for place, parameter in enumerate(weights.parameters()):
                    noise = torch.Generator().manual_seed(100 * seed + place)
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
            branches.append(Branch(name, branch.tasks, weights, vocabulary.tokenizer(), cfg, branch.device))
        made.append(branches)
    for plain, compiled in zip(*made, strict=True):
        compare(plain, compiled, captured)
        captured.clear()
    assert not counters["recompile_limit"]


def test_teachers_frozen_where_a_phase_began_are_compiled_too_once_for_all_phases(tmp_path, captured):
    branch = make_branch(make_config(tmp_path, "model.compile=eager", "model.layers=1"))
    rollout = branch.rollout([branch.tasks[0].prompt(0)], 0)
    before, graphs = branch.score(rollout).logp[0], []
    for _ in range(2):
        branch.freeze()
        assert all(block._compiled_call_impl for block in blocks_of(branch.frozen.model))
        assert torch.equal(branch.score(rollout).logp[0], before)
        graphs.append(captured["unique_graphs"])
        branch.thaw()
    assert graphs[0] == graphs[1]


def test_what_cannot_be_compiled_is_refused_by_name(tmp_path, monkeypatch):
    cfg = make_config(tmp_path, "model.compile=fast")
    with pytest.raises(ValueError, match=r"model: compile must be a backend .* as .*inductor.*; got 'fast'"):
        make_branch(cfg)
    cfg = make_config(tmp_path, "model.compile=eager")
    model = build_tiny(cfg.model, 0)
    monkeypatch.setattr(model, "_no_split_modules", None)
    with pytest.raises(ValueError, match="compile must find blocks in the decoder; got none in Qwen3VL"):
        Branch("text", make_branch(cfg).tasks, model, vocabulary.tokenizer(), cfg, model.device)


def test_a_run_may_go_on_compiled(tmp_path):
    plain, compiled = (checkpoint.identity(make_config(tmp_path, *more)) for more in ((), ("model.compile=eager",)))
    assert plain == compiled
