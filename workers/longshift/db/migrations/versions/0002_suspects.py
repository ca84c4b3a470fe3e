"""Suspects, wards, and what the sweeper must know to judge sooner and ring less often."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None
phase = "expand"
oldest = "0002"  # software of that time starts on its own revision only


def upgrade() -> None:
    op.add_column(
        "sessions",
        sa.Column(
            "rings",
            sa.SmallInteger(),
            server_default="0",
            nullable=False,
            comment="wake-ups sent again since the last claim",
        ),
    )
    op.add_column(
        "sessions",
        sa.Column(
            "suspect",
            sa.Integer(),
            comment="its turn may have crashed a process: it runs only in a ward, with at most so many turns; "
            "NULL: anywhere",
        ),
    )
    op.add_column(
        "sessions",
        sa.Column(
            "crashes",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="processes that died under its turn since this recorded anything",
        ),
    )
    op.create_index(
        "ix_sessions_suspect",
        "sessions",
        ["ready_at"],
        postgresql_where=sa.text("lease_worker IS NULL AND suspect IS NOT NULL"),
    )
    op.add_column(
        "workers",
        sa.Column("watching_since", sa.DateTime(timezone=True), comment="since when it has beaten without a break"),
    )
    op.add_column(
        "workers",
        sa.Column(
            "process",
            sa.Uuid(),
            comment="the process behind it, which may have had other ids; its supervisor knows it by this",
        ),
    )
    op.add_column(
        "workers",
        sa.Column(
            "isolated", sa.Boolean(), server_default="false", nullable=False, comment="a ward: it runs suspects only"
        ),
    )
    op.add_column(
        "workers",
        sa.Column(
            "held",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="leases that it held when it was declared dead",
        ),
    )
    op.add_column(
        "workers",
        sa.Column(
            "crashed",
            sa.Boolean(),
            server_default="false",
            nullable=False,
            comment="its supervisor saw it end by its own doing: what ran there is suspect",
        ),
    )
    op.add_column(
        "workers",
        sa.Column(
            "reported",
            sa.Boolean(),
            server_default="false",
            nullable=False,
            comment="its parent saw it end; else it was silent, perhaps with its whole machine",
        ),
    )
    op.create_index("ix_workers_process", "workers", ["process"])
    op.alter_column("mail", "kind", comment="signal, cancel, expire or condemn", existing_type=sa.Text())


def downgrade() -> None:
    op.alter_column("mail", "kind", comment="signal, cancel or expire", existing_type=sa.Text())
    op.drop_index("ix_workers_process", table_name="workers")
    for name in ("reported", "crashed", "held", "isolated", "process", "watching_since"):
        op.drop_column("workers", name)
    op.drop_index("ix_sessions_suspect", table_name="sessions")
    for name in ("crashes", "suspect", "rings"):
        op.drop_column("sessions", name)
