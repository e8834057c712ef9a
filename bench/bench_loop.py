"""A whole step of GRPO, sampling included: this loop (`method: expert`) and TRL's `GRPOTrainer`, turn by turn.

The same model (Phi's architecture, random weights, a bias that ends one token in `MEAN`), prompts, batch and limit;
completions are as long as each of them happens to sample, so what counts is tokens a second.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from bench.measure import Clock
from bench.results import OURS
from copd import schema
from copd.branch import Branch
from copd.config import Config
from copd.task import Prompt

# layers, hidden size, vocabulary, prompts, samples, limit and mean length of completions
SIZES = {"cuda": (8, 2048, 65_536, 64, 8, 2048, 512), "cpu": (6, 384, 16_384, 16, 8, 512, 128)}
SIZES["quick"] = (1, 32, 64, 2, 2, 8, 4)
MICRO = 8  # completions of TRL's micro-batch; as many tokens of ours


def words(V: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1", pad_token="w0", padding_side="left")


class Words:
    """Prompts of random words; a completion of an even number of words is right."""

    name = "words"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, count: int) -> None:
        self.tokenizer = tokenizer
        ids = torch.randint(4, len(tokenizer), (count, 32), generator=torch.Generator().manual_seed(0))
        self.texts = [
            " ".join(tokenizer.convert_ids_to_tokens(row[: 8 + i % 25])) for i, row in enumerate(ids.tolist())
        ]

    def size(self, split: str) -> int:
        return len(self.texts)

    def prompt(self, index: int, split: str = "train") -> Prompt:
        ids = self.tokenizer(self.texts[index]).input_ids
        return Prompt(self.name, index, self.texts[index], ids, [0] * len(ids))

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def reward(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        return [float(len(text.split()) % 2 == 0) for text in completions]


@pytest.mark.filterwarnings("ignore")
def bench_grpo(benchmark, record, scale, device, tmp_path):
    trl = pytest.importorskip("trl", minversion="1.15")
    from datasets import Dataset

    layers, D, V, P, G, limit, mean = SIZES["quick" if scale.N <= 32 else device]
    tokenizer = words(V)
    heads = {"num_attention_heads": max(1, D // 64), "num_key_value_heads": max(1, D // 64)}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}
    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(vocab_size=V, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=layers, **heads, **ends)
    ).to(device)
    with torch.no_grad():
        model.lm_head.bias[1] = torch.log(torch.tensor(V / mean))
    task = Words(tokenizer, 4 * P)
    tokens = MICRO * (limit // 2)
    options = [
        f"rollout={{prompts: {P}, samples: {G}, max_new_tokens: {limit}, mask_truncated: false}}",
        "optim.lr=1e-6",
    ]
    options += [f"micro_batch_tokens={tokens}", "method=expert", "branches.words.task=data", f"output_dir={tmp_path}"]
    cfg = schema.load(Config, None, [*options, "branches.words.data.path=none"])
    cfg = replace(cfg, model=replace(cfg.model, dtype="float32"))
    branch = Branch("words", [task], copy.deepcopy(model), tokenizer, cfg, torch.device(device))
    clock, rounds, made = Clock(device), scale.rounds, []
    mine, theirs = (
        {"name": name, "ms": [], "tokens_per_s": [], "peak_mib": None, "why": None} for name in (OURS, "TRL")
    )

    def note(entry: dict, begun: tuple[int, float], tokens: int) -> None:
        seconds = time.perf_counter() - begun[1]
        # of the last step, when the optimiser has its state
        entry["peak_mib"] = clock.risen(begun[0])
        entry["ms"].append(1e3 * seconds)
        entry["tokens_per_s"].append(tokens / seconds)

    def reward(completions, completion_ids, **columns):
        made.append(sum(map(len, completion_ids)))
        return [float(len(ids) % 2 == 0) for ids in completion_ids]

    class Turn(TrainerCallback):
        """TRL's step, then ours."""

        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = clock.low(), time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            note(theirs, self.begun, made[-1])
            begun = clock.low(), time.perf_counter()
            note(mine, begun, branch.learn(branch.native_batches(state.global_step))["tokens"])

    micro = min(MICRO, P * G)
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=P * G // micro,
        num_generations=G,
        max_completion_length=limit,
        learning_rate=1e-6,
        max_steps=1 + rounds,
        use_cpu=device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": text} for text in task.texts])
    trainer = trl.GRPOTrainer(model, reward, settings, rows, processing_class=tokenizer, callbacks=[Turn()])
    benchmark.pedantic(trainer.train, rounds=1)
    for entry in (mine, theirs):  # the first step starts things up
        entry |= {name: entry[name][1:] for name in ("ms", "tokens_per_s")}
    shape = {"model": "phi", "D": D, "V": V, "N": P * G, "layers": layers, "device": device, "dtype": "float32"}
    record({"op": "loop"} | shape | {"limit": limit, "mean": mean, "entries": [mine, theirs]})
