"""The synthetic tasks: rows from their index, disjoint splits, exact answers, drawn media."""

import numpy as np
import pytest
import torch

from copd.lab.tasks import vocabulary
from copd.lab.tasks.arithmetic import Arithmetic
from copd.lab.tasks.count import COLOURS, Count
from copd.lab.tasks.motion import Motion
from copd.lab.tasks.synthetic import patches

ALL = pytest.mark.parametrize("cls", [Arithmetic, Count, Motion])


@ALL
def test_a_row_is_rebuilt_from_its_index_alone(cls):
    first, second = cls("x", seed=3), cls("x", seed=3)
    second.prompt(7)
    for split in ("train", "test"):
        a, b = first.prompt(5, split), second.prompt(5, split)
        assert (a.input_ids, a.columns, a.index) == (b.input_ids, b.columns, b.index)
        assert all(torch.equal(a.media[name], b.media[name]) for name in a.media)
    assert len({str(cls("x", seed=seed)._problem(0, "train")[0]) for seed in range(8)}) > 1


@ALL
def test_train_and_test_share_no_problem(cls):
    task = cls("x")
    problems = {split: {str(task._problem(i, split)[0]) for i in range(300)} for split in ("train", "test")}
    assert not problems["train"] & problems["test"]


@ALL
def test_the_worked_answer_earns_the_reward_and_a_wrong_one_does_not(cls):
    task, rng = cls("x"), np.random.default_rng(0)
    for index in range(50):
        prompt = task.prompt(index)
        right = task.decode(task.solution(index, rng, careful=True))
        wrong = " ".join([*right.split()[:-1], str(int(right.split()[-1]) + 1)])
        assert task.reward([prompt] * 3, [right, wrong, ""]) == [1.0, 0.0, 0.0]


@ALL
def test_a_careless_annotator_slips_as_often_as_told(cls):
    rng = np.random.default_rng(0)

    def accuracy(**options):
        task = cls("x", **options)
        texts = [task.decode(task.solution(i, rng, careful=False)) for i in range(400)]
        return np.mean(task.reward([task.prompt(i) for i in range(400)], texts))

    assert accuracy(slip=0.0) == 1
    assert 0.2 < accuracy(slip=0.3) < 0.8
    assert accuracy(slip=0.7, slip_unit="problem") < 0.7
    assert abs(accuracy(slip=0.0, convention="mirror", convention_slip=0.6) - 0.4) < 0.15


def test_arithmetic_answers_by_the_formula():
    task = Arithmetic("x", steps=3, modulus=10)
    assert task.words((7, 5, -3, 9)) == ["text", "7", "+", "5", "-", "3", "+", "9", "="]
    assert task.values((7, 5, -3, 9), np.zeros(3, bool)) == [2, 9, 8]
    assert task.values((7, 5, -3, 9), np.array([False, True, False])) == [2, 5, 4]


def test_count_answers_by_the_pixels():
    task = Count("x", noise=0.0)
    for index in range(20):
        prompt = task.prompt(index)
        asked = COLOURS.index(prompt.text.split()[2])
        image = prompt.images[0].astype(float)
        own = image[..., asked] - image.mean(-1)
        cells = own.reshape(3, 8, 3, 8).max((1, 3)) > 100
        assert int(prompt.columns["answer"]) == cells.sum()


def test_motion_answers_by_the_pixels():
    task = Motion("x", noise=0.0)
    for index in range(20):
        prompt = task.prompt(index)
        grey = 127
        centres = [
            np.abs(frame.astype(float) - grey).max(-1).max(0).nonzero()[0].mean() for frame in prompt.images[::2]
        ]
        assert int(prompt.columns["answer"]) == (np.diff(centres) > 0).sum()


def test_conventions_state_the_result_or_its_mirror():
    plain, mirror = (Count("x", convention=name) for name in ("plain", "mirror"))
    rng = np.random.default_rng(0)
    a, b = (task.decode(task.solution(0, rng, careful=True)).split() for task in (plain, mirror))
    assert (a[-3], b[-3]) == ("plain", "mirror")
    assert int(a[-1]) + int(b[-1]) == 9
    assert plain.reward([plain.prompt(0)] * 2, [" ".join(a), " ".join(b)]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slip": 1.5}, r"x: slip must be in \[0, 1\]; got 1.5"),
        ({"slip_unit": "word"}, "x: slip_unit must be step or problem; got 'word'"),
        ({"convention": "odd"}, "x: convention must be plain or mirror; got 'odd'"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Arithmetic("x", **options)


def test_patches_are_those_of_transformers_image_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    theirs = processor([image], return_tensors="pt")
    ours = patches(image[None].astype(np.float32) / 127.5 - 1)
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    assert ours["image_grid_thw"].tolist() == theirs["image_grid_thw"].tolist()


def test_the_tokenizer_reads_what_the_tasks_write():
    tokenizer = vocabulary.tokenizer()
    for cls in (Arithmetic, Count, Motion):
        prompt = cls("x").prompt(0)
        assert tokenizer.encode(prompt.text) == prompt.input_ids
    assert len(tokenizer) == vocabulary.SIZE == len(set(vocabulary.WORDS))
