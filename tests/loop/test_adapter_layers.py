"""Which layers of a base an adapter may have, its vision tower and its head among them."""

from pathlib import Path

import pytest
import torch
from copd_cases import CPU, cross_batch, make_config
from test_adapter import LORA, logits, make_base, make_branch, moved, weights
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from copd import schema
from copd.adapter import Adapter, lora_config
from copd.config import Config
from copd.settings import AdapterConfig, ModelConfig
from copd_kernels import Head


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
