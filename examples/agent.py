"""An agent with a tool (openai-agents) whose answers are personal: only its client is configured.

    pip install openai-agents
    hydra-llm serve --llm openai:gpt-4o-mini --bundle bundle    # in another terminal
    python examples/agent.py agent17 "My new kettle does not switch on at all."

The header `x-hydra-user` names the user, so that every call of the agent's loop is this user's. The
gateway's replies say whether the user's records were used. The address is HYDRA_URL.
"""

import os
import sys

import httpx
from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

URL = os.environ.get("HYDRA_URL", "http://127.0.0.1:8000/v1")
MODEL = os.environ.get("HYDRA_MODEL", "gpt-4o-mini")
TASK = "Does this support agent answer, escalate, refund or wait? Write one word. Ticket: {input}"


@function_tool
def warranty(product: str) -> str:
    """How many months of warranty are left for a product."""
    return "14 months"


def support_agent(user: str, replies: list[httpx.Response]) -> Agent:
    """An agent for a user; the gateway's replies are added to `replies`."""

    async def keep(reply: httpx.Response) -> None:
        replies.append(reply)

    client = AsyncOpenAI(
        base_url=URL,
        api_key=os.environ.get("HYDRA_KEY", "any"),
        default_headers={"x-hydra-user": user},
        http_client=DefaultAsyncHttpxClient(event_hooks={"response": [keep]}),
    )
    model = OpenAIChatCompletionsModel(MODEL, client)
    return Agent(name="support", model=model, tools=[warranty])


def main() -> None:
    user, ticket = sys.argv[1:]
    set_tracing_disabled(True)  # it would send the conversation to the SDK's own service
    replies: list[httpx.Response] = []
    result = Runner.run_sync(support_agent(user, replies), TASK.format(input=ticket))
    print(result.final_output)
    for reply in replies:
        print("personal:", reply.headers.get("x-hydra-personalized"), file=sys.stderr)


if __name__ == "__main__":
    main()
