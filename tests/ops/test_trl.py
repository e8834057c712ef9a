"""copd_kernels in TRL's trainers: the loss and gradient of TRL's own code on the same batch."""

import copy
import importlib.metadata as metadata
import inspect
import types
import warnings
from collections import defaultdict

import pytest
import torch
from torch import nn

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
if tuple(map(int, metadata.version("trl").split(".")[:2])) < (1, 15):
    pytest.skip(f"trl {metadata.version('trl')} is older than 1.15", allow_module_level=True)

from datasets import Dataset  # noqa: E402  # after the skip
from trl.models.utils import _ForwardRedirection  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402
from trl_cases import (  # noqa: E402
    COMMON,
    FAMILIES,
    V,
    build,
    distillation,
    distillation_step,
    gradient,
    grpo,
    grpo_step,
    make_tokenizer,
    relative,
    rollouts,
)

from copd_kernels.trl import GKD, DistillationTrainer, GRPOTrainer, fuse, sequence  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


ASKED = ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_fused_model_returns_is_trls(family):
    found = []
    inputs = rollouts(images=family == "Qwen3VL")
    batch, mask, _ = sequence(inputs)
    labels = batch["input_ids"].clone()
    labels[:, : inputs["prompt_ids"].shape[1]] = -100
    labels[:, -mask.shape[1] :][~mask] = -100
    with torch.no_grad():  # the second row's are what the model would say
        labels[1, 1:] = torch.where(labels[1, 1:] == -100, -100, build(family)(**batch).logits[1, :-1].argmax(-1))
    for fused in (True, False):
        model = build(family).train()
        add_fused_lm_head(model, temperature=0.9, outputs=ASKED)
        if fused:
            fuse(types.SimpleNamespace(model=model))
        out = model(**batch, labels=labels, fused_lm_head=True)
        weigh = torch.linspace(0.5, 1.5, labels[:, 1:].numel()).view(labels[:, 1:].shape)
        loss = out.loss + (weigh * (out.log_probs - out.entropy)).mean()
        found.append([*(getattr(out, name).float() for name in ("loss", *ASKED)), gradient(model, loss)])
        assert out.is_top1[1].any()
        assert (out.label_mask == (labels[:, 1:] != -100)).all()
    for name, x, y in zip(("loss", *ASKED, "gradient"), *found, strict=True):
        assert relative(x, y) < 1e-6, name


def fused_outputs(model, fused, dtype=torch.float32, **options):
    """Log-probs, entropies and the gradient of the policy's loss, by TRL's fused lm_head or ours."""
    inputs = rollouts()
    batch, *_ = sequence(inputs)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model = model.to(dtype).train()
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"), **options)
    for _ in range(fused):
        fuse(types.SimpleNamespace(model=model))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(options)):
        out = model(**batch, labels=labels, fused_lm_head=True)
    return [out.log_probs.float(), out.entropy.float(), gradient(model, out.loss - out.entropy.mean()).float()]


def test_in_bf16_the_error_is_no_worse_than_trls():
    exact = fused_outputs(build().to(torch.bfloat16), False, torch.float64)
    ours, theirs = (fused_outputs(build(), fused, torch.bfloat16) for fused in (True, False))
    for mine, other, want in zip(ours, theirs, exact, strict=True):
        assert relative(mine, want) <= 1.1 * relative(other, want)


def test_a_head_cast_to_fp32_stays_fp32_under_autocast():
    found = []
    for fused in (True, False):
        model = build()
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
        found.append(fused_outputs(model, fused, cast_lm_head_to_fp32=True))
    for x, y in zip(*found, strict=True):
        assert relative(x, y) < 1e-6


def test_a_model_may_be_fused_again():
    for x, y in zip(fused_outputs(build(), 2), fused_outputs(build(), 0), strict=True):
        assert relative(x, y) < 1e-6


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
def test_a_fused_trainer_has_trls_loss_and_gradient(tokenizer, tmp_path, family):
    theirs, ours = grpo(tokenizer, tmp_path, model=build(family)), grpo(tokenizer, tmp_path, model=build(family))
    assert fuse(ours) is ours
    (loss, grad), (want, want_grad) = grpo_step(ours), grpo_step(theirs)
    assert abs(loss - want) < 1e-6
    assert relative(grad, want_grad) < 1e-6
    entropies = [trainer._metrics["train"]["entropy"][-1] for trainer in (ours, theirs)]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-6)


