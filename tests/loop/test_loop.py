"""Algorithm 1: what must hold exactly."""

import json
import math
import signal

import pytest
import torch
from copd_cases import cross_batch, make_branch, make_config, make_run, reward_longer, run, same, save, weights
from torch.profiler import ProfilerActivity, profile

from copd import checkpoint, state
from copd.coevolve import Plan, coevolve, gather
from copd_kernels import schedule


def rewarded(branch):
    branch.tasks[0].reward = reward_longer
    return branch


def make_plan(cfg, names=("text", "image"), phases=("rl", "opd"), teachers=None):
    branches = {name: rewarded(make_branch(cfg, name)) for name in names}
    teachers = teachers or {name: [other for other in names if other != name] for name in names}
    return Plan(list(branches.values()), list(phases), teachers)


def finish(plan, start=0):
    return list(coevolve(plan, start))


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    cfg = make_config(tmp_path)
    first, second = make_plan(cfg), make_plan(cfg)
    logged = [[{k: v for k, v in m.items() if k != "update_time"} for m in s[2].values()] for s in finish(first)]
    again = [[{k: v for k, v in m.items() if k != "update_time"} for m in s[2].values()] for s in finish(second)]
    assert logged == again
    for a, b in zip(first.branches, second.branches, strict=True):
        assert same(weights(a), weights(b))


def test_another_seed_gives_other_numbers(tmp_path):
    first, second = make_plan(make_config(tmp_path)), make_plan(make_config(tmp_path, "seed=1"))
    finish(first), finish(second)
    assert not same(weights(first.branches[0]), weights(second.branches[0]))


@pytest.mark.parametrize("teacher", ["live", "phase_start"])
def test_half_the_steps_then_a_resume_equal_all_steps_bit_for_bit(tmp_path, teacher):
    cfg = make_config(tmp_path, f"opd.teacher={teacher}")
    phases = ["rl", "opd", "opd", "rl"]
    whole, half, rest = (make_plan(cfg, phases=phases) for _ in range(3))
    finish(whole)
    steps = coevolve(half)
    next(steps), next(steps)
    path = save(tmp_path, 2, half, cfg)
    assert checkpoint.load(path, rest, cfg) == 2
    finish(rest, 2)
    for a, b in zip(whole.branches, rest.branches, strict=True):
        kept, again = state.parts(a), state.parts(b)
        assert {"step", "exp_avg"} < kept.keys() == again.keys()
        assert all(same(kept[part], again[part]) for part in kept)


def test_a_resumed_run_writes_the_results_of_an_uninterrupted_one(tmp_path, monkeypatch):
    settings = ("cycles=2", "checkpoint_every=2", "eval.every=2")
    whole = run(make_config(tmp_path, *settings, "name=whole"))
    cfg = make_config(tmp_path, *settings, "name=broken")
    trainer = make_run(cfg)

    def interrupted_after_three_steps(plan, start):
        for step, *rest in coevolve(plan, start):
            yield step, *rest
            if step == 3:
                raise ZeroDivisionError

    monkeypatch.setattr("copd.train.coevolve", interrupted_after_three_steps)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    monkeypatch.undo()
    resumed = run(cfg)
    for part in ("final", "samples"):
        assert resumed[part] == whole[part]
    for part in ("eval", "divergence"):
        assert [r | {"time": 0} for r in resumed[part]] == [r | {"time": 0} for r in whole[part]]


def test_ctrl_c_saves_a_checkpoint_that_resumes(tmp_path, monkeypatch):
    cfg = make_config(tmp_path, "cycles=2", "name=stopped")

    def ctrl_c_in_the_first_step(plan, start):
        for item in coevolve(plan, start):
            signal.raise_signal(signal.SIGINT)
            yield item

    monkeypatch.setattr("copd.train.coevolve", ctrl_c_in_the_first_step)
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    assert [path.name for path in checkpoint.found(cfg.run_dir)] == ["checkpoint-1"]
    monkeypatch.undo()
    resumed, whole = run(cfg), run(make_config(tmp_path, "cycles=2", "name=whole"))
    assert resumed["final"] == whole["final"]


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    cfg = make_config(tmp_path)
    plan = make_plan(cfg)
    path = save(tmp_path, 1, plan, cfg)
    with pytest.raises(ValueError, match="resume: config must be the one"):
        checkpoint.load(path, plan, make_config(tmp_path, "optim.lr=2e-3"))


