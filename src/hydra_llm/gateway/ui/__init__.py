"""The dashboard at `/ui`: pages for people, made on the server, without JavaScript. Each page and
each form calls what the API's endpoints call, with the caller of the session.
"""

from fastapi import FastAPI

from hydra_llm.gateway.auth import Access
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.ui import administration, people, signing
from hydra_llm.gateway.ui.session import Sessions
from hydra_llm.store.store import Store


def add_to(app: FastAPI, store: Store, access: Access, settings: ServeSettings) -> None:
    """Serve the dashboard."""
    app.state.sessions = Sessions(store, access, settings)
    for module in (people, administration, signing):  # the last one takes what is left
        app.include_router(module.router)
