"""After the merge: the merged model learns from the branches, each judging the prompts it owns."""

import json

import pytest
import torch
from copd_cases import cross_batch, make_branch, make_config, reward_longer, routed_batch, same, save, weights

from copd import checkpoint
from copd.branch import Branch
from copd.coevolve import coevolve, gather, make_plan
from copd.distill import Lesson, TeacherScore
from copd.lab.start import start
from copd.merge import merge
from copd.rlvr import advantages, token_weights
from copd.train import Run, device_of, run


def make_run(cfg):
    trainer = Run(cfg, *start(cfg, device_of(cfg)))
    for task in trainer.tasks.values():
        task.reward = reward_longer
    return trainer


def gradient(branch, batch):
    branch._backward(batch)
    found = torch.cat([p.grad.flatten() for p in branch.parameters if p.grad is not None])
    branch.optimizer.zero_grad()
    return found


def three(cfg, seeds=(1, 2, 3)):
    """A student, and branches of other weights that own text, image and video."""
    owners = [make_branch(cfg, n, seed) for n, seed in zip(("text", "image", "video"), seeds, strict=True)]
    student = make_branch(cfg)
    student.tasks = [owner.tasks[0] for owner in owners]
    return student, owners


@pytest.mark.parametrize("signal_name", ["sampled", "reverse", "forward", "jsd"])
def test_every_row_is_judged_by_the_branch_that_owns_its_prompt(tmp_path, signal_name):
    """The routed sweep over a mixed rollout gives the gradient of one sweep a domain, in any micro-batches."""
    settings = (f"consolidate.signal={signal_name}", f"opd.signal={signal_name}", "rollout.prompts=4")
    found = {}
    for tokens in (10**6, 60):
        cfg = make_config(tmp_path, *settings, f"micro_batch_tokens={tokens}", domains=("text", "image", "video"))
        student, owners = three(cfg)
        batch = routed_batch(student, owners, 0)
        prompts = [prompt.task for prompt in batch.rollout.prompts]
        assert prompts == ["text", "text", "image", "video"]
        found[tokens] = gradient(student, batch)
        # by hand: each owner scores everything, and only its own rows weigh
        by_hand = []
        for owner, own in zip(owners, batch.lesson.teachers, strict=True):
            weight = torch.zeros_like(batch.weight)
            weight[own.rows] = batch.weight[own.rows]
            whole = type(batch.lesson)([owner.score(batch.rollout)], signal_name, [1.0])
            by_hand.append(gradient(student, type(batch)("all", batch.rollout, weight, lesson=whole)))
        torch.testing.assert_close(found[tokens], torch.stack(by_hand).sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[60], found[10**6], rtol=1e-4, atol=1e-6)


def test_branches_equal_to_the_student_give_no_gradient(tmp_path):
    cfg = make_config(tmp_path, domains=("text", "image", "video"))
    student, owners = three(cfg, (0, 0, 0))
    same_weights = gradient(student, routed_batch(student, owners, 0))
    student, owners = three(cfg)
    # teachers score and the student trains in GEMMs of other shapes, so rounding stays
    assert same_weights.abs().max() <= 1e-5 * gradient(student, routed_batch(student, owners, 0)).abs().max()


def test_who_has_a_prompt_more_changes_from_step_to_step(tmp_path):
    cfg = make_config(tmp_path, "rollout.prompts=4", domains=("text", "image", "video"))
    student, owners = three(cfg)
    dealt = [[p.task for p in routed_batch(student, owners, step).rollout.prompts] for step in range(3)]
    assert [tasks.count("text") for tasks in dealt] == [2, 1, 1]
    assert [tasks.count("video") for tasks in dealt] == [1, 1, 2]


def test_native_rewards_join_the_lesson(tmp_path):
    cfg = make_config(tmp_path, "consolidate.native=true", domains=("text", "image", "video"))
    student, owners = three(cfg)
    for task in student.tasks:
        task.reward = reward_longer
    both = routed_batch(student, owners, 0)
    assert both.advantage.shape == both.weight.shape[:1]
    lesson = type(both)("all", both.rollout, both.weight, lesson=both.lesson)
    reward = type(both)("all", both.rollout, both.weight, advantage=both.advantage)
    apart = gradient(student, lesson) + gradient(student, reward)
    torch.testing.assert_close(gradient(student, both), apart, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["copd", "independent"])
def test_a_run_ends_with_the_consolidated_model(tmp_path, method):
    cfg = make_config(tmp_path, "consolidate.steps=2", f"method={method}", "eval.every=1")
    results = run(cfg, start)
    assert list(results["final"]) == ["base", "text", "image", "merged", "consolidated"]
    assert results["phases"][-1] == ["consolidate", 2, 4]
    assert (cfg.run_dir / "consolidated" / "config.json").exists()
    records = [json.loads(line) for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines()]
    learnt = {r["step"]: r["branch"] for r in records if r["kind"] == "train" and r["phase"] == "consolidate"}
    assert learnt == {3: "consolidated", 4: "consolidated"}
    measured = {r["step"] for r in records if r["kind"] == "eval" and r["branch"] == "consolidated"}
    assert measured == {2, 3, 4}


