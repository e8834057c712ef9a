"""ms-swift: GKD without either model's logits, for every model of transformers, softcap and scale included.

    swift rlhf --rlhf_type gkd --external_plugins examples/swift_copd.py ...

Made for ms-swift 4.6. Its GKD trainer has a fused path, which calls Liger's loss on the backbones' hidden states. Here
that path is every run's whose teacher is a local model and whose whole vocabulary counts (`gkd_logits_topk` unset,
`sft_alpha` 0), without `use_liger_kernel`, and both models' own forward runs.
"""

from contextlib import nullcontext

import torch
from swift.rlhf_trainers.gkd_trainer import GKDTrainer, _ForwardRedirection, disable_gradient_checkpointing

from copd_kernels import kl, through_head
from copd_kernels.liger import divergence_of, kept


def prepare(self):
    args = self.args
    self.use_liger_gkd_loss = self.teacher_model is not None and args.sft_alpha == 0 and self.gkd_logits_topk is None
    self._forward_redirection = _ForwardRedirection()


def loss(self, student, model_inputs, forward_inputs):
    """The mean over the labelled tokens of D(student, teacher), inside the wrapper's forward."""
    mask = model_inputs["labels"][:, 1:] != -100
    batch = {**forward_inputs, "use_cache": False}

    def at(head):
        return kept(torch.nn.functional.pad(mask, (0, 1)), head)[0]

    offloaded = self.load_teacher_model_context() if self.args.offload_teacher_model else nullcontext()
    checkpointed = disable_gradient_checkpointing(self.teacher_model, self.args.gradient_checkpointing_kwargs)
    # the teacher's weights are read with the student's, so they stay until then
    with offloaded, through_head(self.teacher_model, at):
        with torch.no_grad(), checkpointed:
            teacher = self.teacher_model(**batch).logits.detach()
        options = divergence_of(self.beta) | {"temperature": self.temperature}
        with through_head(student, lambda head: kl(at(head), teacher, **options)):
            return student(**batch).logits


GKDTrainer._prepare_liger_loss, GKDTrainer._compute_liger_loss = prepare, loss
