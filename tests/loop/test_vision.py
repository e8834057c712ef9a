"""Vision models of other families than the lab's: built small from their configs, with their own processors."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from copd_cases import CPU, make_config, weights
from PIL import Image
from test_vllm import run_beside
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from copd.branch import Branch
from copd.data import FileTask
from copd.model import collate, hidden_states
from copd.processor import PilProcessor
from copd.settings import DataConfig
from copd_kernels import logprob

QWEN = {"image": "<|image_pad|>", "video": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
TEXT |= {"num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
QWEN_VISION |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
LINEAR = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tokenizer(specials, **named):
    """Bytes, and special words; `named` are those that the tokenizer has a name for."""
    words = ["<pad>", "<eos>", "<bos>", *pre_tokenizers.ByteLevel.alphabet(), *specials]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(list(specials))
    basic = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **basic, extra_special_tokens=named)


def template(image, video="", before="", after=""):
    placed = f"{{% if p.type == 'image' %}}{before}{image}{after}{{% elif p.type == 'video' %}}{before}{video}{after}"
    parts = f"{{% for p in m.content %}}{placed}{{% else %}}{{{{ p.text }}}}{{% endif %}}{{% endfor %}}"
    return f"{{% for m in messages %}}{{{{ m.role }}}}: {parts}\n{{% endfor %}}assistant:"


def images_only(kind, image_processor, words, chat, *rest, **options):
    """A processor without its part for videos, which transformers builds with torchvision alone."""

    class ImagesOnly(kind):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, *rest, chat_template=chat_template, **options)
            self.video_processor = SimpleNamespace(num_frames=4, fps=1)  # SmolVLM reads them for every chat

    return ImagesOnly(image_processor, words, chat)


def qwen(kind):
    words = tokenizer(QWEN.values())
    chat = template(QWEN["image"], QWEN["video"], QWEN["start"], QWEN["end"])
    ids = dict(
        zip(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            words.convert_tokens_to_ids(list(QWEN.values())),
            strict=True,
        )
    )
    size = {"shortest_edge": 64, "longest_edge": 4096}
    pixels = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size, **HALF)
    text, vision = TEXT | MROPE, QWEN_VISION
    if kind == "qwen2_5_vl":
        vision = vision | {"window_size": 16, "fullatt_block_indexes": [1]}
        processor = images_only(Qwen2_5_VLProcessor, pixels, words, chat)
    elif kind == "qwen3_5":
        vision = vision | {"num_position_embeddings": 64}
        processor = PilProcessor(pixels, words, chat)
        text = text | LINEAR | {"layer_types": ["linear_attention", "full_attention"]}
    else:
        vision = vision | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_interleaved": True}
        processor = PilProcessor(pixels, words, chat)
        if kind == "qwen3_vl_moe":
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return AutoConfig.for_model(
        kind, text_config=text | {"vocab_size": len(words)}, vision_config=vision, **ids
    ), processor


def gemma3():
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer(names.values(), **names)
    boi, eoi, image = words.convert_tokens_to_ids(list(names.values()))
    pixels = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, **HALF)
    processor = Gemma3Processor(pixels, words, template("<start_of_image>"), image_seq_length=4)
    text = TEXT | {"vocab_size": len(words), "query_pre_attn_scalar": 8, "sliding_window": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    ids = {"boi_token_index": boi, "eoi_token_index": eoi, "image_token_index": image, "mm_tokens_per_image": 4}
    vision = VISION | {"image_size": 16, "vision_use_head": False}
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **ids), processor


def internvl():
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names["video_token"] = "<video>"
    words = tokenizer(names.values(), **names)
    pixels = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, min_patches=1, max_patches=4, **HALF)
    processor = images_only(InternVLProcessor, pixels, words, template("<IMG_CONTEXT>\n"), image_seq_length=4)
    text = TEXT | {"vocab_size": len(words), "model_type": "qwen2"}
    vision = VISION | {"image_size": [16, 16], "patch_size": [4, 4]}
    ids = {"image_token_id": words.convert_tokens_to_ids("<IMG_CONTEXT>"), "image_seq_length": 4}
    return AutoConfig.for_model("internvl", text_config=text, vision_config=vision, **ids), processor


def llava_onevision():
    words = tokenizer(["<image>", "<video>"])
    places = [[16, 16], [16, 32], [32, 16], [32, 32]]
    pixels = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=places, **HALF)
    processor = images_only(LlavaOnevisionProcessor, pixels, words, template("<image>\n"), 16, "full")
    text = TEXT | {"vocab_size": len(words), "model_type": "qwen2"}
    vision = VISION | {"image_size": 16, "model_type": "siglip_vision_model", "vision_use_head": False}
    image, video = words.convert_tokens_to_ids(["<image>", "<video>"])
    ids = {"image_token_index": image, "video_token_index": video, "image_grid_pinpoints": places}
    return AutoConfig.for_model("llava_onevision", text_config=text, vision_config=vision, **ids), processor


def smolvlm():
    names = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    }
    words = tokenizer([*names.values(), "<video>", "<end_of_utterance>"], **names)
    pixels = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, **HALF)
    processor = images_only(SmolVLMProcessor, pixels, words, template("<image>"), image_seq_len=4)
    text = TEXT | {"vocab_size": len(words), "model_type": "llama"}
    image = words.convert_tokens_to_ids("<image>")
    config = AutoConfig.for_model(
        "smolvlm", text_config=text, vision_config=VISION | {"image_size": 16}, image_token_id=image, scale_factor=2
    )
    return config, processor


FAMILIES = {kind: (lambda kind=kind: qwen(kind)) for kind in ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")}
FAMILIES |= {build.__name__: build for build in (gemma3, internvl, llava_onevision, smolvlm)}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(config of the run, model, processor, task): rows with an image, with two of other sizes, and without any."""
    folder = tmp_path_factory.mktemp(request.param)
    config, processor = FAMILIES[request.param]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        if not parameter.any():  # what would hide images from the language model, as Gemma 3's projector at its start
            torch.nn.init.normal_(parameter, std=0.2)
    for name, (width, height), colour in (("a", (24, 16), "red"), ("b", (16, 40), "blue"), ("c", (16, 16), "green")):
        Image.new("RGB", (width, height), colour).save(folder / f"{name}.png")
    rows = [{"images": ["a.png"]}, {"images": ["b.png", "c.png"]}, {}, {"images": ["c.png"]}]
    file = folder / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"Hi {i * '!'}", "answer": "x"} | r) + "\n" for i, r in enumerate(rows))
    )
    task = FileTask("vision", DataConfig(path=str(file), test_rows=1), processor)
    cfg = make_config(folder, "model.hidden_size=32", "rollout.max_new_tokens=5", "optim.lr=1e-2")
    return cfg, model, processor, task


