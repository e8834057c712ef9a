"""The loop on several ranks: what one process makes of a run, K processes make too, bit for bit."""

import json
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from copd_cases import make_config, make_run, reward_longer
from safetensors.torch import load_file

import copd.ranks as ranks_of_the_loop
from copd import train
from copd.coevolve import coevolve, gather
from copd.lab.start import start
from copd.ranks import Place
from copd.task import Prompt

TIMES = ("time", "step_time", "update_time", "tokens_per_s", "memory_mib")
THREE = ("text", "image", "video")


def begin(cfg, device):
    base, processor, tasks = start(cfg, device)
    for task in tasks.values():
        task.reward = reward_longer
    return base, processor, tasks


def whole_run(folder, settings, domains):
    """On every rank: a run from start to end; its results without what time makes different."""
    torch.use_deterministic_algorithms(False)  # as in a run, which does not fill what it allocates
    cfg = make_config(folder, *settings, domains=domains)
    return plain(train.run(cfg, begin))


def plain(results):
    timed = {"config", "cost", "name"}
    results = {key: value for key, value in results.items() if key not in timed}
    return json.loads(json.dumps(results), object_hook=lambda record: {k: v for k, v in record.items() if k != "time"})


def told(folder, kept):
    """What a run left: every logged number, all weights, the names of all files but those that one of two kept."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    files = sorted(str(path) for path in paths if path.parts[0] != kept)
    weights = {path: load_file(folder / path) for path in files if path.endswith(".safetensors")}
    return records, files, weights


def assert_same_runs(ours, theirs, kept=""):
    (records, files, weights), (other_records, other_files, other_weights) = told(ours, kept), told(theirs, kept)
    assert records == other_records
    assert files == other_files
    for path, state in weights.items():
        different = [name for name, value in state.items() if not torch.equal(value, other_weights[path][name])]
        assert not different, f"{path}: {different}"


PARTS = ("micro_batch_tokens=40", "rlvr.updates_per_batch=2")
ALL = ("topology=all", "opd.teachers=all", "schedule=overlap", "overlap.every=1")
CASES = {
    "reverse": (("opd.teacher=phase_start", "opd_steps=2", "checkpoint_every=1", "eval.every=2"), THREE, 2),
    "sampled": (("opd.signal=sampled", "eval.divergence_every=1", "consolidate.steps=1"), THREE, 3),
    "everything": ((*ALL, *PARTS, "consolidate.steps=1", "consolidate.native=true"), THREE, 2),
    "adapters": (("model.adapter={rank: 4}", "merge.into=adapter"), ("text", "image"), 2),
    "independent": (("method=independent", "merge.method=ties", "offload=true"), ("text", "image"), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_one_process_and_several_make_the_same_run(case, tmp_path, ranks):
    settings, domains, size = CASES[case]
    (alone,) = ranks(1, whole_run, tmp_path / "1", settings, domains)
    assert ranks(size, whole_run, tmp_path / "several", settings, domains) == [alone] * size
    assert_same_runs(tmp_path / "several" / "run", tmp_path / "1" / "run")


def message(what):
    """On rank 0: how many tensors travel. On rank 1: what arrives."""
    if dist.get_rank():
        return ranks_of_the_loop.receive(0, torch.device("cpu"))
    works = ranks_of_the_loop.send(what, 1)
    for work, _ in works:
        work.wait()
    return len(works) - 2


def test_a_message_is_what_was_sent_and_holds_each_tensor_once(ranks):
    tensors = [torch.randn(3, 5).T, torch.tensor(7), torch.empty(0, 4), torch.ones(3, dtype=torch.bfloat16)]
    prompt = Prompt("text", 4, "two words", [1, 2], [0, 0], {"pixel_values": torch.ones(2, 2)}, {"answer": "3"})
    what = {"tensors": tensors, "again": tensors[0], "part": torch.arange(10)[3:5], "prompts": [prompt, prompt]}
    count, arrived = ranks(2, message, what)
    assert count == 5  # the empty one needs no message of its own
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(arrived["tensors"], tensors, strict=True))
    assert torch.equal(arrived["part"], torch.tensor([3, 4]))
    first, second = arrived["prompts"]
    assert first is second
    assert (first.input_ids, first.text, first.columns) == ([1, 2], "", {})
    assert torch.equal(first.media["pixel_values"], torch.ones(2, 2))


def sent_in_a_step(folder, signal):
    """Bytes of each tensor that this rank sends in a step of Phase II."""
    cfg = make_config(folder, f"opd.signal={signal}", domains=("text", "text2"))
    trainer, sent, isend = make_run(cfg), [], dist.isend

    def counted(tensor, rank, **options):
        sent.append(tensor.numel())
        return isend(tensor, rank, **options)

    ranks_of_the_loop.dist.isend = counted
    try:
        gather(trainer.plan, "opd", 0)
    finally:
        ranks_of_the_loop.dist.isend = isend
    return sent


def test_the_sampled_signal_needs_no_lm_head_of_the_teacher(tmp_path, ranks):
    lm_head = 256 * 32 * 4
    for rank in ranks(2, sent_in_a_step, tmp_path / "sampled", "sampled"):
        assert sum(rank) < lm_head / 4
    for rank in ranks(2, sent_in_a_step, tmp_path / "reverse", "reverse"):
        assert rank.count(lm_head) == 1


def held_in_a_step(folder):
    """What this rank takes of others' states in a step of Phase II, item by item, and the most it has at once."""
    cfg = make_config(folder, "topology=all", "opd.teachers=all", "micro_batch_tokens=1", PARTS[1], domains=THREE)
    trainer, receive, taken, here, most = make_run(cfg), ranks_of_the_loop.receive, [], [], 0

    def counted(rank, device, tag=0):
        nonlocal most
        item = receive(rank, device, tag)
        if tag:
            taken.append(item.nbytes)
            here.append(item.nbytes)
            weakref.finalize(item, here.remove, item.nbytes)
            most = max(most, sum(here))
        return item

    ranks_of_the_loop.receive = counted
    try:
        list(coevolve(trainer.plan, 1))
    finally:
        ranks_of_the_loop.receive = receive
    return taken, most, trainer.plan.place.owed


