"""Configs: files, overrides, errors."""

from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest
from copd_cases import make_config

from copd import config, schema, settings, topology
from copd.lab import config as lab
from copd.lab.config import LabConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_config_survives_the_round_trip(tmp_path):
    cfg = make_config(tmp_path, "opd.branch_beta.text=0.5", "branches.image.options.grid=2")
    assert schema.load(LabConfig, asdict(cfg)) == cfg


@pytest.mark.parametrize("module", [config, settings, lab])
def test_every_field_has_a_line_of_documentation(module):
    source = Path(module.__file__).read_text().splitlines()
    for cls in vars(module).values():
        if is_dataclass(cls) and cls.__module__ == module.__name__ and cls not in (config.Config, LabConfig):
            for field in cls.__annotations__:
                (place,) = [i for i, line in enumerate(source) if line.startswith(f"    {field}: ")][:1] or [None]
                assert source[place + 1].strip().startswith('"""'), f"{cls.__name__}.{field}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rlvr.clip=1", "Key 'clip' not in 'RLVRConfig'"),
        ("method=grpo", "Invalid value 'grpo', expected one of"),
        ("optim.lr=fast", "could not be converted to Float"),
        ("branches.text.data.file=x", "Key 'file' not in 'DataConfig'"),
        ("hub=audio", r"hub must be one of the branches \['text', 'image'\]; got 'audio'"),
        ("opd.branch_beta.audio=1", "opd.branch_beta must name branches"),
        ("merge.weights.audio=1", "merge.weights must name branches"),
        ("branches.audio.options.steps=1", "branches.audio.task must be set"),
        ("rollout.samples=0", "rollout.samples must be at least 1; got 0"),
        ("rollout.temperature=0", "rollout.temperature must be above 0; got 0.0"),
        ("merge.density=0", r"merge.density must be in \(0, 1\]; got 0.0"),
        ("optim.lr=-1", "optim.lr must be at least 0; got -1.0"),
        ("optim.betas=[0.9]", r"optim.betas must be two numbers in \[0, 1\); got \[0.9\]"),
        ("eval.prompts=0", "eval.prompts must be at least 1; got 0"),
        ("rlvr.updates_per_batch=0", "rlvr.updates_per_batch must be at least 1; got 0"),
        ("opd.jsd_beta=2", r"opd.jsd_beta must be in \[0, 1\]; got 2.0"),
        ("branches.text.data.fps=0", "data.fps must be above 0; got 0.0"),
        ("branches.text.data.rewards=[]", "data.rewards must name at least one reward; got none"),
        ("branches.text.data.reward_weights=[1,2]", r"data.reward_weights must be one for each of the 1 .* got \[1.0"),
        ("keep_checkpoints=0", "keep_checkpoints must be at least 1; got 0"),
        ("micro_batch_tokens=0", "micro_batch_tokens must be at least 1; got 0"),
        *(
            (f"branches.{name}.task=count", f"branches must have names that make folders.*; got '{name}'")
            for name in ("base", "merged", "overall", "a/b", "-a", "a b")
        ),
        ("cycles=-1", "cycles must be at least 0; got -1"),
        ("cycles", "an override must have the form key=value; got 'cycles'"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(tmp_path, override, message):
    with pytest.raises(ValueError, match=f"^config: .*{message}"):
        make_config(tmp_path, override)


def test_a_run_without_branches_is_an_error():
    with pytest.raises(ValueError, match="branches must name at least one domain; got none"):
        schema.load(config.Config, None)


def test_the_lab_sets_more_than_the_loop_and_the_loop_refuses_it():
    lines = ["branches.text.task=data", "warmstart.clean_steps=1"]
    assert schema.load(LabConfig, None, lines).warmstart.clean_steps == 1
    with pytest.raises(ValueError, match="Key 'warmstart' not in 'Config'"):
        schema.load(config.Config, None, lines)


@pytest.mark.parametrize("name", ["smoke", "smoke_lora", "qwen3_vl_4b", "qwen3_vl_4b_lora"])
def test_the_bundled_runs_load(name):
    assert list(schema.load(LabConfig, CONFIGS / f"{name}.yaml").branches) == ["text", "image", "video"]


def test_the_run_for_eight_gpus_gives_each_branch_as_many():
    assert 8 % len(schema.load(LabConfig, CONFIGS / "qwen3_vl_4b_8gpu.yaml").branches) == 0


def test_the_paper_is_the_default():
    cfg = schema.load(LabConfig, CONFIGS / "smoke.yaml")
    paper = settings.OPDConfig()
    assert (paper.signal, paper.teacher, paper.native, paper.delta_clamp) == ("sampled", "live", True, None)
    assert (cfg.rlvr.clip_low, cfg.rlvr.clip_high, cfg.rlvr.loss_aggregation) == (0.2, 0.28, "sequence")
    assert (cfg.topology, cfg.merge.method, settings.OptimConfig().lr) == ("hub", "mean", 1e-6)


def test_the_hub_exchanges_with_every_spoke_and_spokes_with_the_hub_alone(tmp_path):
    domains = ("text", "image", "video")
    hub = topology.teachers(make_config(tmp_path, "hub=image", domains=domains))
    assert hub == {"text": ["image"], "image": ["text", "video"], "video": ["image"]}
    pairs = topology.teachers(make_config(tmp_path, "topology=all", domains=domains))
    assert pairs["video"] == ["text", "image"]
