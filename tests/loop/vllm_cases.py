"""Rollouts by a real vLLM. `test_vllm.py` runs this file in a process, and an environment, of its own."""

from copy import copy
from dataclasses import replace

import pytest
import torch
from copd_cases import make_branch, make_config
from test_adapter import make_base, moved
from test_data import EXAMPLES
from test_data import checkpoint as save_model
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralConfig, MixtralForCausalLM, PhiConfig, PhiForCausalLM

from copd import checkpoint, cli, engine, schema, train
from copd.adapter import Adapter, lora_config
from copd.branch import Branch
from copd.config import Config
from copd.lab.tasks import vocabulary
from copd.rollout import generate
from copd.vllm import VLLM
from copd.weights import Whole
from copd_kernels import reference

DOMAINS = ("text", "image", "video")
# head sizes that vLLM's CPU attention has, and memory that a shared machine has
SIZES = ("model.hidden_size=128", "model.vision_hidden_size=64")
OPTIONS = "rollout.engine_options={kv_cache_memory_bytes: 16777216, max_num_seqs: 32, block_size: 32}"
LORA = ("model.adapter.rank=4", "model.adapter.alpha=8", "model.freeze_vision=true")


def config(folder, *overrides):
    few = ("rollout.max_new_tokens=6", "rollout.temperature=0.7")
    return make_config(folder, *SIZES, "rollout.engine=vllm", OPTIONS, *few, *overrides, domains=DOMAINS)


@pytest.fixture(scope="module")
def branches(tmp_path_factory, processor):
    """Three policies, each of a domain of its own, that share one engine."""
    cfg = config(tmp_path_factory.mktemp("runs"))
    made = [make_branch(cfg, name, seed) for seed, name in enumerate(DOMAINS)]
    vllm = engine.make(cfg, made[0].model, processor)
    for branch in made:
        branch.engine = vllm
    return made


def prompts(branches, count=2):
    """Text, images and videos in one batch; the first reaches over blocks of the cache, as a known prefix would."""
    found = [branch.tasks[0].prompt(i) for branch in branches for i in range(count)]
    long = {name: getattr(found[0], name) * 10 for name in ("input_ids", "mm_token_type_ids")}
    return [replace(found[0], **long), *found[1:]]


def error(branch, rollout):
    """The largest difference between the engine's log-probs and those of the trainer's own forward."""
    rows, temperature = range(len(rollout.tokens)), branch.cfg.rollout.temperature
    with torch.no_grad(), branch.active():
        head, tokens = branch.head(rollout, list(rows))
        logits = reference.logits(head).float() / temperature
    if temperature != 1:
        logits[:, branch.special.media] = -torch.inf
    logp = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return (logp - rollout.logp[rollout.mask]).abs().max().item()


def test_each_branch_in_turn_samples_text_images_and_videos_with_the_trainers_log_probs(branches):
    for branch in [*branches, branches[0]]:
        rollout = branch.rollout(prompts(branches), seed=1)
        assert rollout.tokens.shape[0] == 6 * 3
        assert error(branch, rollout) < 1e-5


def test_greedy_tokens_are_those_of_transformers(branches):
    for branch in branches:
        ours = branch.rollout(prompts(branches), 0, 1, greedy=True)
        theirs = generate(branch.model, ours.prompts, 1, branch.cfg.rollout, branch.special, 0, greedy=True)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.mask, theirs.mask)


def test_sampling_depends_on_its_seed_alone(branches):
    first, other = prompts(branches), branches[0].rollout(prompts(branches), 2)
    again = [branches[0].rollout(first, seed) for seed in (2, 3)]
    assert torch.equal(other.tokens, again[0].tokens)
    assert not torch.equal(other.tokens, again[1].tokens)
    # samples of a prompt, and equal prompts, draw with noise of their own
    twice = branches[0].rollout([first[0], first[0]], 2, 8)
    assert len({tuple(row) for row in twice.tokens.tolist()}) > 8


def test_the_mask_ends_with_eos_and_truncated_rows_have_none(branches):
    rollout = branches[0].rollout(prompts(branches), 4, 32)
    eos = torch.tensor(branches[0].special.eos)
    ends = torch.isin(rollout.tokens, eos) & rollout.mask
    lengths = rollout.mask.sum(1)
    assert rollout.truncated.any()
    assert not rollout.truncated.all()
    assert torch.equal(ends.any(1), ~rollout.truncated)
    assert (lengths[rollout.truncated] == 6).all()
    assert (ends.float().argmax(1)[~rollout.truncated] == lengths[~rollout.truncated] - 1).all()
    assert not torch.isin(rollout.tokens[rollout.mask], torch.tensor(branches[0].special.media)).any()


