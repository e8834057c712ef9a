"""What a sampled token weighs: advantages of rewards, what a teacher says of it, and what the sampler did."""

import math

import pytest
import torch
from copd_cases import cross_batch, make_branch, make_config

from copd.distill import delta
from copd.rlvr import advantages, deviation, policy_loss, token_weights
from copd.settings import OPDConfig, RLVRConfig
from copd_kernels import logprob


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