def own_logits(model, processor, prompt, completion=()):
    """Of transformers' forward, with what the processor gives it."""
    ids = torch.tensor([[*prompt.input_ids, *completion]])
    kinds = torch.tensor([[*prompt.mm_token_type_ids, *[0] * len(completion)]])
    named = [name for name in ("mm_token_type_ids", "token_type_ids") if name in processor.model_input_names]
    return model(input_ids=ids, **prompt.media, **dict.fromkeys(named, kinds)).logits[0]


def test_hidden_states_are_those_of_the_models_own_forward(case):
    _, model, processor, task = case
    prompts = [task.prompt(i) for i in range(3)]
    batch = collate(model, prompts, 0, [[5, 6, 7], [8], [9, 10]])
    with torch.no_grad():
        logits = model.lm_head(hidden_states(model, batch))
        for row, (prompt, after) in enumerate(zip(prompts, ([5, 6, 7], [8], [9, 10]), strict=True)):
            want = own_logits(model, processor, prompt, after)
            torch.testing.assert_close(logits[row, : len(want)], want, rtol=1e-4, atol=1e-5)


def test_greedy_tokens_are_those_of_generate_and_log_probs_those_of_training(case):
    cfg, model, processor, task = case
    branch = Branch("vision", [task], model, processor, cfg, CPU)
    prompts = [task.prompt(i) for i in range(3)]
    greedy = branch.rollout(prompts, 0, 1, greedy=True)
    for row, prompt in enumerate(prompts):
        tokens = []
        while len(tokens) < 5 and tokens[-1:] != [1]:
            logits = own_logits(model, processor, prompt, tokens)[-1]
            logits[branch.special.media] = -torch.inf
            tokens.append(logits.argmax().item())
        assert greedy.tokens[row][greedy.mask[row]].tolist() == tokens
    sampled = branch.rollout(prompts, 1)
    head, tokens = branch.head(sampled, list(range(len(sampled.tokens))))
    want = logprob(head, tokens).logp  # over all words, those that are never drawn too
    torch.testing.assert_close(sampled.logp[sampled.mask], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_it_trains_with_its_vision_or_without(case, frozen):
    cfg, model, processor, task = case
    model.requires_grad_(True)
    task.reward = lambda prompts, texts: [float(i % 2) for i in range(len(texts))]
    cfg = make_config(cfg.run_dir, "rollout.prompts=3", f"model.freeze_vision={frozen}", "optim.lr=1e-3")
    cfg = replace(cfg, model=replace(cfg.model, activation_checkpointing=not frozen))
    branch = Branch("vision", [task], model, processor, cfg, CPU)
    before = weights(branch)
    metrics = branch.learn(branch.native_batches(0))
    moved = {name for name, value in weights(branch).items() if not torch.equal(value, before[name])}
    assert metrics["grad_norm"] > 0
    assert any("language_model" in name or "text_model" in name for name in moved)
    assert any("vision" in name or "visual" in name for name in moved) != frozen


def test_videos_of_every_family_whose_processor_takes_them():
    run_beside("video_cases.py")
