"""The first of a pair: the new home of something, beside the old one, which older software goes on using."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from longshift.db.revision import NEEDED, newest

revision = "9001"
down_revision = newest()
branch_labels = None
depends_on = None
phase = "expand"
oldest = NEEDED


def upgrade() -> None:
    op.add_column("workers", sa.Column("address", sa.Text()))


def downgrade() -> None:
    op.drop_column("workers", "address")
