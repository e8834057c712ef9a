"""Branches as adapters: one base, bit for bit what K models would be."""

import gc
import re
from functools import partial

import pytest
import torch
from copd_cases import CPU, TASKS, cross_batch, make_config, make_run, reward_longer, run, same, save
from peft.tuners.lora import LoraLayer
from torch.profiler import ProfilerActivity, profile

from copd import batch, checkpoint, state
from copd.adapter import Adapter, bare, lora_config
from copd.branch import Branch
from copd.coevolve import Plan, coevolve
from copd.lab.tasks import vocabulary
from copd.lab.tiny import build_tiny

LORA = ("model.adapter.rank=4", "model.adapter.alpha=8")


def make_base(cfg, seed=0):
    return build_tiny(cfg.model, seed).to(getattr(torch, cfg.model.dtype))


def make_branch(cfg, base, lora, name="text", domain=None, seed=0):
    domain = domain or name
    adapter = Adapter(base, name, lora, seed)
    branch = Branch(name, [TASKS[domain](domain)], adapter, vocabulary.tokenizer(), cfg, CPU)
    branch.tasks[0].reward = reward_longer
    return branch


def make_plan(cfg, names=("text", "image"), phases=("rl", "opd"), domain=None):
    base = make_base(cfg)
    lora = lora_config(base, cfg.model)
    branches = {name: make_branch(cfg, base, lora, name, domain) for name in names}
    teachers = {name: [other for other in names if other != name] for name in names}
    return Plan(list(branches.values()), list(phases), teachers)


def moved(adapter, seed=1, scale=0.3):
    """Any values, as training might leave them."""
    g = torch.Generator().manual_seed(seed)
    for parameter in adapter.state().values():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=g))
    return adapter


def weights(branch):
    return {name: value.clone() for name, value in branch.weights.state().items()}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 20)[None]).logits


def finish(plan, start=0):
    return list(coevolve(plan, start))


def test_an_untrained_adapter_is_the_base_bit_for_bit(tmp_path):
    cfg = make_config(tmp_path, *LORA)
    base = make_base(cfg)
    expected = logits(base)
    adapter = Adapter(base, "text", lora_config(base, cfg.model))
    with adapter.active():
        assert torch.equal(logits(base), expected)
    assert torch.equal(logits(base), expected)


def test_training_moves_adapters_and_nothing_else(tmp_path):
    plan = make_plan(make_config(tmp_path, *LORA), phases=("rl", "opd", "rl"))
    base = plan.branches[0].model
    before = bare(base).state_dict()
    starts = [weights(branch) for branch in plan.branches]
    finish(plan)
    assert same(bare(base).state_dict(), before)
    assert all(not same(weights(branch), start) for branch, start in zip(plan.branches, starts, strict=True))


def test_with_beta_zero_adapters_equal_independent_runs_bit_for_bit(tmp_path):
    settings = (*LORA, "model.adapter.dropout=0.1")
    copd = make_plan(make_config(tmp_path, *settings, "opd.beta=0"), phases=["rl", "opd", "rl"])
    finish(copd)
    for branch in copd.branches:
        alone = make_plan(make_config(tmp_path, *settings), (branch.name,), ["rl"] * 3)
        finish(alone)
        assert same(weights(branch), weights(alone.branches[0]))


def test_two_equal_adapters_stay_equal(tmp_path):
    cfg = make_config(tmp_path, *LORA, "model.dtype=bfloat16")
    base = make_base(cfg)
    lora = lora_config(base, cfg.model)
    first, second = (make_branch(cfg, base, lora, name, "text") for name in ("text", "image"))
    second.tasks = first.tasks
    start = weights(first)
    finish(Plan([first, second], ["rl", "opd", "opd"], {"text": ["image"], "image": ["text"]}))
    assert same(weights(first), weights(second))
    assert not same(weights(first), start)


