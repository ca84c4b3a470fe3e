"""The second of a pair: the old home goes, which software of 9001 does not use any more."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "9002"
down_revision = "9001"
branch_labels = None
depends_on = None
phase = "contract"
oldest = "9001"


def upgrade() -> None:
    op.drop_column("workers", "host")


def downgrade() -> None:
    op.add_column("workers", sa.Column("host", sa.Text(), server_default="", nullable=False))
