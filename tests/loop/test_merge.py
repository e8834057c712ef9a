"""Merging, against the formulas and by hand."""

import pytest
import torch
from copd_cases import make_branch, make_config, same, weights

from copd.merge import merge
from copd.settings import MergeConfig


def states(seed=0, shape=(5, 7)):
    g = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(shape, generator=g), "count": torch.tensor(3)}
    branches = {n: {"w": base["w"] + torch.randn(shape, generator=g), "count": torch.tensor(3)} for n in "abc"}
    return base, branches


def test_mean_is_the_arithmetic_mean_exactly():
    base, branches = states()
    merged = merge(base, branches, MergeConfig("mean", {"a": 5.0}))
    assert torch.equal(merged["w"], torch.stack([b["w"] for b in branches.values()]).mean(0))
    assert merged["count"] == 3


def test_mean_of_models_keeps_embedding_and_lm_head_tied(tmp_path):
    cfg = make_config(tmp_path)
    branches = {name: make_branch(cfg, name, seed) for seed, name in enumerate(("text", "image"))}
    target = make_branch(cfg, seed=3)
    target.model.load_state_dict(merge(weights(target), {name: weights(b) for name, b in branches.items()}, cfg.merge))
    for name, value in weights(target).items():
        assert torch.equal(value, torch.stack([weights(b)[name] for b in branches.values()]).mean(0))
    assert target.model.lm_head.weight is target.model.get_input_embeddings().weight


def test_merging_one_branch_gives_it_back():
    base, branches = states()
    assert torch.equal(merge(base, {"a": branches["a"]}, MergeConfig())["w"], branches["a"]["w"])


def test_weights_are_normalised_for_the_weighted_mean():
    base, branches = states()
    merged = merge(base, branches, MergeConfig("weighted", {"a": 2.0, "b": 1.0, "c": 1.0}))
    expected = (2 * branches["a"]["w"] + branches["b"]["w"] + branches["c"]["w"]) / 4
    torch.testing.assert_close(merged["w"], expected)


def test_task_arithmetic_adds_scaled_task_vectors():
    base, branches = states()
    merged = merge(base, branches, MergeConfig("task_arithmetic", {"c": 0.0}, scale=0.5))
    expected = base["w"] + 0.5 * (branches["a"]["w"] + branches["b"]["w"] - 2 * base["w"])
    torch.testing.assert_close(merged["w"], expected)


def test_ties_trims_elects_a_sign_and_averages_what_agrees():
    base = {"w": torch.zeros(4)}
    branches = {
        "a": {"w": torch.tensor([4.0, -3.0, 0.1, 0.0])},
        "b": {"w": torch.tensor([2.0, 5.0, 0.0, 0.2])},
        "c": {"w": torch.tensor([-1.0, 1.0, 0.0, 0.0])},
    }
    # half of each is kept: a [4, -3], b [2, 5], c [-1, 1]; signs +, +; means of (4, 2) and (5, 1)
    merged = merge(base, branches, MergeConfig("ties", density=0.5))
    assert merged["w"].tolist() == [3.0, 3.0, 0.0, 0.0]


def test_ties_of_one_branch_at_full_density_is_that_branch():
    base, branches = states()
    merged = merge(base, {"a": branches["a"]}, MergeConfig("ties", density=1.0))
    torch.testing.assert_close(merged["w"], branches["a"]["w"])


def test_bf16_weights_are_merged_in_fp32():
    base = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    branches = {str(i): {"w": torch.tensor([1.0 + i / 128], dtype=torch.bfloat16)} for i in range(3)}
    merged = merge(base, branches, MergeConfig())["w"]
    assert merged.dtype == torch.bfloat16
    assert merged.item() == torch.tensor(1.0 + 1 / 128).bfloat16().item()


def test_the_inputs_are_left_as_they_were():
    base, branches = states()
    again, _ = states()
    for method in ("mean", "weighted", "task_arithmetic", "ties"):
        merge(base, branches, MergeConfig(method))
    assert same(base, again)


def test_branches_of_other_parameters_are_refused():
    base, branches = states()
    with pytest.raises(ValueError, match=r"merge: branch 'a' must have the base's parameters; got a difference in 'w'"):
        merge(base, {"a": {"count": torch.tensor(3)}}, MergeConfig())
    branches["b"]["w"] = torch.zeros(6, 7)
    with pytest.raises(ValueError, match=r"merge: w of 'b' must have shape \(5, 7\); got \(6, 7\)"):
        merge(base, branches, MergeConfig())


def test_weights_that_cancel_are_refused():
    base, branches = states()
    with pytest.raises(ValueError, match="merge: weights must have a positive sum"):
        merge(base, branches, MergeConfig("weighted", {"a": 0.0, "b": 0.0, "c": 0.0}))
