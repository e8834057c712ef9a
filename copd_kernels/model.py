"""What `lm_head` reads, inside a model's own forward, whatever wraps the model.

    with through_head(model, lambda head: kl(head, teachers)):
        loss = model(input_ids).logits

A wrapper (DDP, FSDP2, ZeRO-3, PEFT, torch.compile) sees an ordinary forward: its hooks run, sharded weights are whole
while they are read, and the loss is an output of the model, so parameters that only the loss reads are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .checks import check as demand
from .head import Head
from .lm_head import fields, lm_head_of
from .probe import check_model, unwrap


@contextmanager
def through_head(
    model: nn.Module, read: Callable[[Head], Any], vocab_size: int | None = None, check: bool = True
) -> Iterator[nn.Module]:
    """While open, `model(**batch)` calls `read(head)` where it would call `lm_head`; the result stands in `.logits`.

    The head's hidden states are those of the model's forward, (B, L, D) or what `logits_to_keep` leaves of them, inside
    its graph; adapters of `lm_head` are part of the head. `read` may return anything; under DDP and FSDP return a
    tensor, or a tuple or dict of tensors, since these look for them there. Not for two threads that share a model.
    The comparison is a forward of two tokens: sharded models enter for the first time on all ranks together.

    Args:
        model: a language model of transformers, text or vision, in any wrapper; called as it always is.
        read: from the head to the result.
        vocab_size: as in `Head`.
        check: compare the head's logits with the model's own at two tokens, once a model.

    Raises:
        ValueError: `labels` passed, `generate` called, an `lm_head` that is quantised or not linear, or logits that the
            model makes in another way than the head. The model is left as it was.
    """
    inner = unwrap(model)
    if check:
        check_model("through_head", inner, vocab_size)

    def forward(hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Any:
        return read(Head(*fields("through_head", inner, hidden, vocab_size, own)))

    with _forward_through("through_head", inner, forward):
        yield model


@contextmanager
def hidden_states(model: nn.Module) -> Iterator[nn.Module]:
    """While open, `model(**batch).logits` are the hidden states (B, L, D) that `lm_head` would have read."""
    with _forward_through("hidden_states", unwrap(model), lambda hidden, own: hidden):
        yield model


@contextmanager
def reading(model: Any, read: Callable[[Head], Any], vocab_size: int | None = None) -> Iterator[Callable[[], Any]]:
    """`through_head` inside a forward of `model`, where its own hooks do not run: yields what returns the result."""

    def forward(hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Any:
        return read(Head(*fields("through_head", model, hidden, vocab_size, own)))

    with _instead_of_lm_head("through_head", model, forward) as take:
        yield take


# what stands for `lm_head`: from its input and its own forward to the result
Forward = Callable[[Tensor, Callable[[Tensor], Tensor]], Any]


@contextmanager
def _forward_through(op: str, model: Any, forward: Forward) -> Iterator[None]:
    def refuse_labels(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for name in ("labels", "shift_labels"):
            fix = "the model would make its own loss of them"
            demand(op, name, kwargs.get(name) is None, "not be passed to the model", "a tensor", fix)

    def put(module: nn.Module, args: Any, output: Any) -> Any:
        demand(op, "model", hasattr(output, "keys"), "return a dict of outputs", type(output).__name__)
        output["logits"] = take()
        return output

    def generate(*args: Any, **kwargs: Any) -> None:
        demand(op, "generate", False, "not be called inside", "a call", "its logits are not there")

    with _instead_of_lm_head(op, model, forward) as take, _attribute(model, "generate", generate):
        handles = [
            model.register_forward_pre_hook(refuse_labels, with_kwargs=True),
            # before FSDP2's own hook on the model, which looks in the output for tensors to wait for
            model.register_forward_hook(put, prepend=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _instead_of_lm_head(op: str, model: Any, forward: Forward) -> Iterator[Callable[[], Any]]:
    lm_head = lm_head_of(op, model)
    own: Any = lm_head.forward
    results: list[Any] = []
    nested = hasattr(own, "stands_for_lm_head")
    demand(op, "model", not nested, "not be inside another through_head already", "nested calls")

    def stand_in(hidden: Tensor, **kwargs: Any) -> Any:
        # PEFT's, of which each token may have another function: `adapter_names`, `alora_offsets`
        given = sorted(name for name, value in kwargs.items() if value is not None)
        demand(op, "lm_head", not given, "be called with hidden states alone", ", ".join(given))
        return forward(hidden, own)

    def keep(module: nn.Module, args: Any, result: Any) -> Tensor:
        results.append(result)
        # what the model does to its logits happens to one number a token
        placeholder: Tensor = args[0].new_zeros(*args[0].shape[:-1], 1)
        return placeholder

    def take() -> Any:
        taken, results[:] = list(results), []
        demand(op, "lm_head", len(taken) == 1, "be called once a forward", f"{len(taken)} calls")
        return taken[0]

    stand_in.stands_for_lm_head = True  # type: ignore[attr-defined]  # a mark
    with _attribute(lm_head, "forward", stand_in):
        # after FSDP2's own hook on a sharded lm_head, which looks in the result for tensors to wait for
        handle = lm_head.register_forward_hook(keep)
        try:
            yield take
        finally:
            handle.remove()


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of this instance alone, afterwards as it was."""
    before = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
