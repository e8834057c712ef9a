"""What is no tensor, head or number is refused in the one wording, for every public argument."""

import pytest
import torch

from copd_kernels import Head, agreement, kl, logprob, mutual_kl

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
