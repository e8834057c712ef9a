"""What is read by threads before it is asked for, and rows of files that are decoded so."""

import threading
from collections import Counter

import pytest
import torch
from copd_cases import make_branch, make_config, make_run
from test_data import config, rows
from test_media import film

from copd import media
from copd.ahead import Ahead
from copd.batch import draw
from copd.coevolve import Plan, coevolve
from copd.data import FileTask


class Reader:
    """Notes what it reads and in which thread; waits where it is told to, and breaks on a negative number."""

    def __init__(self):
        self.seen, self.threads, self.may = [], set(), threading.Semaphore(100)

    def __call__(self, number):
        self.may.acquire()
        self.seen.append(number)
        self.threads.add(threading.current_thread())
        if number < 0:
            raise ValueError(f"no {number}")
        return -number


def keys(*numbers):
    return [(number,) for number in numbers]


def test_what_is_expected_is_read_once_by_threads_and_taken_in_order():
    read = Reader()
    ahead = Ahead(read, 3)
    ahead.expect(keys(*range(10)))
    assert [ahead.take(number) for number in range(10)] == [-number for number in range(10)]
    assert sorted(read.seen) == list(range(10))
    assert threading.main_thread() not in read.threads
    assert ahead.take(3) == -3
    assert threading.main_thread() in read.threads


def test_no_more_are_held_than_the_bound():
    read = Reader()
    ahead = Ahead(read, 3)
    ahead.expect(keys(*range(10)))
    ahead.pool.shutdown(wait=True)
    assert sorted(read.seen) == [0, 1, 2]


def test_one_that_is_passed_over_is_forgotten_and_read_when_it_comes():
    read = Reader()
    read.may = threading.Semaphore(0)
    ahead = Ahead(read, 2)
    ahead.expect(keys(0, 1, 2, 3))
    read.may.release(100)
    assert ahead.take(2) == -2
    assert list(ahead.expected) == keys(3)
    assert ahead.take(1) == -1
    assert ahead.take(3) == -3


def test_an_error_is_raised_where_it_is_taken():
    ahead = Ahead(Reader(), 2)
    ahead.expect(keys(1, -2, 3))
    assert ahead.take(1) == -1
    with pytest.raises(ValueError, match="no -2"):
        ahead.take(-2)
    assert ahead.take(3) == -3


@pytest.fixture
def films(write, tmp_path):
    """A task's rows, each with a picture and a film; the last is held out."""
    for i in range(7):
        film(tmp_path / f"{i}.mp4", 4, rate=2)
    return write(*({"prompt": f"{i}?", "images": ["a.png"], "videos": [f"{i}.mp4"]} for i in range(7)))


@pytest.mark.parametrize("most", [0, 2, 16])
def test_rows_decoded_ahead_are_the_same_rows_each_decoded_once(processor, films, monkeypatch, most):
    decoded, inner = [], media.read_video
    monkeypatch.setattr(
        media, "read_video", lambda *of: (decoded.append((of[0], threading.current_thread())), inner(*of))[1]
    )
    task = FileTask("film", config(films, decode_ahead=most), processor)
    plain = FileTask("film", config(films, decode_ahead=0), processor)
    made = [prompt for step in range(3) for prompt in draw(task, 3, step, "key")]
    if task.ahead.pool is not None:
        task.ahead.pool.shutdown(wait=True)
    asked, decoded[:] = list(decoded), []
    wanted = [prompt for step in range(3) for prompt in draw(plain, 3, step, "key")]
    for ours, theirs in zip(made, wanted, strict=True):
        assert (ours.index, ours.input_ids) == (theirs.index, theirs.input_ids)
        assert all(torch.equal(ours.media[name], theirs.media[name]) for name in theirs.media)
    # of the fourth step no more than the bound have been begun, by threads; the first step nobody could foresee
    extra = min(most, 3)
    assert len(asked) == 9 + extra
    assert sum(thread is not threading.main_thread() for _, thread in asked) == (6 + extra if most else 0)


def test_a_task_without_media_needs_no_threads(processor, write):
    task = FileTask("text", config(write(*rows(4))), processor)
    assert len(draw(task, 2, 0, "key")) == 2
    assert task.ahead.pool is None


def test_a_broken_file_is_named_as_it_is_without_threads(processor, films, tmp_path):
    (tmp_path / "3.mp4").write_text("no film")
    said = set()
    for most in (0, 16):
        task = FileTask("film", config(films, decode_ahead=most), processor)
        with pytest.raises(ValueError, match=r"film: row 3 of .*rows.jsonl: video must be a file") as caught:
            [draw(task, 2, step, "key") for step in range(3)]
        said.add(str(caught.value))
    assert len(said) == 1


def test_a_row_in_place_of_one_that_is_too_long_disturbs_nothing(processor, films):
    task = FileTask("film", config(films, max_prompt_tokens=1, overlong="next"), processor)
    task.expect([0, 3, 1])
    with pytest.raises(ValueError, match="one train prompt must have at most 1 tokens; got none"):
        task.prompt(0)
    assert [row for row, _ in task.ahead.expected] == [3, 1]


def count(task, expected, drawn):
    """Notes the rows that a task is told to expect, and those that are asked of it."""
    prompt = task.prompt
    task.expect = lambda rows: expected.update((task.name, row) for row in rows)
    task.prompt = lambda row, split="train": (drawn.update([(task.name, row)]), prompt(row, split))[1]
    return task


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        # native batches go on through Phase II; a Phase II begins with cross batches, the merge with its own
        (["rl_steps=2", "opd_steps=2", "cycles=2", "consolidate.steps=2"], 2 * 2 + 2 * 2 * 2 + 2),
        (["rl_steps=2", "opd_steps=2", "cycles=2", "opd.native=false"], 2 * 2 * 2 + 2 * 2 * 2),
        (["method=mixed", "mixed_steps=5"], 2 * 2),
        (["method=mixed", "mixed_steps=3", "mixed_batch=joint"], 2 * 2),
    ],
)
def test_every_row_of_a_phase_but_the_first_steps_is_expected_and_none_beyond_its_end(tmp_path, settings, first):
    run, expected, drawn = make_run(make_config(tmp_path, *settings)), Counter(), Counter()
    for task in run.tasks.values():
        count(task, expected, drawn)
    for _ in coevolve(run.plan):
        pass
    assert not expected - drawn
    assert (drawn - expected).total() == first


@pytest.mark.parametrize("batch", ["in_turn", "joint"])
def test_a_student_of_experts_expects_what_each_will_ask(tmp_path, batch):
    cfg = make_config(tmp_path, "method=mopd", f"mixed_batch={batch}")
    expected, drawn, in_turn = Counter(), Counter(), batch == "in_turn"
    experts = [make_branch(cfg, name) for name in ("text", "image")]
    student = make_branch(cfg, "student", domain="text")
    student.tasks = [count(expert.tasks[0], expected, drawn) for expert in experts]
    teachers = {"student": ["text", "image"]}
    for _ in coevolve(Plan([student], ["opd"] * 5, teachers, native=False, in_turn=in_turn, experts=experts)):
        pass
    assert not expected - drawn
    assert (drawn - expected).total() == 2 * 2
