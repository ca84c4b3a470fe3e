"""The tiers: blobs and what refers to them, archives, times to live, values that are too large for a row."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from longshift.errors import InUse

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
phase = "expand"
oldest = "0004"  # software of that time starts on its own revision only

MOMENT = sa.DateTime(timezone=True)
NOW = sa.text("clock_timestamp()")


# its processes do not know that events may be archived and values be elsewhere: they would read a part for the whole
OLD_WORKERS = sa.text("""
SELECT count(*) FROM workers WHERE dead_at IS NULL AND heartbeat_at > clock_timestamp() - interval '15 seconds'""")


def upgrade() -> None:
    alive = op.get_bind().execute(OLD_WORKERS).scalar_one()
    if alive:
        raise InUse(
            f"{alive} workers of the version before are running, and nothing was migrated: stop all workers and API "
            "processes, wait 15 s, run `longshift migrate` again, then start the new ones"
        )
    _sessions()
    _turns()
    _blobs()
    _archives()
    op.add_column("passages", sa.Column("created_at", MOMENT, server_default=NOW, nullable=False))
    op.create_index(
        "ix_passages_words", "passages", ["words"], postgresql_using="gin", postgresql_with={"fastupdate": "off"}
    )


def _sessions() -> None:
    op.add_column(
        "sessions",
        sa.Column(
            "archived_event_id",
            sa.Uuid(),
            comment="id of the last event that is in the cold tier: with archived_through the end of the log",
        ),
    )
    op.add_column(
        "sessions",
        sa.Column(
            "idle_since",
            MOMENT,
            comment="when its last open turn ended; NULL: never, or it runs, or its whole log is archived",
        ),
    )
    op.alter_column(
        "sessions",
        "expires_at",
        existing_type=MOMENT,
        existing_nullable=True,
        comment="when the sweeper looks whether its time to live is over; NULL: kept",
        existing_comment="time to live; NULL: kept",
    )
    op.execute(
        "UPDATE sessions SET idle_since = coalesce(leased_at, created_at) WHERE open_turns = 0 AND lease_worker IS NULL"
        " AND deleted_at IS NULL AND next_position > 0"
    )
    op.create_index("ix_sessions_idle", "sessions", ["idle_since"], postgresql_where=sa.text("idle_since IS NOT NULL"))
    op.create_index(
        "ix_sessions_expires",
        "sessions",
        ["expires_at"],
        postgresql_where=sa.text("expires_at IS NOT NULL AND deleted_at IS NULL"),
    )
    op.add_column(
        "sessions",
        sa.Column(
            "purge_at", MOMENT, comment="deleted: when the sweeper looks for what is left of it; NULL: nothing is"
        ),
    )
    op.create_index("ix_sessions_purge", "sessions", ["purge_at"], postgresql_where=sa.text("purge_at IS NOT NULL"))
    op.add_column(
        "session_details",
        sa.Column(
            "ttl", sa.Interval(), comment="how long it is kept after its last activity; NULL: as the fleet is set up"
        ),
    )


def _turns() -> None:
    for name in ("input", "output"):
        op.add_column(
            "turns",
            sa.Column(f"{name}_artifact", sa.Uuid(), comment=f"where the {name} is, if it is too large for a row"),
        )


def _blobs() -> None:
    op.execute("CREATE SEQUENCE generations START 2")  # whatever was stored so far has generation 1
    op.create_table(
        "blobs",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column(
            "generation",
            sa.BigInteger(),
            server_default=sa.text("nextval('generations')"),
            nullable=False,
            comment="part of the object's key, and never used twice: an object written again after it was collected is"
            " another",
        ),
        sa.Column(
            "stored",
            sa.Boolean(),
            server_default="false",
            nullable=False,
            comment="an upload of this generation has succeeded",
        ),
        sa.Column(
            "orphan_since",
            MOMENT,
            server_default=NOW,
            comment="since when no artifact points to it and nobody has touched it; NULL: one does",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "sha256", name=op.f("pk_blobs")),
    )
    op.create_index(
        "ix_blobs_orphan_since", "blobs", ["orphan_since"], postgresql_where=sa.text("orphan_since IS NOT NULL")
    )
    op.execute(
        "INSERT INTO blobs (tenant_id, sha256, size, generation, stored, orphan_since)"
        " SELECT DISTINCT ON (tenant_id, sha256) tenant_id, sha256, size, generation, true, NULL FROM artifacts"
        " ORDER BY tenant_id, sha256, generation DESC"
    )
    for name in ("generation", "state", "touched_at"):
        op.drop_column("artifacts", name)
    op.add_column(
        "artifacts",
        sa.Column(
            "referenced",
            sa.Boolean(),
            server_default="false",
            nullable=False,
            comment="a session refers to it, with the last of which it goes; false: nobody has looked yet, see"
            " db/collection.py",
        ),
    )
    op.execute("UPDATE artifacts SET referenced = true")  # nobody has written down by which sessions: they are kept
    op.create_index("ix_artifacts_blob", "artifacts", ["tenant_id", "sha256"])
    op.create_index("ix_artifacts_loose", "artifacts", ["created_at"], postgresql_where=sa.text("NOT referenced"))
    op.create_table(
        "garbage",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("since", MOMENT, server_default=NOW, nullable=False),
        sa.Column("swept", sa.Boolean(), server_default="false", nullable=False, comment="the object was deleted once"),
        sa.PrimaryKeyConstraint("tenant_id", "sha256", "generation", name=op.f("pk_garbage")),
    )
    op.create_index("ix_garbage_since", "garbage", ["swept", "since"])
    op.create_table(
        "artifact_refs",
        sa.Column("artifact_id", sa.Uuid(), nullable=False),
        sa.Column(
            "session_id",
            sa.Uuid(),
            nullable=False,
            comment="its log, its turns or its archive point to the artifact",
        ),
        sa.PrimaryKeyConstraint("artifact_id", "session_id", name=op.f("pk_artifact_refs")),
    )
    op.create_index("ix_artifact_refs_session", "artifact_refs", ["session_id"])


def _archives() -> None:
    op.create_table(
        "archives",
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("through_seq", sa.BigInteger(), nullable=False, comment="events 1 to this are in the cold tier"),
        sa.Column("event_id", sa.Uuid(), nullable=False, comment="id of the last of them"),
        sa.Column("manifest_id", sa.Uuid(), nullable=False, comment="artifact that lists the segments"),
        sa.Column("context_id", sa.Uuid(), nullable=False, comment="artifact with the fold of those events"),
        sa.Column("events", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False, comment="of the segments, compressed"),
        sa.Column("created_at", MOMENT, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_archives")),
    )


def downgrade() -> None:
    op.drop_table("archives")
    op.drop_table("artifact_refs")
    op.drop_table("garbage")
    op.drop_index("ix_artifacts_loose", table_name="artifacts")
    op.drop_index("ix_artifacts_blob", table_name="artifacts")
    op.drop_column("artifacts", "referenced")
    op.add_column(
        "artifacts",
        sa.Column(
            "generation",
            sa.Integer(),
            server_default="1",
            nullable=False,
            comment="grows when a collected object is written again",
        ),
    )
    op.add_column(
        "artifacts", sa.Column("state", sa.Text(), server_default="live", nullable=False, comment="live or deleting")
    )
    op.add_column("artifacts", sa.Column("touched_at", MOMENT, server_default=NOW, nullable=False))
    op.execute(
        "UPDATE artifacts a SET generation = b.generation FROM blobs b"
        " WHERE b.tenant_id = a.tenant_id AND b.sha256 = a.sha256"
    )
    op.drop_table("blobs")
    op.execute("DROP SEQUENCE generations")
    op.drop_column("turns", "output_artifact")
    op.drop_column("turns", "input_artifact")
    op.drop_column("session_details", "ttl")
    op.drop_index("ix_sessions_purge", table_name="sessions")
    op.drop_column("sessions", "purge_at")
    op.drop_index("ix_sessions_expires", table_name="sessions")
    op.drop_index("ix_sessions_idle", table_name="sessions")
    op.alter_column(
        "sessions",
        "expires_at",
        existing_type=MOMENT,
        existing_nullable=True,
        comment="time to live; NULL: kept",
        existing_comment="when the sweeper looks whether its time to live is over; NULL: kept",
    )
    op.drop_column("sessions", "idle_since")
    op.drop_column("sessions", "archived_event_id")
    op.drop_index("ix_passages_words", table_name="passages")
    op.drop_column("passages", "created_at")
