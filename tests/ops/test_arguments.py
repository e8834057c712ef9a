"""What is no tensor, head or number is refused in the one wording, for every public argument."""

import pytest
import torch

from copd_kernels import Head, TopK, agreement, kl, logprob, mutual_kl, topk

h, w = torch.randn(3, 4), torch.randn(20, 4)
HEAD, TOKENS = Head(h, w), torch.zeros(3, dtype=torch.int64)
LEARNT = torch.ones((), requires_grad=True)
CALLS = {
    "hidden": lambda x: Head(x, w),
    "lm_head": lambda x: Head(h, x),
    "bias": lambda x: Head(h, w, bias=x),
    "scale": lambda x: Head(h, w, scale=x),
    "softcap": lambda x: Head(h, w, softcap=x),
    "vocab_size": lambda x: Head(h, w, vocab_size=x),
    "student": lambda x: kl(x, HEAD),
    "teachers": lambda x: kl(HEAD, x),
    "teacher_weight": lambda x: kl(HEAD, HEAD, teacher_weight=x),
    "teacher_index": lambda x: kl(HEAD, HEAD, teacher_index=x),
    "token_weight": lambda x: kl(HEAD, HEAD, token_weight=x),
    "beta": lambda x: kl(HEAD, HEAD, divergence="jsd", beta=x),
    "temperature": lambda x: logprob(HEAD, TOKENS, temperature=x),
    "workspace_bytes": lambda x: logprob(HEAD, TOKENS, workspace_bytes=x),
    "head": lambda x: logprob(x, TOKENS),
    "tokens": lambda x: logprob(HEAD, x),
    "heads": lambda x: mutual_kl(x),
    "edge_weight": lambda x: mutual_kl([HEAD, HEAD], edge_weight=x),
    "k": lambda x: agreement(HEAD, HEAD, k=x),
}


@pytest.mark.parametrize("argument", CALLS)
@pytest.mark.parametrize("value", [[1.0, "x"], "x", torch.nn.Linear(4, 20)], ids=["list", "text", "module"])
def test_what_is_of_another_kind_is_a_type_error(argument, value):
    with pytest.raises(TypeError, match=rf"\w+: {argument}(\[0\])? must be a"):
        CALLS[argument](value)


@pytest.mark.parametrize("argument", ["scale", "softcap", "beta", "temperature"])
def test_a_number_to_be_learnt_is_refused(argument):
    with pytest.raises(TypeError, match=f"{argument} must be a constant; got a tensor that requires grad; multiply"):
        CALLS[argument](LEARNT)


@pytest.mark.parametrize("argument", ["student", "teachers", "head", "heads"])
def test_a_tensor_is_no_head(argument):
    with pytest.raises(TypeError, match=f"{argument} must be a Head"):
        CALLS[argument](h)


@pytest.mark.parametrize("edges", [3, [1], [(0.0, 1)], [(0, "1")], [None], "ab"])
def test_edges_that_are_no_pairs_are_a_type_error(edges):
    head = Head(torch.randn(3, 4), torch.randn(20, 4))
    with pytest.raises(TypeError, match="mutual_kl: edges must be a list of pairs of indices; got "):
        mutual_kl([head, head], edges=edges)


def test_an_ignore_index_that_is_no_integer_is_a_type_error():
    with pytest.raises(TypeError, match="logprob: ignore_index must be an integer; got NoneType"):
        logprob(Head(torch.randn(3, 4), torch.randn(20, 4)), torch.zeros(3, dtype=torch.long), ignore_index=None)


