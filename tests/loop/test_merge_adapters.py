"""Merging adapters: their deltas are the task vectors, whatever they become."""

import pytest
import torch
from copd_cases import make_config, run
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM

from copd import cli, merge_adapters
from copd.adapter import Adapter, bare, lora_config
from copd.lab.config import TinyConfig
from copd.lab.tiny import build_tiny
from copd.merge import merge
from copd.model import load_saved
from copd.settings import AdapterConfig, MergeConfig, ModelConfig

METHODS = {
    "mean": MergeConfig("mean"),
    "weighted": MergeConfig("weighted", {"a": 2.0, "b": 1.0}),
    "task_arithmetic": MergeConfig("task_arithmetic", {"c": 0.25}, scale=0.7),
    "ties": MergeConfig("ties", {"a": 0.5}, density=0.3),
}
LINEAR = ("mean", "weighted", "task_arithmetic")


def make_base():
    config = Qwen3Config(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


def make_adapters(base, names="abc", scale=0.1, **settings):
    settings = {"rank": 3, "alpha": 7.0} | settings
    lora = lora_config(base, ModelConfig(adapter=AdapterConfig(**settings)))
    adapters = {name: Adapter(base, name, lora) for name in names}
    for seed, adapter in enumerate(adapters.values()):
        g = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=g))
    return adapters


def whole_states(base, adapters):
    """Each branch as a model of its own, in fp64 so that the merge of these is the oracle."""
    states, start = {}, bare(base).double().state_dict()
    for name, adapter in adapters.items():
        states[name] = {key: value.clone() for key, value in start.items()}
        for key, make in adapter.deltas().items():
            states[name][key] += make().double()
    return start, states


def deltas(adapter):
    return {key: make() for key, make in adapter.deltas().items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_is_the_merge_of_the_whole_models(method):
    base = make_base()
    adapters = make_adapters(base, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["lm_head"])
    merged = merge_adapters.into_model(adapters, METHODS[method]).state_dict()
    expected = merge(*whole_states(base, adapters), METHODS[method])
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value.float(), rtol=1e-5, atol=1e-6)


def test_a_merged_model_is_the_sum_of_the_deltas():
    base = make_base()
    start = bare(base).state_dict()
    adapters = make_adapters(base)
    merged = merge_adapters.into_model(adapters, MergeConfig("task_arithmetic")).state_dict()
    for key, value in start.items():
        made = [adapter.deltas()[key]().double() for adapter in adapters.values() if key in adapter.deltas()]
        assert (merged[key].double() - (value.double() + sum(made))).abs().max() <= 1e-6


def test_a_weight_that_no_adapter_changes_stays_bit_for_bit():
    base = make_base()
    start = bare(base).state_dict()
    merged = merge_adapters.into_model(make_adapters(base, target_modules=["q_proj"]), MergeConfig()).state_dict()
    assert [key for key in start if not torch.equal(start[key], merged[key])] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    ]


def test_embeddings_and_convolutions_have_deltas_too():
    """A model with the deltas in its weights computes what the adapter does."""
    base = build_tiny(TinyConfig(hidden_size=32, vision_hidden_size=16), 0).eval()
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())  # untied
    adapter = make_adapters(base, "a", target_modules=["embed_tokens", "proj", "up_proj"])["a"]
    merged = merge_adapters.into_model({"a": adapter}, MergeConfig())
    ids = torch.arange(3, 20)[None]
    pixels = torch.randn(16, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4]])
    with torch.no_grad(), adapter.active():
        expected = base(input_ids=ids).logits, base.model.get_image_features(*pixels).pooler_output
    with torch.no_grad():
        found = merged(input_ids=ids).logits, merged.model.get_image_features(*pixels).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", LINEAR)
def test_concatenated_ranks_are_exact(method):
    base = make_base()
    adapters = make_adapters(base, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["lm_head"])
    merged = merge_adapters.into_adapter(adapters, METHODS[method])
    assert merged.config.r == 9
    assert merged.error == 0.0
    start = bare(base).state_dict()
    expected = merge_adapters.into_model(adapters, METHODS[method]).state_dict()
    for key, value in deltas(merged).items():
        torch.testing.assert_close(start[key] + value, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 4, 9, 40])
