"""Rollouts by vLLM, in the process that trains: one engine, which takes the weights of whoever samples.

A model's weights are written over the engine's before its rollout, an adapter is a LoRA request over its base's. On a
GPU the engine sleeps between rollouts, so that training has the memory. What vLLM samples is what `copd.rollout` does:
media placeholders are never drawn, log-probs are over all words. At a temperature other than 1 it tells those
it draws from instead, which are above the loss's by -log(1 - p(placeholders)).
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from copd.config import Config
from copd.model import MEDIA
from copd.processor import QWEN3, load_processor
from copd.rollout import Rollout, Special, seed_of
from copd.task import Prompt
from copd.weights import Weights, Whole, base_name, vision_of

logger = logging.getLogger("copd")
ONE_ADAPTER = 1
"""the id of the only LoRA request there ever is"""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""of adapters, that vLLM makes room for"""


class VLLM:
    """vLLM as `copd.engine.Engine`.

    It starts at the first rollout. After an exception within it nothing is sampled any more: what was asked for stays
    unfinished, and waiting for more could last for ever.
    """

    def __init__(self, cfg: Config, model: PreTrainedModel, processor: Any) -> None:
        self.cfg, self.processor = cfg, processor
        self.config, self.architecture = model.config, type(model).__name__
        self.engine: Any = None
        self.sleeps = False
        self.limit = 0
        """longest prompt and completion that it has room for"""
        self.base: PreTrainedModel | None = None
        """whose weights it has, if those never change: the base of adapters"""
        self.failed: BaseException | None = None
        if hasattr(model.config, "vision_config") and not hasattr(processor, "image_processor"):
            raise ValueError("rollout: engine vllm must have the model's image processor; got its tokenizer alone")
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            got = torch.distributed.get_world_size()
            raise ValueError(f"rollout: engine vllm must be used by a run of one process; got {got}")

    def sample(
        self,
        weights: Weights,
        prompts: list[Prompt],
        samples: int,
        special: Special,
        seed: int,
        greedy: bool = False,
        first: int = 0,
    ) -> Rollout:
        if self.failed is not None:
            raise RuntimeError("rollout: engine vllm must be started anew, with the run") from self.failed
        self._check(weights)
        asleep = self._start(weights.model)
        asked = [self._input(prompt) for prompt in prompts]
        try:
            if asleep:
                self.engine.wake_up(["weights"])
            request = self._load(weights)
            if asleep:
                self.engine.wake_up(["kv_cache"])
            outputs = self._generate(asked, samples, special, seed, greedy, request)
            if self.sleeps:
                # weights that training will change are let go; those of adapters' base wait in the host's memory
                self.engine.sleep(level=2 if self.base is None else 1)
        except BaseException as error:
            self.failed = error
            if not isinstance(error, Exception):
                raise
            got = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"rollout: engine vllm must come to its end; got {got}") from error
        return rollout_of(prompts, samples, outputs, special, weights.model.device)

    def _start(self, model: PreTrainedModel) -> bool:
        """Starts it where it has not been; returns whether it is asleep."""
        if self.engine is not None:
            return self.sleeps
        cfg, gpu = self.cfg, model.device.type == "cuda"
        if not gpu and any(".experts." in name for name in model.state_dict()):
            # whose build goes on with the experts that it began with
            rule = "rollout: engine vllm must have a model without experts on a CPU"
            raise ValueError(f"{rule}; got {self.architecture}; rollout.engine=transformers samples it")
        # in this process, where it can take weights as they lie in memory; read when vllm is first imported
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import EngineArgs, LLMEngine

        self.scratch = tempfile.TemporaryDirectory(prefix="copd-vllm-")
        folder = Path(self.scratch.name)
        config = type(self.config).from_dict(self.config.to_dict())
        config.architectures = [self.architecture]
        config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        check_read(self.processor, folder)
        options: dict[str, Any] = {
            "dtype": cfg.model.dtype,
            "max_model_len": -1,  # the longest that its memory has room for
            "enforce_eager": not gpu,
            "enable_sleep_mode": gpu,
        }
        if not gpu:  # a prompt in pieces winds a generator back, which those of the CPU cannot
            options["enable_chunked_prefill"] = False
        if hasattr(self.config, "vision_config"):
            # pixels come as the model's own processor made them: normalised
            options |= {"mm_device_do_normalize": False, "skip_mm_profiling": True}
        if adapter := cfg.model.adapter:
            rank = max(adapter.rank, cfg.merge.rank or 0)
            if cfg.merge.into == "adapter" and cfg.merge.rank is None:
                rank *= len(cfg.branches)
            room = next((r for r in RANKS if r >= rank), rank)
            # a second slot: where all are full, vLLM's CPU build gives rows without an adapter the last one's
            options |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": room}
            options["lora_dtype"] = getattr(torch, cfg.model.dtype)
        options |= cfg.rollout.engine_options
        self.sleeps = options["enable_sleep_mode"]
        try:
            arguments = EngineArgs(
                model=str(folder),
                load_format="dummy",
                seed=0,
                # raw ones are before the placeholders are ruled out, and before the temperature too
                logprobs_mode="raw_logprobs" if cfg.rollout.temperature == 1 else "processed_logprobs",
                generation_config="vllm",
                disable_log_stats=True,
                **options,
            )
            self.engine = LLMEngine.from_engine_args(arguments)
        except Exception as error:
            rule = "rollout: engine vllm must start with the model and rollout.engine_options"
            raise RuntimeError(f"{rule}; got {type(error).__name__}: {error}") from error
        if self.engine.model_config.using_transformers_backend():
            # which changes transformers' class in place: what this process trains could run no more
            got = f"{self.architecture}, which it takes from transformers"
            raise ValueError(f"rollout: engine vllm must have a model of its own for what it samples; got {got}")
        self.limit = self.engine.vllm_config.model_config.max_model_len
        logger.info("rollout: vLLM has started, for prompts and completions of up to %d tokens", self.limit)
        return False

    def _check(self, weights: Weights) -> None:
        """Raises `ValueError` for an adapter of layers that vLLM would leave as they are."""
        if isinstance(weights, Whole):
            return
        from copd.adapter import Adapter

        assert isinstance(weights, Adapter)
        odd = list(weights.saved_modules())
        vision = {module for part in vision_of(weights.model) for module in part.modules()}
        for name, layer in weights.layers().items():
            if layer in vision or not isinstance(layer.get_base_layer(), nn.Linear):
                odd.append(name)
        if odd:
            rule = "rollout: engine vllm must have adapters of linear layers of the language model alone"
            raise ValueError(f"{rule}; got {odd[0]}; model.freeze_vision=true leaves a vision tower out")

    def _input(self, prompt: Prompt) -> Any:
        length, after = len(prompt.input_ids), self.cfg.rollout.max_new_tokens
        where = prompt.where or f"row {prompt.index} of {prompt.task}"
        if length + after > self.limit:
            rule = f"rollout: prompt and max_new_tokens must fit in the {self.limit} tokens of engine vllm"
            raise ValueError(f"{rule}; got {length} + {after} for {where}; rollout.engine_options may give it more")
        if odd := prompt.media.keys() - {name for pixels, grid, _ in MEDIA for name in (pixels, grid)}:
            rule = "rollout: engine vllm must have images and videos as patches and grids, as Qwen-VL has them"
            got = f"{min(odd)} of {self.architecture} for {where}"
            raise ValueError(f"{rule}; got {got}; rollout.engine=transformers samples them")
        return engine_input(prompt, self.config)

    def _load(self, weights: Weights) -> Any:
        """Takes the weights as they are now; returns the LoRA request that they are, if they are an adapter."""
        if isinstance(weights, Whole):
            self._reload(weights.model)
            return None
        from vllm.lora.request import LoRARequest

        if self.base is not weights.model:
            self._reload(weights.model)
            self.base = weights.model
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            weights.save(Path(folder))
            request = LoRARequest("adapter", ONE_ADAPTER, folder, load_inplace=True)
            self.engine.add_lora(request)
        self.engine.reset_prefix_cache()
        return LoRARequest("adapter", ONE_ADAPTER, folder)

    def _reload(self, model: PreTrainedModel) -> None:
        """Writes a model's own weights, those under its adapters if it has any, over the engine's."""
        self.base = None
        # the whole state, tied weights under each of their names: the CPU build packs the head apart
        state = {base_name(name): value for name, value in model.state_dict().items()}
        # by the names, and with the experts one by one, that a checkpoint has
        saved = revert_weight_conversion(model, {name: value for name, value in state.items() if name is not None})
        has_head = any(self.engine.apply_model(_has_head))
        tensors = ((name, value) for name, value in saved.items() if has_head or not name.endswith("lm_head.weight"))
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        # in this order: the scheduler would take pictures and prefixes of other weights for known
        self.engine.reset_encoder_cache()
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("prefixes of other weights are still in use")

    def _generate(
        self, asked: list[Any], samples: int, special: Special, seed: int, greedy: bool, request: Any
    ) -> list[Any]:
        """vLLM's completions, in the order of their rows."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        cfg = self.cfg.rollout
        for place, prompt in enumerate(asked):
            params = SamplingParams(
                n=samples,
                temperature=0.0 if greedy else cfg.temperature,
                max_tokens=cfg.max_new_tokens,
                seed=seed_of(seed, place) >> 1,  # sample j draws with seed + j
                stop_token_ids=special.eos,
                logit_bias=dict.fromkeys(special.media, -100.0) or None,
                logprobs=0,  # of the word drawn alone
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.engine.add_request(str(place), prompt, params, lora_request=request)
        done: dict[int, Any] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                done[int(output.request_id)] = output.outputs
        return [row for place in range(len(asked)) for row in sorted(done[place], key=lambda row: row.index)]


def _has_head(model: nn.Module) -> bool:
    """Whether vLLM's model has an `lm_head`, or multiplies by its embeddings instead, as its Gemma 2 does."""
    return any(name.endswith("lm_head") for name, _ in model.named_modules())