def test_autocast_takes_a_head_of_two_dtypes_and_outside_of_it_says_so():
    hidden, weight = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(20, 4, requires_grad=True)
    ids = torch.zeros(3, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Head(hidden, weight)
        loss = logprob(mixed, ids).logp.sum()
        want = logprob(Head(hidden.detach(), weight.detach().bfloat16()), ids).logp.sum()
    assert torch.equal(loss, want)
    loss.backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(TypeError, match=r"lm_head must have hidden's dtype torch.bfloat16 outside autocast"):
        logprob(mixed, ids)


def test_meta_tensors_give_shapes():
    one = Head(torch.randn(3, 4, device="meta"), torch.randn(20, 4, device="meta"))
    assert logprob(one, torch.zeros(3, dtype=torch.long, device="meta")).entropy.shape == (3,)
    assert kl(one, one).device.type == "meta"
    assert mutual_kl([one, one]).loss.shape == ()
    assert agreement(one, one).overlap.shape == (1, 3)


@pytest.fixture
def mesh(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_head_that_is_split_otherwise_is_refused_with_what_to_do(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    rows, same = distribute_tensor(w, mesh, [Shard(0)]), distribute_tensor(h, mesh, [Replicate()])
    got = "got a plain tensor; read lm_head where FSDP has it whole: .*through_head"
    with pytest.raises(
        TypeError, match=rf"Head: hidden must be a DTensor \[Replicate\(\)\] over lm_head's mesh; {got}"
    ):
        Head(h, rows)
    with pytest.raises(TypeError, match="Head: hidden must be a plain tensor, as lm_head is; got a DTensor"):
        Head(same, w)
    with pytest.raises(ValueError, match=r"Head: lm_head must be split by its rows .*; got \[Replicate\(\)\]"):
        Head(same, distribute_tensor(w, mesh, [Replicate()]))
    with pytest.raises(
        ValueError, match=r"Head: hidden must be a DTensor \[Replicate\(\)\] .*; got \[Shard\(dim=0\)\] over"
    ):
        Head(distribute_tensor(h, mesh, [Shard(0)]), rows)
    with pytest.raises(TypeError, match=r"Head: bias must be a DTensor \[Shard\(dim=0\)\] .*; got a plain tensor"):
        Head(same, rows, torch.zeros(20))
    with pytest.raises(ValueError, match="Head: lm_head must have 20 of its 20 rows on this rank; got 19"):
        Head(same, DTensor.from_local(w[:19], mesh, [Shard(0)], shape=w.shape, stride=w.stride(), run_check=False))
    split = Head(same, rows)
    with pytest.raises(ValueError, match=r"kl: teachers\[0\] must be split over ranks as student is, "):
        kl(split, HEAD)
    with pytest.raises(
        TypeError, match=r"logprob: tokens must be a plain tensor; got a DTensor; pass its to_local\(\)"
    ):
        logprob(HEAD, distribute_tensor(TOKENS, mesh, [Replicate()]))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_backend_that_cannot_pause_for_other_ranks_says_so(mesh, backend, monkeypatch):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    split = Head(distribute_tensor(h, mesh, [Replicate()]), distribute_tensor(w, mesh, [Shard(0)]))
    calls = [
        lambda **how: kl(split, split, **how),
        lambda **how: logprob(split, TOKENS, **how),
        lambda **how: mutual_kl([split, split], **how),
        lambda **how: agreement(split, split, **how),
    ]
    monkeypatch.setattr("copd_kernels.rows.missing", lambda name, device: None)
    for call in calls:
        with pytest.raises(
            NotImplementedError, match=rf"backend must be .* for a vocabulary split .*; got '{backend}'"
        ):
            call(backend=backend)
        call()


def test_what_does_not_know_a_split_vocabulary_says_so(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    split = Head(distribute_tensor(h, mesh, [Replicate()]), distribute_tensor(w, mesh, [Shard(0)]))
    listed = TopK(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1) - 1)
    calls = {
        "student": [lambda: kl(split, listed), lambda: kl(split, split, support="teacher", k=2)],
        "head": [lambda: topk(split, 2)],
    }
    for argument, refused in calls.items():
        for call in refused:
            with pytest.raises(ValueError, match=rf"{argument} must be .*split over ranks; got "):
                call()