@pytest.mark.parametrize("signal_name", ["sampled", "reverse", "forward", "jsd"])
def test_a_teacher_equal_to_the_student_gives_no_distillation_gradient(tmp_path, signal_name):
    cfg = make_config(tmp_path, f"opd.signal={signal_name}")
    student, teacher = make_branch(cfg), make_branch(cfg, "image")
    batch = cross_batch(student, teacher, 0)
    student._backward(batch)
    largest = max(p.grad.abs().max() for p in student.parameters if p.grad is not None)
    student.optimizer.zero_grad()
    moved = make_branch(cfg, "image", seed=1)
    student._backward(cross_batch(student, moved, 0))
    largest_of_another = max(p.grad.abs().max() for p in student.parameters if p.grad is not None)
    # scored and trained in GEMMs of other shapes, so rounding stays
    assert largest <= 1e-5 * largest_of_another


@pytest.mark.parametrize("signal_name", ["sampled", "reverse"])
def test_with_beta_zero_copd_equals_independent_bit_for_bit(tmp_path, signal_name):
    # a norm to clip to would be summed over other tensors: the tower has gradients here and none there, if all zero
    off = "optim.max_grad_norm=1e9"
    copd = make_plan(make_config(tmp_path, "opd.beta=0", f"opd.signal={signal_name}", off), phases=["rl", "opd", "rl"])
    independent = make_plan(make_config(tmp_path, "method=independent", off), phases=["rl"] * 3)
    finish(copd), finish(independent)
    for a, b in zip(copd.branches, independent.branches, strict=True):
        assert same(weights(a), weights(b))


def test_two_equal_branches_stay_equal(tmp_path):
    cfg = make_config(tmp_path)
    first, second = (rewarded(make_branch(cfg, name, domain="text")) for name in ("text", "image"))
    second.tasks = first.tasks
    finish(Plan([first, second], ["rl", "opd", "opd"], {"text": ["image"], "image": ["text"]}))
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(make_branch(cfg)))


def test_all_scoring_precedes_any_update(tmp_path):
    """Gathering by hand, then updating in reverse order, gives what the loop gives."""
    cfg = make_config(tmp_path)
    looped, by_hand = make_plan(cfg, phases=["opd"]), make_plan(cfg, phases=["opd"])
    finish(looped)
    batches = gather(by_hand, "opd", 0)
    for branch in reversed(by_hand.branches):
        branch.learn(batches[branch.name])
    for a, b in zip(looped.branches, by_hand.branches, strict=True):
        assert same(weights(a), weights(b))


def test_scoring_leaves_the_teacher_unchanged(tmp_path):
    cfg = make_config(tmp_path)
    student, teacher = make_branch(cfg), make_branch(cfg, "image")
    before = weights(teacher)
    student.learn([cross_batch(student, teacher, 0)])
    assert same(weights(teacher), before)
    assert all(p.grad is None for p in teacher.parameters)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_one_to_five_branches_train_and_merge(tmp_path, count):
    domains = ("text", "image", "video", "text2", "image2")[:count]
    results = run(make_config(tmp_path, domains=domains))
    assert list(results["final"]) == ["base", *domains, "merged"]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    taught = {
        r["branch"]: sum(k.startswith("kl/") for k in r) for r in records if r["kind"] == "train" and r["step"] == 2
    }
    # the first is the hub
    assert taught == {name: count - 1 if name == "text" else 1 for name in domains}


