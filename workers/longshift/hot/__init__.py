"""Redis: wake-ups, notifications, deltas and hot contexts. The only package that talks to it; nothing here is needed for
correctness.

    longshift.wake.<queue>                       list     wake-ups, see wakeup.py; lossy by design, the sweeper rings again
    longshift.turn.<turn hex>                    channel  a turn changed: its new status
    longshift.log.<session hex>                  channel  the log grew: {"seq": n}; a delta: {"delta", "turn", "step", "attempt"}
    longshift.ctx.<tenant hex>.<session hex>     string   a copy of the session's context: one line, then the snapshot
                                                          (snapshot.py); lives LONGSHIFT_HOT_TTL after it was last written

The line of a copy, its parts separated by one space:

    epoch         19 digits   the lease under which it was written
    seq           19 digits   the last event that is folded in; all nines: the session is deleted, and no snapshot follows
    event id      32 hex      of that event: (seq, event id) name one history
    digest        32 hex      BLAKE2b of everything else
    checkpoint    digits      seq of the session's newest checkpoint; 0: it has none; -1: none, and its log begins in an archive
    fresh         digits      characters of what was folded in since

Only ``COMPARE_AND_SET`` (contexts.py) writes such a key: a copy moves forward within one epoch and yields to a newer one. A
copy that turns out wrong is dropped if it is still the one that was seen. Another layout needs another name of the key.

There is no key without a time to live beside the wake-up lists. Every failure of Redis is swallowed here, logged once
per outage and reported by ``up``: the fleet is slower without it, never wrong. Nothing waits long for a Redis that hangs:
each call has a limit as a whole, whatever it does to connect and to try again, and listeners do not wait for each other.
"""

from longshift.hot.client import KEEPALIVE, Hot, delta_message, log_channel, turn_channel
from longshift.hot.contexts import Contexts
from longshift.hot.copies import Broken, Copy, Key

__all__ = [
    "KEEPALIVE",
    "Broken",
    "Contexts",
    "Copy",
    "Hot",
    "Key",
    "delta_message",
    "log_channel",
    "turn_channel",
]