def test_a_cut_adapter_is_the_best_of_its_rank_and_its_error_is_reported(method, rank, caplog):
    """By Eckart and Young: what is lost is the tail of the singular values."""
    base = make_base()
    adapters = make_adapters(base, target_modules=["q_proj", "embed_tokens"])
    cfg = MergeConfig(**{**vars(METHODS[method]), "into": "adapter", "rank": rank})
    start = bare(base).double().state_dict()
    exact = merge(*whole_states(base, adapters), METHODS[method])
    with caplog.at_level("INFO", logger="copd"):
        merged = merge_adapters.into_adapter(adapters, cfg)
    lost = total = 0.0
    for key, value in deltas(merged).items():
        values = torch.linalg.svdvals(exact[key].double() - start[key])
        miss = (value.double() - (exact[key].double() - start[key])).square().sum().item()
        assert miss == pytest.approx(values[rank:].square().sum().item(), rel=1e-3, abs=1e-9)
        lost, total = lost + miss, total + values.square().sum().item()
    assert merged.error == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-5)
    assert f"rank {rank}, relative error {merged.error:.2e}" in caplog.text


def test_adapters_of_other_ranks_and_scales_become_one():
    base = make_base()
    adapters = make_adapters(base, "ab", target_modules=["q_proj"])
    wide = LoraConfig(r=5, lora_alpha=11, use_rslora=True, target_modules=["q_proj"])
    adapters["c"] = Adapter(base, "c", wide, seed=3)
    for parameter in adapters["c"].parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    merged = merge_adapters.into_adapter(adapters, MergeConfig())
    assert merged.config.r == 11
    for key, value in deltas(merged).items():
        torch.testing.assert_close(value, torch.stack([deltas(a)[key] for a in adapters.values()]).mean(0))


def test_adapters_of_other_layers_are_refused_as_one_adapter_and_merged_as_a_model():
    base = make_base()
    adapters = make_adapters(base, "a", target_modules=["q_proj"])
    adapters["b"] = Adapter(base, "b", LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match=r"merge: adapters must change the same layers .* differ in .*k_proj"):
        merge_adapters.into_adapter(adapters, MergeConfig())
    assert merge_adapters.into_model(adapters, MergeConfig()) is not None


def test_ties_into_an_adapter_needs_a_rank():
    with pytest.raises(ValueError, match=r"config: merge.rank must be given for ties into an adapter"):
        MergeConfig("ties", into="adapter")
    with pytest.raises(ValueError, match=r"config: merge.rank must be at least 1; got 0"):
        MergeConfig(into="adapter", rank=0)


def test_whole_models_do_not_become_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"config: merge.into must be model without model.adapter; got adapter"):
        make_config(tmp_path, "merge.into=adapter")
    with pytest.raises(SystemExit, match="merge: branches must be adapters to become one; got a whole model"):
        cli.main(["merge", "a", "b", "--out", str(tmp_path), "into=adapter"])


def test_a_run_may_merge_into_an_adapter(tmp_path):
    cfg = make_config(tmp_path, "model.adapter.rank=2", "merge.into=adapter")
    results = run(cfg)
    assert "merged" in results["final"]
    branches, merged = (
        [load_saved(cfg.run_dir / name)[0].state_dict() for name in names]
        for names in (("branch-text", "branch-image"), ("merged",))
    )
    for key, value in merged[0].items():
        torch.testing.assert_close(value, (branches[0][key] + branches[1][key]) / 2, rtol=1e-5, atol=1e-6)


def test_eval_and_merge_take_adapter_folders(tmp_path, capsys):
    cfg = make_config(tmp_path, "method=expert", "model.adapter.rank=2")
    run(cfg)
    folders = [str(cfg.run_dir / f"branch-{name}") for name in ("text", "image")]
    whole, one = str(tmp_path / "whole"), str(tmp_path / "one")
    cli.main(["merge", *folders, "--out", whole, "method=weighted", f"weights={{{folders[0]}: 3}}"])
    cli.main(["merge", *folders, "--out", one, "into=adapter", "method=weighted", f"weights={{{folders[0]}: 3}}"])
    text, image, found, again = (load_saved(folder)[0].state_dict() for folder in (*folders, whole, one))
    for key in found:
        torch.testing.assert_close(found[key], (3 * text[key] + image[key]) / 4, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again[key], found[key], rtol=1e-5, atol=1e-6)
    capsys.readouterr()
    cli.main(["eval", folders[0], one, "--config", str(cfg.run_dir / "config.yaml")])
    assert capsys.readouterr().out.count("accuracy") == 4
