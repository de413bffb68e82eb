"""An OpenAI-compatible endpoint: its URL and key, what its refusals mean, what its models take.
For `llm/openai.py` (the official SDK) and the gateway's upstream (raw bodies). Sends nothing.
"""

import base64
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from cachetools import TTLCache

from hydra_llm.errors import SettingsError
from hydra_llm.llm.wire import error_in

OPENAI_URL = "https://api.openai.com/v1"
SPEC = re.compile(r"(.+?)(?:@((?i:https?)://.+))?")
MEANT_AS_URL = re.compile(r"@[^@/]*://|@[\w.-]+:\d+(?:/|$)")
LOGPROBS = frozenset({"logprobs", "top_logprobs"})
OPTIONAL = frozenset({"temperature", "seed"}) | LOGPROBS  # parameters that an endpoint may lack
CAPABILITY_SECONDS = 600.0  # what an endpoint refuses in a bad hour is tried again
NAMES_N = re.compile(
    r"""['"`]n['"`]|\bn\b\s*(?:=|>|<|!|must|is|should|has|cannot|parameter|other)"""
    r"""|parameter:? n\b|multiple (?:choices|completions)"""
)
UNSUPPORTED = re.compile(
    r"(?i)unsupported|not supported|does not support|unrecognized|unknown|not permitted|deprecated"
    r"|not allowed to request"
)
COUNT = re.compile(r"(?<![\w.-])\d{1,4}(?![\w-]|\.\d)")  # not in a name such as gpt-4
# A prompt longer than the context window, as OpenAI, vLLM, llama.cpp and proxies say it, and the
# numbers of tokens in such a message; the largest of LENGTH is the length of the request.
TOO_LONG = re.compile(
    r"(?i)context[ _](?:length|size|window)|(?:prompt|input|message)s? (?:is|are) too long"
)
WINDOW = re.compile(r"(?i)context (?:length|size|window)\D{1,20}(\d+)|(\d+) max|n_ctx\D+(\d+)")
LENGTH = re.compile(r"(\d+) (?:\w+ )?tokens|n_prompt_tokens\D+(\d+)")
FITS = 0.6  # share of a prompt that is taken to fit where the endpoint names no numbers


KEY = re.compile(r"[!-~]+")
SECRET = re.compile(r"(?i)key|token|secret|sig|pass|auth|code|cred")
"""In the names of a URL's parameters whose values are not shown."""
SHORT = 8  # a shorter secret is hidden only where it stands alone


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and the key that they carry; a local endpoint may need none. `query` is
    the URL's, such as Azure's `api-version=...`: it belongs behind the path of every request.
    """

    url: str = field(repr=False)
    key: str = field(default="", repr=False)
    query: str = field(default="", repr=False)

    @classmethod
    def of(cls, name: str, url: str | None = None, key: str | None = None) -> "Endpoint":
        """URL and key as given, else of OPENAI_BASE_URL and OPENAI_API_KEY; errors say `name`.
        Raises SettingsError: OPENAI_BASE_URL is no URL, OpenAI's own endpoint has no key, or the
        key has characters that no header can carry.
        """
        where = "the URL of the LLM" if url else "OPENAI_BASE_URL"
        url = url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        if not is_url(url):
            fix = "it begins with http:// or https://, names a host, and holds no blanks"
            raise SettingsError(f"{where} is no URL of an endpoint: {fix}")
        parts = urlsplit(url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")  # as some portals show it
        source = "the key of api_key" if key else "OPENAI_API_KEY"
        key = key or os.environ.get("OPENAI_API_KEY", "")
        if key and not KEY.fullmatch(key):
            problem = "holds a line break, a blank or a character outside ASCII"
            raise SettingsError(f"{source} {problem}: remove it (it is not shown here)")
        if not key and url == OPENAI_URL:
            fix = "set OPENAI_API_KEY (another endpoint may need none)"
            raise SettingsError(f"{name} needs a key: {fix}")
        return cls(parts._replace(path=path, query="", fragment="").geturl(), key, parts.query)

    def redact(self, text: str) -> str:
        """A text, before it is cut or changed, without the endpoint's secrets in any form."""
        return self._secrets.sub("***", text) if self._secrets else text

    def redacted(self, value: Any) -> Any:
        """A JSON value with all its texts redacted."""
        if isinstance(value, str):
            return self.redact(value)
        if isinstance(value, Mapping):
            return {self.redact(str(name)): self.redacted(item) for name, item in value.items()}
        return [self.redacted(item) for item in value] if isinstance(value, list) else value

    @cached_property
    def _secrets(self) -> re.Pattern[str] | None:
        password = urlsplit(self.url).password or ""
        asked = parse_qsl(self.query) + parse_qsl(self.query.replace("+", "%2B"))
        named = [value for name, value in asked if SECRET.search(name)]
        secrets = {self.key, password, unquote(password), *named} - {""}
        patterns = [form for secret in secrets for form in _forms(secret)]
        longest_first = sorted(patterns, key=len, reverse=True)
        return re.compile("|".join(longest_first), re.IGNORECASE) if patterns else None


def endpoint_of(rest: str) -> tuple[str, str | None]:
    """Model and URL of `MODEL[@URL]`, the rest of an `openai:` spec; a model's name may hold an @.
    Raises SettingsError: no model, or an invalid URL, which would else be taken for part of it.
    """
    match = SPEC.fullmatch(rest)
    valid = is_url((match and match[2]) or OPENAI_URL)
    if match is None or MEANT_AS_URL.search(match[1]) or not valid:
        forms = "openai:MODEL, or openai:MODEL@URL (http:// or https://) for another endpoint"
        raise SettingsError(f"openai:{without_userinfo(rest)} names no model and endpoint: {forms}")
    return match[1], match[2]