def test_a_fused_trainer_trains_generates_and_keeps_trls_curve(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    curves = []
    for make in (fuse, lambda trainer: trainer):
        settings = {"max_steps": 2, "learning_rate": 1e-2, "seed": 3, "gradient_checkpointing": True}
        settings |= {"gradient_accumulation_steps": 2, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        trainer = make(grpo(tokenizer, tmp_path, settings=settings, peft_config=lora))
        trainer.train()
        curves.append([(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "loss" in r])
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=1e-6)


def test_lora_is_fused_under_its_wrapper(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    theirs, ours = (grpo(tokenizer, tmp_path, peft_config=copy.deepcopy(config)) for _ in range(2))
    for trainer in (theirs, ours):
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                nn.init.constant_(parameter, 0.05)
    (loss, grad), (want, want_grad) = grpo_step(fuse(ours)), grpo_step(theirs)
    assert abs(loss - want) < 1e-6
    assert relative(grad, want_grad) < 1e-6


CHAT = [f"w{i} w{i + 1}" for i in range(2, 10)]
SUPERVISED = {
    "SFT": ("SFTConfig", {"text": CHAT}, {}),
    "SFT, weighed by probability": ("SFTConfig", {"text": CHAT}, {"loss_type": "dft"}),
    "DPO": ("DPOConfig", {"prompt": ["w5"] * 8, "chosen": CHAT, "rejected": CHAT[::-1]}, {}),
    "WPO": ("DPOConfig", {"prompt": ["w5"] * 8, "chosen": CHAT, "rejected": CHAT[::-1]}, {"use_weighting": True}),
    "KTO": ("KTOConfig", {"prompt": ["w5"] * 8, "completion": CHAT, "label": [True, False] * 4}, {}),
}


@pytest.mark.parametrize("kind", SUPERVISED)
def test_supervised_and_preference_losses_and_their_metrics_are_trls(tokenizer, tmp_path, kind):
    config, columns, options = SUPERVISED[kind]
    found = []
    for make in (fuse, lambda trainer: trainer):
        args = {"report_to": [], "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, **options}
        # TRL loads the reference model from where the model came from
        model = build()
        model.save_pretrained(tmp_path / "base")
        model.config._name_or_path = str(tmp_path / "base")
        cls = getattr(trl, config.replace("Config", "Trainer"))
        data = Dataset.from_dict(columns)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = getattr(trl, config)(str(tmp_path), **args)
            trainer = make(cls(model, args=args, train_dataset=data, processing_class=tokenizer))
            batch = next(iter(trainer.get_train_dataloader()))
            with torch.no_grad():  # or policy and reference are one, and rewards nothing
                trainer.model.lm_head.weight.mul_(1.3)
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, batch)
        metrics = {name: torch.tensor(value) for name, value in trainer._metrics["train"].items()}
        found.append((loss.detach(), gradient(trainer.model, loss), metrics))
    (loss, grad, metrics), (want, want_grad, want_metrics) = found
    assert abs(loss - want) <= 1e-6 * abs(want)
    assert relative(grad, want_grad) < 1e-6
    torch.testing.assert_close(metrics, want_metrics, rtol=1e-5, atol=1e-6)
    assert {"entropy", "loss", "mean_token_accuracy", "logits/chosen"} & set(metrics)


def test_async_grpo_is_trls(tokenizer):
    async_grpo = pytest.importorskip("trl.experimental.async_grpo")
    found = []
    for fused in (True, False):
        # built without its rollout server, of which the loss knows nothing
        trainer = async_grpo.AsyncGRPOTrainer.__new__(async_grpo.AsyncGRPOTrainer)
        trainer.model, trainer.aux_loss_enabled, trainer.args = build().train(), False, trl.GRPOConfig(use_cpu=True)
        trainer.epsilon_low = trainer.epsilon_high = 0.2
        trainer.accelerator = types.SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x)
        counted = ("forward_tokens", "trained_tokens", "seq_len_weighted", "samples", "forward_s")
        vars(trainer).update({f"_step_{name}": 0 for name in counted})
        trainer.current_gradient_accumulation_steps, trainer._metrics = 1, {"train": defaultdict(list)}
        add_fused_lm_head(trainer.model, temperature=0.8, outputs=("log_probs", "entropy"))
        if fused:
            fuse(trainer)
        ids = torch.randint(2, V, (1, 9), generator=torch.Generator().manual_seed(0))
        shifted = torch.full((1, 9), -100)
        shifted[0, 3:8] = ids[0, 4:]
        none = torch.full((1, 1), -1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9)[None]}
        inputs |= {"shift_labels": shifted, "token_index": torch.arange(3, 8)[None], "tree_kv_index": none}
        inputs |= {"tree_cu_seqlens_q": none, "tree_cu_seqlens_k": none, "tree_max_seqlens": torch.ones(1, 2).long()}
        inputs |= {"old_log_probs": torch.full((1, 5), -4.0), "advantages": torch.linspace(-1, 1, 5)[None]}
        inputs |= {"segment_id": torch.zeros(1, 5, dtype=torch.long), "global_n_tokens": torch.tensor([5.0])}
        inputs |= {"global_n_forward_tokens": torch.tensor([9.0]), "mean_seq_len": torch.tensor([9.0])}
        loss = async_grpo.AsyncGRPOTrainer.compute_loss(trainer, trainer.model, inputs)
        found.append((loss.detach(), trainer._metrics["train"]["entropy"][0], gradient(trainer.model, loss)))
    (loss, entropy, grad), (want, want_entropy, want_grad) = found
    assert abs(loss - want) < 1e-6 * abs(want)
    assert entropy == pytest.approx(want_entropy, rel=1e-6)
    assert relative(grad, want_grad) < 1e-6


@pytest.mark.parametrize("images", [False, True])
def test_live_teachers_add_their_kl_to_the_same_forward(tokenizer, tmp_path, images):
    first, second = ("Qwen3VL", "Qwen3VL") if images else ("Qwen3", "Gemma2")
    teachers = [build(first, seed=1), build(second, seed=2)]
    ours = grpo(tokenizer, tmp_path, GRPOTrainer, model=build(first), teachers=teachers, kl_coef=0.3)
    alone = fuse(grpo(tokenizer, tmp_path, model=build(first)))
    (loss, grad), (plain, plain_grad) = grpo_step(ours, images), grpo_step(alone, images)
    batch, mask, where = sequence(rollouts(images=images))

    def log_softmax(model):
        return (model(**batch).logits[:, where][mask] / 0.9).float().log_softmax(-1)

    p = log_softmax(ours.model)
    kl = sum((p.exp() * (p - log_softmax(t.eval()).detach())).sum(-1).mean() for t in teachers) / 2
    assert abs(loss - plain - 0.3 * kl.detach()) < 1e-6
    assert relative(grad, plain_grad + 0.3 * gradient(ours.model, kl)) < 1e-6
    assert ours._metrics["train"]["teacher_kl"][-1] == pytest.approx(kl.item(), rel=1e-5)
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_one_teacher_distils_as_trls_does(tokenizer, tmp_path, beta):
    ours = distillation(tokenizer, tmp_path, build(seed=1), DistillationTrainer, beta)
    theirs = distillation(tokenizer, tmp_path, build(seed=1), trl.DistillationTrainer, beta)
    (loss, grad, *rest), (want, want_grad, *want_rest) = distillation_step(ours), distillation_step(theirs)
    assert abs(loss - want) < 1e-6
    assert relative(grad, want_grad) < 1e-6
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


def test_images_are_distilled_as_trls_are():
    found = []
    for cls in (DistillationTrainer, trl.DistillationTrainer):
        # built without a processor, of which the loss knows nothing
        trainer = cls.__new__(cls)
        trainer.model, trainer.teacher_model = build("Qwen3VL").train(), build("Qwen3VL", seed=1).eval()
        trainer.teachers, trainer.teacher_weights, trainer.beta, trainer.temperature = (
            [trainer.teacher_model],
            None,
            0.5,
            1,
        )
        trainer._is_vlm, trainer.model_kwarg_keys, trainer.args = (
            True,
            {"logits_to_keep"},
            trl.DistillationConfig(use_cpu=True),
        )
        trainer._forward_redirection = _ForwardRedirection()
        trainer.accelerator = types.SimpleNamespace(unwrap_model=lambda model: model, is_main_process=False)
        found.append(distillation_step(trainer, images=True))
    for x, y in zip(*found, strict=True):
        assert relative(x.float(), y.float()) < 1e-6


def test_each_row_learns_from_the_teacher_that_its_column_names(tokenizer, tmp_path):
    teachers = {"math": build(seed=1), "code": build(seed=2), "law": build(seed=3)}
    ours = distillation(tokenizer, tmp_path, teachers, DistillationTrainer, 0.3, route="domain")
    read, seen = {name: [] for name in teachers}, ["code", "math", "code", "math"]
    for name, teacher in teachers.items():
        teacher.register_forward_pre_hook(lambda m, a, kw, n=name: read[n].append(kw), with_kwargs=True)
    index = torch.tensor([list(teachers).index(name) for name in seen])
    loss, grad, _, count = distillation_step(ours, teacher_index=index)
    # once to compare the head, then on its own rows; who has none reads one, for other ranks wait for it
    assert [len(read[name][-1]["input_ids"]) for name in teachers] == [2, 2, 1]
    want, want_grad = 0, 0
    for name in ("math", "code"):
        alone = distillation(tokenizer, tmp_path, teachers[name], trl.DistillationTrainer, 0.3)
        rows = torch.tensor([other == name for other in seen])
        value, gradient_of, *_ = distillation_step(alone, rows=rows)
        share = rollouts()["completion_mask"][rows].sum() / count
        want, want_grad = want + share * value, want_grad + share * gradient_of
    assert abs(loss - want) < 1e-6
    assert relative(grad, want_grad) < 1e-6


def test_a_routed_trainer_trains_on_its_column_and_logs_each_teacher(tokenizer, tmp_path):
    rows = {"prompt": ["w2 w3", "w4"] * 4, "domain": ["b", "a"] * 4}
    options = {"route": "domain", "rows": rows}
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    teachers = {"a": build(seed=1), "b": build(seed=2)}
    trainer = distillation(tokenizer, tmp_path, teachers, DistillationTrainer, 1.0, settings=settings, **options)
    trainer.train()
    logged = [r for r in trainer.state.log_history if "teacher_kl/a" in r]
    assert len(logged) == 2
    assert all(r["teacher_kl/a"] > 0 and r["teacher_kl/b"] > 0 for r in logged)


def test_a_column_names_a_teacher(tokenizer, tmp_path):
    rows = {"prompt": ["w2 w3", "w4"] * 4, "domain": ["b", "c"] * 4}
    teachers, options = {"a": build(seed=1), "b": build(seed=2)}, {"route": "domain", "rows": rows}
    trainer = distillation(
        tokenizer, tmp_path, teachers, DistillationTrainer, 1.0, settings={"max_steps": 1}, **options
    )
    with pytest.raises(ValueError, match=r"DistillationTrainer: domain must be one of \['a', 'b'\]; got 'c'"):
        trainer.train()
    with pytest.raises(ValueError, match="teacher_weights must be omitted with route"):
        distillation(tokenizer, tmp_path, teachers, DistillationTrainer, 1.0, teacher_weights=[0.5, 0.5], **options)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("name", "temperature"), [("GKD", 1.0), ("GOLD", 0.7)])
