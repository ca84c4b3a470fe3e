"""The lease and append protocol as a small model, of which every reachable state is visited.

    python -m tests.model                      the protocol in each scope: states, transitions, depth, seconds
    python -m tests.model --variants           and each variant with one fix taken away: what it breaks, and how soon
    python -m tests.model --off one-shot-rescue    the shortest way to break that one, step by step

The random test of ``tests/integration/protocol/fuzz`` runs the real statements on a real Postgres, along some schedules. The
model runs no SQL, but along all schedules: a worker may be paused before each of its steps, for any time; a statement may
run before, long after or without its sender's knowing; between any two steps anybody else may take any number of theirs. It
is small where size adds nothing (one session, two turns, two workers, one or two faults at a time).

What stands for what. ``tests/model/test_drift.py`` fails if a statement here loses what the model relies on:

    model                       statement               what the model takes from it
    statements.claim_sees       leases.CLAIM            in its snapshot: runnable, and the worker has no tombstone
    statements.claim            leases.CLAIM            checks the locked row again; a new epoch; no longer head_waiting
    statements.claim            leases.ENDS             a statement of its own: the end of the log while the row is locked
    statements.fenced           log.APPEND              epoch and worker, as of the row lock; who meets a locked row skips it
    statements.append           log.APPEND              rows that are there already are left out of the answer
    statements.append           log.APPEND_CONSUMING    ... and consume nothing: a signal goes with the row that records it
    worker.look                 mail.LOOK               what has come, mail_seq and whether the turn is to end: of one moment
    statements.start            log.START               not for a turn that has ended
    statements.finish           log.FINISH              open_turns, lease kept only for a next turn, ready if one remains
    statements.leave            log.LEAVE               ready at once if mail_seq is not the one of the last look
    statements.standing         log.STANDING            lease, event at the place, end of the log: in one snapshot
    statements.release          leases.RELEASE          epoch and worker in the condition of the write
    worker.look                 leases.HEAD             the first open turn by position
    worker.reconcile            leases.RECONCILE        mine, not in memory once no reply is on its way; a new epoch
    world.tombstone             upkeep.TOMBSTONE        silent workers
    world.rescue                upkeep.HOLDING_DEAD     the ids of the dead that hold, in a statement of its own
    statements.take_away        upkeep.RESCUE           by those ids, on the locked row; a new epoch; running turns queued
    world.sweeper               upkeep.RING             ready sessions without a wake-up
    statements.submit           intake.ADMIT            ready unless the first turn waits
    statements.mail             mail.ADD_SIGNAL         mail_seq + 1, ready
    statements.mail             mail.ADD_MAIL           mail_seq + 1, ready
    statements.cancel           mail.END_UNSTARTED      a turn without attempts ends by its row
    worker.reborn               liveness.HEARTBEAT      no row: I was declared dead

``worker.settle`` is ``Journal._judge``, ``worker.recover`` is ``Journal._recover`` and ``_compare``, ``worker.acknowledge`` is
``Journal._acknowledge``; ``worker.compose`` is the runner with an agent of two steps side by side, and perhaps a wait.

Promises, in ``promises.py``: no holder writes after a later claim has committed, ``seq`` has no gap, turns run in order and
one at a time, no step is recorded twice or started by the current holder when it is recorded, what was acknowledged is in
the log, no rightful holder is told ``LeaseLost``; and from each state, without further faults, a way leads to one in which
all accepted turns have ended and no lease is held.

What it leaves out: time (whoever may be slow may be slow for ever), several sessions in one statement (they are independent
rows, locked in one order), suspects (whom a claim may take, not how), deletion, archive, timers and deadlines (wake-ups of
another kind), two leases of one session in the memory of one worker, effects outside the database. A failover may lose
acknowledged commits: what holds then is that the log has no gap and no two writers.
"""
