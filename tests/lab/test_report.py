"""The report says what the runs say: numbers, comparisons either way round, one page without network."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from copd import evaluate
from copd.lab import curves, figures, report
from copd.lab.suite import Suite

DOMAINS = ["text", "image", "video"]
STEPS = 12
PHASES = [["rl", 0, 4], ["opd", 4, 6], ["rl", 6, 10], ["opd", 10, 12]]
OWN, OTHER, BASE = 0.9, 0.45, 0.5
MERGED = {"copd": 0.85, "independent": 0.7, "mixed": 0.8, "mopd": 0.88}


def make(method, seed=0, variant="", domains=DOMAINS, merged=MERGED, arm=None):
    """A run whose accuracies are known: seed s adds s points to every trained model."""
    branches = {d: d for d in domains} if method in ("copd", "independent") else {}
    single = {"mixed": "mixed", "mopd": "student"}.get(method)
    models = ["base", *branches, single or "merged"]
    total = STEPS * len(domains) if method == "mixed" else STEPS

    def accuracy(model, domain, step=total):
        if model == "base":
            return BASE
        taught = method == "copd" and domains[0] in (model, domain)
        level = OWN if model == domain else merged[method] if model not in domains else 0.8 if taught else OTHER
        return BASE + (level + 0.01 * seed - BASE) * step / total

    evals = [
        {"branch": m, "domain": d, "step": s, "accuracy": accuracy(m, d, s), "samples": 100}
        for m in models
        if m != "base"
        for d in domains
        for s in range(0, total + 1, 2)
    ]
    kl = {"copd": 0.02, "independent": 0.6}.get(method)
    divergences = [
        {"student": a, "teacher": b, "domain": a, "step": s, "overlap": 1 - kl * s / 60, "symmetric_kl": kl * s / STEPS}
        for a in branches
        for b in branches
        if a != b and domains[0] in (a, b)
        for s in range(0, total + 1, 2)
    ]
    frame = (np.random.default_rng(0).random((8, 8, 3)) * 255).astype(np.uint8)
    samples = [
        {
            "branch": m,
            "domain": d,
            "index": -1 - i,
            "prompt": "<bos> " + "<|image_pad|> " * 4 + f"<b>{d}</b> {i} & more?",
            "completion": "1 2 answer <i>3</i>",
            "answer": "3",
            "reward": 1.0,
            "images": [] if d == "text" else [evaluate.data_uri(frame)] * (4 if d == "video" else 1),
        }
        for m in models
        for d in domains
        for i in range(2)
    ]
    return {
        "name": f"{arm or method}-seed{seed}",
        "method": method,
        **({"arm": arm} if arm else {}),
        "variant": variant,
        "seed": seed,
        "hub": domains[0],
        "domains": domains,
        "branches": branches,
        "config": {"method": method, "seed": seed, "topology": "hub", "eval": {"top_k": 10}},
        "phases": PHASES if method == "copd" else [["rl", 0, total]],
        "final": {
            m: {d: {"accuracy": accuracy(m, d), "samples": 600, "clipped_ratio": 0.015} for d in domains}
            for m in models
        },
        "eval": evals,
        "divergence": divergences,
        "samples": samples,
        "cost": {
            "seconds": 60.0,
            "rollouts": 100 * total,
            "updates": total,
            "tokens": 1000,
            "curve": [[step, 100 * step] for step in range(0, total + 1, 2)],
        },
        "versions": {"torch": "2", "transformers": "5"},
    }


def save(directory, *runs):
    for run in runs:
        folder = directory / run["variant"] / run["name"]
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(run))
    return directory


def study(seeds=(0, 1, 2), variants=("k3",)):
    return [make(method, seed, variant) for variant in variants for method in MERGED for seed in seeds]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A reported study of three seeds: its Markdown and its page."""
    directory = save(tmp_path_factory.mktemp("study"), *study())
    report.write(directory)
    return (directory / "results.md").read_text(), (directory / "report.html").read_text()