def test_consolidation_begins_at_the_merge_and_leaves_the_branches_alone(tmp_path):
    trainer = make_run(make_config(tmp_path, "consolidate.steps=2"))
    plan = trainer.plan
    steps = coevolve(plan)
    next(steps), next(steps)
    before = [weights(branch) for branch in plan.branches]
    states = {branch.name: branch.model.state_dict() for branch in plan.branches}
    expected = merge(trainer.base.state_dict(), states, trainer.cfg.merge)
    assert same(plan.models(2)[-1].model.state_dict(), expected)
    list(steps)
    assert all(same(weights(branch), state) for branch, state in zip(plan.branches, before, strict=True))
    assert not same(plan.student[0].model.state_dict(), expected)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resume_before_at_and_inside_consolidation_is_exact(tmp_path, done):
    cfg = make_config(tmp_path, "consolidate.steps=2")
    whole, half, rest = (make_run(cfg).plan for _ in range(3))
    list(coevolve(whole))
    steps = coevolve(half)
    for _ in range(done):
        next(steps)
    assert checkpoint.load(save(tmp_path, done, half, cfg), rest, cfg) == done
    list(coevolve(rest, done))
    for a, b in zip(whole.models(4), rest.models(4), strict=True):
        assert same(weights(a), weights(b))


def test_without_steps_nothing_is_made_after_the_merge(tmp_path):
    plan = make_run(make_config(tmp_path)).plan
    list(coevolve(plan))
    assert plan.models(plan.steps) == plan.branches


@pytest.mark.parametrize("signal_name", ["sampled", "forward"])
def test_other_branches_that_agree_with_the_owner_change_nothing(tmp_path, signal_name):
    cfg = make_config(tmp_path, f"opd.signal={signal_name}", domains=("text", "image", "video"))
    student, owner, other = (make_branch(cfg, n, s) for n, s in (("text", 0), ("image", 1), ("video", 1)))
    alone, joined = (gradient(student, cross_batch(student, owner, 0, others=o)) for o in ((), (other,)))
    torch.testing.assert_close(joined, alone, rtol=1e-4, atol=1e-6)


def test_the_owner_weighs_what_the_config_says(tmp_path):
    cfg = make_config(tmp_path, "opd.signal=forward", "opd.owner_weight=0.75", domains=("text", "image", "video"))
    student, owner, other = (make_branch(cfg, n, s) for n, s in (("text", 0), ("image", 1), ("video", 2)))
    batch = cross_batch(student, owner, 0, others=(other,))
    apart = []
    for score in batch.lesson.teachers:
        lesson = type(batch.lesson)([score], "forward", [1.0])
        apart.append(gradient(student, type(batch)(batch.domain, batch.rollout, batch.weight, lesson=lesson)))
    torch.testing.assert_close(gradient(student, batch), 0.75 * apart[0] + 0.25 * apart[1], rtol=1e-4, atol=1e-6)


def opinions(rollout, cfg, *slopes):
    """Teachers whose log-probs are the student's plus so much times the advantage of each row."""
    rows = rollout.micro_batches(cfg.micro_batch_tokens)
    advantage = advantages(torch.arange(len(rollout.mask)).view(2, 3).float(), cfg.rlvr).view(-1, 1)
    said = [[(rollout.logp + slope * advantage)[r][rollout.mask[r]] for r in rows] for slope in slopes]
    return [TeacherScore(f"teacher{i}", logp=logp) for i, logp in enumerate(said)]


@pytest.mark.parametrize(
    ("slopes", "weight"),
    [((1, 2), [1 / 3, 2 / 3]), ((-1, 2, 2), [0, 0.5, 0.5]), ((1, -3), [1, 0]), ((-1, -2), [1, 0]), ((0, 0), [1, 0])],
)
def test_teachers_weigh_by_how_much_their_way_raises_the_reward(tmp_path, slopes, weight):
    domains = ("text", "image", "video")
    cfg = make_config(tmp_path, "opd.teacher_weight=better", "micro_batch_tokens=60", domains=domains)
    rollout = make_branch(cfg).native_batch(0).rollout
    assert len(rollout.micro_batches(60)) > 1
    weight_of = token_weights(rollout.mask, cfg.rlvr)

    def found(reward):
        lesson = Lesson(opinions(rollout, cfg, *slopes), "forward", None, advantages(reward, cfg.rlvr).flatten())
        lesson.weigh(rollout, weight_of, cfg)
        return lesson.weight

    reward = torch.arange(6).view(2, 3).float()
    assert found(reward) == pytest.approx(weight)
    # a constant reward says nothing, and one that failed leaves its row out
    assert found(0 * reward) == [1, *[0] * (len(slopes) - 1)]
    reward[0, 0] = torch.nan
    assert [w > 0 for w in found(reward)] == [w > 0 for w in weight]