def test_weights_that_moved_are_those_it_samples_with(branches):
    branch, asked = branches[1], prompts(branches)
    before = branch.rollout(asked, 5)
    with torch.no_grad():
        for parameter in branch.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert error(branch, before) > 0.1
    assert error(branch, branch.rollout(asked, 5)) < 1e-5


def test_a_prompt_beyond_the_limit_is_named_and_harms_nothing(branches):
    prompt = branches[0].tasks[0].prompt(3)
    long = replace(prompt, input_ids=prompt.input_ids * 20_000)
    rule = r"prompt and max_new_tokens must fit in the \d+ tokens"
    for where, named in (("", "row 3 of text"), ("text: row 7 of rows.jsonl", "text: row 7 of rows.jsonl")):
        with pytest.raises(ValueError, match=f"{rule} .* for {named};"):
            branches[0].rollout([prompt, replace(long, where=where)], 0)
    assert error(branches[0], branches[0].rollout([prompt], 0)) < 1e-5


def test_media_of_another_form_are_refused_by_name(branches):
    prompt = branches[1].tasks[0].prompt(3)
    other = replace(prompt, media={"pixel_values": prompt.media["pixel_values"], "image_sizes": torch.ones(1, 2)})
    got = "patches and grids, .* got image_sizes of Qwen3VLForConditionalGeneration for row 3 of image"
    with pytest.raises(ValueError, match=got + r"; rollout\.engine=transformers samples them"):
        branches[1].rollout([other], 0)
    assert error(branches[1], branches[1].rollout([prompt], 0)) < 1e-5


def test_after_an_exception_inside_it_nothing_is_sampled(branches, monkeypatch):
    broken = copy(branches[0].engine)
    monkeypatch.setattr(broken, "_generate", lambda *_: 1 / 0)
    monkeypatch.setattr(branches[0], "engine", broken)
    with pytest.raises(RuntimeError, match="engine vllm must come to its end; got ZeroDivisionError"):
        branches[0].rollout(prompts(branches), 0)
    with pytest.raises(RuntimeError, match="engine vllm must be started anew"):
        branches[0].rollout(prompts(branches), 0)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, processor):
    """Three adapters on one base, and the base itself, that share one engine."""
    cfg = config(tmp_path_factory.mktemp("runs"), *LORA)
    base = make_base(cfg)
    lora = lora_config(base, cfg.model)
    vllm = engine.make(cfg, base, processor)
    owned = [moved(Adapter(base, name, lora), seed, scale=0.1) for seed, name in enumerate(DOMAINS)]
    tasks = [make_branch(cfg, name).tasks for name in DOMAINS]
    made = [
        Branch(w.name, t, w, processor.tokenizer, cfg, base.device, vllm) for w, t in zip(owned, tasks, strict=True)
    ]
    return [*made, Branch("base", tasks[0], base, processor.tokenizer, cfg, base.device, vllm)]


def test_adapters_are_requests_of_one_engine_updated_in_place(adapters):
    asked = prompts(adapters[:3])
    for visit, branch in enumerate(adapters * 2):
        rollout = branch.rollout(asked, 6)
        assert error(branch, rollout) < 1e-5
        if branch.name != "base":
            moved(branch.weights, 10 + visit, scale=0.1)
            assert error(branch, rollout) > 0.1
            assert error(branch, branch.rollout(asked, 6)) < 1e-5


def test_an_adapter_of_layers_that_the_engine_leaves_alone_is_refused(adapters, tmp_path):
    cfg = config(tmp_path, *LORA, "model.freeze_vision=false")
    base = adapters[0].model
    tower = Adapter(base, "tower", lora_config(make_branch(cfg).model, cfg.model))
    with pytest.raises(ValueError, match=r"adapters of linear layers of the language model alone; got model\.visual"):
        adapters[0].engine.sample(tower, [], 1, adapters[0].special, 0)
    tower.remove()


TOKENIZER, PIXELS = "tokenizer_config.json", "processor_config.json"


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ((TOKENIZER, '_token": "<|im_end|>"', '_token": "<|im_start|>"'), "eos_token_id 1 instead of 2"),
        (("tokenizer.json", '"!": ', '"?!": '), "another vocabulary"),
        ((PIXELS, "0.5,", "0.4,"), "other pixel_values of one picture, by Qwen2VLImageProcessor instead of Qwen2VL"),
        ((PIXELS, '"shortest_edge": 256', '"shortest_edge": 6400'), "other pixel_values of one picture"),
        ((PIXELS, "Qwen3VLProcessor", "NoProcessor"), "TokenizersBackend, which reads no pictures"),
    ],
)
def test_a_processor_that_is_read_as_another_one_is_refused(branches, processor, monkeypatch, change, got):
    (file, written, instead), save = change, type(processor).save_pretrained

    def otherwise(self, folder):
        save(self, folder)
        text = (folder / file).read_text()
        assert written in text
        (folder / file).write_text(text.replace(written, instead))

    monkeypatch.setattr(type(processor), "save_pretrained", otherwise)
    vllm = engine.make(branches[0].cfg, branches[0].model, processor)
    with pytest.raises(ValueError, match=f"rollout: engine vllm must read the run's processor as it is; got {got}"):
        vllm.sample(branches[0].weights, [], 1, branches[0].special, 0)


