"""The page: one file, well formed, nothing loaded, hostile text harmless."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_runs import HOSTILE, REPORT, rl_metrics, rl_samples, write_demo, write_run
from PIL import Image

from vold.report import write_report
from vold.report.health import health_warnings, phases, summarise
from vold.report.read import RunRecord, read_runs
from vold.report.samples import excerpt, failed_image_problems, shared_problems, thumbnail
from vold.report.style import METRICS, format_duration, format_number, metric

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and visible text; fails on tags that do not nest."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def html(demo):
    return write_report([demo], demo / "report.html", title="Made-up <demo>").read_text(encoding="utf-8")


def test_well_formed_and_nothing_comes_from_elsewhere(html):
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(
        value.startswith(("data:image/", "#")) for name in ("src", "href", "xlink:href") for value in page.values(name)
    )
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert "default-src 'none'" in html and "Made-up &lt;demo&gt;" in html


def test_links_lead_to_sections_that_exist(html):
    page = Page(html)
    fragments = [value[1:] for value in page.values("href") if value.startswith("#")]
    assert {"result", "curves", "runs", "health", "samples", "config"} <= set(fragments) <= set(page.values("id"))


def test_headline_numbers_and_only_the_clear_best_is_bold(html):
    assert re.findall(r'<td class="best">([^<]*)</td>', html) == ["62.3 ± 2.4", "53.8 ± 2.5"]
    text = " ".join("".join(Page(html).text).split())
    assert "VOLD solves 53.8 % of the image problems, GRPO 44.8 %: a clear lead of 9.0" in text
    assert "One training run per model" in text and "Differences are paired" in text


def test_figures_follow_the_colour_scheme(html):
    figures = "".join(re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL))
    assert "var(--run-3)" in figures and "var(--ink)" in figures
    assert not re.findall(r"#[0-9a-f]{6}(?=[;\"'])", figures)


def test_the_best_checkpoint_is_marked_in_the_table_and_on_its_curve(tmp_path):
    metrics = [{"step": step, "accuracy_geo": value, "accuracy_text": 0.2} for step, value in ((5, 0.3), (10, 0.2))]
    pages = []
    for kept in ("geo", None):
        run = write_run(tmp_path / "vold", config={"verb": "rl", "evaluation": {"best": kept}}, metrics=metrics)
        pages.append(write_report([run], tmp_path / "report.html", title="t").read_text(encoding="utf-8"))
    marked, plain = pages
    assert "best: step 5 (Geo accuracy)" in marked and "best: step" not in plain
    figures = [re.findall(r"<figure.*?</figure>", page, flags=re.DOTALL) for page in pages]
    differ = [one for one, other in zip(*figures, strict=True) if one != other]
    assert len(differ) == 1 and "Geo accuracy by step" in differ[0]


def test_images_are_inlined(html):
    uris = [value for value in Page(html).values("src")]
    sizes = {Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).size for uri in uris}
    assert sizes == {(196, 28), (160, 23)}, "as they are, and small in the gallery of failures"


def test_config_differences_name_the_keys_that_differ(html):
    table = re.search(r'<table class="diff">.*?</table>', html, flags=re.DOTALL).group()
    assert re.findall(r"<tr><td>([^<]*)</td>", table) == ["objective.beta", "objective.preset"]


def test_hostile_text_everywhere_is_shown_not_run(tmp_path):
    row = dict.fromkeys(
        ("prompt_id", "prompt", "response", "extracted", "gold", "verdict", "rule", "finish_reason"), HOSTILE
    )
    row |= {"step": HOSTILE, "images": [HOSTILE, 3, "/dev/zero", "\x00"], "reward": HOSTILE}
    row |= {"tokens": [HOSTILE, "\x1b[2J"], "logp": [-1.0, "x"], "logp_teacher": [-9.0, None]}
    config = {"verb": "rl", HOSTILE: HOSTILE, "name": HOSTILE}
    run = write_run(tmp_path / "<b>run", config=config, metrics=[{"step": 0, "reward": 0.1, HOSTILE: 1}], samples=[row])
    intervals = [[HOSTILE, HOSTILE, 0.0, 1.0], [HOSTILE, "train", 0.0, 1.0]]
    (run / "timeline.jsonl").write_text(json.dumps({"step": HOSTILE, "intervals": intervals}) + "\n")
    report = {
        "accuracy": {HOSTILE: {HOSTILE: 0.5}},
        "versions": {HOSTILE: HOSTILE},
        "commit": HOSTILE,
        "seconds": {HOSTILE: 2},
    }
    html = write_report([run], tmp_path / "out.html", title=HOSTILE, accuracy=report).read_text()
    page = Page(html)
    assert not {"script", "b"} & set(re.findall(r"<(script|b)[ >]", html.replace("<summary><b>", "")))
    assert "img" not in page.tags and not [key for key, _ in page.attributes if key.startswith("on")]
    assert "alert('x')" in "".join(page.text) and "{{ 7*7 }}" in "".join(page.text)


def test_invisible_characters_become_visible():
    assert excerpt("a\u202eb\x00c\n\td") == "a⟨202E⟩b⟨0000⟩c\n\td"
    assert excerpt(None) == "" and excerpt(3) == "3"
    assert "characters left out" in excerpt("x" * 10_000) and len(excerpt("x" * 10_000)) < 5000


def test_a_run_that_has_only_begun(tmp_path):
    run = write_run(tmp_path / "new", config={"verb": "rl", "steps": 10})
    (run / "metrics.jsonl").write_text('{"step": 0, "rew')
    text = "".join(Page(write_report([run], tmp_path / "r.html", title="New").read_text()).text)
    assert "1 unreadable line skipped" in text


def test_a_single_run_with_trouble_is_flagged(tmp_path):
    import random

    rows = rl_metrics(random.Random(0), teacher=False)
    rows[3] |= {"mismatch_mean": 0.5, "grad_norm": float("nan")}
    run = write_run(
        tmp_path / "grpo", config={"verb": "rl", "steps": 90}, metrics=rows, samples=rl_samples(random.Random(1))
    )
    text = " ".join("".join(Page(write_report([run], tmp_path / "r.html", title="One").read_text()).text).split())
    assert "beyond on 1 of 45 steps" in text and "not finite or missing on some steps: grad_norm" in text
    assert "44 of 90" in text and "What each step changed" not in text


def test_evaluations_alone_make_the_table(tmp_path, demo):
    copies = [read for read in read_runs([demo]) if read.evaluation]
    for record in copies:
        write_run(
            tmp_path / record.name, config=dict(record.config), samples=record.samples, evaluation=record.evaluation
        )
    html = write_report([tmp_path], tmp_path / "r.html", title="Evaluations").read_text()
    assert re.findall(r'<td class="best">([^<]*)</td>', html) == ["62.3 ± 2.4", "53.8 ± 2.5"]


def test_seeds_section(tmp_path, demo):
    html = write_report([demo], tmp_path / "r.html", title="Seeds", seeds=[REPORT, REPORT]).read_text()
    assert "Over training seeds" in html and "53.8 ± 0.0" in html


def test_problems_are_counted_by_pattern_not_picked(demo):
    problems = shared_problems([record for record in read_runs([demo]) if record.evaluation])
    for name in ("image", "text"):
        counts = [problem.count for problem in problems if problem.set == name]
        assert counts == sorted(counts, reverse=True) and sum(counts) <= 400 == problems[0].total
    assert all(
        sample.correct == ok
        for problem in problems
        for sample, (_, ok) in zip(problem.samples, problem.marks, strict=True)
    )


def test_thumbnails_are_small_and_unreadable_files_say_so(tmp_path):
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "big.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    big = thumbnail(tmp_path / "big.png")
    assert (big.width, big.scale) == (560, 1) and len(big.uri) < 20_000
    assert thumbnail(tmp_path / "bad.png").uri is None


def test_an_evaluation_of_several_answers_by_kind_and_beside_the_paper(tmp_path):
    kind = {"accuracy": 0.25, "stderr": 0.01, "n": 8}
    numbers = {"accuracy": 0.5, "stderr": 0.02, "n": 30, "k": 4, "majority": 0.6, "majority_stderr": 0.05}
    numbers |= {"truncated": 0.1, "mean_length": 9.0, "median_length": 8.5, "p95_length": 20}
    numbers |= {"categories": {"<b>count</b>": kind}, "skills": {"perception": kind}}
    samples = []
    for i in range(30):
        Image.new("RGB", (400, 300), (i * 8, 60, 60)).save(tmp_path / f"{i}.png")
        right = i % 3 == 0
        row = {"set": "image", "prompt_id": str(i), "verdict": "correct" if right else "wrong", "gold": "4"}
        samples.append(row | {"extracted": str(i), "images": [str(tmp_path / f"{i}.png")], "prompt": "how many?"})
    evaluation = {"sets": {"image": numbers}, "benchmarks": {"rule": {"MMStar": {"score": 51.25}}}}
    run = write_run(tmp_path / "eval", config={"verb": "eval"}, samples=samples, evaluation=evaluation)
    html = write_report([run], tmp_path / "report.html", title="evaluation").read_text()
    assert "50.0 ± 2.0" in html and "60.0 ± 5.0" in html and "9 · 8.5 · 20" in html
    assert "&lt;b&gt;count&lt;/b&gt;" in html and "25.0 ± 1.0" in html and "perception" in html
    assert "51.2" in html and "paper: VOLD" in html and "55.2" in html and "this run, by rule" in html
    assert "this run, by a model" not in html
    (failures,) = failed_image_problems(read_runs([run]))
    assert failures.n_wrong == 20 and len(failures.samples) == 20
    pictures = [sample.pictures[0] for sample in failures.samples]
    assert all(picture.uri.startswith("data:image/jpeg;base64,") for picture in pictures)
    assert all(max(picture.width, picture.height) == 160 for picture in pictures)
    assert failures.samples[0].extracted == "1" and failures.samples[0].origin == "image set"
    assert html.count(pictures[0].uri) == 1


def test_phases_and_what_none_of_them_claims():
    metrics = {"step": [0.0, 1.0], "seconds": [3.0, 3.0], "seconds_train": [1.5, 1.5], "seconds_rollout": [1.0, 1.0]}
    times = phases(RunRecord("a", path=None, metrics=metrics))
    assert [(phase.name, phase.seconds) for phase in times] == [("rollout", 2.0), ("train", 3.0), ("other", 1.0)]
    assert sum(phase.share for phase in times) == pytest.approx(1)


def test_a_summary_counts_steps_beyond_the_limit():
    metrics = {"truncated": [0.0, 0.2, 0.1], "effective_sample_size": [0.4, 0.9, 0.8]}
    record = RunRecord("a", path=None, metrics={"step": [0.0, 1.0, 2.0], **metrics})
    summary = summarise(record, "truncated")
    assert (summary.median, summary.worst, summary.last, summary.beyond, summary.steps) == (0.1, 0.2, 0.1, 1, 3)
    summary = summarise(record, "effective_sample_size")
    assert (summary.median, summary.worst, summary.beyond) == (0.8, 0.4, 1), "below is the wrong side"
    assert len(health_warnings(record, last=9)) == 2
    assert "40 %, healthy ≥ 50 %, on 1 of the last 3 steps" in health_warnings(record, last=9)[0]
    assert len(health_warnings(record, last=2)) == 1
    assert summarise(record, "entropy") is None


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1.5, "1.5"), (0.000012, "1.2e-5"), (12345.6, "12,346"), (float("nan"), "–")]
)
def test_format_number(value, text):
    assert format_number(value) == text


def test_the_documented_limits_are_the_ones_that_flag():
    documented = (Path(__file__).parents[2] / "docs/report.md").read_text(encoding="utf-8")
    table = [line for line in documented.splitlines() if line.startswith("| ") and "`" in line.split("|")[2]]
    rows = [
        f"| {described.label} | `{key}` | {described.limit} | {described.meaning} | {described.advice} |"
        for key, described in METRICS.items()
        if described.has_limit
    ]
    assert table == rows and all(described.advice for described in METRICS.values() if described.has_limit)


def test_values_and_durations():
    assert metric("truncated").format(0.0838) == "8.4 %" and metric("entropy").format(0.0838) == "0.0838"
    assert [format_duration(s) for s in (7.25, 250, 7500)] == ["7.2 s", "4 min 10 s", "2 h 5 min"]
