"""Optional libraries: which extra of the package brings each, and one line where one is missing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain

from hydra_llm.errors import MissingExtra

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "server": (
        "alembic",
        "fastapi",
        "fastapi_offline",
        "jinja2",
        "opentelemetry",
        "prometheus_client",
        "psycopg",
        "sqlalchemy",
        "starlette",
        "uvicorn",
    ),
    "openai": ("openai",),
    "mcp": ("mcp",),
    "otel": ("opentelemetry.exporter", "opentelemetry.sdk"),
    "embedded": ("xllamacpp",),
    "openvino": ("openvino_genai",),
    "privacy": ("dp_accounting",),
    "ray": ("ray",),
    "accelerate": ("accelerate",),
    "device": ("onnxruntime", "tokenizers"),
    "onnx": ("onnx", "onnxscript"),
    "drift": ("river",),
    "learn": ("torch", "transformers", "safetensors", "sklearn", "huggingface_hub"),
    "bench": ("scipy", "rouge_score", "sacrebleu"),
    "report": ("altair", "jinja2", "markupsafe", "vl_convert"),
}
"""Extra → the modules that it brings and this package imports."""
HOLDS: Mapping[str, tuple[str, ...]] = {
    "bench": ("learn", "bench"),
    "demo": ("learn", "bench", "embedded"),
    "onnx": ("learn", "device", "onnx"),
}
"""Extra → those whose modules it brings, where there are several."""
_EXTRA_OF = {module: extra for extra, modules in EXTRAS.items() for module in modules}


def require(extra: str, what: str = "this") -> None:
    """Raise `MissingExtra` unless each module of an extra is installed; none is imported."""
    for module in _modules(extra):
        if not _is_there(module):
            raise _missing(what, extra, module)


def installed() -> list[str]:
    """The extras whose modules are all there; none is imported."""
    return [extra for extra in EXTRAS if all(map(_is_there, _modules(extra)))]


@contextmanager
def one_line_imports(what: str) -> Iterator[None]:
    """Raise `MissingExtra` in place of the ImportError of an optional library."""
    try:
        yield
    except ModuleNotFoundError as error:
        parts = (error.name or "").split(".")
        names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        module = next((name for name in names if name in _EXTRA_OF), "")
        if not module:
            raise
        raise _missing(what, _EXTRA_OF[module], module) from None


def _modules(extra: str) -> Iterator[str]:
    return chain.from_iterable(EXTRAS[part] for part in HOLDS.get(extra, (extra,)))


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # an import hook may refuse it
        return False


def _missing(what: str, extra: str, module: str) -> MissingExtra:
    fix = f"pip install 'hydra-llm[{extra}]'"
    return MissingExtra(f"{what} needs the extra '{extra}' ({module} is not installed): {fix}")
