"""A bundle that was learned in fp32, served in bfloat16: answered, judged and fitted there."""

from pathlib import Path

import pytest

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.gateway.deployment import with_precision
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.model import precision
from hydra_llm.store.store import Store

from .conftest import records_of, running

QUESTION = "the battle for the bridge"


@pytest.mark.anyio
async def test_servers_of_two_precisions_share_users_and_heads(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))
    store.add_records("ada", records_of("ada"))
    picks, own = [], {"candidates": 3}
    async with (
        running(store, bundles["titles"], **own) as plain,
        running(store, bundles["titles"], encoder_precision="bf16", **own) as low,
    ):
        one, other = (world.app.state.gateway.deployment for world in (plain, low))
        assert one.id == other.id, "heads belong to both"
        encoders = [deployment.features.encoder for deployment in (one, other)]
        assert [encoder.precision for encoder in encoders] == ["fp32", "bf16"]
        assert encoders[0].digest != encoders[1].digest
        for world in (plain, low):
            reply = (await world.ask(QUESTION)).json()
            assert reply["personalization"]["warm"]
            picks.append(reply["choices"][0]["message"]["content"])
        assert picks[0] == picks[1]
        said = {"request_id": reply["personalization"]["request_id"], "chosen": 1}
        judged = await low.http.post("/v1/feedback", json=said)
        assert judged.json()["head_moved"], judged.text
        (await plain.ask(QUESTION)).raise_for_status()
        assert store.heads("ada", one.id), "and the first one answers by it"
    loaded = Bundle.load(bundles["titles"])
    assert loaded.precision == "fp32", "the bundle itself stays as it was learned"


@pytest.mark.anyio
@pytest.mark.parametrize("precision", [None, "int8"])
async def test_a_server_encodes_by_onnx_runtime(
    store: Store, bundles: dict[str, Path], caches: Path, precision: str | None
) -> None:
    pytest.importorskip("onnxscript")
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["titles"], encoder_precision=precision) as world:
        encoder = world.app.state.gateway.deployment.features.encoder
        assert encoder.graph is not None
        assert encoder.precision == (precision or "fp32")
        reply = (await world.ask(QUESTION)).json()
        assert reply["personalization"]["warm"]
    learned = Bundle.load(bundles["titles"]).features.encoder
    assert learned.graph is None, "the bundle itself stays with torch"
    assert (learned.digest == encoder.digest) == (precision is None)


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_fastest_is_up_to_the_processor(
    monkeypatch: pytest.MonkeyPatch, fast: bool, chosen: str
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: fast)
    asked = with_precision(Settings(), ServeSettings(encoder_precision="fastest"))
    assert asked.encoder_precision == chosen


def test_without_it_all_commands_have_the_same() -> None:
    for here in ("auto", "bf16"):
        given = Settings(encoder_precision=here)
        assert with_precision(given, ServeSettings()) == given
