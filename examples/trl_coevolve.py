"""Two TRL trainers in one process that teach each other: co-evolution without leaving TRL.

    python examples/trl_coevolve.py

Each is `copd_kernels.trl.GRPOTrainer` with the other's live model as teacher. They take optimiser steps in turn, each
in a thread that waits for its turn, so that a teacher never moves while it teaches. Replace the tiny models, rows and
rewards by your own.
"""

from __future__ import annotations

import tempfile
import threading
from typing import Any

import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from copd_kernels.trl import GRPOTrainer


class Turns(transformers.TrainerCallback):
    """Trainer `mine` of `count` takes a step when it is its turn; one that has ended is passed over."""

    def __init__(self, turns: threading.Condition, state: dict[str, Any], mine: int) -> None:
        self.turns, self.state, self.mine = turns, state, mine

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.turns:
            self.turns.wait_for(lambda: self.state["turn"] == self.mine)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.turns:
            self._pass_on()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.turns:
            self.state["running"].discard(self.mine)
            self._pass_on()

    def _pass_on(self) -> None:
        running = sorted(self.state["running"])
        later = [i for i in running if i > self.state["turn"]] or running
        self.state["turn"] = later[0] if later else None
        self.turns.notify_all()


def coevolve(trainers: list[GRPOTrainer]) -> None:
    """Trains all of them, a step each in turn, everyone's teachers being the others as they are."""
    turns, failed = threading.Condition(), []
    state = {"turn": 0, "running": set(range(len(trainers)))}
    for i, trainer in enumerate(trainers):
        trainer.teachers = [other.model for other in trainers if other is not trainer]
        trainer.add_callback(Turns(turns, state, i))

    def train(i: int) -> None:
        try:
            trainers[i].train()
        except BaseException as error:  # the others would wait for ever
            failed.append(error)
            Turns(turns, state, i).on_train_end(None, None, None)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(len(trainers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def tiny() -> tuple[Any, Any]:
    """A model of a few thousand weights and its tokenizer, made here: nothing is downloaded."""
    words = {"<pad>": 0, "<eos>": 1} | {str(i): i + 2 for i in range(30)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes)), tokenizer


def main(steps: int = 3) -> list[GRPOTrainer]:
    rewards = {
        "even": lambda completions, **_: [sum(int(w) % 2 == 0 for w in c.split()) / 8 for c in completions],
        "odd": lambda completions, **_: [sum(int(w) % 2 == 1 for w in c.split()) / 8 for c in completions],
    }
    transformers.set_seed(0)
    base, tokenizer = tiny()
    weights, trainers = base.state_dict(), []
    for name, reward in rewards.items():
        model, _ = tiny()
        model.load_state_dict(weights)  # experts start from one model
        args = trl.GRPOConfig(
            tempfile.mkdtemp(prefix=name),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            max_steps=steps,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        rows = Dataset.from_dict({"prompt": ["1 2 3", "4 5"]})
        trainers.append(GRPOTrainer(model, reward, args, train_dataset=rows, processing_class=tokenizer, kl_coef=0.1))
    coevolve(trainers)
    return trainers


if __name__ == "__main__":
    for trainer in main():
        for record in trainer.state.log_history:
            if "teacher_kl" in record:
                print(
                    f"step {record['step']}: reward {record['reward']:.3f}, KL to the other {record['teacher_kl']:.4f}"
                )
