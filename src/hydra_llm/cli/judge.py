"""`hydra-llm bench judge`: what people would notice of a run, with an LLM as a judge if wished."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli import options as opt
from hydra_llm.cli.table import print_table, print_text
from hydra_llm.config import Settings
from hydra_llm.errors import DataError, SettingsError
from hydra_llm.gate import generic_requests
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.masked import masked
from hydra_llm.llm.none import NONE, NoLLM
from hydra_llm.llm.registry import check_spec

if TYPE_CHECKING:
    from hydra_llm.bench.judge import Case, Judge, Verdict
    from hydra_llm.bench.perceived import Impersonal
    from hydra_llm.bench.report.tables import Run
    from hydra_llm.datasets.dataset import DataSet
    from hydra_llm.llm.base import ChatLLM

FILE = "judge.json"
COIN = "The judge agrees with people no better than a coin: its win rate says nothing."
NO_PEOPLE = "Nobody knows whether the judge agrees with people: give --people DATA (choices)."


@dataclass(frozen=True)
class Asked:
    """How much is judged, and of what."""

    method: Annotated[str | None, Option(help="Of the run; default: hydra's first.")] = None
    against: Annotated[str | None, Option(help="Another one; default: rag.")] = None
    limit: Annotated[int, Option(min=0, help="Max answers judged, and requests asked.")] = 100
    people: Annotated[Path | None, Option(help="Recorded choices; default: of --data.")] = None
    people_limit: Annotated[int, Option(min=0, help="Max choices judged.")] = 40
    bundle: Annotated[Path | None, Option(help="For requests; default: the run's own.")] = None
    requests: Annotated[Path | None, Option(help="Impersonal requests, one a line.")] = None


@opt.with_option_sets
def judge(
    folder: Annotated[Path, Argument(metavar="RUN", help="Folder of a run.")],
    data: Annotated[Path, Option(help="The data set of the run.")],
    asked: Asked,
    source: opt.RecordedLLM,
    options: opt.RunSettings,
    wide: opt.Wide = False,
    as_json: opt.AsJson = False,
) -> None:
    """Tell how often answers are better, another user's, or changed for no reason.

    With `--llm` (or `--replay`) an LLM also judges which of two answers each user would prefer, in
    both orders, and its agreement with people's recorded choices is told beside. A stopped command
    continues where it was. Writes RUN/judge.json.
    """
    spec = source.spec(NONE)
    check_spec(spec)
    from hydra_llm.bench.runlog import write_json
    from hydra_llm.datasets.native import load

    settings, loaded = options.settings(), load(data)
    people = load(asked.people) if asked.people else loaded
    used = nullcontext(NoLLM()) if spec == NONE else source.opened(spec, settings)
    with used as llm, console.progress(quiet=as_json) as report:
        found = measured(folder, (loaded, people), asked, llm, settings, report)
    write_json(folder / FILE, _no_nan(found))
    console.say(f"wrote {folder / FILE}")
    if as_json:
        console.emit(found, True)
        return
    title = f"{found['method']} against {found['against']}, 95 % intervals over users"
    print_table(list(_rows(found)), title, wide)
    for line in _remarks(found):
        print_text(line, wide=wide)


def measured(
    folder: Path,
    data: "tuple[DataSet, DataSet]",
    asked: Asked,
    llm: "ChatLLM",
    settings: Settings,
    report: Any,
) -> dict[str, Any]:
    """All that is told of a run, as JSON values. Raises SettingsError, DataError, LLMError."""
    from hydra_llm.bench import perceived
    from hydra_llm.bench.report.tables import open_run

    if not isinstance(llm, NoLLM):
        if settings.private:
            fault = "the judge's rubrics are written from records, which the LLM must not see"
            raise SettingsError(f"setting 'private': {fault}: leave --llm out")
        llm = masked(llm, settings.mask)
    run, own_data = open_run(folder), _of_run(folder, data[0])
    method, against = perceived.chosen_methods(run, asked.method, asked.against)
    pairs = perceived.answered_pairs(run, method, against)
    sides = {method: [own for own, _ in pairs], against: [other for _, other in pairs]}
    stages = _impersonal(run, asked, llm)
    return {
        "method": method,
        "against": against,
        "data": run.manifest["data"],
        "win_rate": perceived.win_rate(run.task, pairs).to_json(),
        "as_another": _json(perceived.as_another(run, method)),
        "nearer_to_others": _json(perceived.nearer_to_others(own_data, sides)),
        "impersonal": stages and stages.to_json(),
        "judge": None
        if isinstance(llm, NoLLM)
        else _judged(pairs, (own_data, data[1]), asked, llm, settings, report),
    }


def _of_run(folder: Path, data: "DataSet") -> "DataSet":
    """The data set as the run asked it; SettingsError if it is another one."""
    from hydra_llm.bench.runlog import read_run

    digest = read_run(folder)[0].get("data")
    for choices in (None, False, True):
        own = data if choices is None else data.asking(choices=choices)
        if own.digest == digest:
            return own
    raise SettingsError(f"--data: {folder} has answered another data set: name that one")


def _json(rates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: rate.to_json() for name, rate in rates.items()}


def _judged(
    pairs: Sequence[Any],
    data: "tuple[DataSet, DataSet]",
    asked: Asked,
    llm: "ChatLLM",
    settings: Settings,
    report: Any,
) -> dict[str, Any]:
    """The judge's verdicts on the run's answers and on people's choices."""
    from hydra_llm.bench import judge as judging
    from hydra_llm.bench.perceived import cases_of

    seed = settings.seed
    cases = judging.by_lot(cases_of(pairs, data[0]), asked.limit, seed)
    chosen = judging.choice_cases(data[1], asked.people_limit, seed)
    if asked.people and not chosen and asked.people_limit:
        raise DataError(f"--people {asked.people}: no new user has a recorded choice as a query")

    def verdicts(cases: "Sequence[Case]", of: "DataSet") -> "list[Verdict]":
        own: Judge = judging.Judge(llm, settings, of.task.prompt)
        return run_sync(partial(judging.judged, own, cases, report))

    of_run, of_people = verdicts(cases, data[0]), verdicts(chosen, data[1])
    return {
        "llm": dict(llm.identity),
        "seed": seed,
        "score": judging.score(of_run).to_json(),
        "people": judging.score(of_people).to_json() if chosen else None,
        "longer_taken": judging.longer_taken(chosen) if chosen else None,
        "verdicts": [asdict(verdict) for verdict in of_run],
        "people_verdicts": [asdict(verdict) for verdict in of_people],
    }


