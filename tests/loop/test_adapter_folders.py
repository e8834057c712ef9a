"""Folders that hold an adapter: peft reads them, and what does not fit its base is refused."""

import copy
import json
import re

import pytest
import torch
from copd_cases import make_config, run, same
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_adapter import LORA, logits, make_base, moved
from test_adapter_layers import HEADS, make_untied

from copd.adapter import Adapter, apply, bare, lora_config
from copd.model import load_saved
from copd.settings import AdapterConfig, ModelConfig


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