def test_of_an_answer_no_more_is_here_than_the_micro_batch_that_is_computed(tmp_path, ranks):
    """A row a micro-batch, two updates: of each teacher of a lesson one row's states, whatever the rollout's size."""
    rows, updates = 2 * 3, 2
    # `text` and `video` hear `image` in both of their lessons, `image` both of them in both of its own
    for (taken, most, owed), (branches, heard) in zip(
        ranks(2, held_in_a_step, tmp_path), ((2, 2), (1, 4)), strict=True
    ):
        assert len(taken) == branches * heard * rows * updates
        assert 0 < most <= heard * max(taken)
        assert owed == []


def alone_and_together(places):
    place = Place(["text", "image", "video"])

    def work(rank):
        if place.index == rank:
            raise OSError(f"disk of rank {rank}")
        return place.index

    found = []
    for method, rank in ((place.together, 1), (place.told, 0), (place.ahead, 0), (place.ahead, 1)):
        with pytest.raises(OSError, match=f"disk of rank {rank}"):
            method(partial(work, rank))
        found.append(method(partial(work, 5)))
    return found, place.any(place.index == 1), [name for name in places if place.holds(name)]


def test_what_one_rank_raises_all_raise_and_go_on(ranks):
    names = ["base", "text", "image", "video", "merged", "consolidated"]
    first, second = ranks(2, alone_and_together, names)
    assert first == ([0, 0, 0, 0], True, ["base", "text", "video"])
    assert second == ([1, 0, 1, 1], True, ["image", "merged", "consolidated"])


def refused(folder, settings):
    with pytest.raises(ValueError, match="ranks: ") as raised:
        train.run(make_config(folder, *settings, domains=THREE), start)
    return str(raised.value)


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (4, (), "processes must be at most 3 or a multiple, one or more for each of text, image, video; got 4"),
        (2, ("rollout.engine=vllm",), "rollout.engine must be transformers with several processes; got vllm"),
        (2, ("method=mixed", "offload=true"), "offload must be off with 2 ranks a branch; got True"),
        (3, ("method=mopd",), "rollout.prompts must be at least 3 with 3 ranks a branch; got 2"),
    ],
)
def test_what_several_ranks_cannot_run_is_refused_on_every_one(size, settings, message, tmp_path, ranks):
    assert ranks(size, refused, tmp_path, settings) == [f"ranks: {message}"] * size
    assert not (tmp_path / "run").exists()
