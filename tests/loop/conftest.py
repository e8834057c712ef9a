"""A processor built offline and rows beside media, for whoever reads data."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from copd.lab.tasks import vocabulary
from copd.processor import PilProcessor

EXAMPLES = Path(__file__).parents[2] / "examples"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vocabulary.MEDIA]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def processor():
    """Byte-level BPE of the examples, and Qwen3-VL's image processor with the tiny model's patches."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((file.read_text() for file in sorted(EXAMPLES.glob("*.jsonl"))), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=TEMPLATE
    )
    size = {"shortest_edge": 256, "longest_edge": 65536}
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return PilProcessor(image_processor, tokenizer, TEMPLATE, video_processor={"size": size})


@pytest.fixture
def write(tmp_path):
    """Writes rows as `rows.jsonl` beside a blank `a.png` of 16 x 24 and a folder `clip` of frames 0 to 10.

    A row's answer is 0 unless given.
    """
    Image.new("RGB", (24, 16), "white").save(tmp_path / "a.png")
    (tmp_path / "clip").mkdir()
    for i in range(11):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "clip" / f"frame_{i}.png")

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"answer": "0"} | row) + "\n" for row in rows))
        return str(path)

    return write
