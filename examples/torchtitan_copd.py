"""torchtitan: losses from hidden states, in place of `ChunkedLossWrapper` and the loss of logits inside it.

    config.loss = CrossEntropy.Config()       # in a function of a model's config_registry.py
    config.loss = Distillation.Config()       # where the trainer passes `teachers`, a list of Heads, to its loss

The trainer gives a `ChunkedLossWrapper` its `lm_head` and the model's hidden states. `lm_head` is called, so FSDP2
gathers its weight and reduces its gradient; what it would have done with the weight, these ops do. Made for torchtitan
0.3; not for tensor parallelism, where each rank has a part of the vocabulary.
"""

from dataclasses import dataclass

from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper

from copd_kernels import Head, kl, logprob


class CrossEntropy(ChunkedLossWrapper):
    """-Σ logp over the tokens with a label, divided by `global_valid_tokens` if given."""

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """`num_chunks` and `loss_fn` are not read: a workspace says how many tokens are projected at once."""

    def read(self, head, labels):
        return -logprob(head, labels, ignore_index=IGNORE_INDEX).logp.sum()

    def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
        lm_head = self.lm_head
        lm_head.forward = lambda hidden: self.read(Head(hidden, lm_head.weight, lm_head.bias), labels, **loss_inputs)
        try:
            loss = lm_head(pred)
        finally:
            del lm_head.forward
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


class Distillation(CrossEntropy):
    """Σ KL(student ‖ teachers), exact over the vocabulary; `teachers` are Heads with hidden (B, L, D_j)."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropy.Config):
        """As of `CrossEntropy`."""

    def read(self, head, labels, teachers):
        return kl(head, teachers, token_weight=labels != IGNORE_INDEX, reduction="sum")
