"""What the release after the pair adds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "9003"
down_revision = "9002"
branch_labels = None
depends_on = None
phase = "expand"
oldest = "9001"


def upgrade() -> None:
    op.add_column("workers", sa.Column("zone", sa.Text()))


def downgrade() -> None:
    op.drop_column("workers", "zone")
