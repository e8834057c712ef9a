"""`through_head` in two processes: DDP and FSDP2, however they wrap the model, give the gradients of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from copd_kernels import logprob, through_head


def sharded(model, *, own_unit=False, reshard=None):
    """FSDP2 over layers and root; lm_head as a unit of its own, or the root resharded after its forward."""
    for layer in model.model.layers:
        fully_shard(layer)
    if own_unit:
        fully_shard(model.lm_head)
    return fully_shard(model, reshard_after_forward=reshard)


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "DDP that looks for unused parameters": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "FSDP2": sharded,
    "FSDP2, lm_head a unit of its own": lambda model: sharded(model, own_unit=True),
    "FSDP2, root resharded after its forward": lambda model: sharded(model, reshard=True),
}


def backward(model, ids):
    tokens = ids[:, 1:].contiguous()

    def read(head):
        return -logprob(head, tokens, backend="torch").logp.mean()

    with through_head(model, read):
        loss = model(input_ids=ids, use_cache=False, logits_to_keep=slice(0, -1)).logits
    loss.backward()


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def worst_errors():
    """For each wrapper the largest relative error of a parameter's gradient."""
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    ids = torch.randint(0, 96, (4, 7))
    alone = copy.deepcopy(model)
    backward(alone, ids)
    want = {name: parameter.grad for name, parameter in alone.named_parameters()}
    found = {}
    for name, wrap in WRAPPERS.items():
        inner = copy.deepcopy(model)
        wrapped = wrap(inner)
        for _ in range(2):  # the first step compares, the second does not
            wrapped.zero_grad()
            backward(wrapped, ids.chunk(2)[dist.get_rank()])
        errors = [(whole(p.grad) - want[n]).norm() / want[n].norm() for n, p in inner.named_parameters()]
        found[name] = float(max(errors))
    return found


def test_gradients_are_those_of_one_process(ranks):
    pytest.importorskip("transformers")
    for found in ranks(2, worst_errors):
        assert list(found) == list(WRAPPERS)
        assert max(found.values()) < 1e-6, found
