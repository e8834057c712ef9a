"""The 256 words of the synthetic tasks, and the tokenizer that reads them.

Words are separated by spaces and each is one token, so a prompt in the report is exactly what the model read.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
IMAGE, VIDEO, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
LANGUAGE = [
    *("answer", "text", "image", "video", "+", "-", "="),
    *("red", "green", "blue", "steps", "right", "left", "plain", "mirror"),
]
NUMBERS = [str(number) for number in range(100)]
MEDIA = [IMAGE, VIDEO, VISION_START, VISION_END]
SIZE = 256

_known = [PAD, BOS, EOS, *LANGUAGE, *NUMBERS]
# media ids come last, as in Qwen3-VL
WORDS = [*_known, *(f"<unused_{i}>" for i in range(SIZE - len(_known) - len(MEDIA))), *MEDIA]
ID = {word: index for index, word in enumerate(WORDS)}


def encode(words: list[str]) -> list[int]:
    return [ID[word] for word in words]


def decode(tokens: list[int]) -> str:
    """Words of `tokens` without the special ones."""
    return " ".join(WORDS[token] for token in tokens if WORDS[token] not in (PAD, BOS, EOS))


def tokenizer() -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer with the same words, saved beside every tiny checkpoint."""
    core = Tokenizer(models.WordLevel(ID, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=MEDIA,
    )
