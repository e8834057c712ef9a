"""Branches as adapters: one base, bit for bit what K models would be."""

import copy
import gc
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from copd_cases import CPU, TASKS, cross_batch, make_config, make_run, reward_longer, run, same, save
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from copd import batch, checkpoint, schema, state
from copd.adapter import Adapter, apply, bare, lora_config
from copd.branch import Branch
from copd.coevolve import Plan, coevolve
from copd.config import Config
from copd.lab.tasks import vocabulary
from copd.lab.tiny import build_tiny
from copd.model import load_saved
from copd.settings import AdapterConfig, ModelConfig
from copd_kernels import Head

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


def test_a_run_of_adapters_writes_folders_that_peft_loads_on_their_base(tmp_path):
    cfg = make_config(tmp_path, *LORA, "name=run")
    results = run(cfg)
    assert list(results["final"]) == ["base", "text", "image", "merged"]
    files = {path.name for path in (cfg.run_dir / "branch-text").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert "model.safetensors" not in files
    named = json.loads((cfg.run_dir / "branch-text" / "adapter_config.json").read_text())["base_model_name_or_path"]
    base, _ = load_saved(named)
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), cfg.run_dir / "branch-text"))
    assert torch.equal(expected, logits(PeftModel.from_pretrained(base, cfg.run_dir / "branch-text")))
    torch.testing.assert_close(logits(load_saved(cfg.run_dir / "branch-text")[0]), expected)
    assert json.loads((cfg.run_dir / "results.json").read_text())["final"]["text"]


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


def targets_of(cfg):
    return lora_config(make_base(cfg), cfg.model).target_modules


def test_the_vision_tower_is_adapted_unless_frozen_or_left_out(tmp_path):
    visual = [
        any("visual" in name for name in targets_of(make_config(tmp_path, *LORA, *more)))
        for more in (
            (),
            ("model.freeze_vision=true",),
            ("model.adapter.target_modules=[q_proj,v_proj]",),
            ("model.adapter.target_modules=[attn.qkv]",),
        )
    ]
    assert visual == [True, False, False, True]


def test_a_vision_tower_left_out_gets_no_gradient_and_stays(tmp_path):
    cfg = make_config(tmp_path, *LORA, "model.freeze_vision=true")
    base = make_base(cfg)
    branch = make_branch(cfg, base, lora_config(base, cfg.model), "image")
    assert not any("visual" in name for name in branch.weights.state())
    branch.learn([branch.native_batch(0)])
    assert all(p.grad is None for p in base.model.visual.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.adapter.target_modules=[q_proj,querry]"], "target_modules must each match a module .* got 'querry'"),
        (["model.adapter.target_modules=[mlp]"], "must be linear, embedding or convolution layers; got .*mlp, a "),
        (["model.adapter.target_modules=[qkv]", "model.freeze_vision=true"], "module of the language model; got 'qkv'"),
        (["model.adapter.target_modules=[lm_head]"], "tied embeddings must stay as they are; got lm_head"),
        (["model.adapter.target_modules=[embed_tokens]"], "tied embeddings must stay as they are; got .*embed_tokens"),
        (["model.adapter.modules_to_save=[lm_head]"], "tied embeddings must stay as they are; got lm_head"),
        (["model.adapter.modules_to_save=[lm_haed]"], "modules_to_save must each match a module .* got 'lm_haed'"),
    ],
)
def test_targets_that_cannot_be_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"adapter: .*{message}"):
        targets_of(make_config(tmp_path, *settings))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.adapter.rank=0", "model.adapter.rank must be at least 1; got 0"),
        ("model.adapter.dropout=1", r"model.adapter.dropout must be in \[0, 1\)"),
        ("model.adapter.target_modules=some", "target_modules must be all-linear or a list of names; got 'some'"),
        ("model.adapter.target_modules=[]", "target_modules must be all-linear or a list of names"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, setting)


def test_the_sizes_that_the_config_of_one_gpu_reckons_with():
    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560}
    vision |= {"deepstack_visual_indexes": [5, 11, 17]}
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
        )
    model.tie_weights()
    cfg = schema.load(Config, Path(__file__).parents[2] / "configs" / "qwen3_vl_4b_lora.yaml")
    linear = [model.get_submodule(name) for name in lora_config(model, cfg.model).target_modules]
    adapter = cfg.model.adapter.rank * sum(layer.in_features + layer.out_features for layer in linear)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 4.44
    assert round(adapter / 1e6, 1) == 80.5


def test_adapters_are_not_offloaded(tmp_path):
    with pytest.raises(ValueError, match=r"offload must be false with model.adapter"):
        make_config(tmp_path, *LORA, "offload=true")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    cfg = make_config(tmp_path, *LORA)
    base, other = make_base(cfg), make_base(cfg, seed=1)
    Adapter(base, "text", lora_config(base, cfg.model)).save(tmp_path / "text")
    with pytest.raises(ValueError, match=r"adapter: base of .*text must be the one it was trained on"):
        Adapter.load(other, tmp_path / "text", "text")


