"""What a step's numbers say about the run: a warning once, or its end."""

from __future__ import annotations

import logging
from typing import Any

from copd.config import Config
from copd.log import Log

logger = logging.getLogger("copd")
# mean |log p of the sampler − log p of the loss| in nats: bf16 and another engine's kernels make hundredths
DIFFERENCE = (0.1, 1.0)
EMPTY_STEPS = 10


class Unhealthy(RuntimeError):
    """The run goes on to nothing."""


def check(record: dict[str, Any], log: Log, cfg: Config) -> None:
    """Judges the newest `train` record of a branch. Raises `Unhealthy` where going on is a waste."""
    name, step = record["branch"], log.records[-1]["step"]
    difference, (odd, wrong) = record.get("sampling_logp_difference", 0.0), DIFFERENCE
    if difference > odd:
        rule = f"step {step}: sampler and loss of branch {name!r} must agree on log-probs"
        message = f"{rule}; got a mean difference of {difference:.2g} nats"
        if difference > wrong:
            raise Unhealthy(f"{message}: the rollouts are another policy's")
        _once(log, message, "sampling_logp_difference")
    if record["completions/weighed_ratio"] == 0:
        clipped = record["completions/clipped_ratio"]
        rule = f"step {step}: completions of branch {name!r} must leave something to learn from"
        message = f"{rule}; got none with a weight, {clipped:.0%} cut off at {cfg.rollout.max_new_tokens} tokens"
        cure = "raise rollout.max_new_tokens, see that the model has an EOS, or set rollout.mask_truncated=false"
        recent = [r for r in log.of("train") if r["branch"] == name][-EMPTY_STEPS:]
        if len(recent) == EMPTY_STEPS and not any(r["completions/weighed_ratio"] for r in recent):
            raise Unhealthy(f"{message}, {EMPTY_STEPS} steps in a row; {cure}")
        _once(log, f"{message}; {cure}", "weighed_ratio")


def _once(log: Log, message: str, kind: str) -> None:
    if kind not in log.warned:
        log.warned.add(kind)
        logger.warning(message)
