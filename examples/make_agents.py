"""Write agents/labels.csv and agents/replies.csv: 30 made-up support agents, by a seed.

labels.csv: what each agent does with a ticket (answer, escalate, refund or wait). A policy that all
share says what to do with a topic; each agent has habits of their own for some topics, and for
angry customers. replies.csv: what each agent writes, in a style of their own. All texts are made up
here; no person, company or product is real.

    python examples/make_agents.py
"""

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

FOLDER = Path(__file__).parent / "agents"
AGENTS, LABELLED, REPLIES, SEED = 30, 25, 12, 13
ACTIONS = ("answer", "escalate", "refund", "wait")
PRODUCTS = ("kettle", "desk lamp", "backpack", "headphones", "coffee mill", "bike light", "router")

TOPICS = {
    "late parcel": (
        "wait",
        ["My {p} has not arrived, it was due {d} days ago.", "Where is my {p}? {d} days late now."],
        "Your parcel is on its way and the carrier expects it within {d} days.",
    ),
    "wrong item": (
        "refund",
        ["I ordered a {p} and got something else.", "The box had no {p} in it but a toy."],
        "The right item leaves our store today; keep the other one.",
    ),
    "broken item": (
        "refund",
        ["The {p} broke after {d} days of use.", "My new {p} does not switch on at all."],
        "That is covered: we replace it or pay it back, as you prefer.",
    ),
    "login": (
        "answer",
        ["I cannot log in, the code for my account never comes.", "My password is refused again."],
        "Please ask for a new code on the sign-in page; it is valid for {d} minutes.",
    ),
    "invoice": (
        "answer",
        ["There are two charges for one {p} on my card.", "I need an invoice for the {p}."],
        "The invoice is in your account, and the second charge is only a hold for {d} days.",
    ),
    "cancel": (
        "escalate",
        ["Please cancel my plan, I do not use it.", "I want to end my subscription this month."],
        "Your plan is cancelled and ends in {d} days; nothing more will be charged.",
    ),
    "question": (
        "answer",
        ["Does the {p} come in green?", "Can I wash the {p}, and does it last {d} years?"],
        "Yes, it does; the product page has the details under care and colours.",
    ),
    "data": (
        "escalate",
        ["Send me all data you hold about me.", "Delete my account and all my orders, please."],
        "We have started it; it takes up to {d} days, and we write when it is done.",
    ),
}
"""Topic → what most agents do with it, what customers write, and what can be answered."""

MOODS = {
    "calm": ["Thanks for a look.", "No hurry.", "Kind regards.", ""],
    "angry": ["This is the third time!", "I am really annoyed.", "Never again, if this goes on!"],
}
GREETINGS = ("Hi!", "Hello,", "Dear customer,", "Good day,", "Hey there,", "")
REGRETS = ("Sorry about that.", "We apologise for the trouble.", "I know that is annoying.", "")
OFFERS = ("Just reply if anything is left.", "Can I do more for you?", "Call us any time.", "")
ENDINGS = ("Best, {i}.", "Yours, the support team", "- {i}", "Have a nice day!", "Regards, {i}.")


@dataclass(frozen=True)
class Agent:
    """An agent: what they do otherwise than others, and how they write."""

    name: str
    habits: dict[str, str]  # topic → action
    when_angry: str | None  # action for every angry customer, whatever the topic
    style: tuple[str, str, str, str]  # greeting, regret, offer, ending
    loud: bool  # ends sentences with "!"


def make_agent(number: int, rng: random.Random) -> Agent:
    habits = {topic: rng.choice(ACTIONS) for topic in rng.sample(list(TOPICS), 4)}
    when_angry = rng.choice(["escalate", "refund"]) if rng.random() < 0.5 else None
    parts = rng.choice(GREETINGS), rng.choice(REGRETS), rng.choice(OFFERS), rng.choice(ENDINGS)
    return Agent(f"agent{number:02}", habits, when_angry, parts, rng.random() < 0.3)


def tickets(count: int, rng: random.Random) -> Iterator[tuple[str, str, str, str]]:
    """Time, topic, mood and text of an agent's tickets, oldest first."""
    time = datetime(2025, 1, 6, 8) + timedelta(minutes=rng.randrange(600))
    for _ in range(count):
        time += timedelta(minutes=rng.randrange(40, 3000))
        topic, mood = rng.choice(list(TOPICS)), rng.choice(["calm", "calm", "angry"])
        told = rng.choice(TOPICS[topic][1]).format(p=rng.choice(PRODUCTS), d=rng.randint(2, 9))
        parts = told, rng.choice(MOODS[mood]), f"Order {rng.randint(1000, 9999)}."
        yield f"{time:%Y-%m-%dT%H:%M}", topic, mood, " ".join(filter(None, parts))


def action(agent: Agent, topic: str, mood: str) -> str:
    if mood == "angry" and agent.when_angry:
        return agent.when_angry
    return agent.habits.get(topic, TOPICS[topic][0])


def reply(agent: Agent, topic: str, rng: random.Random) -> str:
    greeting, regret, offer, ending = agent.style
    body = TOPICS[topic][2].format(d=rng.randint(2, 9))
    initial = chr(ord("A") + int(agent.name[-2:]) % 26)
    text = " ".join(filter(None, (greeting, regret, body, offer, ending.format(i=initial))))
    return text.replace(". ", "! ") if agent.loud else text


def write(file: Path, rows: list[tuple[str, ...]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([("user", "time", "input", "output"), *rows])
    print(f"wrote {len(rows)} records to {file.name}")


def main() -> None:
    rng = random.Random(SEED)
    labels, replies = list[tuple[str, ...]](), list[tuple[str, ...]]()
    for agent in [make_agent(number, rng) for number in range(1, AGENTS + 1)]:
        for time, topic, mood, text in tickets(LABELLED, rng):
            labels.append((agent.name, time, text, action(agent, topic, mood)))
        for time, topic, _, text in tickets(REPLIES, rng):
            replies.append((agent.name, time, text, reply(agent, topic, rng)))
    FOLDER.mkdir(exist_ok=True)
    write(FOLDER / "labels.csv", labels)
    write(FOLDER / "replies.csv", replies)


if __name__ == "__main__":
    main()
