"""The chaos run: ``make chaos ARGS="--minutes 10 --seed 7"``.

A fleet of real processes works while everything around it fails. Afterwards a checker, which has read only what can be
seen from outside, says whether a promise was broken.

    stage.py         the servers, API replicas and workers (``slots.py``), and what can be done to them
    objects.py       the object store's bad days: a proxy before S3
    schedule.py      which fault comes when, to whom and for how long: a function of the seed, nothing else
    agents.py        what the workers run; each line of the file of effects is written here
    clients.py       what clients do (``edge.py``: how they ask, and ask again), and what they were told
    evidence.py      all that was observed, as one JSON file
    checks_*.py      the promises, each a function of the evidence; ``checker.py`` calls them all
    run.py           load and faults side by side, then calm, then the check
    gather.py        reads everything after the run
    report.py        what happened, for people and as JSON

**Faults.** SIGKILL of a worker, or of its supervisor and wards with it; SIGTERM and SIGSTOP (shorter than the time-to-live,
and longer) of workers; SIGKILL and SIGTERM of API replicas; Redis flushed, killed, restarted, stopped; Postgres restarted
(fast and immediate), killed, stopped; an object store that is slow, answers 500 and 503, or resets connections; a tenth of
all wake-ups dropped and a tenth doubled, all the time; turns that end their process, block its event loop, spin in a
thread, raise what frameworks do not catch, or overrun their deadline; clients that cancel queued, running and waiting turns
and that send much twice. The last worker or replica that stands is spared, so that there always is something to disturb.

**The seed** reproduces the schedule: kinds, times, victims by number, durations, and what each client asks for in which
order. It does not reproduce the run: real processes race.

**What is read.** Answers of the API, the events of every session, the file of effects, the keys of Redis, the logs of the
processes (for tracebacks) and their exit codes. Postgres is read for two questions only: is a lease left, and does a
worker that was declared dead hold one.

Where a run finds a violation it exits with 1 and names the folder that has logs and evidence;
``python -m tests.chaos --check FOLDER/evidence.json`` checks that evidence again.
"""
