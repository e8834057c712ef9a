"""FSDP2 as the README has it: ops inside a window of the model give the gradients of one process."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from split_cases import whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from copd_kernels import Head, kl

README = (Path(__file__).parents[2] / "README.md").read_text()
CODE = re.search(r"```python\n(from torch.distributed.fsdp.*?)```", README, re.DOTALL)[1]
# wraps `model`; makes `loss` of `model`, `ids` and `teachers`, and its gradients
WRAP, STEP = CODE[: CODE.index("def loss")], CODE[CODE.index("def loss") :]


def make_model(tied):
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads))


def make_batch():
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 96, (4, 7), generator=random)
    return ids, torch.randn(4, 7, 8, generator=random), torch.randn(96, 8, generator=random)


def backward(model, ids, states, weight):
    scope = {"model": model, "ids": ids, "teachers": Head(states, weight), "Head": Head, "kl": kl}
    exec(STEP, scope)
    return scope["loss"]


def gradients(model):
    return {name: whole(p.grad).float() for name, p in model.named_parameters()}


def alone(model, dtype=torch.float32):
    model = copy.deepcopy(model).to(dtype)
    model.window = lambda run: run()
    backward(model, *make_batch())
    return gradients(model)


def on_ranks(tied):
    """Of each way the largest relative error of a parameter's gradient, and what one process has."""
    model, (ids, states, weight) = make_model(tied), make_batch()
    mine, theirs = (x.chunk(2)[dist.get_rank()] for x in (ids, states))
    exact, found = alone(model), {}
    for way in ("once", "micro-batches", "checkpointing", "bf16"):
        scope = {"model": copy.deepcopy(model), "policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
        wrapped = scope["model"]
        if way == "checkpointing":
            wrapped.gradient_checkpointing_enable()
            wrapped.train()
        exec(re.sub(r"(fully_shard\(\w+)", r"\1, mp_policy=policy", WRAP) if way == "bf16" else WRAP, scope)
        if way == "micro-batches":
            for n in range(2):
                wrapped.set_requires_gradient_sync(n == 1)
                backward(wrapped, mine[n : n + 1], theirs[n : n + 1], weight)
        else:
            backward(wrapped, mine, theirs, weight)
        made = gradients(wrapped)
        scale = 2 if way == "micro-batches" else 1
        found[way] = max(float((g / scale - exact[n]).norm() / exact[n].norm()) for n, g in made.items())
        assert {type(p.grad).__name__ for p in wrapped.parameters()} == {"DTensor"}
    wrapped.reshard()
    with pytest.raises(
        TypeError, match=r"hidden must be a DTensor .*; got a plain tensor; read lm_head where FSDP has it"
    ):
        Head(states.new_zeros(3, 32), wrapped.lm_head.weight)
    low = alone(model, torch.bfloat16)
    found["bf16 in one process"] = max(float((g - exact[n]).norm() / exact[n].norm()) for n, g in low.items())
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_window_gives_the_gradients_of_one_process(ranks, tied):
    pytest.importorskip("transformers")
    for found in ranks(2, on_ranks, tied):
        assert max(found[way] for way in ("once", "micro-batches", "checkpointing")) < 1e-6, found
        assert found["bf16"] <= 2 * found["bf16 in one process"], found


def after_a_step():
    """The loss after a window without backward, `reshard` and other weights, and what one process has of it."""
    model, batch = make_model(tied=False), make_batch()
    other = copy.deepcopy(model)
    other.window = lambda run: run()
    exec(WRAP, {"model": model})
    losses = []
    for each in (model, other):
        scope = {"model": each, "ids": batch[0], "teachers": Head(*batch[1:]), "Head": Head, "kl": kl}
        exec(STEP.partition("model.window")[0], scope)
        with torch.no_grad():
            before = each.window(scope["loss"])
            if each is model:
                model.reshard()
            for p in each.parameters():
                p.mul_(0.5)
        losses.append((before.item(), each.window(scope["loss"]).item()))
    return losses


def test_after_reshard_a_window_reads_the_weights_of_the_next_step(ranks):
    pytest.importorskip("transformers")
    for ours, alone in ranks(2, after_a_step):
        assert ours == pytest.approx(alone, rel=1e-6)
        assert ours[0] != pytest.approx(ours[1], rel=1e-4)


class Body(torch.nn.Module):
    def __init__(self, lm_head):
        super().__init__()
        self.linear, self.lm_head = torch.nn.Linear(8, 8), torch.nn.Parameter(lm_head)


def on_two_dimensions():
    """The largest relative error of a gradient where tokens are split over one dimension and words over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp = mesh["tp"]
    x, states, weight, other = (torch.randn(*shape) for shape in ((2, 5, 8), (2, 5, 8), (53, 8), (53, 8)))
    alone = Body(weight)
    kl(Head(alone.linear(x), alone.lm_head), Head(states, other)).backward()
    model = Body(distribute_tensor(weight, tp, [Shard(0)]))
    model.linear.load_state_dict(alone.linear.state_dict())
    fully_shard(model, mesh=mesh["dp"])
    model.window = lambda run: run()
    register_fsdp_forward_method(model, "window")
    mine = mesh.get_local_rank("dp")

    def everywhere(hidden):
        return DTensor.from_local(hidden, tp, [Replicate()], run_check=False)

    def loss():
        student = Head(everywhere(model.linear(x[mine])), model.lm_head)
        return kl(student, Head(everywhere(states[mine]), distribute_tensor(other, tp, [Shard(0)])))

    model.window(loss).backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(float((whole(p.grad) - q.grad).norm() / q.grad.norm()) for p, q in pairs)


def test_a_window_gives_the_gradients_of_one_process_over_a_split_vocabulary_too(ranks):
    assert max(ranks(4, on_two_dimensions)) < 1e-6
