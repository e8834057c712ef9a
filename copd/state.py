"""What there is to save of a branch, and its files: safetensors of `torch.distributed.checkpoint`, a folder a branch.

Every rank of a branch writes the shards that it has and reads those that it needs, whoever wrote them: nothing is
gathered, and a branch that one process saved goes on on several, or on others. Named as in the model:

    weights                 in fp32 where they train, whatever dtype the model computes in
    step, exp_avg, ...      AdamW's, of the weights that have had a gradient
    frozen                  the weights at the phase's start, where those teach
"""

from __future__ import annotations

import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from copd.branch import Branch
from copd.peers import Peers
from copd.weights import shard

Parts = dict[str, dict[str, Tensor]]
FILE_BYTES = 4 << 30  # of a file about; it is in memory a second time while it is written


def parts(branch: Branch) -> Parts:
    """All there is to save, by part and name: the tensors themselves, not copies."""
    found: Parts = {"weights": branch.weights.state() | branch.trained}
    for name, weight in branch.trained.items():
        for part, value in branch.optimizer.state[weight].items() if weight in branch.optimizer.state else ():
            found.setdefault(part, {})[name] = value
    return found | ({"frozen": branch.frozen.state()} if branch.frozen else {})


def copied(found: Parts) -> Parts:
    """In host memory, whatever becomes of the branch; shards stay shards."""
    return {
        part: {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
        for part, values in found.items()
    }


def shards(branch: Branch) -> Parts:
    """What this rank has, to look at."""
    return {part: {name: shard(value) for name, value in values.items()} for part, values in parts(branch).items()}


def write(folder: Path, found: Parts, peers: Peers) -> dict[str, int]:
    """Saves what every rank of the branch has of it; returns digests of some of the files, the other ranks the rest."""
    number, size = {}, 0
    for part, values in found.items():
        for name, value in values.items():
            number[f"{part}.{name}"], size = 1 + size // (FILE_BYTES * peers.size), size + value.nbytes
    writer = dcp.HuggingFaceStorageWriter(str(folder), number, save_distributed=True)
    writer.per_thread_copy_ahead = 0  # no stream of another device, in a thread that has chosen none
    with _plainly():
        dcp.save(found, storage_writer=writer, process_group=peers.group, no_dist=peers.size == 1)
    mine = sorted(folder.iterdir())[peers.index :: peers.size]
    return {f"{folder.name}/{file.name}": digest(file) for file in mine}


def check(folder: Path, digests: dict[str, int], peers: Peers) -> None:
    """Raises `OSError` for a file that is damaged; each rank of the branch looks at some."""
    mine = sorted(name for name in digests if name.startswith(f"{folder.name}/"))[peers.index :: peers.size]
    for name in mine:
        if digest(folder.parent / name) != digests[name]:
            raise OSError(f"{name} is damaged")


def read(folder: Path, branch: Branch) -> None:
    """Gives a branch what `write` saved, on as many ranks as it has now."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved: dict[str, set[str]] = defaultdict(set)
    for key in reader.read_metadata().state_dict_metadata:
        part, _, name = key.partition(".")
        saved[part].add(name)
    branch.thaw()
    if saved["frozen"]:
        branch.freeze()
    branch.optimizer.state.clear()
    for name, weight in branch.trained.items():
        if name in saved["step"]:
            moments = {
                part: torch.zeros_like(weight) for part in saved if part.startswith("exp_") and name in saved[part]
            }
            branch.optimizer.state[weight] = {"step": torch.tensor(0.0)} | moments
    with _plainly(), torch.no_grad():
        dcp.load(parts(branch), storage_reader=reader, no_dist=True)
    branch.publish()


@contextmanager
def _plainly() -> Iterator[None]:
    """Raises what went wrong, which DCP bundles by rank in what is no `Exception`; it warns of a single process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def digest(file: Path) -> int:
    """CRC-32 of a file: safetensors has none of its own."""
    found = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            found = zlib.crc32(block, found)
    return found