def cells(markdown, label):
    """The row of a table that starts with `label`."""
    row = next(line for line in markdown.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_final_table_has_means_errors_and_cost(written):
    text, _ = written
    error = "± 0.6"  # of 0, 1, 2 points: 1 / sqrt(3)
    assert cells(text, "base") == ["50.0 ± 0.0"] * 4 + ["3", "0", "0"]
    assert cells(text, "experts, each at home") == [f"**91.0 {error}**"] * 4 + ["3", "1,200", "12"]
    assert cells(text, "Experts averaged")[3:] == [f"71.0 {error}", "3", "1,200", "12"]
    assert cells(text, "CoPD merged")[3:] == [f"86.0 {error}", "3", "1,200", "12"]
    assert cells(text, "MOPD, 12 steps")[3:] == [f"89.0 {error}", "3", "2,400", "24"]  # its experts included
    assert cells(text, "Mixed RLVR, 36 steps")[3:] == [f"81.0 {error}", "3", "3,600", "36"]


def consolidated(run, gain=0.05, steps=3):
    """The run with so many steps of consolidation after its merge."""
    run["final"]["consolidated"] = {
        domain: record | {"accuracy": record["accuracy"] + gain} for domain, record in run["final"]["merged"].items()
    }
    run["phases"] = [*run["phases"], ["consolidate", STEPS, STEPS + steps]]
    run["cost"] |= {"rollouts": run["cost"]["rollouts"] + 100 * steps, "consolidation": 100 * steps}
    run["cost"]["curve"] = [*run["cost"]["curve"], [STEPS + steps, run["cost"]["rollouts"]]]
    after = [r | {"branch": "consolidated"} for r in run["eval"] if (r["branch"], r["step"]) == ("merged", STEPS)]
    run["eval"] = [*run["eval"], *(r | {"step": STEPS + steps, "accuracy": r["accuracy"] + gain} for r in after)]
    return run


def test_arms_of_one_method_stand_side_by_side(tmp_path):
    worse = {"copd": 0.6, "mopd": 0.5}
    runs = [consolidated(make(method, seed)) for method in ("copd", "independent") for seed in (0, 1, 2)]
    runs += [make(method, seed) for method in ("mixed", "mopd") for seed in (0, 1)]
    runs += [make("copd", seed, arm="paper", merged=worse) for seed in (0, 1)]
    runs += [make("mopd", seed, arm="mopd-sampled", merged=worse) for seed in (0, 1)]
    runs.append(make("mixed", 0, arm="mixed-turns"))
    for run in runs:
        if run.get("arm"):
            run["config"]["opd"] = {"signal": "sampled"}
        if run.get("arm") == "paper":  # as many as MOPD and its experts
            run["cost"]["rollouts"] = 2400
    report.write(save(tmp_path, *runs))
    text = (tmp_path / "results.md").read_text()
    assert cells(text, "CoPD merged")[3:] == ["86.0 ± 0.6", "3", "1,200", "12"]
    assert cells(text, "CoPD consolidated")[3:] == ["**91.0 ± 0.6**", "3", "1,500", "15"]
    assert cells(text, "Experts averaged")[3:] == ["71.0 ± 0.6", "3", "1,200", "12"]
    assert cells(text, "CoPD, paper (merged)")[3:] == ["60.5 ± 0.5", "2", "2,400", "12"]
    # its experts were not consolidated
    assert cells(text, "MOPD, sampled, 12 steps")[3:] == ["50.5 ± 0.5", "2", "2,400", "24"]
    assert cells(text, "CoPD consolidated over CoPD, paper (merged)")[2:] == ["+30.0 ± 0.0", "2 of 2"]
    assert cells(text, "CoPD, paper (merged) over MOPD, sampled, 12 steps")[2:] == ["+10.0 ± 0.0", "2 of 2"]
    assert "CoPD, paper (merged) over MOPD, 12 steps" not in text  # of another signal
    assert (
        "3 seeds: CoPD consolidated 91.0 ± 0.6 % overall.\n  Ahead in every seed: over Experts consolidated +15" in text
    )
    assert "; over CoPD, paper (merged) +30.0 ± 0.0 (2 seeds); " in text
    assert "  In none: CoPD branches over experts, each at home +0.0 ± 0.0." in text
    # what few seeds have is in the table alone
    assert text.count("Mixed RLVR, turns, 36 steps") == 3
    assert text.count("over Mixed RLVR, turns") == 1
    line = (tmp_path / "figures" / "cost.svg").read_text()
    assert all(f">{label}<" in line for label in ("CoPD", "CoPD, paper", "Experts", "MOPD, sampled", "Mixed RLVR"))


def test_the_summary_goes_between_the_marks_of_a_file(tmp_path):
    (tmp_path / "README.md").write_text("a\n<!-- study -->\nold\n<!-- /study -->\nb\n")
    report.write(save(tmp_path / "runs", *study()), readme=tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("a\n<!-- study -->\n- **k3**, 3 seeds: CoPD merged 86.0 ± 0.6 % overall.\n")
    assert text.endswith(".\n<!-- /study -->\nb\n")
    assert "old" not in text
    (tmp_path / "plain.md").write_text("a\n")
    with pytest.raises(ValueError, match="readme must have the marks of a study; got none in "):
        report.write(tmp_path / "runs", readme=tmp_path / "plain.md")
    assert (tmp_path / "plain.md").read_text() == "a\n"


def test_runs_of_two_folders_are_reported_together_and_the_last_counts(tmp_path):
    save(tmp_path / "a", *study(seeds=[0]))
    save(tmp_path / "b", *(make("copd", seed, "k3", merged={"copd": 0.5}) for seed in (0, 1)))
    report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    text = (tmp_path / "c" / "results.md").read_text()
    assert cells(text, "CoPD merged")[3:5] == ["50.5 ± 0.5", "2"]
    assert cells(text, "Experts averaged")[3:5] == ["70.0", "1"]


def test_a_curve_over_cost_is_that_of_the_model_the_arm_would_end_with():
    suite = Suite("", [consolidated(make("copd")), consolidated(make("independent")), make("mopd"), make("mixed")])
    over, steps = curves.grown(suite, suite.arms["copd"])
    assert list(steps) == [0, 2, 4, 6, 8, 10, 12, 15]
    assert list(over) == [0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5]
    assert [values[0] for values in steps.values()][-2:] == pytest.approx([85, 90])
    over, steps = curves.grown(suite, suite.arms["mopd"])
    assert (min(steps), max(steps), min(over), max(over)) == (12, 24, 1.2, 2.4)
    assert steps[24] == pytest.approx([88])


def test_comparisons_are_paired_by_seed_and_go_both_ways(tmp_path):
    runs = study()
    runs[0]["final"]["text"]["text"]["accuracy"] = 0.4  # CoPD, seed 0
    report.write(save(tmp_path, *runs))
    text = (tmp_path / "results.md").read_text()
    assert cells(text, "CoPD branches over experts, each at home")[2:] == ["-5.6 ± 5.6", "0 of 3"]
    assert cells(text, "CoPD merged over MOPD, 12 steps")[2:] == ["-3.0 ± 0.0", "0 of 3"]
    assert cells(text, "CoPD merged over Experts averaged")[2:] == ["+15.0 ± 0.0", "3 of 3"]


def test_divergence_table_compares_copd_with_the_control(written):
    text, _ = written
    assert cells(text, "top-10 overlap, CoPD") == ["0.996 ± 0.000", "0.996", "0.999"]
    assert cells(text, "top-10 overlap, independent") == ["0.880 ± 0.000", "0.880", "0.980"]
    assert cells(text, "symmetric KL (nats a token), independent")[0] == "0.600 ± 0.000"


def test_the_order_is_the_one_measured(written):
    text, _ = written
    order = (
        "in order: experts, each at home 91.0 > MOPD, 12 steps 89.0 > CoPD merged 86.0 > Mixed RLVR, 36 steps 81.0 > "
    )
    assert order in text


def test_completions_at_the_length_limit_are_counted(written):
    assert "Completions cut off at the length limit: at most 1.5 % of a model's." in written[0]


def test_one_seed_has_no_error(tmp_path):
    report.write(save(tmp_path, *study(seeds=[0])))
    text = (tmp_path / "results.md").read_text()
    assert cells(text, "base") == ["50.0"] * 4 + ["1", "0", "0"]
    assert "one seed, hence without standard error" in text
    assert "±" not in text


@pytest.mark.parametrize("method", list(MERGED))
def test_a_single_run_is_reported_in_its_own_folder(tmp_path, method):
    run = make(method)
    (tmp_path / "results.json").write_text(json.dumps(run))
    report.write(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == run
    assert cells((tmp_path / "results.md").read_text(), "base")[:4] == ["50.0"] * 4
    assert (tmp_path / "report.html").is_file()


def test_a_run_keeps_its_results_when_its_experts_lie_below_it(tmp_path):
    student = make("mopd")
    (tmp_path / "results.json").write_text(json.dumps(student))
    report.write(save(tmp_path, make("independent") | {"method": "expert", "name": "experts"}))
    assert json.loads((tmp_path / "results.json").read_text()) == student
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# mopd-seed0\n")
    assert cells(text, "MOPD, 12 steps")[-4:] == ["88.0", "1", "2,400", "24"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_branches_is_reported(tmp_path, count):
    domains = ["text", "image", "video", "code", "speech"][:count]
    report.write(save(tmp_path, *(make(method, domains=domains) for method in MERGED)))
    assert len(cells((tmp_path / "results.md").read_text(), "CoPD merged")) == count + 4


def test_the_collected_study_alone_gives_the_same_report(tmp_path):
    report.write(save(tmp_path / "a", *study(variants=["k2", "k3"])))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").write_text((tmp_path / "a" / "results.json").read_text())
    report.write(tmp_path / "b")
    for name in ("results.md", "report.html"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    assert {path.name for path in (tmp_path / "b" / "figures").iterdir()} == {
        f"{variant}-{name}.svg" for variant in ("k2", "k3") for name in ("final", "accuracy", "cost", "divergence")
    }


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.stack, self.sources, self.counts = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.sources += [value for key, value in attributes if key in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "link"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_is_well_formed_and_needs_no_network(written):
    _, text = written
    page = Page()
    page.feed(text)
    assert page.stack == []
    assert page.counts["svg"] == 4
    assert "script" not in page.counts
    assert page.sources
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in page.sources)


def test_the_page_shows_samples_escaped_with_their_images(written):
    _, text = written
    assert "[image] &lt;b&gt;video&lt;/b&gt; 0 &amp; more?" in text
    assert text.count("<img ") == 2 * (1 + 4)  # two image cards, two video cards of four frames
    models = ["base", "CoPD text", "CoPD merged", "text expert", "Experts averaged", "Mixed RLVR, 36 steps"]
    assert all(f"<td>{name}</td>" in text for name in models)
    assert "topology: hub" in text


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"report: directory must hold a results.json; got none below"):
        report.write(tmp_path)


def test_a_study_is_reported_into_another_folder_small_enough_to_commit(tmp_path):
    runs = study()
    report.write(save(tmp_path / "runs", *runs), tmp_path / "results")
    assert not (tmp_path / "runs" / "results.md").exists()
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "results.json",
        "results.md",
        "report.html",
        "figures",
    }
    kept = json.loads((tmp_path / "results" / "results.json").read_text())
    images = [uri for run in kept["runs"] for sample in run["samples"] for uri in sample["images"]]
    assert len(images) == 2 * (1 + 4)  # every image once, of one seed
    assert kept["name"] == "runs"


def test_a_logarithmic_axis_spans_the_values_whatever_their_error(monkeypatch):
    monkeypatch.setattr(figures, "_svg", lambda figure: figure)
    line = figures.Line("CoPD", "black", {3: [0.01, 0.9], 6: [0.02, 0.03]})
    low, high = figures.lines([[figures.Panel("KL", [line], log=True)]], 2.0).axes[0].get_ylim()
    assert 0.01 < low < 0.025
    assert 0.9 < high < 2


def rescaled(run, scale, shift):
    """The same run with rewards that are no longer right or wrong."""
    for record in [*run["eval"], *(r for domains in run["final"].values() for r in domains.values())]:
        record["reward"] = scale * record.pop("accuracy") + shift
    return run


@pytest.mark.parametrize(("scale", "shift", "base"), [(3.0, 1.0, "2.5 ± 0"), (1.0, -5.0, "-4.5 ± 0")])
def test_rewards_that_are_no_shares_are_shown_as_they_are(tmp_path, scale, shift, base):
    report.write(save(tmp_path, *(rescaled(run, scale, shift) for run in study())))
    text = (tmp_path / "results.md").read_text()
    assert cells(text, "base")[:4] == [base] * 4
    assert "## Final reward" in text
    assert "accuracy" not in text.replace("accuracy.svg", "").lower()
    assert "in %" not in text
    bars = (tmp_path / "figures" / "k3-final.svg").read_text()
    assert ">reward<" in bars
    assert "accuracy" not in bars
    assert f">{scale * 0.5 + shift:g}<".replace("-", "\u2212") in bars or f">{scale * 0.5 + shift:g}<" in bars


def test_an_accuracy_and_a_reward_of_zeros_and_ones_are_the_same_report(tmp_path):
    named = study()
    for run in named:
        for record in [*run["eval"], *(r for domains in run["final"].values() for r in domains.values())]:
            record["reward"] = record["accuracy"]
    report.write(save(tmp_path / "a" / "s", *named))
    report.write(save(tmp_path / "b" / "s", *study()))
    one, other = ((tmp_path / name / "s" / "results.md").read_text() for name in "ab")
    assert one == other


def test_runs_moved_aside_are_not_reported(tmp_path):
    report.write(save(tmp_path, *study(seeds=[0])))
    text = (tmp_path / "results.md").read_text()
    aside = tmp_path / "k3" / "copd-seed0.old-1"
    aside.mkdir()
    (aside / "results.json").write_text((tmp_path / "k3" / "copd-seed0" / "results.json").read_text())
    report.write(tmp_path)
    assert (tmp_path / "results.md").read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"method"', "results.json must be JSON"), ('{"method": "grpo", "name": "x"}', "results of 'x' must be a run's")],
)
def test_a_file_that_is_no_result_is_named(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.write(tmp_path)


def test_readme_and_results_are_what_the_committed_runs_say(tmp_path):
    root = Path(__file__).parents[2]
    (tmp_path / "README.md").write_text((root / "README.md").read_text())
    committed = root / "results"
    report.write(committed, tmp_path / "out", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (root / "README.md").read_text()
    for name in ("results.json", "results.md"):
        assert (tmp_path / "out" / name).read_text() == (committed / name).read_text()
