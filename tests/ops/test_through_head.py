"""`through_head` and `hidden_states`: the model's own forward, with what `lm_head` reads."""

import warnings

import pytest
import torch
from torch import nn

from copd_kernels import Head, hidden_states, kl, logprob, through_head
from copd_kernels.reference import logits

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
# each transforms its logits in another way, or keeps its layers under another name
FAMILIES = {
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Gemma3Text": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "HyperCLOVAX": {"logits_scaling": 0.25},
    "Phi": {},
    "GPTNeoX": {},
}
IDS = torch.tensor([[5, 17, 3, 80, 41], [9, 2, 66, 30, 7]])


def build(family, **options):
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = getattr(transformers, f"{family}Config")(**SMALL | FAMILIES.get(family, {}) | options)
    name = family.removesuffix("Text")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, two[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def eager(model, ids):
    log_p = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None]).sum()


def fused(model, ids):
    def read(head):
        return logprob(Head(head.hidden[:, :-1], *head_fields(head)), ids[:, 1:]).logp.sum()

    with through_head(model, read):
        return model(input_ids=ids).logits


def head_fields(head):
    return head.lm_head, head.bias, head.scale, head.softcap, head.vocab_size


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_the_models_own_logits(family):
    model = build(family)
    ours, theirs = fused(model, IDS), eager(model, IDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    close(grads(model, ours), grads(model, theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_reads_the_models_own_logits(family):
    model = build(family)
    with torch.no_grad():
        with hidden_states(model):
            hidden = model(input_ids=IDS).logits
        want = model(input_ids=IDS).logits
    torch.testing.assert_close(logits(Head.of(model, hidden)), want, rtol=1e-4, atol=1e-5)


def test_an_image_goes_through_the_models_own_forward():
    text = SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    tokens = torch.tensor([[5, 92, 90, 90, 90, 90, 93, 7, 8]])
    pixels = torch.randn(16, 3 * 2 * 4 * 4)
    media = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    media["mm_token_type_ids"] = (tokens == 90).int()
    with through_head(model, lambda head: logprob(head, tokens).logp.sum()):
        ours = model(input_ids=tokens, **media).logits
    theirs = model(input_ids=tokens, **media).logits.float().log_softmax(-1).gather(-1, tokens[..., None]).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    close(grads(model, ours), grads(model, theirs))


class Lying(nn.Module):
    """A Qwen3 whose forward does to its logits what its config does not say."""

    def __init__(self, change):
        super().__init__()
        self.model, self.change = build("Qwen3"), change
        self.config = self.model.config
        self.get_output_embeddings, self.get_input_embeddings = (
            self.model.get_output_embeddings, self.model.get_input_embeddings,
        )  # fmt: skip

    def forward(self, **kwargs):
        output = self.model(**kwargs)
        output["logits"] = self.change(output["logits"])
        return output


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 1.01,
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z + 1,
        lambda z: z.roll(1, -1),
        lambda z: z * torch.nan,
    ],
    ids=["scaled", "capped", "shifted", "permuted", "nan"],
)
def test_a_model_that_makes_its_logits_otherwise_is_refused_with_the_difference(change):
    hidden = torch.randn(3, 32)
    with pytest.raises(ValueError, match=r"Head.of: model must make .* of logit \d+, .*; got .*; give scale"):
        Head.of(Lying(change), hidden)
    with pytest.raises(ValueError, match=r"through_head: model must make"), through_head(Lying(change), lambda head: 0):
        pass
    assert Head.of(Lying(change), hidden, check=False).scale == 1


def test_the_check_leaves_no_trace():
    model = build("Llama", attention_dropout=0.1).train()
    hidden, state = torch.randn(2, 32), torch.get_rng_state()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    Head.of(model, hidden)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_model_whose_head_reads_another_thing_than_its_backbone_makes_is_refused():
    """MiniCPM3 divides last_hidden_state before `lm_head`: right through `through_head`, a trap for `Head.of`."""
    small = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    model = build("MiniCPM3", **small, dim_model_base=8)
    with pytest.raises(ValueError, match="hidden must be what lm_head reads, which MiniCPM3ForCausalLM makes of"):
        Head.of(model, torch.randn(2, 32))
    ours, theirs = fused(model, IDS), eager(model, IDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options)).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head", "q_proj"], "lora_bias": True},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}},
        {"target_modules": ["lm_head"], "use_rslora": True},
    ],
    ids=["lora", "lora_bias", "dora", "saved", "tokens", "rslora"],
)
def test_an_adapter_of_the_head_is_part_of_it(options):
    model = lora(build("Llama"), **options)
    ours, theirs = fused(model, IDS), eager(model, IDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    close(grads(model, ours), grads(model, theirs))
    with model.disable_adapter():
        torch.testing.assert_close(fused(model, IDS), eager(model, IDS), rtol=1e-5, atol=1e-5)
    hidden = torch.randn(3, 32)
    want = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits(Head.of(model, hidden)), want, rtol=1e-4, atol=1e-4)


