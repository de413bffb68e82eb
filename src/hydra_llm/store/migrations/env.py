"""Alembic's door: migrations run on the connection that `store/migrate.py` has opened."""

from alembic import context

from hydra_llm.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
context.run_migrations()
