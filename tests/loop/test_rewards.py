"""Built-in rewards, loading by name, and how several are combined."""

import math
import sys

import numpy as np
import pytest

from copd import rewards


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("4", "4", 1.0),
        ("  Paris. ", "paris", 1.0),
        ("First 5.\n**Answer:** 4", 4, 1.0),
        ("3 7 answer 4", "4", 1.0),
        ("The answer is 5. No, the answer is $4$.", "4", 1.0),
        (r"\boxed{5}, or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
        ("<answer>5</answer> <answer> 4 </answer>", "4", 1.0),
        ("14", "4", 0.0),
        ("4 and 5", "4", 0.0),
        (".5", "5", 0.0),
        (r"\boxed{4", "4", 0.0),
        ("", "4", 0.0),
        ("4", None, None),
    ],
)
def test_exact_match_reads_the_last_stated_answer(completion, answer, reward):
    assert rewards.exact_match(completions=[completion], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("B", "B", 1.0),
        ("(b) because it is red", "B. red", 1.0),
        ("A is tempting, yet I choose C", "(C)", 1.0),
        (r"A or B: \boxed{B}", "A", 0.0),
        ("The answer is (D).", "d", 1.0),
        ("It's blue", "B", 0.0),
        ("B", "blue", None),
        ("B", None, None),
    ],
)
def test_multiple_choice_compares_letters(completion, answer, reward):
    assert rewards.multiple_choice(completions=[completion], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"so \boxed{\frac{2}{4}}", "1/2", 1.0),
        ("0.5", r"$\frac12$", 1.0),
        (r"\boxed{3}", 4, 0.0),
        ("no number", "4", 0.0),
        ("4", None, None),
    ],
)
def test_math_verify_judges_equality(completion, answer, reward):
    pytest.importorskip("math_verify")
    assert rewards.math_verify(completions=[completion], answer=[answer]) == [reward]


def test_math_verify_names_the_package_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RuntimeError, match="pip install math-verify"):
        rewards.math_verify(completions=["4"], answer=["4"])


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a\nb</think>\n4", 1.0),
        ("a</think> 4", 1.0),
        ("<think>a</think> ", 0.0),
        ("<think>a 4", 0.0),
        ("<think>a</think><think>b</think> 4", 0.0),
        ("4", 0.0),
    ],
)
def test_format_wants_one_thought_and_then_an_answer(completion, reward):
    assert rewards.BUILT_IN["format"](completions=[completion]) == [reward]


@pytest.mark.parametrize("name", ["exact_match", "multiple_choice", "format"])
def test_a_chat_completion_earns_what_its_text_earns(name):
    chat = [[{"role": "assistant", "content": "<think>a</think> (B)"}]]
    plain = ["<think>a</think> (B)"]
    reward = rewards.load(name)
    assert reward(completions=chat, answer=["B"]) == reward(completions=plain, answer=["B"])


def test_load_finds_built_in_rewards_and_module_functions():
    assert rewards.load("exact_match") is rewards.exact_match
    assert rewards.load("copd.rewards:think_format") is rewards.think_format


@pytest.mark.parametrize("name", ["exact", "copd.rewards:", ":f"])
def test_load_refuses_an_unknown_name(name):
    with pytest.raises(ValueError, match=r"rewards: name must be one of .* or module:function; got"):
        rewards.load(name)


@pytest.mark.parametrize("name", ["no_such_module:f", "copd.rewards:no_such_function"])
def test_load_says_what_cannot_be_imported(name):
    with pytest.raises(ValueError, match=r"must be importable; got .*no_such"):
        rewards.load(name)


def test_load_refuses_what_is_not_a_function():
    with pytest.raises(ValueError, match="must be a function; got a dict"):
        rewards.load("copd.rewards:BUILT_IN")


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def even_rows(prompts, completions, keep, **columns):
    return [1.0 if kept else None for kept in keep]


def test_combine_weights_and_adds_what_applies():
    total = rewards.combine([length, even_rows], [0.5, 2.0], ["p"] * 2, ["abc", "de"], {"keep": [True, False]})
    assert total == ([3.5, 1.0], {"length": [3.0, 2.0], "even_rows": [1.0, None]}, {})


