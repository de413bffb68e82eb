"""Alembic's door: migrations run on the connection that `store/migrate.py` has opened."""

from alembic import context

from hydra_llm.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
