"""Whether a model does to its logits what its config says: compared once a model, on two tokens.

Names in configs are no promise: one name multiplies in one model and divides in the next, and is ignored in a third. So
`lm_head` is given a hidden state large enough to feel a softcap, inside the model's own forward, and what comes out of
the model is held against what the head would make of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .checks import check
from .lm_head import Fields, fields, lm_head_of, text_config, transform

# the states of each lm_head (adapters, scale, softcap) that have been compared
CHECKED: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()
# what two ways to round the same logits differ by, relative to the largest
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
LARGEST = 50.0


def unwrap(model: nn.Module) -> Any:
    """Out of DDP, FSDP1, DeepSpeed and torch.compile; FSDP2 and PEFT put nothing around that must come off."""
    while True:
        parts = model._modules
        inner = parts.get("_orig_mod") or parts.get("module") or parts.get("_fsdp_wrapped_module")
        if inner is None:
            return model
        model = inner


def check_model(op: str, model: Any, vocab_size: int | None, backbone: bool = False) -> None:
    """Raises `ValueError` with the difference unless the model's logits are those of the head read from it.

    With `backbone`, what `lm_head` reads must also be the backbone's `last_hidden_state`. Without gradients, in
    evaluation mode, drawing nothing from the random generators; not in a trace, nor of weights that are not finite.
    """
    module = lm_head_of(op, model)
    weight = next(module.parameters())
    if torch.compiler.is_compiling() or weight.is_meta or isinstance(weight, FakeTensor):
        return
    adapters = tuple(getattr(module, "active_adapters", ())), getattr(module, "disable_adapters", False)
    state = type(module), adapters, transform(text_config(model)), vocab_size, backbone
    seen = CHECKED.setdefault(module, set())
    if state in seen or not bool(weight.detach().isfinite().all()):
        return  # of weights that are not finite nothing can be told
    seen.add(state)  # at once: a model may call `Head.of` in its own forward
    try:
        _compare(op, model, module, vocab_size, backbone)
    except BaseException:
        seen.discard(state)
        raise


@torch.no_grad()
def _compare(op: str, model: Any, module: nn.Module, vocab_size: int | None, backbone: bool) -> None:
    caught: dict[str, Tensor] = {}
    heads: list[tuple[Fields, Tensor]] = []

    def give(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden)
        direction = direction.expand_as(hidden[..., :1, :])
        largest = module.forward(direction).abs().amax().clamp(min=1e-3)
        given = direction * (LARGEST / largest).to(hidden.dtype)
        caught["read"] = hidden
        head = fields(op, model, given.flatten(0, -2)[:1], vocab_size)
        heads.append((head, logits(head)[0]))
        return (given.expand_as(hidden).contiguous(),), {}

    def last(module: nn.Module, args: Any, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if state is not None:
            caught["last"] = state

    whole = getattr(model, "get_base_model", lambda: model)()
    # after FSDP2's own hook on lm_head: only now, and until its forward ends, are sharded weights whole
    handles = [module.register_forward_pre_hook(give, with_kwargs=True)]
    if isinstance(getattr(whole, "base_model", None), nn.Module) and whole.base_model is not whole:
        handles.append(whole.base_model.register_forward_hook(last))
    ids = torch.tensor([[1, 2]], device=model.get_input_embeddings().weight.device)
    with evaluating(model):
        try:
            got = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        finally:
            for handle in handles:
                handle.remove()
    head, want = heads[0]
    read, made = tuple(caught["read"].shape[:-1]), tuple(got.shape[:-1])
    check(op, "model", read == made, f"make logits of all that lm_head reads, {read}", made, "use its own logits")
    got = got.flatten(0, -2)[-1].to(want)
    fix = f"pass vocab_size={got.numel()}"
    check(op, "model", got.numel() >= want.numel(), f"make {want.numel()} logits, as its head does", got.numel(), fix)
    off = (got[: want.numel()] - want).abs()
    worst = int(off.nan_to_num(nan=torch.inf).argmax())
    narrow = [TOLERANCE.get(x.dtype, 1e-4) for x in (caught["read"], head.hidden)]
    if torch.is_autocast_enabled(ids.device.type):
        narrow.append(TOLERANCE[torch.bfloat16])
    name, adaptation = type(whole).__name__, f"scale {head.scale:g} and softcap {head.softcap}"
    rule = f"make {want[worst]:.6g} of logit {worst}, as {adaptation} of its config say; {name} is another function"
    ok = float(off[worst]) <= max(narrow) * float(want.abs().max())
    check(op, "model", ok, rule, f"{got[worst]:.6g}", "give scale and softcap to Head")
    if backbone and "last" in caught and caught["last"].shape == caught["read"].shape:
        same = torch.allclose(caught["last"].float(), caught["read"].float(), rtol=max(narrow), atol=1e-6)
        rule = f"be what lm_head reads, which {name} makes of last_hidden_state first"
        check(op, "hidden", same, rule, "a check that cannot tell", "use hidden_states(model), and check=False")


def logits(head: Fields) -> Tensor:
    """(N, V) fp32"""
    V = head.vocab_size or head.lm_head.shape[0]
    z = head.hidden.float() @ head.lm_head[:V].float().T
    z = (z if head.bias is None else z + head.bias[:V].float()) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