def test_an_adapter_of_other_sizes_is_refused(tmp_path):
    cfg = make_config(tmp_path, *LORA)
    base = make_base(cfg)
    adapter = Adapter(base, "text", lora_config(base, cfg.model))
    adapter.save(tmp_path / "text")
    config = tmp_path / "text" / "adapter_config.json"
    config.write_text(re.sub('"r": 4', '"r": 5', config.read_text()))
    with pytest.raises(ValueError, match=r"adapter: weights in .*text must fit their base"):
        Adapter.load(bare(base), tmp_path / "text", "text")


@pytest.mark.parametrize("change", ["absent", "besides"])
def test_an_adapter_with_a_tensor_too_few_or_too_many_is_refused(tmp_path, change):
    cfg = make_config(tmp_path, *LORA)
    base = make_base(cfg)
    Adapter(base, "text", lora_config(base, cfg.model)).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors |= {name.replace("lora_A", "lora_C"): tensors[name].clone()} if change == "besides" else {}
    save_file({key: value for key, value in tensors.items() if change == "besides" or key != name}, path)
    with pytest.raises(ValueError, match=r"adapter: weights in .* must fit their base; got a difference in"):
        Adapter.load(bare(base), tmp_path, "text")


def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path):
    cfg = make_config(tmp_path, *LORA)
    base = make_base(cfg)
    Adapter(base, "text", lora_config(base, cfg.model)).save(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ValueError, match=r"adapter: .* must hold plain LoRA weights"):
        Adapter.load(bare(base), tmp_path, "text")


def test_a_quantised_base_is_refused(tmp_path):
    make_base(make_config(tmp_path)).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(ValueError, match="model: path must hold weights that are not quantised; got bitsandbytes"):
        load_saved(tmp_path / "base")


def test_a_name_that_peft_would_confuse_is_safe_or_refused(tmp_path):
    """peft finds an adapter's weights by a part of their names, which `visual` and `layers` are as well."""
    cfg = make_config(tmp_path, *LORA)
    base = make_base(cfg)
    lora = lora_config(base, cfg.model)
    visual, layers = (moved(Adapter(base, name, lora), seed) for seed, name in enumerate(("visual", "layers")))
    visual.save(tmp_path / "visual")
    assert same(Adapter.load(bare(base), tmp_path / "visual", "x").state(), visual.state())
    assert not same(visual.state(), layers.state())
    for name in ("a.b", "layers"):
        with pytest.raises(ValueError, match="adapter: name must have no dot and be new to its base"):
            Adapter(base, name, lora)


def make_untied():
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


HEADS = {
    "delta": {"target_modules": ["lm_head", "q_proj"]},
    "whole": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_of_an_adapter_that_trains_it_is_its_own(kind):
    model = make_untied()
    lora = lora_config(model, ModelConfig(adapter=AdapterConfig(4, **HEADS[kind])))
    adapter = moved(Adapter(model, "a", lora))
    tokens = torch.arange(3, 20)[None]
    plain = logits(model)
    with adapter.active():
        hidden = model.model(tokens).last_hidden_state
        head = Head.of(model, hidden)
        torch.testing.assert_close(head.hidden @ head.lm_head.T, model(tokens).logits)
        gradients = torch.autograd.grad((head.hidden @ head.lm_head.T).square().sum(), adapter.parameters())
    assert all(gradient.any() for gradient in gradients)
    assert torch.equal(logits(model), plain)
    head = Head.of(model, hidden)
    assert head.lm_head.shape == (64, 32), "none outside of it"


@pytest.mark.parametrize("kind", HEADS)
def test_folders_and_frozen_copies_hold_all_an_adapter_has(tmp_path, kind):
    model = make_untied()
    adapter = moved(Adapter(model, "a", lora_config(model, ModelConfig(adapter=AdapterConfig(4, **HEADS[kind])))))
    plain = logits(model)
    with adapter.active():
        expected = logits(model)
    adapter.save(tmp_path)
    fresh = bare(model)
    loaded = Adapter.load(fresh, tmp_path, "b")
    twin = adapter.copy()
    for other, owner in ((loaded, fresh), (twin, model)):
        assert same(other.state(), adapter.state())
        with other.active():
            assert torch.equal(logits(owner), expected)
    twin.remove()
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(PeftModel.from_pretrained(bare(model), tmp_path)), expected)
    torch.testing.assert_close(logits(apply(bare(model), tmp_path)), expected)


@pytest.mark.parametrize("kind", HEADS)
def test_branches_that_train_the_head_teach_with_the_one_they_had(tmp_path, kind):
    """All scoring precedes any update: a trained head is kept as it was, though its adapter moves."""
    cfg = make_config(tmp_path, "model.adapter.rank=4")
    base = make_base(cfg)
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())  # untied
    lora = lora_config(base, ModelConfig(adapter=AdapterConfig(4, **HEADS[kind])))
    student, teacher = (make_branch(cfg, base, lora, name) for name in ("text", "image"))
    moved(teacher.weights), moved(student.weights, 2)
    batch = cross_batch(student, teacher, 0)
    seen = batch.lesson.teachers[0]
    kept = seen.head(0, CPU)
    before = kept.hidden @ kept.lm_head.T
    teacher.learn([teacher.native_batch(0)])
    assert torch.equal(kept.hidden @ kept.lm_head.T, before)
    assert not torch.equal(teacher.score(batch.rollout).logp[0], seen.logp[0])
    start = weights(student)
    student.learn([batch])
    assert any("lm_head" in name and not torch.equal(value, start[name]) for name, value in weights(student).items())
