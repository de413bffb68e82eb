"""A user whose taste changes, and the question that tells most about a user, at the gateway."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.errors import DataError, MissingExtra
from hydra_llm.gateway.drift import first_after_change
from hydra_llm.gateway.next_question import MOST, read_pool
from hydra_llm.store.store import Store
from hydra_llm.store.values import StoredFeedback

from .conftest import TAGS, TOPICS, World, records_of, running, tastes
from .test_gateway import fitted

pytestmark = pytest.mark.anyio
TEXTS = list(itertools.chain.from_iterable(zip(*TOPICS.values(), strict=True)))
EARLIER, LATER = 20, 8  # pieces of feedback before and after the change
TOPIC_OF = {text: topic for topic, texts in TOPICS.items() for text in texts}


async def judge(world: World, text: str, label: str, place: int) -> Any:
    """Ask, and choose the candidate with this label; the reply's `personalization`."""
    reply = (await world.ask(f"{text} number {place}")).json()["personalization"]
    request = reply["request_id"]
    shown = world.store.request(request)
    assert shown is not None
    answers = [candidate["answer"] for candidate in shown.content["candidates"]]
    given = {"request_id": request, "chosen": answers.index(label)}
    answer = await world.http.post("/v1/feedback", json=given)
    assert answer.status_code == 200, answer.json()
    again = await world.http.post("/v1/feedback", json=given)
    assert again.json()["repeated"]
    return reply


async def live(store: Store, bundle: Path, **settings: Any) -> tuple[list[bool], str, list[float]]:
    """A user with much feedback at which the head was better than the shared one, who then wants
    other answers: whether replies tell of it, the figure of changes, and the later rises.
    """
    store.add_records("ada", records_of("ada", 30))
    old = tastes("ada")
    new = {topic: TAGS.labels[(TAGS.labels.index(label) + 1) % 3] for topic, label in old.items()}
    async with running(store, bundle, candidates=3, **settings) as world:
        id = world.app.state.gateway.deployment.id
        with store.change("ada") as change:
            for place in range(EARLIER):
                rise = -0.6 + 0.1 * (place % 3)
                content = {"bundle": id, "group": {}, "rise": rise, "visible": place}
                change.put_feedback(StoredFeedback(f"r{place:02}", float(place), content))
            change.mark_learned([f"r{place:02}" for place in range(EARLIER)])
        await fitted(world, "ada")
        replies = []
        for place, text in enumerate(TEXTS[:LATER]):
            replies.append(await judge(world, text, new[TOPIC_OF[text]], place))
        await fitted(world, "ada")  # a refit keeps what was found
        replies.append((await world.ask(TEXTS[0])).json()["personalization"])
        figures = (await world.http.get("/metrics")).text
        (line,) = [x for x in figures.splitlines() if x.startswith("hydra_user_drift_total")]
        later = store.unlearned_feedback("ada", LATER, or_learned=True)
        return (
            [bool(reply.get("drift")) for reply in replies],
            line,
            [own.content["rise"] for own in later if "rise" in own.content],
        )


async def test_a_change_of_taste_is_told(store: Store, bundles: dict[str, Path]) -> None:
    told, line, rises = await live(store, bundles["tags"], detect_changes=True)
    assert len(rises) == LATER
    assert rises[0] > 0
    assert (told[0], told[-1]) == (False, True), rises
    assert line == "hydra_user_drift_total 1.0"
    first = first_after_change(store.unlearned_feedback("ada", or_learned=True))
    assert first is not None
    assert not first.request.startswith("r0")


async def test_without_the_setting_nothing_is_looked_for(
    store: Store, bundles: dict[str, Path]
) -> None:
    told, line, rises = await live(store, bundles["tags"])
    assert not any(told)
    assert line == "hydra_user_drift_total 0.0"
    assert not rises


def test_feedback_without_a_loss_tells_nothing() -> None:
    old = [StoredFeedback(f"r{i}", float(i), {"group": None}) for i in range(50)]
    assert first_after_change(old) is None


async def test_the_setting_needs_its_extra(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.extras._is_there", lambda module: module != "river")
    with pytest.raises(MissingExtra, match=r"detect_changes needs the extra 'drift'"):
        async with running(store, bundles["tags"], detect_changes=True):
            pass


# ---- the next question


async def test_the_next_question_tells_most(
    store: Store, bundles: dict[str, Path], tmp_path: Path
) -> None:
    pool = tmp_path / "pool.txt"
    pool.write_text("\n".join([*TEXTS, "", TEXTS[0]]), encoding="utf-8")
    store.add_records("bob", records_of("bob", 1))
    async with running(store, bundles["tags"], question_pool=pool) as world:
        new = (await world.http.get("/v1/users/nobody/next-question?limit=50")).json()["data"]
        worth = [own["worth"] for own in new]
        assert sorted(own["question"] for own in new) == sorted(TEXTS)
        assert worth[0] == max(worth) > 0
        one = (await world.http.get("/v1/users/nobody/next-question")).json()["data"]
        assert one == new[:1]
        record = {"id": "q1", "input": one[0]["question"], "output": TAGS.labels[0]}
        await world.http.post("/v1/users/nobody/records", json={"records": [record]})
        after = (await world.http.get("/v1/users/nobody/next-question?limit=50")).json()["data"]
        assert one[0]["question"] not in [own["question"] for own in after]
        assert len(after) == len(TEXTS) - 1


async def test_what_cannot_be_asked_is_told_in_a_line(
    store: Store, bundles: dict[str, Path], tmp_path: Path
) -> None:
    pool = tmp_path / "pool.txt"
    pool.write_text("a question", encoding="utf-8")
    path = "/v1/users/ada/next-question"
    for settings, bundle, code in (
        ({}, bundles["tags"], "no_questions"),
        ({"question_pool": pool}, None, "no_bundle"),
        ({"question_pool": pool}, bundles["titles"], "no_uncertainty"),
    ):
        async with running(store, bundle, **settings) as world:
            answer = await world.http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, code)
            assert "\n" not in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b" \n\n", "has 0 questions"),
        (b"\xff\xfe", "cannot be read as text"),
        ("\n".join(map(str, range(MOST + 1))).encode(), "at most 500"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_pool_gets_one_line(content: bytes | None, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "pool.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=fault):
        read_pool(file)