def test_an_option_that_the_engine_does_not_know_is_named(branches, processor):
    cfg = branches[0].cfg
    cfg = replace(cfg, rollout=replace(cfg.rollout, engine_options={"max_num_sequences": 8}))
    vllm = engine.make(cfg, branches[0].model, processor)
    with pytest.raises(
        RuntimeError, match=r"must start with .* rollout\.engine_options; got TypeError: .*num_sequences"
    ):
        vllm.sample(branches[0].weights, [], 1, branches[0].special, 0)


def test_a_run_samples_with_it_and_goes_on_after_it_failed_and_eval_too(processor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES.parent)
    save_model(tmp_path / "base", processor, hidden_size=128, vision_hidden_size=64)
    options = [
        f"model.path={tmp_path / 'base'}",
        f"output_dir={tmp_path / 'runs'}",
        "model.dtype=float32",
        "cycles=1",
        "rl_steps=1",
        "opd_steps=1",
        "rollout={prompts: 2, samples: 2, max_new_tokens: 6, mask_truncated: false, engine: vllm}",
        OPTIONS,
        "eval={every: 0, prompts: 2, samples: 1, curve_prompts: 2, divergence_prompts: 1, shown: 1}",
    ]
    cfg = schema.load(Config, EXAMPLES / "shapes.yaml", options)
    calls, inner = [], VLLM._generate

    def fails_in_the_second_step(self, *asked):
        calls.append(asked)
        return inner(self, *asked) if len(calls) != 5 else 1 / 0

    monkeypatch.setattr(VLLM, "_generate", fails_in_the_second_step)
    with pytest.raises(RuntimeError, match="engine vllm must come to its end; got ZeroDivisionError"):
        train.run(cfg)
    assert [path.name for path in checkpoint.found(cfg.run_dir)] == ["checkpoint-1"]
    train.run(cfg)
    steps = [line for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert len(steps) == 2 * 3
    capsys.readouterr()
    cli.main(["eval", str(cfg.run_dir / "merged"), "--config", str(cfg.run_dir / "config.yaml")])
    assert capsys.readouterr().out.count("accuracy") == 3


# engines of their own come last: one that is let go takes the process group of the others with it
def test_more_prompts_than_a_forward_of_the_engine_takes_are_sampled(branches, processor, monkeypatch):
    branch = branches[0]
    prompt, names = branch.tasks[0].prompt(0), ("input_ids", "mm_token_type_ids")
    long = [replace(prompt, **{name: getattr(prompt, name) * (7 + i) for name in names}) for i in range(12)]
    few = {"max_model_len": 256, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 1 << 25, "max_num_seqs": 32}
    cfg = replace(branch.cfg, rollout=replace(branch.cfg.rollout, engine_options=few, temperature=1.0))
    monkeypatch.setattr(branch, "cfg", cfg)  # at this temperature log-probs are over all words
    monkeypatch.setattr(branch, "engine", engine.make(cfg, branch.model, processor))
    assert sum(len(row.input_ids) for row in long) > 2 * 256
    assert error(branch, branch.rollout(long, 7)) < 1e-5


def test_a_text_model_that_multiplies_by_its_embeddings_is_sampled(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32, "sliding_window": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 32, "initializer_range": 0.15}
    special = {"vocab_size": 256, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    torch.manual_seed(0)
    model, words = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **special)).eval(), vocabulary.tokenizer()
    cfg = config(tmp_path, "rollout.temperature=1")
    branch = Branch("text", make_branch(cfg).tasks, model, words, cfg, model.device, engine.make(cfg, model, words))
    assert error(branch, branch.rollout([branch.tasks[0].prompt(i) for i in range(2)], 8)) < 1e-5


def test_experts_are_refused_on_a_cpu(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=256, num_key_value_heads=1, num_local_experts=2, **sizes))
    vllm = engine.make(config(tmp_path), model, vocabulary.tokenizer())
    with pytest.raises(ValueError, match="must have a model without experts on a CPU; got MixtralForCausalLM; rollout"):
        vllm.sample(Whole(model), [], 1, None, 0)


def test_a_model_that_the_engine_takes_from_transformers_is_refused(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = PhiForCausalLM(PhiConfig(vocab_size=256, **sizes))
    vllm = engine.make(config(tmp_path), model, vocabulary.tokenizer())
    with pytest.raises(ValueError, match="must have a model of its own for what it samples; got PhiForCausalLM"):
        vllm.sample(Whole(model), [], 1, None, 0)
