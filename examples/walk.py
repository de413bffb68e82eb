"""From a CSV file to served, personal answers: each step is a command or a request, and is printed.

    python examples/walk.py    # with a fake LLM, in a temporary folder
    python examples/walk.py --llm openai:gpt-4o-mini --out my-walk

The data are the made-up support agents of agents/labels.csv: what does this agent do with a ticket?
Needs `pip install 'hydra-llm[bench,server]'`. The fake LLM chooses a label at random: what is
personal is learned from the agents' tickets.
"""

import argparse
import csv
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from hydra_llm import Personalizer

CSV = Path(__file__).parent / "agents" / "labels.csv"
TASK = "Does this support agent answer, escalate, refund or wait? Write one word. Ticket: {input}"
TICKET = "My new kettle does not switch on at all. No hurry."


def hydra(*arguments: str) -> str:
    """Run `hydra-llm` with these arguments; print and return what it prints."""
    print(f"\n$ hydra-llm {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "hydra_llm", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"that failed with exit code {done.returncode}")
    return done.stdout


@contextmanager
def served(*options: str) -> Iterator[httpx2.Client]:
    """A client of the gateway, which runs as long as it is used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["serve", "--port", port, *options]
    print(f"\n$ hydra-llm {shlex.join(arguments)}", flush=True)
    server = subprocess.Popen([sys.executable, "-m", "hydra_llm", *arguments])
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            until("the gateway is ready", lambda: ready(client) or server.poll())
            yield client
    finally:
        server.terminate()
        server.wait(60)


def ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/health/readiness").status_code == 200
    except httpx2.HTTPError:
        return False


def until(what: str, holds: Any, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > ends:
            sys.exit(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.1)


def post(client: httpx2.Client, path: str, body: dict[str, Any]) -> Any:
    reply = client.post(path, json=body)
    if reply.is_error:
        sys.exit(f"POST {path}: {reply.status_code} {reply.text}")
    return reply.json()


def ask(client: httpx2.Client, user: str, model: str) -> tuple[str, str]:
    """The answer about TICKET for a user, and the request's id."""
    messages = [{"role": "user", "content": TASK.format(input=TICKET)}]
    body = {"model": model, "user": user, "messages": messages}
    reply = post(client, "/v1/chat/completions", body)
    personal, text = reply["personalization"], reply["choices"][0]["message"]["content"]
    print(f"{user}: {text}  (records {len(personal['records'])}, scores {personal['scores']})")
    return text, personal["request_id"]


def offline(llm: str) -> None:
    """From the CSV file to a bundle, a table of methods and one answer."""
    hydra("data", "import", str(CSV), "--out", "tickets", "--name", "tickets", "--prompt", TASK)
    hydra("data", "check", "tickets")
    hydra("learn", "tickets", "--llm", llm, "--out", "bundle")
    hydra("fit", "tickets", "--bundle", "bundle", "--llm", llm)
    methods = ["--methods", "rag@4,user-majority,hydra@4,8", "--b", "8"]
    hydra("bench", "run", "tickets", "--bundle", "bundle", "--llm", llm, "--out", "run", *methods)
    hydra("bench", "show", "run")
    hydra("ask", TICKET, "--user", new_users()[0], "--bundle", "bundle", "--llm", llm)
    print("\nThe same ticket for every new agent, by the library:")
    personalizer = Personalizer.load("bundle", llm)
    for user in new_users():
        print(f"{user}: {personalizer.answer(TICKET, user=user).text}")


def new_users() -> list[str]:
    lines = Path("tickets/users.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["user"] for row in map(json.loads, lines) if row["split"] == "test"]


def online(llm: str) -> None:
    """The same bundle behind the gateway: records, an answer, feedback, another answer."""
    user, model = new_users()[0], llm.partition(":")[2] if llm.startswith("openai:") else llm
    with CSV.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["user"] == user]
    records = [{**row, "id": str(at)} for at, row in enumerate(rows)]
    for record in records:
        del record["user"]
    with served("--llm", llm, "--bundle", "bundle", "--store", "sqlite:///walk.db") as client:
        print(post(client, f"/v1/users/{user}/records", {"records": records}))
        job = post(client, f"/v1/users/{user}/fit", {})
        place = f"/v1/users/{user}/jobs/{job['id']}"
        until("the head is fitted", lambda: client.get(place).json()["state"] == "done")
        first, request = ask(client, user, model)
        wanted = "wait" if first != "wait" else "escalate"
        for _ in range(10):
            print(f"feedback: {user} does not {first}, but would {wanted}")
            post(client, "/v1/feedback", {"request_id": request, "edited": wanted})
            answer, request = ask(client, user, model)
            if answer == wanted:
                break
        if answer != wanted:
            sys.exit(f"after ten corrections the answer is still {answer}")
    print(f"\n{user}'s answer moved from {first} to {answer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", default="fake:rule=labels")
    parser.add_argument("--out", type=Path, help="folder of all files; default: a temporary one")
    options = parser.parse_args()
    os.environ.setdefault("HYDRA_CONSTRAIN", "true")  # the LLM may only write labels
    os.environ.setdefault("HYDRA_LABELLED_USERS", "8")  # learning asks the LLM about so many
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        offline(options.llm)
        online(options.llm)


if __name__ == "__main__":
    main()