def test_several_active_adapters_add_up_and_switch():
    peft = pytest.importorskip("peft")
    model = lora(build("Llama"), target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "second" in name:
            nn.init.normal_(parameter, std=0.2)
    seen = []
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        seen.append(fused(model, IDS).item())
        assert seen[-1] == pytest.approx(eager(model, IDS).item(), rel=1e-5)
    assert len(set(seen)) == 3


def test_dropout_of_a_lora_head_is_drawn_as_peft_draws_it():
    model = lora(build("Llama"), target_modules=["lm_head"], lora_dropout=0.3)
    fused(model, IDS)  # checked
    model.train()
    torch.manual_seed(3)
    ours = fused_whole(model)
    torch.manual_seed(3)
    theirs = model(input_ids=IDS).logits.float().log_softmax(-1).gather(-1, IDS[..., None]).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def fused_whole(model):
    with through_head(model, lambda head: logprob(head, IDS).logp.sum()):
        return model(input_ids=IDS).logits


def test_a_dora_head_with_dropout_is_refused():
    model = lora(build("Llama"), target_modules=["lm_head"], use_dora=True, lora_dropout=0.3).train()
    with pytest.raises(
        ValueError, match=r"lm_head must have no dropout in such an adapter; got .*; set lora_dropout=0"
    ):
        fused(model, IDS)


def test_a_function_of_its_own_for_each_token_is_refused():
    model = lora(build("Llama"), target_modules=["lm_head"])
    message = "through_head: lm_head must be called with hidden states alone; got adapter_names"
    with pytest.raises(ValueError, match=message), through_head(model, lambda head: head):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


def test_the_check_is_made_again_when_the_config_says_otherwise():
    model = build("Granite")
    with through_head(model, lambda head: head.scale):
        assert model(input_ids=IDS).logits == 0.25
    model.config.logits_scaling = 8.0  # granite reads it when it is called
    with through_head(model, lambda head: head.scale):
        assert model(input_ids=IDS).logits == 0.125
    changed = build("HyperCLOVAX")
    Head.of(changed, torch.randn(2, 32))
    changed.config.logit_scale = 3.0  # which hyperclovax does not
    with pytest.raises(ValueError, match=r"as scale 0\.75 and softcap None of its config say"):
        Head.of(changed, torch.randn(2, 32))


class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(x).exp()


def test_a_head_that_is_not_linear_is_refused():
    model = build("Llama")
    model.lm_head = Twice(32, 96, bias=False)
    with pytest.raises(ValueError, match=r"Head.of: model must make"):
        Head.of(model, torch.randn(2, 32))


@pytest.mark.parametrize("op", [through_head, lambda model, read: hidden_states(model)], ids=["through_head", "hidden"])
def test_what_the_model_cannot_do_inside_is_a_named_error_and_undone(op):
    model = build("Llama")
    before = dict(model.__dict__), dict(model.lm_head.__dict__)
    with pytest.raises(ValueError, match="labels must not be passed to the model"), op(model, lambda head: 0):
        model(input_ids=IDS, labels=IDS)
    with pytest.raises(ValueError, match="generate must not be called inside"), op(model, lambda head: 0):
        model.generate(input_ids=IDS)
    nested = pytest.raises(ValueError, match="must not be inside another through_head")
    with nested, op(model, lambda head: 0), op(model, lambda head: 0):
        pass
    with pytest.raises(ZeroDivisionError), through_head(model, lambda head: 1 / 0):
        model(input_ids=IDS)
    assert "forward" not in model.lm_head.__dict__
    assert "generate" not in model.__dict__
    assert before[0].keys() == model.__dict__.keys()
    assert not model._forward_hooks
    assert not model.lm_head._forward_hooks
    assert model(input_ids=IDS).logits.shape == (2, 5, 96)


def test_checkpointed_layers_and_logits_to_keep_compose():
    model = build("Llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ours, theirs = fused(model, IDS), eager(model, IDS)
    close(grads(model, ours), grads(model, theirs))
    with hidden_states(model):
        assert model(input_ids=IDS, logits_to_keep=2).logits.shape == (2, 2, 32)


def test_a_teacher_teaches_from_its_own_forward():
    student, teacher = build("Llama"), build("Gemma2")
    with torch.no_grad(), through_head(teacher, lambda head: head):
        lesson = teacher(input_ids=IDS).logits
    with through_head(student, lambda head: kl(head, lesson)):
        ours = student(input_ids=IDS).logits
    p, q = (model(input_ids=IDS).logits.float().log_softmax(-1) for model in (student, teacher))
    theirs = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_one_graph_under_torch_compile():
    model = build("Llama")
    fused(model, IDS)  # checked
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with through_head(compiled, lambda head: logprob(head, IDS).logp.sum()):
        ours = compiled(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(ours, fused_whole(model), rtol=1e-5, atol=1e-5)