def check_read(processor: Any, folder: Path) -> None:
    """Raises `ValueError` for a processor that transformers reads from `folder`, as the engine does, as another one.

    The engine is given token ids and pixels; of its own it has the end of a completion and how large pictures become.
    """
    rule = "rollout: engine vllm must read the run's processor as it is"
    try:
        theirs = load_processor(folder)
    except Exception as error:  # whatever a processor's own code may raise
        raise ValueError(f"{rule}; got {type(error).__name__}: {error}") from error
    ours, other = (getattr(each, "tokenizer", each) for each in (processor, theirs))
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(ours, name) != getattr(other, name):
            raise ValueError(f"{rule}; got {name} {getattr(other, name)} instead of {getattr(ours, name)}")
    if ours.get_vocab() != other.get_vocab():
        raise ValueError(f"{rule}; got another vocabulary")
    if processor is ours:
        return
    if theirs is other:
        raise ValueError(f"{rule}; got {type(theirs).__name__}, which reads no pictures")
    # of one colour, which ways to resize it do not tell apart
    picture = Image.new("RGB", (80, 48), (200, 120, 40))
    seen = [each.image_processor([picture], return_tensors="pt") for each in (processor, theirs)]
    for name, value in seen[0].items():
        again = seen[1].get(name)
        if again is None or again.shape != value.shape or not torch.allclose(again.float(), value.float(), atol=1e-3):
            names = [type(each.image_processor).__name__ for each in (theirs, processor)]
            raise ValueError(f"{rule}; got other {name} of one picture, by {names[0]} instead of {names[1]}")


