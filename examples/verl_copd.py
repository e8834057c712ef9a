"""verl: log-probs and entropies by `logprob`, for every model of transformers, softcap and scale included.

    PYTHONPATH=examples python -m verl.trainer.main_ppo actor_rollout_ref.model.external_lib=verl_copd \
        actor_rollout_ref.model.use_fused_kernels=True ...

verl imports `external_lib` in every worker before it builds a model, and asks `patch_forward_with_backends` for a
forward that returns log-probs. This is another such function: it gives the forward to one model, not to its class, and
the model's own code runs up to `lm_head`. Made for verl 0.9 and its FSDP engine; Megatron's has no `lm_head` to ask.
"""

import types

import torch
import verl.models.transformers.monkey_patch as patch
from verl.models.transformers.dense_common import CausalLMOutputForPPO

from copd_kernels import logprob
from copd_kernels.model import reading


def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
    """verl's function of this name; any `fused_kernels_backend` means this one."""
    if not use_fused_kernels:
        return
    own = model.forward

    def forward(self, input_ids=None, labels=None, shift_labels=None, temperature=None, return_dict=True, **inputs):
        if temperature is None:  # `generate`, and whoever wants logits
            return own(input_ids=input_ids, labels=labels, return_dict=return_dict, **inputs)
        # verl's: the last position's is the first token, and nobody reads it
        tokens = torch.roll(input_ids if labels is None else labels, -1, -1) if shift_labels is None else shift_labels
        with reading(self, lambda head: logprob(head, tokens, temperature=temperature)) as take:
            own(input_ids=input_ids, return_dict=True, **inputs)
        found = take()
        return CausalLMOutputForPPO(log_probs=found.logp, entropy=found.entropy)

    model.forward = types.MethodType(forward, model)


patch.patch_forward_with_backends = patch_forward_with_backends
