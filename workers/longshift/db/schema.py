"""The data model. Postgres is the truth; Redis and the object store can be rebuilt from what stands here.

A *session* is a row in ``sessions``, kept narrow because every protocol step touches it: who holds its lease, whether it
is runnable, and the counters that order its mailbox. Whether it is runnable follows from the row alone:
``lease_worker IS NULL AND ready_at <= clock_timestamp()``. Only the holder of the lease, proved by
``lease_epoch = :epoch AND lease_worker = :worker`` under a row lock, writes ``events`` of the session or moves a turn that
has started. Everybody else writes mail (``turns`` that never started, ``mail``) and sets ``ready_at``.

    who writes      what
    API             idempotency, sessions (counters, ready_at), turns (new; cancel before the start), mail, batches,
                    blobs, artifacts, artifact_refs; archives and deletions of sessions without open turns
    holder          events, turns (start, suspend, finish), sessions (release), mail (consumed), approvals (open, close),
                    tool_calls (start), checkpoints, passages, blobs, artifacts, artifact_refs; sessions and turns that its
                    turn starts, word of their end
    whoever started a tool call     its outcome in tool_calls, also after losing the lease: that removes doubt
    operator, by the API            approvals (answer), tool_calls (settle)
    sweeper         sessions (rescue, dispatched_at), turns (scheduled -> queued, expire before the start), workers (dead_at);
                    of sessions without open turns everything: archive, expiry; blobs and artifacts that nothing refers to,
                    garbage
    supervisor      workers (dead_at, crashed: of a process that it saw end), sessions (rescue)
    worker          workers (its own row), agents
    operator        workers (drain_asked_at), by the command line

Lock order everywhere: idempotency row, session rows by id, turns, the rest. ``events`` has no foreign keys, and epochs come
from one global sequence, so that deleting and re-creating a client-chosen session id never repeats one. ``input``,
``output`` and event payloads are ``json``, not ``jsonb``: the order of keys survives, so that an agent that iterates over a
recorded result sees the same order when it is replayed. Deleted sessions stay as tombstones.

A session is a *suspect* (``suspect`` not NULL) after its turn ran in a process that crashed: an ordinary claim passes it by,
and only a ward (a child process of a worker, ``workers.isolated``) may claim it, with at most ``suspect`` others like it.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Sequence,
    SmallInteger,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TSVECTOR

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
Moment = DateTime(timezone=True)
EMPTY = text("'{}'::jsonb")
NOW = func.clock_timestamp()
OPEN = "status IN ('scheduled', 'queued', 'running', 'waiting')"

epochs = Sequence("epochs", metadata=metadata)
generations = Sequence("generations", start=2, metadata=metadata)  # an object is never written under an old name again

tenants = Table(
    "tenants",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", Moment, nullable=False, server_default=NOW),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", Uuid, ForeignKey("tenants.id"), nullable=False),
    Column("name", Text, nullable=False, comment="for people"),
    Column("hint", Text, nullable=False, comment="first characters, to tell keys apart"),
    Column("hash", LargeBinary, nullable=False, unique=True, comment="SHA-256 of the key, which has 256 random bits"),
    Column("scopes", ARRAY(Text), nullable=False, comment="of submit, read, admin"),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    Column("expires_at", Moment),
    Column("last_used_at", Moment, comment="to the minute"),
    Column("revoked_at", Moment),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", Uuid, nullable=False),
    Column("queue", Text, nullable=False, comment="which class of workers its next turn needs"),
    Column("priority", SmallInteger, nullable=False, server_default="0", comment="0 is ordinary; reserved"),
    Column("next_position", BigInteger, nullable=False, server_default="0", comment="positions given out so far"),
    Column("open_turns", Integer, nullable=False, server_default="0", comment="turns with a position and no end"),
    Column(
        "mail_seq", BigInteger, nullable=False, server_default="0", comment="grows with each mail: suspend compares it"
    ),
    Column(
        "head_waiting",
        Boolean,
        nullable=False,
        server_default="false",
        comment="its head turn waits: a submit must not wake it",
    ),
    Column("lease_worker", Uuid, comment="who holds the lease; NULL: nobody"),
    Column(
        "lease_epoch", BigInteger, nullable=False, server_default="0", comment="fencing token, from the sequence epochs"
    ),
    Column("leased_at", Moment),
    Column("ready_at", Moment, comment="when it may run next; NULL: no work, or waiting for mail"),
    Column("dispatched_at", Moment, comment="when a wake-up was last sent; cleared by the claim"),
    Column(
        "rings", SmallInteger, nullable=False, server_default="0", comment="wake-ups sent again since the last claim"
    ),
    Column(
        "suspect",
        Integer,
        comment="its turn may have crashed a process: it runs only in a ward, with at most so many turns; NULL: anywhere",
    ),
    Column(
        "crashes",
        Integer,
        nullable=False,
        server_default="0",
        comment="processes that died under its turn since this recorded anything",
    ),
    Column("checkpoint_seq", BigInteger, nullable=False, server_default="0", comment="seq of the newest checkpoint"),
    Column(
        "archived_through",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="events up to here are in the cold tier",
    ),
    Column(
        "archived_event_id",
        Uuid,
        comment="id of the last event that is in the cold tier: with archived_through the end of the log",
    ),
    Column(
        "idle_since",
        Moment,
        comment="when its last open turn ended; NULL: never, or it runs, or its whole log is archived",
    ),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    Column("expires_at", Moment, comment="when the sweeper looks whether its time to live is over; NULL: kept"),
    Column("deleted_at", Moment, comment="tombstone"),
    Column("purge_at", Moment, comment="deleted: when the sweeper looks for what is left of it; NULL: nothing is"),
    CheckConstraint("open_turns >= 0", name="open_turns"),
    Index("ix_sessions_lease_worker", "lease_worker", postgresql_where=text("lease_worker IS NOT NULL")),
    Index("ix_sessions_ready_at", "ready_at", postgresql_where=text("lease_worker IS NULL AND ready_at IS NOT NULL")),
    Index("ix_sessions_suspect", "ready_at", postgresql_where=text("lease_worker IS NULL AND suspect IS NOT NULL")),
    Index("ix_sessions_tenant", "tenant_id", "id"),
    Index("ix_sessions_idle", "idle_since", postgresql_where=text("idle_since IS NOT NULL")),
    Index("ix_sessions_expires", "expires_at", postgresql_where=text("expires_at IS NOT NULL AND deleted_at IS NULL")),
    Index("ix_sessions_purge", "purge_at", postgresql_where=text("purge_at IS NOT NULL")),
    postgresql_with={"fillfactor": "70"},
)

session_details = Table(
    "session_details",
    metadata,
    Column("session_id", Uuid, primary_key=True),
    Column("metadata", JSONB, nullable=False, server_default=EMPTY, comment="the client's: <= 16 pairs"),
    Column("ttl", Interval, comment="how long it is kept after its last activity; NULL: as the fleet is set up"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", Uuid, nullable=False),
    Column("total", Integer, nullable=False),
    Column("metadata", JSONB, nullable=False, server_default=EMPTY),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    Index("ix_batches_tenant", "tenant_id", "id"),
)

turns = Table(
    "turns",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("session_id", Uuid, nullable=False),
    Column("tenant_id", Uuid, nullable=False),
    Column("position", BigInteger, comment="place in the session's order; NULL while scheduled"),
    Column("status", Text, nullable=False),
    Column("agent", Text, nullable=False),
    Column("agent_version", Text, comment="asked for, or pinned by the first attempt"),
    Column("queue", Text, nullable=False),
    Column("input", JSON, nullable=False),
    Column("input_artifact", Uuid, comment="where the input is, if it is too large for a row"),
    Column("output", JSON(none_as_null=True)),
    Column("output_artifact", Uuid, comment="where the output is, if it is too large for a row"),
    Column("error", JSON(none_as_null=True)),
    Column("root_turn_id", Uuid, nullable=False, comment="first of a chain of retries: replay keys belong to it"),
    Column("retry_of", Uuid),
    Column("parent_turn_id", Uuid),
    Column("attempts", Integer, nullable=False, server_default="0", comment="starts, resumes included"),
    Column("version", Integer, nullable=False, server_default="1", comment="grows with each change: the ETag"),
    Column("first_seq", BigInteger, comment="seq of its first turn.started: where a replay begins"),
    Column("run_after", Moment),
    Column("deadline", Moment, nullable=False),
    Column("usage", JSONB, nullable=False, server_default=EMPTY),
    Column("batch_id", Uuid),
    Column("batch_index", Integer),
    Column("custom_id", Text, comment="the client's name for a line of a batch"),
    Column("traceparent", Text),
    Column("metadata", JSONB, nullable=False, server_default=EMPTY),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    Column("started_at", Moment),
    Column("ended_at", Moment),
    Column(
        "clock_stopped_at", Moment, comment="since when its deadline does not come nearer: it waits for an approval"
    ),
    Column(
        "parent_told",
        Boolean,
        nullable=False,
        server_default="false",
        comment="the session of its parent turn was woken because it has ended",
    ),
    Index("uq_turns_position", "session_id", "position", unique=True),
    Index(
        "ix_turns_head",
        "session_id",
        "position",
        postgresql_where=text("status IN ('queued', 'running', 'waiting')"),
    ),
    Index("ix_turns_batch", "batch_id", "batch_index", postgresql_where=text("batch_id IS NOT NULL")),
    Index("ix_turns_tenant", "tenant_id", "id"),
    Index("ix_turns_parent", "parent_turn_id", postgresql_where=text("parent_turn_id IS NOT NULL")),
    Index(
        "ix_turns_untold",
        "ended_at",
        postgresql_where=text("parent_turn_id IS NOT NULL AND ended_at IS NOT NULL AND NOT parent_told"),
    ),
    Index("ix_turns_run_after", "run_after", postgresql_where=text("status = 'scheduled'")),
    Index("ix_turns_deadline", "deadline", postgresql_where=text(f"{OPEN} AND clock_stopped_at IS NULL")),
    postgresql_with={"fillfactor": "80"},
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("route", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("request_hash", LargeBinary, nullable=False),
    Column(
        "resource_id", Uuid, nullable=False, comment="the turn, session, batch or artifact that the first request made"
    ),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("tenant_id", "route", "key"),
    Index("ix_idempotency_created_at", "created_at"),
)

events = Table(
    "events",
    metadata,
    Column("session_id", Uuid, nullable=False),
    Column("seq", BigInteger, nullable=False, comment="1, 2, 3 ... without gaps in its session"),
    Column("id", Uuid, nullable=False, comment="made by the writer, which recognises its own retries by it"),
    Column("epoch", BigInteger, nullable=False, comment="the lease under which it was written"),
    Column("turn_id", Uuid),
    Column("kind", Text, nullable=False),
    Column("key", Text, comment="replay key, for what a replay looks up"),
    Column("schema_version", SmallInteger, nullable=False, server_default="1"),
    Column("payload", JSON, nullable=False),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("session_id", "seq"),
)

mail = Table(
    "mail",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("session_id", Uuid, nullable=False),
    Column("turn_id", Uuid, comment="NULL: for whichever turn waits for this name"),
    Column("kind", Text, nullable=False, comment="signal, cancel, expire or condemn"),
    Column("name", Text, nullable=False, server_default=""),
    Column("payload", JSON),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    Column("consumed_at", Moment, comment="when the holder recorded it"),
    # in the order in which a look takes signals, so that it reads no more of them than it wants
    Index(
        "ix_mail_unread", "session_id", "kind", "name", "created_at", "id", postgresql_where=text("consumed_at IS NULL")
    ),
    Index("ix_mail_read", "consumed_at", postgresql_where=text("consumed_at IS NOT NULL")),
)

approvals = Table(
    "approvals",
    metadata,
    Column("id", Uuid, primary_key=True, comment="recorded in the wait.begun of its turn"),
    Column("tenant_id", Uuid, nullable=False),
    Column("session_id", Uuid, nullable=False),
    Column("turn_id", Uuid, nullable=False),
    Column("name", Text, nullable=False),
    Column("show", JSON(none_as_null=True), comment="what the one who decides should see"),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    Column("expires_at", Moment, comment="when the turn goes on without an answer; NULL: with its deadline"),
    Column("answered_at", Moment, comment="set once: of two answers the first counts"),
    Column("answer", JSON(none_as_null=True), comment="{granted, comment}"),
    Column("answered_by", Uuid, comment="the API key of the answer"),
    Column("closed_at", Moment, comment="nobody waits for an answer any more"),
    Index("ix_approvals_session", "session_id", "id"),
    Index("ix_approvals_open", "tenant_id", "id", postgresql_where=text("answered_at IS NULL AND closed_at IS NULL")),
)

tool_calls = Table(
    "tool_calls",
    metadata,
    Column("id", Uuid, primary_key=True, comment="the key: of session, scope, tool and input; what the tool is given"),
    Column("tenant_id", Uuid, nullable=False),
    Column("session_id", Uuid, nullable=False),
    Column("turn_id", Uuid, nullable=False, comment="the turn that started it last"),
    Column("tool", Text, nullable=False),
    Column("effect", Text, nullable=False, comment="read, write or irreversible"),
    Column("dedupe", Text, nullable=False, comment="call, turn or session: how far its key reaches"),
    Column("place", Text, nullable=False, comment="replay key of the call that started it last"),
    Column("input", JSON, nullable=False),
    Column("status", Text, nullable=False, comment="started, done, failed, unknown or given_up"),
    Column("attempts", Integer, nullable=False, server_default="1", comment="how often it was started"),
    Column("worker_id", Uuid, nullable=False, comment="who started it last"),
    Column("epoch", BigInteger, nullable=False, comment="the lease under which it was started last"),
    Column("timeout", Interval, nullable=False, comment="of one call"),
    Column("created_at", Moment, nullable=False, server_default=NOW, comment="when it was started first"),
    Column("started_at", Moment, nullable=False, server_default=NOW, comment="when it was started last"),
    Column("ended_at", Moment, comment="when its outcome was recorded"),
    Column("result", JSON(none_as_null=True)),
    Column("artifact_id", Uuid, comment="where the result is, if it is too large for a row"),
    Column("error", JSON(none_as_null=True), comment="{type, message}"),
    Column("settled_at", Moment, comment="when an operator decided what nobody could know"),
    Column("settled_by", Uuid, comment="the API key of that operator"),
    Column("note", Text, comment="what the operator said of it"),
    Index("ix_tool_calls_session", "session_id", "created_at", "id"),
    Index("ix_tool_calls_open", "tenant_id", "id", postgresql_where=text("status = 'unknown'")),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("session_id", Uuid, nullable=False),
    Column("seq", BigInteger, nullable=False, comment="the fold of events 1 to seq"),
    Column("event_id", Uuid, nullable=False, comment="id of event seq: proves that it is the same history"),
    Column("context", JSON, nullable=False),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("session_id", "seq"),
)

# The bytes themselves, as long as anybody relies on them or is about to; db/files.py says how writers and the collector meet.
blobs = Table(
    "blobs",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column(
        "generation",
        BigInteger,
        generations,
        nullable=False,
        server_default=generations.next_value(),
        comment="part of the object's key, and never used twice: an object written again after it was collected is another",
    ),
    Column(
        "stored", Boolean, nullable=False, server_default="false", comment="an upload of this generation has succeeded"
    ),
    Column(
        "orphan_since",
        Moment,
        server_default=NOW,
        comment="since when no artifact points to it and nobody has touched it; NULL: one does",
    ),
    PrimaryKeyConstraint("tenant_id", "sha256"),
    Index("ix_blobs_orphan_since", "orphan_since", postgresql_where=text("orphan_since IS NOT NULL")),
)

# Objects that nobody can rely on any more. The row outlives the object for a while: an upload may still be on its way.
garbage = Table(
    "garbage",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("since", Moment, nullable=False, server_default=NOW),
    Column("swept", Boolean, nullable=False, server_default="false", comment="the object was deleted once"),
    PrimaryKeyConstraint("tenant_id", "sha256", "generation"),
    Index("ix_garbage_since", "swept", "since"),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", Uuid, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("content_type", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column(
        "referenced",
        Boolean,
        nullable=False,
        server_default="false",
        comment="a session refers to it, with the last of which it goes; false: nobody has looked yet, see db/collection.py",
    ),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    Index("ix_artifacts_tenant", "tenant_id", "id"),
    Index("ix_artifacts_blob", "tenant_id", "sha256"),
    Index("ix_artifacts_loose", "created_at", postgresql_where=text("NOT referenced")),
)

artifact_refs = Table(
    "artifact_refs",
    metadata,
    Column("artifact_id", Uuid, nullable=False),
    Column("session_id", Uuid, nullable=False, comment="its log, its turns or its archive point to the artifact"),
    PrimaryKeyConstraint("artifact_id", "session_id"),
    Index("ix_artifact_refs_session", "session_id"),
)

archives = Table(
    "archives",
    metadata,
    Column("session_id", Uuid, primary_key=True),
    Column("tenant_id", Uuid, nullable=False),
    Column("through_seq", BigInteger, nullable=False, comment="events 1 to this are in the cold tier"),
    Column("event_id", Uuid, nullable=False, comment="id of the last of them"),
    Column("manifest_id", Uuid, nullable=False, comment="artifact that lists the segments"),
    Column("context_id", Uuid, nullable=False, comment="artifact with the fold of those events"),
    Column("events", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False, comment="of the segments, compressed"),
    Column("created_at", Moment, nullable=False, server_default=NOW),
)

passages = Table(
    "passages",
    metadata,
    Column("tenant_id", Uuid, nullable=False),
    Column("session_id", Uuid, nullable=False),
    Column("source", Text, nullable=False, comment="what the text was taken from, as the agent names it"),
    Column("ordinal", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("words", TSVECTOR, Computed("to_tsvector('english', text)", persisted=True), nullable=False),
    Column("created_at", Moment, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("session_id", "source", "ordinal"),
    # what is put off would be read by every search, and take a few MB more
    Index("ix_passages_words", "words", postgresql_using="gin", postgresql_with={"fastupdate": "off"}),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("queues", ARRAY(Text), nullable=False),
    Column("capacity", Integer, nullable=False, comment="turns at a time"),
    Column("running", Integer, nullable=False, server_default="0"),
    Column("lock_key", BigInteger, comment="advisory lock held by its liveness connection"),
    Column("started_at", Moment, nullable=False, server_default=NOW),
    Column("heartbeat_at", Moment, nullable=False, server_default=NOW),
    Column("loop_tick_at", Moment, nullable=False, server_default=NOW, comment="when its event loop last turned"),
    Column("watching_since", Moment, comment="since when it has beaten without a break"),
    Column("draining_since", Moment),
    Column(
        "process", Uuid, comment="the process behind it, which may have had other ids; its supervisor knows it by this"
    ),
    Column("isolated", Boolean, nullable=False, server_default="false", comment="a ward: it runs suspects only"),
    Column("dead_at", Moment, comment="tombstone: never un-set; the process takes a new id"),
    Column(
        "held", Integer, nullable=False, server_default="0", comment="leases that it held when it was declared dead"
    ),
    Column(
        "crashed",
        Boolean,
        nullable=False,
        server_default="false",
        comment="its supervisor saw it end by its own doing: what ran there is suspect",
    ),
    Column(
        "reported",
        Boolean,
        nullable=False,
        server_default="false",
        comment="its parent saw it end; else it was silent, perhaps with its whole machine",
    ),
    Column("version", Text, comment="of its software; NULL: older than this column"),
    Column("revision", Text, comment="newest revision of this schema that its software knows"),
    Column(
        "serves", JSONB, nullable=False, server_default=text("'[]'::jsonb"), comment="agents: [[name, version], ...]"
    ),
    Column("condition", Text, comment="what it says of itself: ok, unready or stuck; NULL: nothing yet"),
    Column("complaint", Text, comment="why it is not ok"),
    Column("drain_asked_at", Moment, comment="an operator wants it to drain and end; its next heartbeat tells it"),
    Index("ix_workers_process", "process"),
    Index("ix_workers_live", "heartbeat_at", postgresql_where=text("dead_at IS NULL")),
    postgresql_with={"fillfactor": "50"},
)

agents = Table(
    "agents",
    metadata,
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("description", Text, nullable=False, server_default=""),
    Column("input_schema", JSONB, nullable=False),
    Column("output_schema", JSONB, nullable=False),
    Column("registered_at", Moment, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("name", "version"),
)

compatibility = Table(
    "compatibility",
    metadata,
    Column("id", SmallInteger, primary_key=True, comment="1: there is one row"),
    Column("oldest", Text, nullable=False, comment="oldest revision whose software understands this schema"),
    CheckConstraint("id = 1", name="one_row"),
)

__all__ = ["metadata"]