def test_adapters_never_leak_even_from_an_exception_in_the_middle_of_a_switch(tmp_path, monkeypatch):
    cfg = make_config(tmp_path, *LORA)
    base = make_base(cfg)
    lora, plain = lora_config(base, cfg.model), logits(base)
    adapters = [moved(Adapter(base, name, lora), seed) for seed, name in enumerate(("text", "image", "video"))]
    expected = []
    for adapter in adapters:
        with adapter.active():
            expected.append(logits(base))
    assert not any(torch.equal(one, other) for one, other in [expected[:2], expected[1:], (plain, expected[0])])

    switch, seen = LoraLayer.set_adapter, []

    def fails_at_the_fifth_layer(layer, *args, **kwargs):
        seen.append(layer)
        if len(seen) == 5:
            raise ZeroDivisionError
        switch(layer, *args, **kwargs)

    with adapters[0].active():
        monkeypatch.setattr(LoraLayer, "set_adapter", fails_at_the_fifth_layer)
        with pytest.raises(ZeroDivisionError), adapters[1].active():
            raise AssertionError("the block of a failed switch must not run")
        monkeypatch.undo()
        assert torch.equal(logits(base), expected[0]), "inside, the first is still on"
    assert torch.equal(logits(base), plain), "outside, none is"
    with pytest.raises(KeyError), adapters[2].active():
        raise KeyError
    assert torch.equal(logits(base), plain)
    for adapter, value in zip(adapters, expected, strict=True):
        with adapter.active():
            assert torch.equal(logits(base), value)


def test_gradients_are_on_for_the_active_adapter_alone_and_come_back_with_it(tmp_path):
    cfg = make_config(tmp_path, *LORA)
    base = make_base(cfg)
    lora = lora_config(base, cfg.model)
    first, second = Adapter(base, "text", lora), Adapter(base, "image", lora)
    with first.active():
        with second.active():
            assert {id(p) for p in base.parameters() if p.requires_grad} == {id(p) for p in second.parameters()}
        assert {id(p) for p in base.parameters() if p.requires_grad} == {id(p) for p in first.parameters()}
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("teacher", ["live", "phase_start"])
def test_half_the_steps_then_a_resume_equal_all_steps_bit_for_bit(tmp_path, teacher):
    cfg = make_config(tmp_path, *LORA, "model.adapter.dropout=0.1", f"opd.teacher={teacher}")
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


def test_a_checkpoint_holds_adapters_and_their_optimisers_only(tmp_path):
    plan = make_plan(make_config(tmp_path, *LORA), phases=["rl"])
    finish(plan)
    branch = plan.branches[1]  # of images: every layer has had a gradient
    adapter = sum(p.numel() for p in branch.parameters)
    held = [value for values in state.parts(branch).values() for value in values.values()]
    assert sum(t.numel() for t in held if t.dim()) == 3 * adapter
    path = save(tmp_path, 1, plan, branch.cfg) / "branch-image"
    assert sum(file.stat().st_size for file in path.iterdir()) < 3 * 4 * adapter + 2**16


def test_phase_start_teachers_stay_and_cost_an_adapter(tmp_path):
    cfg = make_config(tmp_path, *LORA, "opd.teacher=phase_start")
    plan = make_plan(cfg, phases=["opd", "opd"])
    student, teacher = plan.branches
    rollout = cross_batch(student, teacher, 0).rollout
    before = teacher.score(rollout).logp[0]
    next(coevolve(plan))
    assert torch.equal(teacher.score(rollout).logp[0], before)
    teacher.thaw()
    assert not torch.equal(teacher.score(rollout).logp[0], before)
    assert not any("copy-image" in name for name, _ in teacher.model.named_parameters())


def live_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


SIZES = {
    "tiny": ["model.hidden_size=128", "model.vision_hidden_size=32", "model.adapter.rank=1"],
    "30M": ["model.hidden_size=512", "model.layers=12", "model.vision_hidden_size=64", "model.adapter.rank=4"],
}


