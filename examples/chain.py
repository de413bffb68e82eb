"""A LangChain chain whose answers are personal, with feedback: only its model is configured.

    pip install langchain-openai
    hydra-llm serve --llm openai:gpt-4o-mini --bundle bundle    # in another terminal
    python examples/chain.py agent17 "My new kettle does not switch on at all."

`bind(user=...)` names the user of a call, so one chain serves all users. A correction is sent back
with the completion's id. The address is HYDRA_URL.
"""

import os
import sys

import httpx
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

URL = os.environ.get("HYDRA_URL", "http://127.0.0.1:8000/v1")
MODEL = os.environ.get("HYDRA_MODEL", "gpt-4o-mini")
KEY = os.environ.get("HYDRA_KEY", "any")
TASK = "Does this support agent answer, escalate, refund or wait? Write one word. Ticket: {input}"


def main() -> None:
    user, ticket = sys.argv[1:3]
    llm = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, include_response_headers=True)
    chain = ChatPromptTemplate.from_messages([("user", TASK)]) | llm.bind(user=user)
    answer = chain.invoke({"input": ticket})
    print(answer.content)
    about = answer.response_metadata
    print("personal:", about["headers"].get("x-hydra-personalized"), file=sys.stderr)
    if wanted := "".join(sys.argv[3:]):  # what this user would have done
        feedback = {"request_id": about["id"], "edited": wanted}
        headers = {"authorization": f"Bearer {KEY}"}
        httpx.post(f"{URL}/feedback", json=feedback, headers=headers).raise_for_status()


if __name__ == "__main__":
    main()
