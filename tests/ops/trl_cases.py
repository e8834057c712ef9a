"""TRL's trainers around models of a few thousand weights, on batches that nobody had to generate."""

import warnings

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

V = 64
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": V, "pad_token_id": 0, "eos_token_id": 1}
# each transforms its logits in another way, or keeps its layers under another name
FAMILIES = {
    "Qwen3": {},
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Gemma3Text": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Qwen3VL": {},
}
IMAGE = 60


def build(family="Qwen3", seed=0, **options):
    sizes = SIZES | FAMILIES[family] | options
    name = f"{family.removesuffix('Text')}ForCausalLM"
    if family == "Qwen3VL":
        text = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"deepstack_visual_indexes": [0], "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        ids = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
        sizes, name = {"text_config": text, "vision_config": vision, **ids}, "Qwen3VLForConditionalGeneration"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def make_tokenizer():
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


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


def rollouts(B=4, P=3, C=5, images=False):
    """A batch as generation makes it in TRL's trainers, with prompts and completions of any length."""
    if images:  # one a row, of 16 patches that are 4 tokens
        inputs = rollouts(B, 9, C)
        inputs["prompt_ids"].clamp_(max=59)
        inputs["completion_ids"].clamp_(max=59)
        inputs["prompt_ids"][:, 2:8] = torch.tensor([62, IMAGE, IMAGE, IMAGE, IMAGE, 63])
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(16 * B, 3 * 2 * 4 * 4, generator=generator)
        types = torch.cat([inputs["prompt_ids"] == IMAGE, torch.zeros(B, C, dtype=torch.bool)], 1).int()
        grids = torch.tensor([[1, 4, 4]]).expand(B, 3)
        return inputs | {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}
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


def grpo_inputs(trainer, model, images=False):
    inputs = rollouts(images=images)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        media = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if images}
        media |= {"num_images": [1] * len(ids)} if images else {}
        reference, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, 5, **media)
    return inputs | media | {"ref_per_token_logps": reference + 0.1}


def grpo_step(trainer, images=False):
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, grpo_inputs(trainer, trainer.model, images))
    return loss.detach(), gradient(trainer.model, loss)


def distillation(tokenizer, tmp_path, teacher, cls, beta, settings=None, rows=None, **options):
    config = trl.DistillationConfig(str(tmp_path), **COMMON | (settings or {}), beta=beta, temperature=0.9)
    rows = Dataset.from_dict(rows or {"prompt": ["w2 w3", "w4"]})
    return cls(build(), teacher, config, train_dataset=rows, processing_class=tokenizer, **options)


def distillation_step(trainer, rows=slice(None), images=False, **extra):
    trainer.model.train()
    inputs = {name: x[rows] if x is not None and x.dim() else x for name, x in rollouts(images=images).items()} | extra
    loss, entropy, count = trainer._compute_loss(trainer.model, inputs, None)
    return loss.detach(), gradient(trainer.model, loss), entropy, count