def rollout_of(prompts: list[Prompt], samples: int, outputs: list[Any], special: Special, device: Any) -> Rollout:
    """vLLM's completions as a `Rollout`."""
    lengths = torch.tensor([len(row.token_ids) for row in outputs])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.full(mask.shape, special.pad)
    logp = torch.zeros(mask.shape)
    tokens[mask] = torch.tensor([token for row in outputs for token in row.token_ids])
    pairs = ((token, known) for row in outputs for token, known in zip(row.token_ids, row.logprobs, strict=True))
    logp[mask] = torch.tensor([known[token].logprob for token, known in pairs])
    truncated = ~(torch.isin(tokens, torch.tensor(special.eos)) & mask).any(1)
    parts = (part.to(device) for part in (tokens, mask, logp, truncated))
    return Rollout(prompts, samples, *parts)


def engine_input(prompt: Prompt, config: Any) -> Any:
    """A prompt as vLLM takes it: its ids, and its media as the trainer's processor has made them."""
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    if not prompt.media:
        return tokens_input(prompt.input_ids)
    ids = torch.tensor(prompt.input_ids)
    fields: dict[str, Any] = {}
    hashes: dict[str, Any] = {}
    places: dict[str, Any] = {}
    for modality, (pixels, grid, token) in zip(("image", "video"), MEDIA, strict=True):
        if pixels not in prompt.media:
            continue
        grids = prompt.media[grid]
        patches = grids.prod(-1)
        fields[pixels] = MultiModalFieldConfig.flat_from_sizes(modality, patches)
        fields[grid] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        items = zip(prompt.media[pixels].split(patches.tolist()), grids, strict=True)
        hashes[modality] = [_digest(*item) for item in items]  # each is encoded once
        counts = (patches // config.vision_config.spatial_merge_size**2).tolist()
        where = (ids == getattr(config, token)).nonzero()[:, 0]
        ranges = places[modality] = []
        for positions in where.split(counts):
            # a video is one range, the words at its frames' ends and the times between them included
            outside = int(modality == "video" and config.model_type.startswith(QWEN3))
            first, last = int(positions[0]) - outside, int(positions[-1]) + outside
            inside = torch.isin(torch.arange(first, last + 1), positions)
            ranges.append(PlaceholderRange(first, last + 1 - first, is_embed=inside if outside else None))
    return mm_input(
        prompt.input_ids, MultiModalKwargsItems.from_hf_inputs(BatchFeature(prompt.media), fields), hashes, places
    )


def _digest(pixels: Tensor, grid: Tensor) -> str:
    content = hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=16)
    content.update(str(grid.tolist()).encode())
    return content.hexdigest()