@pytest.mark.parametrize(
    ("method", "models", "steps"),
    [
        ("copd", ["base", "text", "image", "merged"], 2),
        ("independent", ["base", "text", "image", "merged"], 2),
        ("expert", ["base", "text", "image"], 2),
        ("mixed", ["base", "mixed"], 4),
        ("mopd", ["base", "student"], 2),
    ],
)
def test_every_method_runs_its_number_of_steps(tmp_path, method, models, steps):
    results = run(make_config(tmp_path, f"method={method}"))
    assert list(results["final"]) == models
    assert results["phases"][-1][-1] == steps
    assert all((tmp_path / "run" / f"branch-{name}").exists() for name in models if name not in ("base", "merged"))


def test_mopd_learns_from_the_experts_of_a_finished_run(tmp_path):
    run(make_config(tmp_path, "method=independent", "name=first"))
    results = run(make_config(tmp_path, "method=mopd", f"experts={tmp_path / 'first'}", "name=second"))
    assert not (tmp_path / "second" / "experts").exists()
    assert "student" in results["final"]


@pytest.mark.parametrize(("sharing", "prompts"), [("per_edge", 2), ("split", 1)])
def test_the_cross_batch_is_whole_for_each_teacher_or_shared_out(tmp_path, sharing, prompts):
    cfg = make_config(tmp_path, f"opd.batch={sharing}", domains=("text", "image", "video"))
    plan = make_plan(cfg, ("text", "image", "video"))
    native, *cross = gather(plan, "opd", 0)[plan.branches[0].name]
    assert len(native.rollout.prompts) == 2
    assert [len(batch.rollout.prompts) for batch in cross] == [prompts, prompts]


def test_without_native_batches_phase_two_distils_alone(tmp_path):
    plan = make_plan(make_config(tmp_path))
    plan.native = False
    assert [str(batch.lesson) for batch in gather(plan, "opd", 0)[plan.branches[0].name]] == ["'image'"]


def test_live_teachers_move_and_phase_start_teachers_do_not(tmp_path):
    scores = {}
    for kind in ("live", "phase_start"):
        plan = make_plan(make_config(tmp_path, f"opd.teacher={kind}"), phases=["opd", "opd"])
        rollout = cross_batch(plan.branches[0], plan.branches[1], 0).rollout
        before = plan.branches[1].score(rollout).logp[0]
        next(coevolve(plan))
        scores[kind] = torch.equal(plan.branches[1].score(rollout).logp[0], before)
    assert scores == {"live": False, "phase_start": True}


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    gradients = {}
    for tokens in (10**6, 1):
        cfg = make_config(tmp_path, f"micro_batch_tokens={tokens}", "opd.signal=reverse")
        student, teacher = rewarded(make_branch(cfg)), make_branch(cfg, "image", seed=1)
        for batch in (student.native_batch(0), cross_batch(student, teacher, 0)):
            student._backward(batch)
        gradients[tokens] = torch.cat([p.grad.flatten() for p in student.parameters if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[10**6], rtol=1e-4, atol=1e-6)


def test_from_the_second_update_on_a_batch_the_ratio_leaves_one(tmp_path):
    student = rewarded(make_branch(make_config(tmp_path, "rlvr.updates_per_batch=3", "optim.lr=0.05")))
    metrics = student.learn([student.native_batch(0)])
    assert metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] > 0


def test_offload_changes_nothing_but_the_place(tmp_path):
    stays, leaves = make_plan(make_config(tmp_path)), make_plan(make_config(tmp_path, "offload=true"))
    finish(stays), finish(leaves)
    for a, b in zip(stays.branches, leaves.branches, strict=True):
        assert same(weights(a), weights(b))


def test_offloaded_branches_visit_their_device_and_leave(tmp_path, monkeypatch):
    branch = make_branch(make_config(tmp_path, "offload=true"))
    branch.device, visited = torch.device("cuda"), []
    monkeypatch.setattr(branch, "_move", visited.append)
    with branch.on_device():
        assert visited == [torch.device("cuda")]
    assert visited == [torch.device("cuda"), "cpu"]


