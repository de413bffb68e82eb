"""`hydra-llm init`: an example of the settings file."""

from pathlib import Path
from typing import Annotated

from typer import Option

from hydra_llm.cli import console
from hydra_llm.environment import SETTINGS_FILE
from hydra_llm.errors import SettingsError

# Each line that is commented out is the default. tests/cli/test_init.py checks every name.
EXAMPLE = """\
# Settings of hydra-llm, read from the folder in which a command runs (or by --config FILE).
# A flag or an environment variable (HYDRA_RETRIEVAL_K=2) wins over this file. Remove the # in
# front of a line to change it. All settings: docs/settings.md. Keys do not belong here:
# OPENAI_API_KEY and HYDRA_ADMIN_KEY are read from the environment.

[retrieval]
# retriever = "bm25"            # bm25, dense, hybrid, recent, random, nothing
# k = 4                         # records of the user in the prompt
# max_prompt_tokens = 1536      # the worst records are left out first

[llm]
# max_tokens = 48               # of an answer; raise it for texts
# samples = 8                   # candidates per answer
# temperature = 0.5             # of the samples; the first answer is greedy
# concurrency = "auto"          # calls at once: as many as the endpoint takes, or a number
# timeout = 120.0               # seconds
# max_calls = 10000             # budget of a run; not set: no limit
# cache = "~/.cache/hydra-llm"  # answers and features, kept for the next run

[model]
# encoder = "minilm"            # a Hugging Face model, or a folder
# head = "linear"               # mlp, linear, lowrank, kernel, bias

[serve]                         # of `hydra-llm serve`
# samples = 8                   # not set: the bundle's
# deadline = 60.0               # seconds until late samples are left out
# upstream_timeout = 600.0      # seconds
# retention_days = 30.0         # answered requests are kept so long for feedback
# requests_per_minute = 600     # per key; not set: no limit
# cors_origins = ["https://app.example"]  # browser applications; not set: none
# log = "text"                  # a line per request: text, json, off
# drain = 30.0                  # seconds for requests in flight at the end; not set: no limit
"""


def init(
    out: Annotated[Path, Option(help="The file; one that exists is not changed.")] = Path(
        SETTINGS_FILE
    ),
) -> None:
    """Write an example of the settings file, with comments."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(EXAMPLE)
    except FileExistsError:
        raise SettingsError(f"{out} exists and is not changed: name another by --out") from None
    except OSError as error:
        raise SettingsError(f"{out} cannot be written: {error.strerror}") from None
    console.say(f"wrote {out}")
