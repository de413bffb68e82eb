"""The device: asks a server for candidates (server.py) and picks one; its records stay here.

    python examples/on-device/pick.py phone "a question" --server http://127.0.0.1:8000

Needs `hydra-llm[device]`; no torch. The vectors of the user's
records are kept in `phone/vectors.sqlite`, so that they are encoded once.
"""

import argparse
from pathlib import Path

import httpx2

from hydra_llm.device import Device
from hydra_llm.types import Candidate


def pick(phone: Path, question: str, server: str) -> str:
    """The answer that this user would want."""
    reply = httpx2.post(f"{server}/candidates", json={"input": question}, timeout=120)
    reply.raise_for_status()
    candidates = [Candidate(**own) for own in reply.json()["candidates"]]
    device = Device.load(phone, cache=phone / "vectors.sqlite")
    chosen = candidates[device.choose(question, candidates).chosen]
    return chosen.answer or chosen.text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phone", type=Path)
    parser.add_argument("question")
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    args = parser.parse_args()
    print(pick(args.phone, args.question, args.server))


if __name__ == "__main__":
    main()
