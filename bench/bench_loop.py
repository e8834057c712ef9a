"""A whole step of GRPO, sampling included: this loop (`method: expert`) and TRL's `GRPOTrainer`, turn by turn.

The same model (StableLM of random weights, with a head that ends one token in `mean`), prompts, batch and limit;
completions are as long as each of them happens to sample, so what counts is tokens a second. `--whole` takes 30 M
parameters and 128 completions of up to 512 tokens, minutes a round. Where vLLM is installed the loop takes a turn with
it, too.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import PreTrainedTokenizerFast, StableLmConfig, StableLmForCausalLM, TrainerCallback

from bench.measure import Clock
from bench.results import OURS
from copd import engine, schema
from copd.branch import Branch
from copd.config import Config
from copd.task import Prompt

# layers, hidden size, vocabulary, prompts, samples, limit and mean length of completions
SIZES = {"cuda": (8, 2048, 65_536, 64, 8, 2048, 512), "cpu": (6, 384, 16_384, 8, 4, 256, 64)}
SIZES |= {"whole": (10, 384, 16_384, 16, 8, 512, 128), "quick": (1, 64, 64, 2, 2, 8, 4)}
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
def bench_grpo(benchmark, record, scale, device, tmp_path, request):
    trl = pytest.importorskip("trl", minversion="1.15")
    from datasets import Dataset

    whole = request.config.getoption("whole")
    layers, D, V, P, G, limit, mean = SIZES["quick" if scale.N <= 32 else "whole" if whole else device]
    tokenizer = words(V)
    sizes = {"hidden_size": D, "intermediate_size": 8 * D // 3 // 64 * 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": D // 64, "num_key_value_heads": D // 64}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}
    torch.manual_seed(0)
    model = StableLmForCausalLM(StableLmConfig(vocab_size=V, **sizes, **heads, **ends)).to(device)
    with torch.no_grad():  # what every hidden state has in common says how likely the end is
        common = model.model.norm.bias.normal_()
        model.lm_head.weight[1] = common * (torch.log(torch.tensor(V / mean)) / common.square().sum())
    task = Words(tokenizer, 4 * P)
    options = [
        f"rollout={{prompts: {P}, samples: {G}, max_new_tokens: {limit}, mask_truncated: false}}",
        f"micro_batch_tokens={MICRO * (limit // 2)}",
        *("method=expert", "optim.lr=1e-6", "branches.words.task=data", "branches.words.data.path=none"),
        f"output_dir={tmp_path}",
    ]
    names = {OURS: "transformers"} | ({f"{OURS}, vLLM": "vllm"} if find_spec("vllm") else {})
    branches = {}
    for name, sampler in names.items():
        # of vLLM's cache: room for the keys and values of every row at its longest, and its greatest batch
        cache = 8 * layers * D * P * G * (limit + 64)
        room = f"{{kv_cache_memory_bytes: {cache}, max_num_seqs: {P * G}}}" if device == "cpu" else "{}"
        own = [f"rollout.engine={sampler}", f"rollout.engine_options={room if sampler == 'vllm' else '{}'}"]
        cfg = schema.load(Config, None, [*options, *own])
        cfg = replace(cfg, model=replace(cfg.model, dtype="float32"))
        samples = engine.make(cfg, model, tokenizer)
        branches[name] = Branch("words", [task], copy.deepcopy(model), tokenizer, cfg, torch.device(device), samples)
    clock, rounds, made = Clock(device), 2 if whole else scale.rounds, []
    entries = {
        name: {"name": name, "ms": [], "tokens_per_s": [], "peak_mib": None, "why": None} for name in (*branches, "TRL")
    }

    def note(name: str, begun: tuple[int, float], tokens: int) -> None:
        seconds = time.perf_counter() - begun[1]
        # of the last step, when the optimiser has its state
        entries[name]["peak_mib"] = clock.risen(begun[0])
        entries[name]["ms"].append(1e3 * seconds)
        entries[name]["tokens_per_s"].append(tokens / seconds)

    def reward(completions, completion_ids, **columns):
        made.append(sum(map(len, completion_ids)))
        return [float(len(ids) % 2 == 0) for ids in completion_ids]

    class Turn(TrainerCallback):
        """TRL's step, then ours."""

        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = clock.low(), time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            note("TRL", self.begun, made[-1])
            for name, branch in branches.items():
                begun = clock.low(), time.perf_counter()
                note(name, begun, branch.learn(branch.native_batches(state.global_step))["tokens"])

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
    for entry in entries.values():  # the first step starts things up
        entry |= {name: entry[name][1:] for name in ("ms", "tokens_per_s")}
    shape = {"model": "stablelm", "D": D, "V": V, "N": P * G, "layers": layers, "device": device, "dtype": "float32"}
    record({"op": "loop"} | shape | {"limit": limit, "mean": mean, "entries": [*entries.values()]})
