"""The ledger of tool calls, approvals, and what turns need to wait for them and for their children."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None
phase = "expand"
oldest = "0003"  # software of that time starts on its own revision only

MOMENT = sa.DateTime(timezone=True)
OPEN = "status IN ('scheduled', 'queued', 'running', 'waiting')"
NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    _turns()
    _mail()
    _approvals()
    _tool_calls()


def _turns() -> None:
    op.add_column(
        "turns",
        sa.Column(
            "clock_stopped_at", MOMENT, comment="since when its deadline does not come nearer: it waits for an approval"
        ),
    )
    op.add_column(
        "turns",
        sa.Column(
            "parent_told",
            sa.Boolean(),
            server_default="false",
            nullable=False,
            comment="the session of its parent turn was woken because it has ended",
        ),
    )
    op.create_index(
        "ix_turns_parent", "turns", ["parent_turn_id"], postgresql_where=sa.text("parent_turn_id IS NOT NULL")
    )
    op.create_index(
        "ix_turns_untold",
        "turns",
        ["ended_at"],
        postgresql_where=sa.text("parent_turn_id IS NOT NULL AND ended_at IS NOT NULL AND NOT parent_told"),
    )
    op.drop_index("ix_turns_deadline", table_name="turns")
    op.create_index(
        "ix_turns_deadline", "turns", ["deadline"], postgresql_where=sa.text(f"{OPEN} AND clock_stopped_at IS NULL")
    )


def _mail() -> None:
    unread = ["session_id", "kind", "name", "created_at", "id"]
    op.create_index("ix_mail_unread", "mail", unread, postgresql_where=sa.text("consumed_at IS NULL"))
    op.create_index("ix_mail_read", "mail", ["consumed_at"], postgresql_where=sa.text("consumed_at IS NOT NULL"))
    op.drop_index("ix_mail_session", table_name="mail")


def _approvals() -> None:
    op.create_table(
        "approvals",
        sa.Column("id", sa.Uuid(), nullable=False, comment="recorded in the wait.begun of its turn"),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("turn_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("show", sa.JSON(none_as_null=True), comment="what the one who decides should see"),
        sa.Column("created_at", MOMENT, server_default=NOW, nullable=False),
        sa.Column("expires_at", MOMENT, comment="when the turn goes on without an answer; NULL: with its deadline"),
        sa.Column("answered_at", MOMENT, comment="set once: of two answers the first counts"),
        sa.Column("answer", sa.JSON(none_as_null=True), comment="{granted, comment}"),
        sa.Column("answered_by", sa.Uuid(), comment="the API key of the answer"),
        sa.Column("closed_at", MOMENT, comment="nobody waits for an answer any more"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_approvals")),
    )
    op.create_index("ix_approvals_session", "approvals", ["session_id", "id"])
    op.create_index(
        "ix_approvals_open",
        "approvals",
        ["tenant_id", "id"],
        postgresql_where=sa.text("answered_at IS NULL AND closed_at IS NULL"),
    )


def _tool_calls() -> None:
    op.create_table(
        "tool_calls",
        sa.Column(
            "id",
            sa.Uuid(),
            nullable=False,
            comment="the key: of session, scope, tool and input; what the tool is given",
        ),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("turn_id", sa.Uuid(), nullable=False, comment="the turn that started it last"),
        sa.Column("tool", sa.Text(), nullable=False),
        sa.Column("effect", sa.Text(), nullable=False, comment="read, write or irreversible"),
        sa.Column("dedupe", sa.Text(), nullable=False, comment="call, turn or session: how far its key reaches"),
        sa.Column("place", sa.Text(), nullable=False, comment="replay key of the call that started it last"),
        sa.Column("input", sa.JSON(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False, comment="started, done, failed, unknown or given_up"),
        sa.Column("attempts", sa.Integer(), server_default="1", nullable=False, comment="how often it was started"),
        sa.Column("worker_id", sa.Uuid(), nullable=False, comment="who started it last"),
        sa.Column("epoch", sa.BigInteger(), nullable=False, comment="the lease under which it was started last"),
        sa.Column("timeout", sa.Interval(), nullable=False, comment="of one call"),
        sa.Column("created_at", MOMENT, server_default=NOW, nullable=False, comment="when it was started first"),
        sa.Column("started_at", MOMENT, server_default=NOW, nullable=False, comment="when it was started last"),
        sa.Column("ended_at", MOMENT, comment="when its outcome was recorded"),
        sa.Column("result", sa.JSON(none_as_null=True)),
        sa.Column("artifact_id", sa.Uuid(), comment="where the result is, if it is too large for a row"),
        sa.Column("error", sa.JSON(none_as_null=True), comment="{type, message}"),
        sa.Column("settled_at", MOMENT, comment="when an operator decided what nobody could know"),
        sa.Column("settled_by", sa.Uuid(), comment="the API key of that operator"),
        sa.Column("note", sa.Text(), comment="what the operator said of it"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tool_calls")),
    )
    op.create_index("ix_tool_calls_session", "tool_calls", ["session_id", "created_at", "id"])
    op.create_index(
        "ix_tool_calls_open", "tool_calls", ["tenant_id", "id"], postgresql_where=sa.text("status = 'unknown'")
    )


def downgrade() -> None:
    op.drop_table("tool_calls")
    op.drop_table("approvals")
    op.create_index("ix_mail_session", "mail", ["session_id"], postgresql_where=sa.text("consumed_at IS NULL"))
    op.drop_index("ix_mail_read", table_name="mail")
    op.drop_index("ix_mail_unread", table_name="mail")
    op.drop_index("ix_turns_deadline", table_name="turns")
    op.create_index("ix_turns_deadline", "turns", ["deadline"], postgresql_where=sa.text(OPEN))
    op.drop_index("ix_turns_untold", table_name="turns")
    op.drop_index("ix_turns_parent", table_name="turns")
    op.drop_column("turns", "parent_told")
    op.drop_column("turns", "clock_stopped_at")
