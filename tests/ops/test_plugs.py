"""The plugs under examples/, each run by the framework's own hook against the framework's own loss.

The frameworks are not among the test dependencies: they pin other releases of torch, transformers and trl, or bring
gigabytes. `pip install --no-deps` of one of them and of what it imports is enough for its tests.
"""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

from copd_kernels import Head

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
V = 53
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": V, "pad_token_id": 0, "eos_token_id": 1}


def build(family, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**SIZES | options)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def gradient(model, loss):
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def same(ours, theirs, tolerance=1e-6):
    for x, y in zip(ours, theirs, strict=True):
        assert ((x - y).norm() / y.norm()).item() < tolerance


def ids(B=2, L=7, seed=0):
    return torch.randint(2, V, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for path in EXAMPLES.glob("*_copd.py"):
        sys.modules.pop(path.stem, None)


# verl


@pytest.fixture
def verl(examples, monkeypatch):
    """verl's module after its own import of `external_lib`, and afterwards as it was."""
    module = pytest.importorskip("verl.models.transformers.monkey_patch", reason="verl is not installed")
    from verl.utils.import_utils import import_external_libs

    # else verl patches a class that trl no longer has
    monkeypatch.setattr(module, "is_trl_available", lambda: False)
    before = module.patch_forward_with_backends
    import_external_libs("verl_copd")
    yield module
    module.patch_forward_with_backends = before


def verl_step(model, **inputs):
    weigh = torch.linspace(0.5, 1.5, 14).view(2, 7)
    out = model(input_ids=ids(), temperature=0.8, return_dict=True, **inputs)
    return out.log_probs.detach(), out.entropy.detach(), gradient(model, (weigh * (out.log_probs - out.entropy)).sum())


@pytest.mark.parametrize("labels", [{}, {"shift_labels": ids(seed=1)}])
def test_verl_gets_its_own_log_probs_and_entropies(verl, labels):
    from verl.models.transformers.dense_common import forward_with_torch_backend

    ours, theirs = build("Qwen3"), build("Qwen3")
    verl.apply_monkey_patch(ours, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="torch")
    theirs.forward = types.MethodType(forward_with_torch_backend, theirs)
    same(verl_step(ours, **labels), verl_step(theirs, **labels))


def test_verl_gets_gemmas_softcap_too(verl):
    ours, full = (build("Gemma2", final_logit_softcapping=3.0) for _ in range(2))
    verl.apply_monkey_patch(ours, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="torch")

    class Full(torch.nn.Module):
        model = full

        def forward(self, input_ids, temperature, return_dict):
            log_p = (full(input_ids=input_ids).logits / temperature).log_softmax(-1)
            logp = log_p.gather(-1, input_ids.roll(-1, -1)[..., None])[..., 0]
            return types.SimpleNamespace(log_probs=logp, entropy=-(log_p.exp() * log_p).sum(-1))

        def parameters(self):
            return full.parameters()

    same(verl_step(ours), verl_step(Full()))


def test_verl_still_generates(verl):
    model = build("Qwen3")
    want = model.generate(ids(), max_new_tokens=3, do_sample=False)
    verl.apply_monkey_patch(model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="torch")
    assert (model.generate(ids(), max_new_tokens=3, do_sample=False) == want).all()


# torchtitan


def titan(config, model, labels, **inputs):
    loss = config.build(compile_config=None)
    loss.set_lm_head(model.lm_head)
    value, _ = loss(model.model(ids()).last_hidden_state, labels, torch.tensor(5.0), **inputs)
    return value.detach(), gradient(model, value)


def test_torchtitans_trainer_gets_its_own_cross_entropy(examples):
    losses = pytest.importorskip("torchtitan.components.loss", reason="torchtitan is not installed")
    plug = importlib.import_module("torchtitan_copd")
    labels = ids(seed=1)
    labels[:, :2] = losses.IGNORE_INDEX
    own = losses.ChunkedLossWrapper.Config(num_chunks=7, loss_fn=losses.CrossEntropyLoss.Config())
    model = build("Qwen3")
    ours, theirs = (titan(config, model, labels) for config in (plug.CrossEntropy.Config(), own))
    same(ours, theirs)
    # what the trainer asks before it leaves `lm_head` to the loss
    assert isinstance(plug.CrossEntropy.Config().build(compile_config=None), losses.ChunkedLossWrapper)
    assert "forward" not in vars(model.lm_head)


def test_torchtitan_can_distil(examples):
    losses = pytest.importorskip("torchtitan.components.loss", reason="torchtitan is not installed")
    plug = importlib.import_module("torchtitan_copd")
    labels = ids(seed=1)
    labels[:, :2] = losses.IGNORE_INDEX
    model, teacher = build("Qwen3").double(), build("Qwen3", 1).double()

    with torch.no_grad():
        hidden = teacher.model(ids()).last_hidden_state
    head = Head(hidden, teacher.lm_head.weight.detach())
    loss, grad = titan(plug.Distillation.Config(), model, labels, teachers=[head])
    log_p, log_q = (m(ids()).logits.log_softmax(-1) for m in (model, teacher))
    want = ((log_p.exp() * (log_p - log_q.detach())).sum(-1) * (labels != losses.IGNORE_INDEX)).sum() / 5
    same((loss, grad), (want.detach(), gradient(model, want)))


# axolotl


def test_axolotls_plugin_manager_fuses_the_trainer(examples):
    base = pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed")
    trl = pytest.importorskip("trl")
    manager = base.PluginManager.get_instance()
    manager.register("axolotl_copd.CopdPlugin")
    trainer = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    from trl.trainer.utils import add_fused_lm_head

    trainer.model, trainer.ref_model, trainer.temperature = build("Qwen3"), None, 1.0
    add_fused_lm_head(trainer.model)
    given = trainer.model.forward
    manager.post_trainer_create({}, trainer)
    assert trainer.model.forward is not given
    with pytest.raises(ValueError, match="fuse: trainer must be"):
        manager.post_trainer_create({}, object())


# ms-swift


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_swifts_gkd_trainer_gets_its_own_loss(examples, beta):
    gkd = pytest.importorskip("swift.rlhf_trainers.gkd_trainer", reason="ms-swift is not installed")
    from swift.utils import import_external_file

    cls, before = gkd.GKDTrainer, dict(vars(gkd.GKDTrainer))
    found = []
    try:
        for plugged in (False, True):
            if plugged:
                import_external_file(str(EXAMPLES / "swift_copd.py"))
            trainer = cls.__new__(cls)
            args = {"sft_alpha": 0, "offload_teacher_model": False, "gradient_checkpointing_kwargs": None}
            trainer.args = types.SimpleNamespace(**args, use_liger_kernel=False, report_to=[])
            trainer.accelerator = types.SimpleNamespace(unwrap_model=lambda model: model, is_main_process=False)
            trainer.template = types.SimpleNamespace(sequence_parallel_size=1)
            trainer.get_use_logits_to_keep = lambda default: False
            trainer.beta, trainer.temperature, trainer.gkd_logits_topk = beta, 0.7, None
            trainer.use_teacher_api = trainer._is_self_distillation = False
            trainer.teacher_model = build("Gemma2", 1, final_logit_softcapping=3.0).eval()
            trainer._prepare_liger_loss()
            model = build("Gemma2", final_logit_softcapping=3.0).train()
            labels = ids()
            labels[:, :3] = -100
            inputs = {"input_ids": ids(), "attention_mask": torch.ones_like(ids()), "labels": labels}
            batch = {"model_inputs": inputs, "teacher_model_inputs": dict(inputs)}
            batch["gkd_batch"] = types.SimpleNamespace(data_source=None)
            loss = cls.compute_loss(trainer, model, batch)
            found.append((loss.detach(), gradient(model, loss)))
    finally:
        for name in ("_prepare_liger_loss", "_compute_liger_loss"):
            setattr(cls, name, before[name])
    same(*reversed(found))