@pytest.mark.parametrize(("size", "dtype"), [("tiny", "float32"), ("30M", "float32"), ("30M", "bfloat16")])
def test_k_branches_cost_the_base_and_sixteen_bytes_an_adapter_weight(tmp_path, size, dtype, monkeypatch):
    """Counted while the last of three learns: weights, gradients, AdamW's moments and, for bf16, fp32 masters."""
    small = ("rollout.prompts=1", "rollout.samples=2", "rollout.max_new_tokens=2", "model.freeze_vision=true")
    cfg = make_config(tmp_path, *SIZES[size], *small, f"model.dtype={dtype}")
    # the order of the prompts, kept from one step to the next, is no branch's
    monkeypatch.setattr(batch, "_order", batch._order.__wrapped__)
    nothing = live_bytes()
    plan = make_plan(cfg, ("first", "second", "third"), ["rl", "rl"], "text")
    steps = coevolve(plan)
    next(steps)
    base, last = plan.branches[0].model, plan.branches[-1]
    adapter = sum(p.numel() for p in last.parameters)
    parameters = sum(p.numel() for p in base.parameters()) - 3 * adapter
    seen, step = [], last.optimizer.step
    monkeypatch.setattr(last.optimizer, "step", lambda: (seen.append(live_bytes() - nothing), step()))
    next(steps)
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert parameters > {"tiny": 4e5, "30M": 2.5e7}[size]
    assert seen[0] == pytest.approx(width * parameters + 3 * 16 * adapter, rel=0.05)


def test_the_log_states_the_memory_of_base_and_adapters(tmp_path, caplog):
    with caplog.at_level("INFO", logger="copd"):
        trainer = make_run(make_config(tmp_path, *LORA))
    adapter = sum(p.numel() for p in trainer.plan.branches[0].parameters)
    each = f"{16 * adapter / 2**20:.1f} MiB each"
    assert any("a base of" in message and "2 adapter(s)" in message and each in message for message in caplog.messages)


@pytest.mark.parametrize("signal_name", ["sampled", "reverse"])
def test_teachers_are_scored_without_a_copy_of_the_shared_lm_head(tmp_path, signal_name):
    plan = make_plan(make_config(tmp_path, *LORA, f"opd.signal={signal_name}"))
    student, teacher = plan.branches
    moved(teacher.weights)
    batch = cross_batch(student, teacher, 0)
    shared = student.model.lm_head.weight
    head = batch.lesson.teachers[0].head_then
    assert head is None if signal_name == "sampled" else head.lm_head.data_ptr() == shared.data_ptr()


def vocabulary_gemms(work, V):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        work()
    shapes = [e.input_shapes for e in seen.events() if e.name in ("aten::mm", "aten::addmm", "aten::mm.out")]
    return sum(any(V in shape for shape in shaped) for shaped in shapes)


def test_a_frozen_shared_head_saves_the_gemm_pass_of_its_gradient(tmp_path, monkeypatch):
    """KL with one teacher: T + 3 passes over the vocabulary for a trained head, T + 2 for a frozen one."""
    monkeypatch.setenv("COPD_BACKEND", "torch")
    passes = {}
    for kind, settings in {"adapters": LORA, "whole": ()}.items():
        cfg = make_config(tmp_path, *settings, "opd.overlap_tokens=0", domains=("text",))
        base = make_base(cfg)
        if settings:
            student = make_branch(cfg, base, lora_config(base, cfg.model))
        else:
            student = Branch("text", [TASKS["text"]("text")], base, vocabulary.tokenizer(), cfg, CPU)
        batch = cross_batch(student, student, 0)
        passes[kind] = vocabulary_gemms(partial(student.learn, [batch]), 256)
    assert passes == {"adapters": 3, "whole": 4}


