"""Teachers that tell their likeliest words in place of hidden states and `lm_head`."""

import pytest
import torch
from copd_cases import cross_batch, make_branch, make_config, routed_batch, run

from copd_kernels import TopK

DOMAINS = ("text", "image", "video")


def setting(tmp_path, signal, *settings, seeds=(1, 2, 3)):
    cfg = make_config(tmp_path, f"opd.signal={signal}", f"consolidate.signal={signal}", *settings, domains=DOMAINS)
    owners = [make_branch(cfg, name, seed) for name, seed in zip(DOMAINS, seeds, strict=True)]
    student = make_branch(cfg)
    return student, owners


def learnt(branch, batch):
    """Loss of what the teachers ask, and the gradient."""
    loss = branch._backward(batch)["loss/opd"]
    found = torch.cat([p.grad.flatten() for p in branch.parameters if p.grad is not None])
    branch.optimizer.zero_grad()
    return loss, found


def batches(student, owners):
    """A cross rollout that two teachers judge, and one dealt out among three."""
    return [cross_batch(student, owners[1], others=(owners[2],)), routed_batch(student, owners)]


@pytest.mark.parametrize("signal", ["forward", "reverse", "jsd"])
def test_a_teacher_that_lists_its_whole_vocabulary_says_as_much_as_its_head(tmp_path, signal):
    whole = [learnt(student, b) for student, owners in [setting(tmp_path, signal)] for b in batches(student, owners)]
    student, owners = setting(tmp_path, signal, "opd.teacher_top_k=100000")
    for batch, (loss, gradient) in zip(batches(student, owners), whole, strict=True):
        found, listed = learnt(student, batch)
        assert found == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(listed, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("signal", ["forward", "reverse", "jsd"])
def test_a_list_is_all_that_is_told_and_says_less(tmp_path, signal):
    whole = [learnt(student, b) for student, owners in [setting(tmp_path, signal)] for b in batches(student, owners)]
    student, owners = setting(tmp_path, signal, "opd.teacher_top_k=4")
    for batch, (loss, _) in zip(batches(student, owners), whole, strict=True):
        told = [view for teacher in batch.lesson.teachers for view in teacher.states]
        assert all(isinstance(view, TopK) and view.ids.shape[1] == 4 for view in told)
        assert 0 < learnt(student, batch)[0] < loss


def test_a_list_of_the_student_itself_asks_nothing(tmp_path):
    student, owners = setting(tmp_path, "forward", "opd.teacher_top_k=4", seeds=(0, 0, 0))
    other, strangers = setting(tmp_path, "forward", "opd.teacher_top_k=4")
    for same, strange in zip(batches(student, owners), batches(other, strangers), strict=True):
        loss, gradient = learnt(student, same)
        assert abs(loss) < 1e-5
        assert gradient.abs().max() <= 1e-4 * learnt(other, strange)[1].abs().max()


def test_a_whole_run_with_lists_logs_what_one_with_heads_logs(tmp_path):
    settings = ("topology=all", "consolidate.steps=1", "opd.signal=forward", "eval.every=1", "rollout.temperature=0.7")
    found = run(make_config(tmp_path, *settings, "opd.teacher_top_k=3"))
    assert found["divergence"]  # measured with whole heads all the same
    assert {"merged", "consolidated"} <= found["final"].keys()


def test_a_list_of_no_words_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"opd.teacher_top_k must be at least 1; got 0"):
        make_config(tmp_path, "opd.teacher_top_k=0")
