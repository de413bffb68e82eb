"""The HTML page of runs is self-contained, escapes texts, and quotes data only on request."""

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hydra_llm.bench.report import html
from hydra_llm.bench.report import tables as report
from hydra_llm.bench.report.cells import cell
from hydra_llm.bench.report.markdown import markdown
from hydra_llm.bench.report.summary import run_summary, summary_line
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.cli.main import run
from hydra_llm.tasks.base import Task

TITLES = Task("titles", "generation", "A headline: {input}", like="LaMP-4")
LLM = {"kind": "gguf", "model": "tiny & small"}
MANIFEST = {
    "data": "d" * 64,
    "task": TITLES.to_json(),
    "llm": LLM,
    "users": 6,
    "queries": 18,
    "settings": {"k": 4, "seed": 7},
}
ANSWERS = {
    "rag@1": "senate votes",
    "rag@4": "senate votes late",
    "hydra@4,8": "<script>alert(1)</script>",
    "oracle": "the senate votes late",
}
GOLD = "the senate votes late"
VOID = {"meta", "br", "line", "path", "rect", "circle"}


def write(folder: Path) -> Path:
    log = RunLog(folder, MANIFEST)
    for place in range(6):
        for query in "abc":
            for method, answer in ANSWERS.items():
                log.add(
                    Sample(
                        method,
                        f"person{place}",
                        query,
                        GOLD,
                        answer if place or method != "rag@4" else GOLD,
                        calls=1,
                    )
                )
    return folder


@pytest.fixture
def opened(tmp_path: Path) -> report.Run:
    return report.open_run(write(tmp_path / "run"))


def page(*runs: report.Run, answers: bool = True) -> str:
    return html.page([report.make_report(run) for run in runs], answers)


