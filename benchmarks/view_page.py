"""How soon the run viewer shows its list in a browser: 5,000 samples with all their details.

    python benchmarks/view_page.py [--samples 5000] [--limit 1.0]

Makes a run of invented texts, writes its page as `hydra-llm bench view` does, and opens it from the
disk in Chromium, three times. Exits with 1 if the median first paint takes longer than `--limit`
seconds. Needs chromium and the package playwright.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra_llm.bench.report import viewer
from hydra_llm.bench.report.tables import open_run
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.tasks.base import Task

NAMES = ("zero-shot", "rag@1", "rag@4", "recent@4", "pag@4", "hydra@4,8", "hydra-shared@4,8")
METHODS = (*NAMES, "mbr@8", "user-majority", "oracle")
TASK = Task("titles", "generation", "Write a title. {input}")
WORDS = ("senate", "votes", "late", "on", "the", "budget", "as", "rain", "ends", "dry", "summers")
RECORDS, CANDIDATES, QUERIES_PER_USER = 16, 8, 5
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def browser() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def made_run(folder: Path, samples: int, seed: int = 0) -> Path:
    """Write a run of invented texts: prompts of 4 records, 16 ranked records, 8 candidates."""
    chance = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words))

    log = RunLog(folder, {"data": "made", "task": TASK.to_json(), "llm": {"model": "none"}})
    for number in range(samples // len(METHODS)):
        user, query = f"user{number // QUERIES_PER_USER}", f"q{number}"
        gold, question = text(6), text(60)
        records: list[dict[str, Any]] = [
            {"id": f"r{place}", "input": text(60), "output": text(6), "time": "2024-05-01"}
            | {"score": 9.0 - place / 2, "rank": place, "usefulness": chance.random()}
            for place in range(RECORDS)
        ]
        shown = "\n\n".join(f"{own['input']}\n{own['output']}" for own in records[:4])
        messages = [{"role": "user", "content": f"{shown}\n\n{TASK.prompt}\n{question}"}]
        for method in METHODS:
            answers = [text(6) for _ in range(CANDIDATES)]
            candidates = [
                {"text": own, "answer": own, "votes": 1, "greedy": place == 0}
                | {"score": chance.random(), "probability": 1 / CANDIDATES, "llm_probability": None}
                for place, own in enumerate(answers)
            ]
            details = {"input": question, "time": "2024-05-02", "records": records, "shown": 4}
            details |= {"messages": messages, "candidates": candidates, "chosen": 0}
            details |= {"abstained": False}
            log.add(Sample(method, user, query, gold, answers[0], calls=8), details)
    return folder


def first_paint(file: Path) -> float:
    """Seconds until the browser shows the page's first text, and its list has rows."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # as root, and in containers, Chromium has no sandbox
        opened = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        try:
            page = opened.new_page()
            page.goto(file.as_uri())
            page.wait_for_selector(".row")
            return float(page.evaluate(PAINT)) / 1000
        finally:
            opened.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds")
    args = parser.parse_args()
    if browser() is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(made_run(Path(folder) / "run", args.samples))
        file = Path(folder) / "view.html"
        file.write_text(viewer.page([run]), encoding="utf-8")
        seconds = statistics.median(first_paint(file) for _ in range(3))
        size = file.stat().st_size / 1e6
    result = {"samples": len(run.samples), "page_mb": round(size, 1)}
    print(json.dumps(result | {"first_paint_s": round(seconds, 3)}))
    sys.exit(seconds > args.limit)


if __name__ == "__main__":
    main()
