"""axolotl: GRPO's log-probs and entropies by `logprob`.

    plugins: [axolotl_copd.CopdPlugin]        # in the YAML, with this folder on PYTHONPATH

Needs trl >= 1.15, whose trainers ask a model for log-probs; axolotl 0.19 pins 1.9.0, whose trainers ask it for logits.
"""

from axolotl.integrations.base import BasePlugin

from copd_kernels.trl import fuse


class CopdPlugin(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        fuse(trainer)
