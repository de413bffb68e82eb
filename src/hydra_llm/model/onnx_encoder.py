"""Encoding by ONNX Runtime: a graph of the encoder, traced once and kept in the cache folder.

`use_onnx` is the one place that decides who encodes by it: what answers many questions (`serve`,
`Personalizer.load`), where the extra `onnx` is installed. Learning, fitting and the benchmark stay
with torch, so that their numbers do not depend on what is installed, and so does `ask`: to open the
graph takes longer than one question gains. In fp32 vectors differ from torch's by less than 1e-5,
so both have one digest and share a cache; int8 has its own.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from hydra_llm.errors import SettingsError
from hydra_llm.extras import installed
from hydra_llm.model.feature_cache import FeatureCache

if TYPE_CHECKING:
    from hydra_llm.model.encoder import Encoder

FOLDER = "graphs"  # in the cache folder
RECIPE = 1  # part of a file's name: another number for graphs that are made in another way
SAME = 1e-5  # in fp32: the largest difference of a component to torch's, relative to the row
LEAST_COSINE = 0.9  # in int8: less is no rounding, but a fault
FLOATS = {"DefaultTensorType": 1}  # where shapes and types are not inferred
PROBES = (
    [""],
    ["Rain", "A quiet film about two sailors: 12.5% of 北京's 🙂, again and again.", ""],
)
log = logging.getLogger(__name__)
_opened: LRUCache[tuple[str, int], "Graph | str"] = LRUCache(4)  # or why there is none
_lock = Lock()


class Graph:
    """A session, safe for several threads."""

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # idle threads sleep: they would take the processor from the event loop
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # shapes change from call to call
        options.log_severity_level = 4  # what fails is raised as well
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Padded tokens [B, L] by name → pooled vectors [B, H]."""
        arrays = {name: own.numpy() for name, own in inputs.items()}
        return torch.from_numpy(self._session.run(None, arrays)[0])


def use_onnx(features: FeatureCache) -> None:
    """Let a cache encode what is missing by ONNX Runtime, if it is installed and the encoder can be
    traced (else one warning). Raises SettingsError: it cannot, and only ONNX Runtime has int8.
    """
    encoder = features.encoder
    on_cpu = encoder.model.device.type == "cpu"
    if encoder.precision != "bf16" and on_cpu and "onnx" in installed():
        folder = features.path.parent / FOLDER if features.path else None
        features.encoder = encoder.by_graph(graph_of(encoder, folder))


def graph_of(encoder: "Encoder", folder: Path | None = None) -> Graph | None:
    """The encoder's graph, from the folder if it is there, else made; one for a process. None where
    it cannot be made, in fp32; SettingsError in int8.
    """
    key = encoder.digest, torch.get_num_threads()
    with _lock:
        if key not in _opened:
            name = f"{encoder.digest[:32]}-{encoder.precision}-{RECIPE}.onnx"
            try:
                _opened[key] = _read(encoder, folder, name) or _make(encoder, folder, name)
            except Exception as error:  # of torch's and of ONNX Runtime's own trees
                _opened[key] = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if encoder.precision == "fp32":
                    text = "encoder '%s' stays with torch, ONNX Runtime cannot run it: %s"
                    log.warning(text, encoder.name, _opened[key])
        found = _opened[key]
    if isinstance(found, Graph):
        return found
    if encoder.precision == "fp32":
        return None
    raise SettingsError(f"encoder_precision=int8: encoder '{encoder.name}' has none: {found}")


def _read(encoder: "Encoder", folder: Path | None, name: str) -> Graph | None:
    """None if it is not there, or damaged."""
    if folder is not None and (folder / name).is_file():
        with suppress(Exception):
            graph = Graph(folder / name)
            _check(encoder, graph, PROBES)
            return graph
    return None


def _make(encoder: "Encoder", folder: Path | None, name: str) -> Graph:
    log.info("making the graph of encoder '%s' for ONNX Runtime, once", encoder.name)
    with _place(folder) as (place, kept), _quiet():
        path = place / name
        trace(encoder, path)
        if encoder.precision == "int8":
            _quantize(path)
        graph = Graph(path)
        _check(encoder, graph, (*PROBES, ["rain " * encoder.max_length]))
        if kept is not None:
            path.replace(kept / name)  # a process that starts meanwhile makes its own
    return graph


def trace(encoder: "Encoder", path: Path) -> None:
    """Write the graph of model and pooling in fp32: inputs [B, L] by name → `vectors` [B, H].
    Raises whatever the exporter raises.
    """
    if encoder._is_longformer:  # found by the check as well, after a minute for a large one
        raise ValueError("the attention of a Longformer is no graph")
    if encoder.precision == "bf16":
        encoder = encoder.of(copy.deepcopy(encoder.model).float())
    inputs = encoder.padded(PROBES[1])
    axes = {name: {0: "texts", 1: "tokens"} for name in inputs}
    with torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            _Pooled(encoder, list(inputs)).eval(),  # else it leaves the encoder in training mode
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=["vectors"],
            dynamic_axes=axes | {"vectors": {0: "texts"}},
            opset_version=17,
            dynamo=False,  # which fixes neither of the two sizes
        )


class _Pooled(nn.Module):
    def __init__(self, encoder: "Encoder", names: list[str]):
        super().__init__()
        self.encoder, self.names = encoder, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.encoder.pooled(dict(zip(self.names, values, strict=True)))


def _quantize(path: Path) -> None:
    """Weights of int8 with a scale for each output channel; activations with one for a matrix."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = path.rename(path.with_name("fp32.onnx"))
    kind = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": False}
    quantize_dynamic(plain, path, **kind, extra_options=FLOATS)


def _check(encoder: "Encoder", graph: Graph, probes: tuple[list[str], ...]) -> None:
    """Raise ValueError unless the graph gives torch's vectors, in batches of several shapes."""
    for texts in probes:
        inputs = encoder.padded(texts)
        with torch.inference_mode():
            expected, found = encoder.pooled(inputs), graph(inputs)
        if encoder.precision == "fp32":
            error = (expected - found).abs().amax(-1) / expected.norm(dim=-1)
            same = bool((error < SAME).all())
        else:
            same = bool((torch.cosine_similarity(expected, found) > LEAST_COSINE).all())
        if not same:
            raise ValueError("the graph's vectors are others")


@contextmanager
def _place(folder: Path | None) -> Iterator[tuple[Path, Path | None]]:
    """A folder to write to, and where its file is then kept: None where that cannot be written."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own = tempfile.TemporaryDirectory(dir=folder)
        except OSError:
            folder = None
    if folder is None:
        own = tempfile.TemporaryDirectory()
    with own as place:
        yield Path(place), folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the exporters."""
    root: Any = logging.root
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