def is_url(text: str) -> bool:
    """Whether a text is the URL of an endpoint."""
    try:
        url = urlsplit(text)
        named = bool(url.hostname) and url.port != 0
    except ValueError:  # brackets that do not close, a port that is no number
        return False
    return named and url.scheme in ("http", "https") and not re.search(r"[\s\x00-\x1f\x7f]", text)


def _forms(secret: str) -> Iterator[str]:
    """Patterns of a secret as texts may quote it: plain, escaped, in a URL, in base64."""
    parts = [
        rf"(?:\\*{re.escape(character)}|%(?:25)*{code:02x}|\\+(?:u00|x){code:02x}"
        rf"|&#(?:0*{code}|x0*{code:x});)"
        for character, code in ((character, ord(character)) for character in secret)
    ]
    if len(secret) < SHORT:
        yield rf"(?<!\w){''.join(parts)}(?!\w)"
        return
    yield r"(?:\s|\\+[rn]|\u200b)*".join(parts)  # a long line may be broken anywhere
    for shift in range(3):  # basic auth has a name before the secret
        encoded = base64.b64encode(b"\0" * shift + secret.encode()).decode()
        whole = encoded[(0, 2, 3)[shift] : (shift + len(secret.encode())) * 8 // 6]
        yield re.escape(whole)
        yield re.escape(whole.translate(str.maketrans("+/", "-_")))


def without_userinfo(text: str) -> str:
    """A text without the secrets of the URLs in it: names, passwords, keys in the query."""
    text = re.sub(r"(://|@(?=[^/\s@]*:))[^/\s]*@", r"\1", text)
    return re.sub(rf"(?i)([?&][^=&\s]*(?:{SECRET.pattern[4:]})[^=&\s]*=)[^&\s]+", r"\1***", text)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an endpoint says where it refuses a request (400 and its like)."""

    status: int
    message: str
    code: str = ""
    param: str = ""  # the parameter that the endpoint names

    @classmethod
    def of(cls, status: int, body: Any) -> "Refusal":
        """The refusal of an error's JSON body."""
        error = error_in(body)
        return (
            cls(status, error.message, error.code, error.param) if error else cls(status, str(body))
        )

    def names(self, parameter: str) -> bool:
        """Whether this parameter is not supported at all (not: its value is out of range)."""
        named = self.param == parameter or re.search(rf"\b{parameter}\b", self.message)
        return bool(named and UNSUPPORTED.search(f"{self.code} {self.message}"))

    def most_logprobs(self, sent: int) -> int | None:
        """The largest number below `sent` that it names, if it is about logprobs."""
        if "logprobs" not in f"{self.param} {self.message}":
            return None
        counts = map(int, COUNT.findall(self.message))
        return max((count for count in counts if count < sent), default=None)

    def fits(self, details: object = "") -> float | None:
        """Of a prompt that was too long the share that would fit, by numbers in the texts."""
        text = f"{self.code} {self.message} {details}"
        if self.status not in (400, 413, 422) or not TOO_LONG.search(text):
            return None
        share = min(_numbers(WINDOW, text), default=0) / max(_numbers(LENGTH, text), default=1)
        return share if 0 < share < 1 else FITS


def _numbers(pattern: re.Pattern[str], text: str) -> list[int]:
    return [int(number) for groups in pattern.findall(text) for number in groups if number]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model takes, as far as its answers have shown."""

    native_n: bool = True  # several texts in one request
    refused: frozenset[str] = frozenset()  # parameters that it does not know, of `OPTIONAL`
    limit_name: str = "max_tokens"  # newer models want max_completion_tokens
    top_logprobs: int | None = None  # tokens that it tells at most, where it has named a limit

    def applied(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request's body with what the model takes."""
        left_out = self.refused if self.native_n else self.refused | {"n"}
        sent = {name: value for name, value in body.items() if name not in left_out}
        if "max_tokens" in sent:
            sent[self.limit_name] = sent.pop("max_tokens")
        if self.top_logprobs is not None and sent.get("top_logprobs"):
            sent["top_logprobs"] = min(sent["top_logprobs"], self.top_logprobs)
        return sent

    def after(self, refusal: Refusal, sent: Mapping[str, Any]) -> "Capabilities":
        """What is known after a refusal of `sent`: the same where it names no parameter of it."""
        if "max_tokens" in sent and refusal.names("max_tokens"):
            return replace(self, limit_name="max_completion_tokens")
        if most := refusal.most_logprobs(sent.get("top_logprobs") or 0):
            return replace(self, top_logprobs=most)
        named = {name for name in OPTIONAL & sent.keys() if refusal.names(name)}
        if named or most == 0:
            if named & LOGPROBS or most == 0:  # one is of no use without the other
                named |= LOGPROBS
            return replace(self, refused=self.refused | named)
        if "n" in sent and (refusal.param == "n" or NAMES_N.search(refusal.message)):
            return replace(self, native_n=False)
        return self


class CapabilityCache:
    """Model → what it takes, for so many seconds after it was last learned."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, seconds: float = CAPABILITY_SECONDS
    ):
        self._known: TTLCache[str, Capabilities] = TTLCache(1000, seconds, clock)

    def of(self, model: str) -> Capabilities:
        return self._known.get(model) or Capabilities()

    def learn(self, model: str, capabilities: Capabilities) -> bool:
        """Remember what a model takes; whether that is new."""
        if is_new := capabilities != self.of(model):
            self._known[model] = capabilities
        return is_new
