"""What operators see and ask for: conditions of workers, drains, the backlog, and which software understands the schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
phase = "expand"
oldest = "0004"

MOMENT = sa.DateTime(timezone=True)

# For autoscalers and dashboards: a role that may read this view needs to read no table. now() and not clock_timestamp(),
# which is volatile: the partial indexes on ready_at would be read as a whole.
BACKLOG = """
CREATE VIEW backlog AS
WITH ready AS (
    SELECT queue, count(*) AS runnable, extract(epoch FROM now() - min(ready_at)) AS oldest_seconds
      FROM sessions WHERE lease_worker IS NULL AND ready_at <= now() GROUP BY queue),
held AS (SELECT queue, count(*) AS running FROM sessions WHERE lease_worker IS NOT NULL GROUP BY queue),
alive AS (
    SELECT q.queue, sum(w.capacity) AS slots, count(*) AS workers
      FROM workers w, unnest(w.queues) AS q(queue)
     WHERE w.dead_at IS NULL AND w.draining_since IS NULL AND NOT w.isolated
       AND w.heartbeat_at > now() - interval '15 seconds'
     GROUP BY q.queue)
SELECT queue, coalesce(runnable, 0) AS runnable, coalesce(running, 0) AS running,
       coalesce(oldest_seconds, 0)::double precision AS oldest_seconds,
       coalesce(slots, 0)::bigint AS slots, coalesce(workers, 0) AS workers
  FROM ready FULL JOIN held USING (queue) FULL JOIN alive USING (queue)"""


def upgrade() -> None:
    op.add_column("workers", sa.Column("version", sa.Text(), comment="of its software; NULL: older than this column"))
    op.add_column(
        "workers", sa.Column("revision", sa.Text(), comment="newest revision of this schema that its software knows")
    )
    op.add_column(
        "workers",
        sa.Column(
            "serves",
            JSONB(),
            nullable=False,
            server_default=sa.text("'[]'::jsonb"),
            comment="agents: [[name, version], ...]",
        ),
    )
    op.add_column(
        "workers",
        sa.Column("condition", sa.Text(), comment="what it says of itself: ok, unready or stuck; NULL: nothing yet"),
    )
    op.add_column("workers", sa.Column("complaint", sa.Text(), comment="why it is not ok"))
    op.add_column(
        "workers",
        sa.Column(
            "drain_asked_at",
            MOMENT,
            comment="an operator wants it to drain and end; its next heartbeat tells it",
        ),
    )
    op.create_table(
        "compatibility",
        sa.Column("id", sa.SmallInteger(), nullable=False, comment="1: there is one row"),
        sa.Column(
            "oldest", sa.Text(), nullable=False, comment="oldest revision whose software understands this schema"
        ),
        sa.CheckConstraint("id = 1", name=op.f("ck_compatibility_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_compatibility")),
    )
    op.execute("INSERT INTO compatibility (id, oldest) VALUES (1, '0004')")
    op.execute(BACKLOG)


def downgrade() -> None:
    op.execute("DROP VIEW backlog")
    op.drop_table("compatibility")
    for name in ("drain_asked_at", "complaint", "condition", "serves", "revision", "version"):
        op.drop_column("workers", name)
