"""Alembic's entry point: it is always handed a connection, by ``longshift.db.migrations.upgrade``."""

from alembic import context

from longshift.db.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=False)
with context.begin_transaction():
    context.run_migrations()