def test_weights_by_who_is_better_are_those_of_the_sweep_and_logged(tmp_path):
    settings = ("opd.signal=forward", "opd.teachers=all", "opd.teacher_weight=better", "topology=all")
    cfg = make_config(tmp_path, *settings, domains=("text", "image", "video"))
    student, owner, other = (make_branch(cfg, n, s) for n, s in (("text", 0), ("image", 1), ("video", 2)))
    owner.tasks[0].reward = reward_longer
    batch = cross_batch(student, owner, 0, others=(other,))
    metrics = student.learn([batch])
    weight = batch.lesson.weight
    assert sum(weight) == pytest.approx(1)
    assert weight != [0.5, 0.5]
    assert [metrics[f"teacher_weight/image/{name}"] for name in ("image", "video")] == weight


def test_an_owner_weight_beside_weights_by_who_is_better_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"opd.owner_weight must be null with teacher_weight: better; got 0.5"):
        make_config(tmp_path, "opd.teacher_weight=better", "opd.owner_weight=0.5")


def test_with_all_teachers_everybody_but_the_student_scores(tmp_path):
    cfg = make_config(tmp_path, "opd.teachers=all", "topology=all", domains=("text", "image", "video"))
    plan = make_run(cfg).plan
    lessons = [str(batch.lesson) for batch in gather(plan, "opd", 0)[plan.branches[0].name][1:]]
    assert lessons == ["'image', 'video'", "'video', 'image'"]
    metrics = plan.branches[0].learn(gather(plan, "opd", 0)[plan.branches[0].name])
    assert {"overlap/image", "overlap/video", "kl/image+video", "kl/video+image"} <= metrics.keys()


def test_joint_mixed_batches_hold_every_domain_in_every_step(tmp_path):
    cfg = make_config(tmp_path, "method=mixed", "mixed_batch=joint", domains=("text", "image", "video"))
    plan = make_run(cfg).plan
    assert plan.steps == 2
    batches = gather(plan, "rl", 1)[plan.branches[0].name]
    assert [batch.domain for batch in batches] == ["text", "image", "video"]
    metrics = plan.branches[0].learn(batches)
    rewards = [metrics[f"reward/{name}"] for name in ("text", "image", "video")]
    assert metrics["reward"] == pytest.approx(sum(rewards) / 3)
    # a step of it samples what a native step of each branch does
    assert metrics["rollouts"] == 3 * 2 * 3


def test_a_joint_student_of_experts_learns_from_each_in_every_step(tmp_path):
    settings = ("method=mopd", "mixed_batch=joint", "opd.signal=forward")
    cfg = make_config(tmp_path, *settings, domains=("text", "image", "video"))
    plan = make_run(cfg).plan
    batches = gather(plan, "opd", 1)["student"]
    assert [(batch.domain, str(batch.lesson)) for batch in batches] == [
        (name, repr(name)) for name in ("text", "image", "video")
    ]
    assert plan.branches[0].learn(batches)["rollouts"] == 3 * 2 * 3


def planned(tmp_path, *settings):
    """The phases of a run of three branches, two steps each."""
    cfg = make_config(tmp_path, *settings, domains=("text", "image", "video"))
    model, processor, tasks = start(cfg, device_of(cfg))

    def branch(name, tasks, given=None):
        return Branch(name, tasks, given or model, processor, cfg, torch.device("cpu"))

    return make_plan(cfg, tasks, branch, lambda name: model, lambda *_: None, lambda: 1.0).phases


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ((), 4),
        (("topology=all",), 6),
        (("topology=all", "opd.batch=split"), 3),
        (("topology=all", "consolidate.steps=5"), 11),
        (("topology=all", "consolidate.steps=5", "mixed_batch=joint"), 4),
        (("topology=all", "opd.batch=split", "mixed_batch=joint"), 3),
        (("mopd_steps=3",), 3),
    ],
)
def test_mopd_samples_as_much_as_the_distillation_it_is_compared_with(tmp_path, settings, steps):
    assert planned(tmp_path, "method=mopd", *settings) == ["opd"] * steps


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ((), 6),
        (("mixed_batch=joint",), 2),
        (("mixed_rollouts=all", "topology=all", "consolidate.steps=5"), 17),
        (("mixed_rollouts=all", "topology=all", "consolidate.steps=5", "mixed_batch=joint"), 6),
        (("mixed_rollouts=all", "mixed_steps=3"), 3),
    ],
)
def test_mixed_samples_as_much_as_the_native_batches_or_as_all_of_copd(tmp_path, settings, steps):
    assert planned(tmp_path, "method=mixed", *settings) == ["rl"] * steps


def test_the_merge_is_measured_along_the_way_and_changes_nothing(tmp_path):
    settings = ("topology=all", "cycles=2", "consolidate.steps=2", "eval.every=1")
    found = {}
    for merged in (False, True):
        trainer = make_run(make_config(tmp_path, *settings, f"eval.merged={merged}", f"name={merged}"))
        found[merged] = trainer.finish(trainer.train())
        for record in found[merged]["eval"]:
            del record["time"]
    measured = [record for record in found[True]["eval"] if record["branch"] == "merged"]
    assert {record["step"] for record in measured} == {0, 1, 2, 3}
    assert [record for record in found[True]["eval"] if record not in measured] == found[False]["eval"]
    assert found[True]["final"] == found[False]["final"]
