"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None
phase = "expand"
oldest = "0001"  # software of that time starts on its own revision only


def upgrade() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("epochs")))
    op.create_table(
        "agents",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), server_default="", nullable=False),
        sa.Column("input_schema", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("output_schema", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "registered_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("name", "version", name=op.f("pk_agents")),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("content_type", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "generation",
            sa.Integer(),
            server_default="1",
            nullable=False,
            comment="grows when a collected object is written again",
        ),
        sa.Column("state", sa.Text(), server_default="live", nullable=False, comment="live or deleting"),
        sa.Column(
            "touched_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifacts")),
    )
    op.create_index("ix_artifacts_tenant", "artifacts", ["tenant_id", "id"], unique=False)
    op.create_table(
        "batches",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column(
            "metadata", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index("ix_batches_tenant", "batches", ["tenant_id", "id"], unique=False)
    op.create_table(
        "checkpoints",
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False, comment="the fold of events 1 to seq"),
        sa.Column("event_id", sa.Uuid(), nullable=False, comment="id of event seq: proves that it is the same history"),
        sa.Column("context", sa.JSON(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("session_id", "seq", name=op.f("pk_checkpoints")),
    )
    op.create_table(
        "events",
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False, comment="1, 2, 3 ... without gaps in its session"),
        sa.Column(
            "id", sa.Uuid(), nullable=False, comment="made by the writer, which recognises its own retries by it"
        ),
        sa.Column("epoch", sa.BigInteger(), nullable=False, comment="the lease under which it was written"),
        sa.Column("turn_id", sa.Uuid(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=True, comment="replay key, for what a replay looks up"),
        sa.Column("schema_version", sa.SmallInteger(), server_default="1", nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("session_id", "seq", name=op.f("pk_events")),
    )
    op.create_table(
        "idempotency",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column(
            "resource_id",
            sa.Uuid(),
            nullable=False,
            comment="the turn, session, batch or artifact that the first request made",
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("tenant_id", "route", "key", name=op.f("pk_idempotency")),
    )
    op.create_index("ix_idempotency_created_at", "idempotency", ["created_at"], unique=False)
    op.create_table(
        "mail",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("turn_id", sa.Uuid(), nullable=True, comment="NULL: for whichever turn waits for this name"),
        sa.Column("kind", sa.Text(), nullable=False, comment="signal, cancel or expire"),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column("payload", sa.JSON(), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("consumed_at", sa.DateTime(timezone=True), nullable=True, comment="when the holder recorded it"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_mail")),
    )
    op.create_index(
        "ix_mail_session", "mail", ["session_id"], unique=False, postgresql_where=sa.text("consumed_at IS NULL")
    )
    op.create_table(
        "passages",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False, comment="what the text was taken from, as the agent names it"),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column(
            "words", postgresql.TSVECTOR(), sa.Computed("to_tsvector('english', text)", persisted=True), nullable=False
        ),
        sa.PrimaryKeyConstraint("session_id", "source", "ordinal", name=op.f("pk_passages")),
    )
    op.create_table(
        "session_details",
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column(
            "metadata",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
            comment="the client's: <= 16 pairs",
        ),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_session_details")),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False, comment="which class of workers its next turn needs"),
        sa.Column("priority", sa.SmallInteger(), server_default="0", nullable=False, comment="0 is ordinary; reserved"),
        sa.Column(
            "next_position", sa.BigInteger(), server_default="0", nullable=False, comment="positions given out so far"
        ),
        sa.Column(
            "open_turns", sa.Integer(), server_default="0", nullable=False, comment="turns with a position and no end"
        ),
        sa.Column(
            "mail_seq",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="grows with each mail: suspend compares it",
        ),
        sa.Column(
            "head_waiting",
            sa.Boolean(),
            server_default="false",
            nullable=False,
            comment="its head turn waits: a submit must not wake it",
        ),
        sa.Column("lease_worker", sa.Uuid(), nullable=True, comment="who holds the lease; NULL: nobody"),
        sa.Column(
            "lease_epoch",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="fencing token, from the sequence epochs",
        ),
        sa.Column("leased_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "ready_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="when it may run next; NULL: no work, or waiting for mail",
        ),
        sa.Column(
            "dispatched_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="when a wake-up was last sent; cleared by the claim",
        ),
        sa.Column(
            "checkpoint_seq",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="seq of the newest checkpoint",
        ),
        sa.Column(
            "archived_through",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="events up to here are in the cold tier",
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True, comment="time to live; NULL: kept"),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True, comment="tombstone"),
        sa.CheckConstraint("open_turns >= 0", name=op.f("ck_sessions_open_turns")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sessions")),
        postgresql_with={"fillfactor": "70"},
    )
    op.create_index(
        "ix_sessions_lease_worker",
        "sessions",
        ["lease_worker"],
        unique=False,
        postgresql_where=sa.text("lease_worker IS NOT NULL"),
    )
    op.create_index(
        "ix_sessions_ready_at",
        "sessions",
        ["ready_at"],
        unique=False,
        postgresql_where=sa.text("lease_worker IS NULL AND ready_at IS NOT NULL"),
    )
    op.create_index("ix_sessions_tenant", "sessions", ["tenant_id", "id"], unique=False)
    op.create_table(
        "tenants",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("name", name=op.f("uq_tenants_name")),
    )
    op.create_table(
        "turns",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column(
            "position", sa.BigInteger(), nullable=True, comment="place in the session's order; NULL while scheduled"
        ),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("agent", sa.Text(), nullable=False),
        sa.Column("agent_version", sa.Text(), nullable=True, comment="asked for, or pinned by the first attempt"),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("input", sa.JSON(), nullable=False),
        sa.Column("output", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column(
            "root_turn_id", sa.Uuid(), nullable=False, comment="first of a chain of retries: replay keys belong to it"
        ),
        sa.Column("retry_of", sa.Uuid(), nullable=True),
        sa.Column("parent_turn_id", sa.Uuid(), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False, comment="starts, resumes included"),
        sa.Column(
            "version", sa.Integer(), server_default="1", nullable=False, comment="grows with each change: the ETag"
        ),
        sa.Column(
            "first_seq", sa.BigInteger(), nullable=True, comment="seq of its first turn.started: where a replay begins"
        ),
        sa.Column("run_after", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "usage", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
        sa.Column("batch_id", sa.Uuid(), nullable=True),
        sa.Column("batch_index", sa.Integer(), nullable=True),
        sa.Column("custom_id", sa.Text(), nullable=True, comment="the client's name for a line of a batch"),
        sa.Column("traceparent", sa.Text(), nullable=True),
        sa.Column(
            "metadata", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'::jsonb"), nullable=False
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_turns")),
        postgresql_with={"fillfactor": "80"},
    )
    op.create_index(
        "ix_turns_batch",
        "turns",
        ["batch_id", "batch_index"],
        unique=False,
        postgresql_where=sa.text("batch_id IS NOT NULL"),
    )
    op.create_index(
        "ix_turns_deadline",
        "turns",
        ["deadline"],
        unique=False,
        postgresql_where=sa.text("status IN ('scheduled', 'queued', 'running', 'waiting')"),
    )
    op.create_index(
        "ix_turns_head",
        "turns",
        ["session_id", "position"],
        unique=False,
        postgresql_where=sa.text("status IN ('queued', 'running', 'waiting')"),
    )
    op.create_index(
        "ix_turns_run_after", "turns", ["run_after"], unique=False, postgresql_where=sa.text("status = 'scheduled'")
    )
    op.create_index("ix_turns_tenant", "turns", ["tenant_id", "id"], unique=False)
    op.create_index("uq_turns_position", "turns", ["session_id", "position"], unique=True)
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("queues", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("capacity", sa.Integer(), nullable=False, comment="turns at a time"),
        sa.Column("running", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lock_key", sa.BigInteger(), nullable=True, comment="advisory lock held by its liveness connection"),
        sa.Column(
            "started_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "heartbeat_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "loop_tick_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
            comment="when its event loop last turned",
        ),
        sa.Column("draining_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "dead_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="tombstone: never un-set; the process takes a new id",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_index(
        "ix_workers_live", "workers", ["heartbeat_at"], unique=False, postgresql_where=sa.text("dead_at IS NULL")
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False, comment="for people"),
        sa.Column("hint", sa.Text(), nullable=False, comment="first characters, to tell keys apart"),
        sa.Column("hash", sa.LargeBinary(), nullable=False, comment="SHA-256 of the key, which has 256 random bits"),
        sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=False, comment="of submit, read, admin"),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True, comment="to the minute"),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_api_keys_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_keys_hash")),
    )


def downgrade() -> None:
    op.drop_table("api_keys")
    op.drop_index("ix_workers_live", table_name="workers", postgresql_where=sa.text("dead_at IS NULL"))
    op.drop_table("workers")
    op.drop_index("uq_turns_position", table_name="turns")
    op.drop_index("ix_turns_tenant", table_name="turns")
    op.drop_index("ix_turns_run_after", table_name="turns", postgresql_where=sa.text("status = 'scheduled'"))
    op.drop_index(
        "ix_turns_head", table_name="turns", postgresql_where=sa.text("status IN ('queued', 'running', 'waiting')")
    )
    op.drop_index(
        "ix_turns_deadline",
        table_name="turns",
        postgresql_where=sa.text("status IN ('scheduled', 'queued', 'running', 'waiting')"),
    )
    op.drop_index("ix_turns_batch", table_name="turns", postgresql_where=sa.text("batch_id IS NOT NULL"))
    op.drop_table("turns")
    op.drop_table("tenants")
    op.drop_index("ix_sessions_tenant", table_name="sessions")
    op.drop_index(
        "ix_sessions_ready_at",
        table_name="sessions",
        postgresql_where=sa.text("lease_worker IS NULL AND ready_at IS NOT NULL"),
    )
    op.drop_index(
        "ix_sessions_lease_worker", table_name="sessions", postgresql_where=sa.text("lease_worker IS NOT NULL")
    )
    op.drop_table("sessions")
    op.drop_table("session_details")
    op.drop_table("passages")
    op.drop_index("ix_mail_session", table_name="mail", postgresql_where=sa.text("consumed_at IS NULL"))
    op.drop_table("mail")
    op.drop_index("ix_idempotency_created_at", table_name="idempotency")
    op.drop_table("idempotency")
    op.drop_table("events")
    op.drop_table("checkpoints")
    op.drop_index("ix_batches_tenant", table_name="batches")
    op.drop_table("batches")
    op.drop_index("ix_artifacts_tenant", table_name="artifacts")
    op.drop_table("artifacts")
    op.drop_table("agents")
    op.execute(sa.schema.DropSequence(sa.Sequence("epochs")))