@pytest.mark.parametrize(
    ("settings", "models"),
    [
        (["method=independent"], ["base", "text", "image", "merged"]),
        (["method=mixed"], ["base", "mixed"]),
        (["method=mopd"], ["base", "student"]),
        (["consolidate.steps=1"], ["base", "text", "image", "merged", "consolidated"]),
        (["opd.teachers=all", "topology=all"], ["base", "text", "image", "merged"]),
    ],
)
def test_every_method_runs_with_adapters(tmp_path, settings, models):
    assert list(run(make_config(tmp_path, *LORA, *settings))["final"]) == models


def test_mopd_puts_the_experts_of_a_finished_run_on_its_own_base(tmp_path):
    run(make_config(tmp_path, *LORA, "method=independent", "name=first"))
    trainer = make_run(make_config(tmp_path, *LORA, "method=mopd", f"experts={tmp_path / 'first'}", "name=second"))
    experts = trainer.plan.experts
    assert [expert.name for expert in experts] == trainer.plan.teachers["student"]
    assert all(expert.model is trainer.base for expert in experts)
    assert all(not expert.parameters for expert in experts)


def test_a_run_of_adapters_resumes_bit_for_bit(tmp_path, monkeypatch):
    settings = (*LORA, "cycles=2", "checkpoint_every=2", "eval.every=2")
    whole = run(make_config(tmp_path, *settings, "name=whole"))
    cfg = make_config(tmp_path, *settings, "name=broken")

    def interrupted_after_three_steps(plan, start):
        for step, *rest in coevolve(plan, start):
            yield step, *rest
            if step == 3:
                raise ZeroDivisionError

    monkeypatch.setattr("copd.train.coevolve", interrupted_after_three_steps)
    with pytest.raises(ZeroDivisionError):
        make_run(cfg).train()
    monkeypatch.undo()
    resumed = run(cfg)
    assert resumed["final"] == whole["final"]
    assert resumed["samples"] == whole["samples"]


def test_activation_checkpointing_gives_the_same_gradient(tmp_path):
    updated = []
    for flag in ("false", "true"):
        cfg = make_config(tmp_path, *LORA, "model.adapter.dropout=0.2", f"model.activation_checkpointing={flag}")
        base = make_base(cfg)
        branch = make_branch(cfg, base, lora_config(base, cfg.model), "image")
        for step in range(2):
            branch.learn([branch.native_batch(step)])
        updated.append(weights(branch))
    for name, value in updated[0].items():
        torch.testing.assert_close(updated[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dropout", "differs"), [(0.5, True), (0.0, False)])
def test_dropout_is_on_while_learning_and_off_for_teaching(tmp_path, dropout, differs):
    cfg = make_config(tmp_path, *LORA, f"model.adapter.dropout={dropout}")
    base = make_base(cfg)
    student = make_branch(cfg, base, lora_config(base, cfg.model))
    moved(student.weights)
    batch = student.native_batch(0)
    before, again = (student.score(batch.rollout).logp[0] for _ in range(2))
    assert torch.equal(before, again)
    student.learn([batch])
    assert (not torch.allclose(batch.logp_old[0], before, atol=1e-4)) == differs


def test_adapters_and_whole_models_share_one_warm_start(tmp_path):
    small = ("warmstart.clean_steps=1", "warmstart.slip_steps=1", "warmstart.batch=2")
    make_run(make_config(tmp_path, *small))
    make_run(make_config(tmp_path, *small, *LORA))
    assert len([path for path in (tmp_path / "warmstart").iterdir() if path.is_dir()]) == 1


def test_the_log_states_the_peak_at_the_end(tmp_path, caplog):
    with caplog.at_level("INFO", logger="copd"):
        run(make_config(tmp_path, *LORA))
    assert any(re.match(r"peak memory: [\d.]+ MiB on cpu", message) for message in caplog.messages)


def test_adapters_are_not_offloaded(tmp_path):
    with pytest.raises(ValueError, match=r"offload must be false with model.adapter"):
        make_config(tmp_path, *LORA, "offload=true")