def test_gkd_and_gold_are_trls(tokenizer, tmp_path, name, temperature, beta):
    module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    own, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")

    class Theirs(own):
        _prepare_dataset = staticmethod(lambda data, *_: data)  # GOLD's wants a tokenizer of bytes

    class Ours(GKD, Theirs):
        pass

    turns = [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}]
    args = {k: v for k, v in COMMON.items() if k != "max_completion_length"}
    ids = torch.randint(2, V, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "prompts": ids[:, :4]}
    found = []
    for cls in (Ours, Theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = config(str(tmp_path), **args, beta=beta, temperature=temperature)
            data = Dataset.from_dict({"messages": [turns]})
            trainer = cls(build(), build("Gemma2", seed=1), settings, train_dataset=data, processing_class=tokenizer)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        found.append((loss.detach(), gradient(trainer.model, loss)))
    for x, y in zip(*found, strict=True):
        assert relative(x, y) < 1e-6


def test_a_trainer_that_needs_more_is_refused():
    class Other:
        pass

    with pytest.raises(ValueError, match="fuse: trainer must have a model; got Other"):
        fuse(Other())
    Other.model = build()
    with pytest.raises(ValueError, match="fuse: trainer must have added trl's fused lm_head to its model; got Other"):
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
    model = build()
    add_fused_lm_head(model)
    asked = inspect.getclosurevars(model.forward).nonlocals
    assert asked.keys() >= {"outputs", "temperature", "cast_lm_head_to_fp32"}
    for name in ("_generate_and_score_completions", "_set_signature_columns_if_needed", "compute_loss"):
        assert hasattr(trl.DistillationTrainer, name), name


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
