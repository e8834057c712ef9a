"""copd_kernels in TRL's trainers: the loss and gradient of TRL's own code on the same batch."""

import copy
import importlib.metadata as metadata
import inspect
import warnings

import pytest
import torch
from torch import nn

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
if tuple(map(int, metadata.version("trl").split(".")[:2])) < (1, 15):
    pytest.skip(f"trl {metadata.version('trl')} is older than 1.15", allow_module_level=True)

from datasets import Dataset  # noqa: E402  # after the skip
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from copd_kernels.trl import GKD, DistillationTrainer, GRPOTrainer, fuse  # noqa: E402

V = 64
FAMILIES = {"Qwen3": {}, "Llama": {}, "Gemma2": {"final_logit_softcapping": 3.0}, "Granite": {"logits_scaling": 4.0}}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": V, "pad_token_id": 0, "eos_token_id": 1}


def build(family="Qwen3", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


ROWS = Dataset.from_dict({"prompt": ["w2 w3 w4", "w5 w6"]})
COMMON = {"report_to": [], "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "max_completion_length": 5}
COMMON |= {"logging_steps": 1}


def grpo(tokenizer, tmp_path, cls=trl.GRPOTrainer, model=None, **options):
    settings = {"num_generations": 2, "beta": 0.04, "temperature": 0.9} | options.pop("settings", {})
    config = trl.GRPOConfig(str(tmp_path), **COMMON | settings)
    model = model or build()
    # TRL loads the reference model from where the model came from
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(
            model=model,
            reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            args=config,
            train_dataset=ROWS,
            processing_class=tokenizer,
            **options,
        )


def rollouts(B=4, P=3, C=5):
    """A batch as generation makes it in TRL's trainers, with prompts and completions of any length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, C + 1, (B,), generator=generator)
    prompt_mask = torch.ones(B, P, dtype=torch.long)
    prompt_mask[0, :1] = 0
    return {
        "prompt_ids": torch.randint(2, V, (B, P), generator=generator),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, V, (B, C), generator=generator),
        "completion_mask": (torch.arange(C) < lengths[:, None]).long(),
        "advantages": torch.randn(B, generator=generator),
        "old_per_token_logps": None,
        "num_items_in_batch": lengths.sum(),
    }


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def grpo_inputs(trainer, model):
    inputs = rollouts()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        reference, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, 5)
    return inputs | {"ref_per_token_logps": reference + 0.1}


def grpo_step(trainer):
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, grpo_inputs(trainer, trainer.model))
    return loss.detach(), gradient(trainer.model, loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_trainer_has_trls_loss_and_gradient(tokenizer, tmp_path, family):
    theirs, ours = grpo(tokenizer, tmp_path, model=build(family)), grpo(tokenizer, tmp_path, model=build(family))
    assert fuse(ours) is ours
    (loss, grad), (want, want_grad) = grpo_step(ours), grpo_step(theirs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert relative(grad, want_grad) < 1e-5
    entropies = [trainer._metrics["train"]["entropy"][-1] for trainer in (ours, theirs)]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)


def test_a_fused_trainer_trains_generates_and_keeps_trls_curve(tokenizer, tmp_path):
    curves = []
    for make in (fuse, lambda trainer: trainer):
        settings = {"max_steps": 2, "learning_rate": 1e-2, "seed": 3}
        trainer = make(grpo(tokenizer, tmp_path, settings=settings))
        trainer.train()
        curves.append([(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "loss" in r])
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-4, atol=1e-5)


def test_lora_is_fused_under_its_wrapper(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    theirs, ours = (grpo(tokenizer, tmp_path, peft_config=copy.deepcopy(config)) for _ in range(2))
    for trainer in (theirs, ours):
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                nn.init.constant_(parameter, 0.05)
    (loss, grad), (want, want_grad) = grpo_step(fuse(ours)), grpo_step(theirs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert relative(grad, want_grad) < 1e-5


def test_live_teachers_add_their_kl_to_the_same_forward(tokenizer, tmp_path):
    teachers = [build(seed=1), build("Gemma2", seed=2)]
    ours = grpo(tokenizer, tmp_path, GRPOTrainer, teachers=teachers, kl_coef=0.3)
    alone = fuse(grpo(tokenizer, tmp_path))
    (loss, grad), (plain, plain_grad) = grpo_step(ours), grpo_step(alone)
    inputs = rollouts()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    mask = inputs["completion_mask"] != 0

    def log_softmax(model):
        z = model(input_ids=ids, attention_mask=attention).logits[:, -6:-1][mask] / 0.9
        return z.float().log_softmax(-1)

    p = log_softmax(ours.model)
    kl = sum((p.exp() * (p - log_softmax(t.eval()).detach())).sum(-1).mean() for t in teachers) / 2
    torch.testing.assert_close(loss, plain + 0.3 * kl.detach(), rtol=1e-5, atol=1e-5)
    assert relative(grad, plain_grad + 0.3 * gradient(ours.model, kl)) < 1e-5
    assert ours._metrics["train"]["teacher_kl"][-1] == pytest.approx(kl.item(), rel=1e-5)
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())


def distillation(tokenizer, tmp_path, teacher, cls, beta, **options):
    config = trl.DistillationConfig(str(tmp_path), **COMMON, beta=beta, temperature=0.9)
    rows = Dataset.from_dict({"prompt": ["w2 w3", "w4"]})
    return cls(build(), teacher, config, train_dataset=rows, processing_class=tokenizer, **options)


def distillation_step(trainer):
    trainer.model.train()
    loss, entropy, count = trainer._compute_loss(trainer.model, rollouts(), None)
    return loss.detach(), gradient(trainer.model, loss), entropy, count


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_one_teacher_distils_as_trls_does(tokenizer, tmp_path, beta):
    ours = distillation(tokenizer, tmp_path, build(seed=1), DistillationTrainer, beta)
    theirs = distillation(tokenizer, tmp_path, build(seed=1), trl.DistillationTrainer, beta)
    (loss, grad, *rest), (want, want_grad, *want_rest) = distillation_step(ours), distillation_step(theirs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert relative(grad, want_grad) < 1e-5
    for ours, theirs in zip(rest, want_rest, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=1e-5)


def test_several_teachers_are_the_weighted_mean_of_trls_losses(tokenizer, tmp_path):
    weights, teachers = [0.5, 0.3, 0.2], [build(seed=seed) for seed in (1, 2, 3)]
    options = {"teacher_weights": weights}
    loss, grad, *_ = distillation_step(distillation(tokenizer, tmp_path, teachers, DistillationTrainer, 1.0, **options))
    alone = [
        distillation_step(distillation(tokenizer, tmp_path, teacher, trl.DistillationTrainer, 1.0))
        for teacher in teachers
    ]
    torch.testing.assert_close(loss, sum(w * step[0] for w, step in zip(weights, alone, strict=True)))
    assert relative(grad, sum(w * step[1] for w, step in zip(weights, alone, strict=True))) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd_is_trls(tokenizer, tmp_path, beta):
    gkd = pytest.importorskip("trl.experimental.gkd")

    class Trainer(GKD, gkd.GKDTrainer):
        pass

    rows = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}]]}
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    args = {k: v for k, v in COMMON.items() if k != "max_completion_length"}
    found = []
    for cls in (Trainer, gkd.GKDTrainer):
        config = gkd.GKDConfig(str(tmp_path), **args, beta=beta, temperature=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = cls(build(), build(seed=1), config, train_dataset=rows, processing_class=tokenizer)
        ids = torch.randint(2, V, (3, 8), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, :4] = -100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "prompts": ids[:, :4]}
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        found.append((loss.detach(), gradient(trainer.model, loss)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert relative(found[0][1], found[1][1]) < 1e-5


def test_a_trainer_that_needs_more_is_refused():
    class Other:
        pass

    with pytest.raises(ValueError, match="fuse: trainer must be a GRPO or RLOO trainer; got Other; use through_head"):
        fuse(Other())


def test_weights_are_as_many_as_teachers(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="teacher_weights must have a weight for each of 2 teachers"):
        distillation(
            tokenizer, tmp_path, [build(seed=1), build(seed=2)], DistillationTrainer, 1.0, teacher_weights=[1.0]
        )


def test_the_seams_are_where_this_release_of_trl_has_them():
    from trl.trainer.utils import FusedCausalLMOutput

    fields = {"loss", "log_probs", "entropy", "label_mask", "aux_loss"}
    assert fields <= set(FusedCausalLMOutput.__dataclass_fields__)
    names = list(inspect.signature(trl.DistillationTrainer._compute_loss).parameters)
    assert names == ["self", "unwrapped_student", "inputs", "num_items_in_batch"]
    assert list(inspect.signature(trl.GRPOTrainer._compute_loss).parameters) == ["self", "model", "inputs"]


def test_two_trainers_teach_each_other_in_turn():
    import runpy
    from pathlib import Path

    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "trl_coevolve.py"))
    trainers = example["main"](steps=2)
    for trainer in trainers:
        assert trainer.state.global_step == 2
        assert [teacher is other.model for other in trainers for teacher in trainer.teachers].count(True) == 1
        seen = [record["teacher_kl"] for record in trainer.state.log_history if "teacher_kl" in record]
        assert len(seen) == 2
    # they start equal: the first to move has nothing to learn from the other yet, the second has
    first, second = (t.state.log_history[0]["teacher_kl"] for t in trainers)
    assert abs(first) < 1e-6 < second
