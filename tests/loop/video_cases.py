"""Videos through families' own processors, which transformers builds with torchvision alone: see test_vision.py."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from copd_cases import CPU, make_config
from PIL import Image
from test_vision import FAMILIES, HALF, own_logits
from transformers import AutoModelForImageTextToText
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from copd import schema, train
from copd.branch import Branch
from copd.config import Config
from copd.data import FileTask
from copd.model import collate, hidden_states, load_saved
from copd.settings import DataConfig

SQUARE = {"size": {"height": 16, "width": 16}} | HALF
QWEN = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096}}
QWEN |= HALF
# family: its processor, with the arguments that one of images has too, and its part for videos
PROCESSORS = {
    "qwen2_5_vl": (Qwen2_5_VLProcessor, {}, Qwen2VLVideoProcessor, QWEN),
    "qwen3_vl": (Qwen3VLProcessor, {}, Qwen3VLVideoProcessor, QWEN),
    "qwen3_vl_moe": (Qwen3VLProcessor, {}, Qwen3VLVideoProcessor, QWEN),
    "qwen3_5": (Qwen3VLProcessor, {}, Qwen3VLVideoProcessor, QWEN),
    "internvl": (InternVLProcessor, {"image_seq_length": 4}, InternVLVideoProcessor, SQUARE),
    "llava_onevision": (
        LlavaOnevisionProcessor,
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        LlavaOnevisionVideoProcessor,
        SQUARE,
    ),
    "smolvlm": (
        SmolVLMProcessor,
        {"image_seq_len": 4},
        SmolVLMVideoProcessor,
        {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}} | HALF,
    ),
}


@pytest.fixture(scope="module", params=PROCESSORS)
def case(request, tmp_path_factory):
    """(config, model, processor, task): rows with a video, two, a picture, none; a shorter video is held out."""
    folder = tmp_path_factory.mktemp(request.param)
    config, images = FAMILIES[request.param]()
    whole, options, reads_videos, settings = PROCESSORS[request.param]
    template, place = images.chat_template, "{% elif p.type == 'video' %}"
    if place + "{%" in template:  # those for pictures alone have no place for videos
        template = template.replace(place, place + "<video>")
    parts = (images.image_processor, images.tokenizer, reads_videos(**settings))
    processor = whole(*parts, chat_template=template, **options)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    noise = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(noise.integers(0, 255, (16, 24, 3), np.uint8)).save(folder / f"{i}.png")
    clip = [f"{i}.png" for i in range(4)]
    rows = [{"videos": [clip]}, {"videos": [clip[::-1], clip]}, {"images": ["4.png"]}, {}, {"videos": [clip[:2]]}]
    file = folder / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"Hi {i * '!'}", "answer": "x"} | row) + "\n" for i, row in enumerate(rows))
    )
    task = FileTask("vision", DataConfig(path=str(file), test_rows=1, fps=1.0), processor)
    cfg = make_config(folder, "model.hidden_size=32", "rollout.max_new_tokens=5", "rollout.prompts=4")
    return cfg, model, processor, task


AFTER = ([5, 6, 7], [8], [9, 10], [11])


def test_hidden_states_are_those_of_the_models_own_forward_and_see_the_video(case):
    _, model, processor, task = case
    prompts = [task.prompt(i) for i in range(4)]
    with torch.no_grad():
        logits = model.lm_head(hidden_states(model, collate(model, prompts, 0, list(AFTER))))
        for row, (prompt, after) in enumerate(zip(prompts, AFTER, strict=True)):
            want = own_logits(model, processor, prompt, after)
            torch.testing.assert_close(logits[row, : len(want)], want, rtol=1e-4, atol=1e-5)
        seen = prompts[0]
        (name,) = (name for name in seen.media if name.startswith("pixel_values"))
        other = replace(seen, media=seen.media | {name: -seen.media[name]})
        changed = model.lm_head(hidden_states(model, collate(model, [other], 0, [AFTER[0]])))[0]
    assert (changed - logits[0, : len(changed)]).abs()[-3:].max() > 1e-3


def test_it_is_sampled_scored_and_trained_with_videos(case):
    cfg, model, processor, task = case
    task.reward = lambda prompts, texts: [float(i % 2) for i in range(len(texts))]
    branch = Branch("vision", [task], model, processor, cfg, CPU)
    prompts = [task.prompt(i) for i in range(4)]
    greedy = branch.rollout(prompts, 0, 1, greedy=True)
    for row, prompt in enumerate(prompts):
        tokens = []
        while len(tokens) < 5 and tokens[-1:] != [1]:
            logits = own_logits(model, processor, prompt, tokens)[-1]
            logits[branch.special.media] = -torch.inf
            tokens.append(logits.argmax().item())
        assert greedy.tokens[row][greedy.mask[row]].tolist() == tokens
    assert branch.learn(branch.native_batches(0))["grad_norm"] > 0


def test_videos_of_several_lengths_are_read_or_refused_in_a_sentence(case):
    _, model, processor, task = case
    prompts = [task.prompt(0), task.prompt(0, "test")]
    with torch.no_grad():
        if model.config.model_type == "llava_onevision":
            with pytest.raises(ValueError, match=r"videos of one batch must have equally many frames.*; got 2 and 4"):
                hidden_states(model, collate(model, prompts, 0))
            return
        logits = model.lm_head(hidden_states(model, collate(model, prompts, 0)))
        for row, prompt in enumerate(prompts):
            want = own_logits(model, processor, prompt)
            torch.testing.assert_close(logits[row, : len(want)], want, rtol=1e-4, atol=1e-5)


def test_a_run_reads_it_from_its_folder_and_leaves_one_that_is_read_again(case):
    cfg, model, processor, task = case
    folder = cfg.run_dir.parent
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    data = f"{{path: {task.files['train']}, test_rows: 1, fps: 1.0, rewards: [exact_match]}}"
    options = [
        f"output_dir={folder}",
        f"model.path={folder / 'model'}",
        *(f"branches.{name}={{task: data, data: {data}}}" for name in ("one", "two")),
        "cycles=1",
        "rl_steps=1",
        "opd_steps=1",
        "opd.signal=reverse",
        "rollout={prompts: 4, samples: 2, max_new_tokens: 4, mask_truncated: false}",
        "eval={prompts: 1, samples: 1, divergence_prompts: 1, shown: 0}",
    ]
    assert set(train.run(schema.load(Config, None, options))["final"]) == {"base", "one", "two", "merged"}
    merged, own = load_saved(folder / "run" / "merged")
    assert type(merged) is type(model)
    assert FileTask("vision", task.cfg, own).prompt(0).input_ids == task.prompt(0).input_ids