def _impersonal(run: "Run", asked: Asked, llm: "ChatLLM") -> "Impersonal | None":
    """None where there is no bundle, or no request is to be asked."""
    found = asked.bundle or next(
        (file.parent for file in sorted(run.folder.glob("bundle*/config.json"))), None
    )
    if found is None or not asked.limit:
        return None
    from hydra_llm.bench.perceived import impersonal
    from hydra_llm.bundle import Bundle

    bundle = Bundle.load(found)
    users = sorted({own.user for own in run.samples if bundle.records.get(own.user)})
    if not users:
        return None
    stages = bundle.personalizer(llm, bundle.settings)
    texts = _requests(asked.requests)[: asked.limit]
    return run_sync(partial(impersonal, stages, users, texts))


def _requests(file: Path | None) -> list[str]:
    """The requests of a file, a line each; by default, every tenth of those that taught the gate.
    SettingsError: the file cannot be read, or is empty.
    """
    if file is None:
        return list(generic_requests()[::10])
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--requests {file}: cannot be read ({error})") from None
    texts = [line.strip() for line in lines if line.strip() and not line.startswith("# ")]
    if not texts:
        raise SettingsError(f"--requests {file}: has no request: write one a line")
    return texts


def _no_nan(value: Any) -> Any:
    """JSON values in which null stands for what is no number."""
    if isinstance(value, dict):
        return {name: _no_nan(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ---- for people


def _rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """What is measured, its value, and of what."""
    method, judged = found["method"], found["judge"]
    yield _row("wins, by the task's gain", found["win_rate"])
    if judged:
        own, name = judged["score"], judged["llm"].get("model", "LLM")
        yield _row(f"wins, by the judge {name}", own, f"{own['cases']} queries")
        if people := judged["people"]:
            yield _row("the judge agrees with people", people, f"{people['cases']} choices")
            longer = {"rate": judged["longer_taken"], "interval": None}
            yield _row("people took the longer one", longer, f"{people['cases']} choices")
    for name, rate in found["as_another"].items():
        yield _row(f"same answer as by {name}", rate)
    for name, rate in found["nearer_to_others"].items():
        whose = "people's own answers" if name == "people" else name
        yield _row(f"nearer to another user: {whose}", rate)
    if impersonal := found["impersonal"]:
        count = f"{impersonal['passed']['queries']} requests"
        yield _row(f"impersonal requests that {method} may change", impersonal["passed"], count)
        if impersonal["changed"]:
            yield _row("impersonal answers changed", impersonal["changed"], count)


def _row(what: str, rate: Mapping[str, Any], of: str = "") -> dict[str, str]:
    from hydra_llm.bench.report.cells import cell

    value = rate["rate"]
    low, high = rate.get("interval", rate.get("rate_interval")) or (None, None)
    numbers = [math.nan if own is None else own for own in (value, low, high)]
    shown = "none" if value is None else cell(*numbers)
    return {"what": what, "share": shown, "of": of or f"{rate['queries']} queries"}


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    """How far the judge can be believed."""
    if not (judged := found["judge"]):
        return
    for name in ("score", "people"):
        if (own := judged[name]) and own["shown_first"] is not None:
            of = "the run's answers" if name == "score" else "people's choices"
            first, same = f"{own['shown_first']:.0%}", f"{own['consistent']:.0%}"
            said = f"took what was shown first in {first}, the same answer in both orders in {same}"
            lost = f"; {own['failed']} failed, {own['unread']} replies unread"
            yield f"Of {of} the judge {said}{lost}."
    people = judged["people"]
    if not people:
        yield NO_PEOPLE
    elif people["rate_interval"][0] is None or people["rate_interval"][0] <= 0.5:
        yield COIN
