"""The report says what the runs say: numbers, comparisons either way round, one page without network."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from copd import evaluate
from copd.lab import figures, report

DOMAINS = ["text", "image", "video"]
STEPS = 12
PHASES = [["rl", 0, 4], ["opd", 4, 6], ["rl", 6, 10], ["opd", 10, 12]]
OWN, OTHER, BASE = 0.9, 0.45, 0.5
MERGED = {"copd": 0.85, "independent": 0.7, "mixed": 0.8, "mopd": 0.88}


def make(method, seed=0, variant="", domains=DOMAINS, merged=MERGED):
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
        if m not in ("base", "merged")
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
        "name": f"{method}-seed{seed}",
        "method": method,
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
        "cost": {"seconds": 60.0, "rollouts": 100 * total, "updates": total, "tokens": 1000},
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
    assert cells(text, "base") == ["50.0 ± 0.0"] * 4 + ["0"]
    assert cells(text, "text expert") == [f"**91.0 {error}**", f"46.0 {error}", f"46.0 {error}", f"61.0 {error}", "400"]
    assert cells(text, "experts averaged")[3:] == [f"71.0 {error}", "1,200"]
    assert cells(text, "CoPD merged")[3:] == [f"86.0 {error}", "1,200"]
    assert cells(text, "MOPD")[3:] == [f"**89.0 {error}**", "2,400"]  # its experts included
    assert cells(text, "mixed, 36 steps")[3:] == [f"81.0 {error}", "3,600"]
    assert cells(text, "mixed, 12 steps")[3:] == ["60.3 ± 0.2", "1,200"]


def test_comparisons_are_paired_by_seed_and_go_both_ways(tmp_path):
    runs = study()
    runs[0]["final"]["text"]["text"]["accuracy"] = 0.4  # CoPD, seed 0
    report.write(save(tmp_path, *runs))
    text = (tmp_path / "results.md").read_text()
    assert cells(text, "text expert over base, on its own text")[2:] == ["+41.0 ± 0.6", "3 of 3"]
    assert cells(text, "CoPD text over text expert, on image (taught)")[2:] == ["+35.0 ± 0.0", "3 of 3"]
    assert cells(text, "CoPD image over image expert, on video (not taught)")[2:] == ["+0.0 ± 0.0", "0 of 3"]
    assert cells(text, "CoPD text over text expert, on its own text")[2:] == ["-16.7 ± 16.7", "0 of 3"]
    assert cells(text, "CoPD merged over MOPD, overall")[2:] == ["-3.0 ± 0.0", "0 of 3"]
    assert cells(text, "CoPD merged over experts averaged, overall")[2:] == ["+15.0 ± 0.0", "3 of 3"]
    assert cells(text, "CoPD merged over the best expert, overall")[2:] == ["+25.0 ± 0.0", "3 of 3"]


def test_divergence_table_compares_copd_with_the_control(written):
    text, _ = written
    assert cells(text, "top-10 overlap, CoPD") == ["0.996 ± 0.000", "0.996", "0.999"]
    assert cells(text, "top-10 overlap, independent") == ["0.880 ± 0.000", "0.880", "0.980"]
    assert cells(text, "symmetric KL (nats a token), independent")[0] == "0.600 ± 0.000"


def test_the_order_is_the_one_measured(written):
    text, _ = written
    assert "in order: MOPD 89.0 > CoPD merged 86.0 > CoPD text (hub) 84.3 > mixed, 36 steps 81.0 > " in text


def test_completions_at_the_length_limit_are_counted(written):
    assert "Completions cut off at the length limit: at most 1.5 % of a model's." in written[0]


def test_one_seed_has_no_error(tmp_path):
    report.write(save(tmp_path, *study(seeds=[0])))
    text = (tmp_path / "results.md").read_text()
    assert cells(text, "base") == ["50.0"] * 4 + ["0"]
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
    assert cells(text, "MOPD")[-2:] == ["**88.0**", "2,400"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_branches_is_reported(tmp_path, count):
    domains = ["text", "image", "video", "code", "speech"][:count]
    report.write(save(tmp_path, *(make(method, domains=domains) for method in MERGED)))
    assert len(cells((tmp_path / "results.md").read_text(), "CoPD merged")) == count + 2


def test_the_collected_study_alone_gives_the_same_report(tmp_path):
    report.write(save(tmp_path / "a", *study(variants=["k2", "k3"])))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").write_text((tmp_path / "a" / "results.json").read_text())
    report.write(tmp_path / "b")
    for name in ("results.md", "report.html"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    assert {path.name for path in (tmp_path / "b" / "figures").iterdir()} == {
        f"{variant}-{name}.svg" for variant in ("k2", "k3") for name in ("final", "accuracy", "divergence")
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
    assert page.counts["svg"] == 3
    assert "script" not in page.counts
    assert page.sources
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in page.sources)


def test_the_page_shows_samples_escaped_with_their_images(written):
    _, text = written
    assert "[image] &lt;b&gt;video&lt;/b&gt; 0 &amp; more?" in text
    assert text.count("<img ") == 2 * (1 + 4)  # two image cards, two video cards of four frames
    models = ["base", "CoPD text (hub)", "CoPD merged", "text expert", "experts averaged", "mixed, 36 steps", "MOPD"]
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