def test_bf16_models_learn_through_fp32_master_weights(tmp_path):
    """Steps of 1e-5 are lost in bf16 weights near 0.05, and kept in the master weights."""
    branch = rewarded(make_branch(make_config(tmp_path, "model.dtype=bfloat16", "optim.lr=1e-5")))
    start = [master.clone() for master in branch.master]
    for step in range(3):
        branch.learn([branch.native_batch(step)])
    assert all(p.dtype == torch.bfloat16 for p in branch.model.parameters())
    assert all(m.dtype == torch.float32 for m in branch.master)
    assert sum((m != s).any() for m, s in zip(branch.master, start, strict=True)) > 0
    for parameter, master in zip(branch.parameters, branch.master, strict=True):
        assert torch.equal(parameter, master.bfloat16())


def test_activation_checkpointing_gives_the_same_gradient(tmp_path):
    updated = []
    for flag in ("false", "true"):
        branch = rewarded(make_branch(make_config(tmp_path, f"model.activation_checkpointing={flag}"), "image"))
        branch.learn([branch.native_batch(0)])
        updated.append(weights(branch))
    for name, value in updated[0].items():
        torch.testing.assert_close(updated[1][name], value, rtol=1e-4, atol=1e-5)


def rows_of_vocabulary(work, vocabulary):
    """Most rows of any (rows, vocabulary) operand of any op that `work` runs, custom ops and backward included."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        work()
    shapes = [shape for event in seen.events() for shape in event.input_shapes if vocabulary in shape]
    return max(math.prod(shape) // vocabulary for shape in shapes)


@pytest.mark.parametrize("signal_name", ["sampled", "reverse", "jsd"])
def test_no_tensor_of_tokens_by_vocabulary_exists_in_the_training_path(tmp_path, signal_name, monkeypatch):
    """Room for 8 rows of logits: no op sees more rows of a vocabulary's width than that, or than `lm_head` has."""
    V, D, N = 256, 32, 128
    monkeypatch.setitem(schedule.WORKSPACE_BYTES, "cpu", 8 * V * 4)
    cfg = make_config(tmp_path, f"opd.signal={signal_name}", "rollout.prompts=8", "rollout.samples=4")
    student, teacher = rewarded(make_branch(cfg)), make_branch(cfg, "image", seed=1)

    def step():
        # the sampler reads the last position alone and is no part of training
        rollout = student.native_batch(0).rollout
        assert rollout.mask.sum() > N - 32
        batches.extend([student.native_batch(0), cross_batch(student, teacher, 0)])

    batches = []
    step()
    rows = rows_of_vocabulary(lambda: (teacher.score(batches[1].rollout), student.learn(batches)), V)
    assert rows <= D < N - 32

    def full_logits():
        (student.head(batches[0].rollout, list(range(32)))[0].hidden @ student.model.lm_head.weight.T).log_softmax(-1)

    assert rows_of_vocabulary(full_logits, V) > N - 32, "the probe sees full logits where there are any"


def test_a_nan_loss_stops_the_run_and_names_branch_and_batch(tmp_path):
    cfg = make_config(tmp_path)
    trainer = make_run(cfg)
    trainer.plan.branches[1].model.lm_head.weight.data[5] = torch.nan
    trainer.plan.branches[1].rollout = trainer.plan.branches[0].rollout
    with pytest.raises(RuntimeError, match=r"loss of branch 'image' must be finite.*on 'image', rows \["):
        trainer.train()
    assert (cfg.run_dir / "failed-1" / "state.pt").exists()


def test_an_empty_batch_changes_nothing_and_is_counted(tmp_path):
    """Every completion of one branch is truncated and masked: no token is left to learn from."""
    cfg = make_config(tmp_path, "rollout.mask_truncated=true", "rollout.max_new_tokens=1")
    branch = rewarded(make_branch(cfg))
    batch = branch.native_batch(0)
    batch.rollout.truncated[:] = True
    batch.weight = branch._weights(batch.rollout)
    before = weights(branch)
    metrics = branch.learn([batch])
    assert same(weights(branch), before)
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["grad_norm"] == 0