def test_combine_hands_prompts_completions_and_columns_over():
    seen = {}

    def spy(**arguments):
        seen.update(arguments)
        return [0.0]

    assert rewards.combine([spy], None, ["p"], ["c"], {"answer": ["a"], "other": [1]}).total == [0.0]
    assert seen == {"prompts": ["p"], "completions": ["c"], "answer": ["a"], "other": [1]}


def short(prompts, completions, **columns):
    return [1.0]


def test_combine_refuses_a_wrong_count():
    with pytest.raises(ValueError, match="combine: short must return one reward for each of the 2 completions; got 1"):
        rewards.combine([short], None, ["p"] * 2, ["a", "b"], {})


@pytest.mark.parametrize("value", [{"overall": 1.0}, 1.0, None, "1"])
def test_combine_refuses_what_is_no_list(value):
    with pytest.raises(ValueError, match="must return one reward for each of the 1 completions; got a"):
        rewards.combine([lambda **arguments: value], None, ["p"], ["a"], {})


def test_a_row_to_which_nothing_applies_is_its_problem_alone():
    score = rewards.combine([even_rows], None, ["p"] * 2, ["a", "b"], {"keep": [True, False]})
    assert score.total[0] == 1.0
    assert math.isnan(score.total[1])
    assert list(score.problems) == [1]
    assert "one of ['even_rows'] must apply to every row" in score.problems[1]


@pytest.mark.parametrize(
    ("value", "got"), [(math.nan, "nan"), (math.inf, "inf"), ("1", "'1'"), ({"overall": 1.0}, "{'overall': 1.0}")]
)
def test_a_reward_that_is_no_finite_number_is_a_problem_of_its_row(value, got):
    score = rewards.combine([lambda **arguments: [value, 1.0]], None, ["p"] * 2, ["a", "b"], {})
    assert math.isnan(score.total[0])
    assert score.total[1] == 1.0
    assert score.problems[0].endswith(f"must return finite numbers or None; got {got}")


def raises_on_empty(prompts, completions, **columns):
    return [float(text[0] == "a") for text in completions]


def test_an_exception_is_a_problem_of_the_row_that_made_it():
    score = rewards.combine([raises_on_empty, length], None, ["p"] * 3, ["a", "", "b"], {})
    assert (score.total[0], score.total[2]) == (2.0, 1.0)
    assert list(score.problems) == [1]
    assert "raises_on_empty raised IndexError: string index out of range" in score.problems[1]


def test_coroutines_arrays_and_numpy_numbers_are_rewards_too():
    async def later(prompts, completions, **columns):
        return [2.0] * len(completions)

    def array(prompts, completions, **columns):
        return np.ones(len(completions))

    score = rewards.combine([later, array], None, ["p"] * 2, ["a", "b"], {})
    assert score.total == [3.0, 3.0]
    assert rewards.combine([lambda **_: [np.float32(0.5)]], None, ["p"], ["a"], {}).total == [0.5]


def test_the_columns_a_reward_needs_are_those_it_names_without_a_default():
    def graded(prompts, completions, solution, level=1, **columns):
        return []

    assert rewards.needed(graded) == {"solution"}
    assert rewards.needed(rewards.exact_match) == {"answer"}
    assert rewards.needed(rewards.think_format) == set()


def test_combine_refuses_weights_of_another_number():
    with pytest.raises(ValueError, match="one for each of the 1 rewards; got 2"):
        rewards.combine([length], [1.0, 2.0], ["p"], ["a"], {})


def test_combine_refuses_no_function():
    with pytest.raises(ValueError, match="must name at least one reward; got none"):
        rewards.combine([], None, ["p"], ["a"], {})


def test_trl_rewards_plug_in():
    trl = pytest.importorskip("trl.rewards")
    pytest.importorskip("math_verify")
    chat = [[{"role": "assistant", "content": r"\boxed{4}"}]]
    assert rewards.combine([trl.accuracy_reward], None, ["p"], chat, {"solution": ["4"]}).total == [1.0]
