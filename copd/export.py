"""A model that ranks split, as the safetensors files of one: each rank writes its rows where they belong.

A tensor lies row after row in its file, and a shard is some of its rows. Nothing is gathered and nothing written twice.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.tensor import DTensor

from copd.peers import Peers

FILE_SIZE = "50GB"  # of one at most, as transformers has it
# in a file those of many bytes come first
TYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32"}
TYPES |= {torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def write(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, peers: Peers) -> None:
    """Weights of a model, sharded by rows or the same everywhere, with those that are not whole numbers in `dtype`."""
    whole = {
        name: torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device="meta")
        for name, value in tensors.items()
    }
    split = split_torch_state_dict_into_shards(
        whole, filename_pattern="model{suffix}.safetensors", max_shard_size=FILE_SIZE
    )
    for file, names in split.filename_to_tensors.items():
        header, starts = _layout({name: whole[name] for name in names})
        peers.told(partial((folder / file).write_bytes, header))
        with (folder / file).open("r+b") as stream:
            for name in names:
                row, value = _mine(tensors[name], peers)
                stream.seek(starts[name] + row * whole[name][:1].nbytes if whole[name].dim() else starts[name])
                stream.write(value.to(whole[name].dtype).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if split.is_sharded and peers.first:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _mine(value: Tensor, peers: Peers) -> tuple[int, Tensor]:
    """The first of the rows that this rank writes, and those rows; all of a tensor that is not split, or none of it."""
    value = value.detach()
    if not isinstance(value, DTensor):
        return 0, value if peers.first else value.new_empty(0)
    rows = math.ceil(len(value) / peers.size)
    return min(len(value), rows * peers.index), value.to_local()


def _layout(whole: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """A file's header, and where in the file each tensor begins."""
    order = sorted(whole, key=lambda name: (-whole[name].element_size(), name))
    ends = [0]
    for name in order:
        ends.append(ends[-1] + whole[name].nbytes)
    described = {
        name: {"dtype": TYPES[whole[name].dtype], "shape": list(whole[name].shape), "data_offsets": [start, end]}
        for name, start, end in zip(order, ends, ends[1:], strict=False)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}} | described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in zip(order, ends, strict=False)}