def test_truncated_completions_are_masked_and_counted(tmp_path):
    branch = rewarded(make_branch(make_config(tmp_path, "rollout.mask_truncated=true")))
    batch = branch.native_batch(0)
    batch.rollout.truncated[:] = False
    batch.rollout.truncated[0] = True
    weight = branch._weights(batch.rollout)
    assert weight[0].sum() == 0
    torch.testing.assert_close(weight[1:].sum(1), torch.full((5,), 1 / 6))


def test_a_reward_of_the_wrong_count_is_an_error(tmp_path):
    branch = make_branch(make_config(tmp_path))
    branch.tasks[0].reward = lambda prompts, completions: [1.0]
    with pytest.raises(ValueError, match=r"reward: 'text' must return one value a completion \(6\); got 1"):
        branch.native_batch(0)


def test_a_prompt_no_branch_owns_is_an_error(tmp_path):
    branch = make_branch(make_config(tmp_path))
    stranger = make_branch(make_config(tmp_path), "image").tasks[0].prompt(0)
    branch.tasks[0].prompt = lambda index: stranger
    with pytest.raises(ValueError, match="prompt: row 0 of 'image' must belong to a task of its branch"):
        branch.native_batch(0)


def test_a_branch_of_another_vocabulary_is_refused(tmp_path):
    run(make_config(tmp_path, "method=expert", "name=experts"))
    folder = tmp_path / "experts" / "branch-text"
    words = json.loads((folder / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["plus"] = vocab.pop("+")
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=r"branch: tokenizer of .* must be the base's"):
        run(make_config(tmp_path, "method=mopd", f"experts={tmp_path / 'experts'}", "name=student"))


def test_checkpoints_load_with_from_pretrained(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    cfg = make_config(tmp_path)
    trainer = make_run(cfg)
    trainer.finish(trainer.train())
    for folder, expected in (("merged", trainer.merged().model), ("branch-image", trainer.plan.branches[1].model)):
        loaded = AutoModelForImageTextToText.from_pretrained(cfg.run_dir / folder)
        assert same(loaded.state_dict(), expected.state_dict())
        assert len(AutoTokenizer.from_pretrained(cfg.run_dir / folder)) == 256


def test_the_memory_of_all_branches_is_stated_at_the_start(tmp_path, caplog):
    with caplog.at_level("INFO", logger="copd"):
        make_run(make_config(tmp_path))
    assert any("2 branch(es) of" in message and "MiB in all" in message for message in caplog.messages)


def test_old_checkpoints_are_removed(tmp_path):
    cfg = make_config(tmp_path, "keep_checkpoints=2")
    branch = make_branch(cfg)
    for step in (5, 10, 100):
        save(tmp_path, step, Plan([branch], ["rl"] * 100), cfg)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_a_finished_run_is_read_and_not_repeated(tmp_path, monkeypatch):
    cfg = make_config(tmp_path)
    first = run(cfg)
    monkeypatch.setattr("copd.train.Run", None)
    assert run(cfg) == json.loads(json.dumps(first))
    with pytest.raises(ValueError, match="resume: config must be the one of the finished run"):
        run(make_config(tmp_path, "optim.lr=1"))


def test_a_setting_of_later_on_leaves_a_finished_run_finished(tmp_path, monkeypatch):
    cfg = make_config(tmp_path)
    first = run(cfg)
    path = cfg.run_dir / "results.json"
    older = json.loads(path.read_text())
    del older["config"]["mixed_rollouts"], older["config"]["eval"]["top_k"], older["identity"]["opd.owner_weight"]
    path.write_text(json.dumps(older))
    monkeypatch.setattr("copd.train.Run", None)
    assert run(cfg)["final"] == first["final"]
