"""The tools of the MCP server: each calls the function of an endpoint (record_routes.py,
user_routes.py), so that checks, limits and what follows a change are the same. Knows no protocol
(mcp_routes.py).

A docstring is the description by which an assistant chooses the tool. No tool takes a user: that is
the request's, whatever a model has read somewhere.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from inspect import cleandoc
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from hydra_llm.gateway import record_routes, user_routes
from hydra_llm.gateway.schemas import FeedbackIn, Id, RecordIn, RecordsIn, SearchIn, Time

Result = dict[str, Any]
INSTRUCTIONS = (
    "Records are what one user did: an input and the answer that this user gave or wanted. Answers"
    " of the hydra-llm gateway are personalized from them."
)


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NoArguments(_Arguments):
    """None."""


class ListIn(_Arguments):
    """Which records to list."""

    limit: Annotated[int, Field(ge=1, le=1000, description="Max records.")] = 50
    skip: Annotated[int, Field(ge=0, description="Newest records to leave out.")] = 0


class NewRecord(_Arguments):
    """A record to add."""

    input: Annotated[str, Field(description="The question or situation.")]
    output: Annotated[str, Field(description="The answer that the user gave or wanted.")]
    time: Annotated[Time, Field(description="ISO 8601; empty: unknown.")] = ""
    id: Annotated[Id | None, Field(description="To replace a record; default: a new one.")] = None

    def as_sent(self) -> RecordIn:
        """The record as the endpoint takes it; the same content has the same id."""
        text = json.dumps([self.input, self.output, self.time])
        id = self.id or f"mcp-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return RecordIn(id=id, input=self.input, output=self.output, time=self.time)


class AddIn(_Arguments):
    """Records to add."""

    records: Annotated[list[NewRecord], Field(min_length=1)]


class DeleteIn(_Arguments):
    """The record to delete."""

    id: Annotated[Id, Field(description="As search_records and list_records return it.")]


class AnswersIn(_Arguments):
    """Which answers to list."""

    limit: Annotated[int, Field(ge=1, le=100, description="Max answers.")] = 5


async def search_records(user: str, given: SearchIn, http: Request) -> Result:
    """Find the user's records that fit a question best, best first."""
    found = await record_routes.search(user, given, http)
    return {"records": found["data"]}


async def list_records(user: str, given: ListIn, http: Request) -> Result:
    """List the user's records, newest first; `total` is how many there are. Those with `enabled`
    false are in no answer.
    """
    records = await run_sync(record_routes.listed_records, user, http)
    newest_first = records[::-1]
    return {"records": newest_first[given.skip :][: given.limit], "total": len(records)}


async def add_records(user: str, given: AddIn, http: Request) -> Result:
    """Add records of what the user did, answered or preferred. The same record again changes
    nothing; one with a known id replaces it. The next personalized answer sees them.
    """
    records = [record.as_sent() for record in given.records]
    counts = await record_routes.add_records(user, RecordsIn(records=records), http)
    return {**counts, "ids": [record.id for record in records]}


async def delete_record(user: str, given: DeleteIn, http: Request) -> Result:
    """Delete one record of the user, and what was learned from it. It cannot be undone."""
    return await record_routes.delete_record(user, given.id, http)


async def describe_user(user: str, given: NoArguments, http: Request) -> Result:
    """Say in words what is known about the user: how much is kept, how the user answers, and what
    was learned.
    """
    return await user_routes.show_user(user, http)


async def list_answers(user: str, given: AnswersIn, http: Request) -> Result:
    """List the latest answers that were personalized for the user, newest first, each with the `id`
    that give_feedback takes and its candidates, the one that was shown first.
    """
    return {"answers": await run_sync(user_routes.answered_requests, user, http, given.limit)}


async def give_feedback(user: str, given: FeedbackIn, http: Request) -> Result:
    """Say what the user made of a personalized answer, by exactly one of `rating` (0 to 1),
    `chosen` (index among the candidates), `edited` (the answer as the user wants it) and `rejected`
    (true). Later answers learn from it; feedback again on the same answer replaces it.
    """
    return await user_routes.feedback(given, http)


@dataclass(frozen=True)
class Tool:
    """A tool, and what an assistant may expect of it."""

    run: Callable[[str, Any, Request], Awaitable[Result]]
    """`run(user, arguments, request)`; the request may speak for that user only."""
    arguments: type[BaseModel]
    title: str
    purpose: str = "write"  # of keys that may use it

    @property
    def reads(self) -> bool:  # it changes nothing; what others replace or delete is lost
        return self.purpose == "read"

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def description(self) -> str:
        return cleandoc(self.run.__doc__ or "").replace("\n", " ")


_ALL = (
    Tool(search_records, SearchIn, "Search records", "read"),
    Tool(list_records, ListIn, "List records", "read"),
    Tool(add_records, AddIn, "Add records"),
    Tool(delete_record, DeleteIn, "Delete a record", "delete"),
    Tool(describe_user, NoArguments, "What is known", "read"),
    Tool(list_answers, AnswersIn, "List answers", "read"),
    Tool(give_feedback, FeedbackIn, "Give feedback"),
)
TOOLS = {tool.name: tool for tool in _ALL}