class Tags(HTMLParser):
    """Every tag with its attributes; checks that what opens also closes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag


def test_the_page_says_what_was_run_and_asks_for_nothing_else(opened: report.Run) -> None:
    text = page(opened)
    tags = Tags(text).tags
    assert {tag for tag, _ in tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "image",
        "use",
        "foreignobject",
    } == set()
    names = {name for _, attributes in tags for name in attributes}
    assert not {
        name for name in names if name.startswith("on") or name.endswith("href") or name == "src"
    }
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "url(" not in text
    assert "@import" not in text
    for output in (
        "<h1>titles</h1>",
        "LaMP-style, shaped like LaMP-4",
        "tiny &amp; small",
        "<dd>18</dd>",
        "<dd>7</dd>",
        "k = 4",
        "torch ",
    ):
        assert output in text
    assert (
        sum(tag == "svg" for tag, _ in tags) == 5
    )  # three metrics, calls, users: nothing was spent on tokens


@pytest.mark.slow
def test_the_tables_are_those_of_the_report(opened: report.Run) -> None:
    actual = report.make_report(opened)
    text = page(opened)
    cells = re.findall(r'<td(?: class="(\w+)")?>([^<]*)</td>', text.partition("<h2>Plots")[0])
    shown = [value for _, value in cells]
    for row in report.method_rows(actual):
        for name, value in row.items():
            if name not in ("part", "method"):
                assert str(value).removesuffix(" *").removesuffix(" '") in shown
    for row in report.comparison_rows(actual.comparisons, actual.holm):
        assert all(
            str(value).replace("'", "&#39;") in shown
            for name, value in row.items()
            if name != "method"
        )
    best = [value for kind, value in cells if kind == "best"]
    assert best == [
        cell(*line.result.metrics[name])
        for line in actual.rows
        if line.method == "rag@4"
        for name in ("rouge1", "rougeL", "bleu")
    ]
    assert [kind for kind, _ in cells].count("second") == list(actual.marks.values()).count(2) >= 3
    order = [
        '<tbody class="prompt">',
        '<tbody class="hydra">',
        '<tbody class="bound">',
        "Differences from rag@4",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


@pytest.mark.slow
def test_answers_are_optional_and_escaped(opened: report.Run) -> None:
    text = page(opened)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    assert text.count(f'<strong dir="auto">{GOLD}</strong>') == html.SHOWN
    without = page(opened, answers=False)
    assert not re.search("senate|person|alert|--no-answers", without)
    assert without.count("<svg") == 5
    Tags(without)


def test_a_run_says_what_it_was(opened: report.Run) -> None:
    settings = {
        "retrieved": 5,
        "samples": 8,
        "temperature": 0.0,
        "queries_per_user": 3,
        "asked_users": None,
        "candidate_prompts": "",
    }
    limited = replace(opened, manifest={**opened.manifest, "settings": settings})
    assert (
        run_summary(limited)["limits"]
        == "M = 5 records to rerank, 8 samples, temperature 0.0, at most 3 labelled queries a"
        " training user"
    )
    several = {"samples": 8, "candidate_prompts": "zero-shot,rag@1"}
    one = replace(opened, manifest={**opened.manifest, "settings": several})
    assert run_summary(one)["limits"] == "8 samples, one of them each by zero-shot,rag@1"
    lenient = replace(
        opened, manifest={**opened.manifest, "settings": {"parsing": "lenient", "retrieved": 5}}
    )
    assert "answers are read: lenient; limits: M = 5 records to rerank" in summary_line(lenient)
    assert summary_line(lenient) in markdown([report.make_report(lenient)])


def test_the_same_queries_are_drawn_each_time_with_every_answer(opened: report.Run) -> None:
    asked = html.sampled(opened)
    assert (len(asked), len({(each.user, each.query) for each in asked})) == (10, 10)
    shuffled = replace(opened, samples=tuple(reversed(opened.samples)))
    assert html.sampled(shuffled) == asked
    assert len(html.sampled(opened, count=100)) == 18
    assert html.sampled(opened, seed=1) != asked
    for each in asked:
        assert sorted(method for answer in each.answers for method in answer.methods) == sorted(
            ANSWERS
        )
        assert [answer.gain for answer in each.answers] == sorted(
            (answer.gain for answer in each.answers), reverse=True
        )
    first = asked[0].answers[0]
    assert (first.gain, first.text) == (1.0, GOLD)


def test_equal_answers_are_grouped_and_failures_shown(opened: report.Run) -> None:
    samples = (
        Sample("rag@1", "u", "q", GOLD, None, "HTTP 500"),
        Sample("rag@4", "u", "q", GOLD, None),
        Sample("hydra@4,8", "u", "q", GOLD, GOLD),
        Sample("hydra@4,8", "u", "q", GOLD, "votes", seed=2),
        Sample("oracle", "u", "q", GOLD, GOLD),
    )
    (asked,) = html.sampled(replace(opened, samples=samples))
    actual = [
        (answer.text, answer.error, answer.gain, len(answer.methods)) for answer in asked.answers
    ]
    assert actual == [
        (GOLD, "", 1.0, 2),
        ("votes", "", pytest.approx(0.4), 1),
        (None, "", 0.0, 1),
        (None, "HTTP 500", None, 1),
    ]
    assert [answer.methods for answer in asked.answers[:2]] == [
        ("hydra@4,8 (seed 0)", "oracle"),
        ("hydra@4,8 (seed 2)",),
    ]
    assert run_summary(replace(opened, samples=samples))["seeds"] == "0, 2"


def test_a_run_of_one_user_and_one_method_has_a_page(tmp_path: Path) -> None:
    log = RunLog(
        tmp_path / "small",
        {
            "data": "d",
            "task": Task("a<b", "generation", "{input}").to_json(),
            "llm": {},
            "users": 1,
            "queries": 1,
        },
    )
    log.add(Sample("zero-shot", "u", "q", "x", "x"))
    text = page(report.open_run(tmp_path / "small"))
    assert "<h1>a&lt;b</h1>" in text
    assert "Differences from" not in text
    assert "LaMP" not in text
    assert text.count("<svg") == 3
    Tags(text)


def test_a_run_of_which_all_failed_says_so(opened: report.Run) -> None:
    text = page(
        replace(
            opened,
            samples=tuple(
                replace(sample, answer=None, error="HTTP 500") for sample in opened.samples
            ),
        )
    )
    assert ">failed</td>" in text
    assert "failed: HTTP 500" in text
    Tags(text)


@pytest.mark.slow
def test_the_command_writes_runs_into_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(write(tmp_path / name)) for name in ("one", "two")]
    file = tmp_path / "new" / "report.html"
    assert run(["bench", "show", *folders, "--html", str(file)]) == 0
    assert (
        f"wrote {file}: it quotes the data, --no-answers leaves that out" in capsys.readouterr().err
    )
    text = file.read_text(encoding="utf-8")
    assert (text.count("<article>"), text.count("<svg"), text.count("<!doctype")) == (2, 10, 1)
    assert run(["bench", "show", *folders, "--html", str(file), "--no-answers"]) == 0
    assert "it quotes" not in capsys.readouterr().err
    assert "senate" not in file.read_text(encoding="utf-8")
    for option, message in (
        ("--html", "cannot be written"),
        ("--markdown", "cannot be written"),
        ("--plots", "is a file"),
    ):
        assert run(["bench", "show", *folders, option, str(file / "within")]) == 2
        assert message in capsys.readouterr().err


def test_names_with_tags_stay_text(opened: report.Run) -> None:
    task = replace(opened.task, name="<b>n</b>", like="<i>LaMP</i>")
    manifest = {**opened.manifest, "llm": {"model": "<script>m</script>", "kind": "fake"}}
    named = replace(opened, task=task, manifest=manifest)
    text = markdown([report.make_report(named)])
    assert "## &lt;b>n&lt;/b>, &lt;script>m" in text
    tags = {tag for tag, _ in Tags(page(named)).tags}
    assert not tags & {"b", "i", "script"}
