"""The scaling rehearsal: ``make rehearse-scale ARGS="--help"``.

One fleet of real processes grows from 1 worker to 6 and shrinks to 1 while clients submit turns. No Kubernetes is needed: a
stand-in for the kubelet follows a replica count.

    kubelet.py       starts, SIGTERMs, SIGKILLs and restarts workers as Kubernetes does with pods
    stage.py         Postgres, Redis, the API, the workers; reads the view ``backlog`` and what the workers hold
    load.py          what clients ask for, and how often (the agents are those of the chaos run)
    rule.py          reads the ScaledObject of k8s/ and decides as the HorizontalPodAutoscaler does that KEDA makes of it
    run.py           load and replica counts side by side, then the check (that of the chaos run, and checks.py)
    figures.py       what is measured: first turns of new workers, drains, interrupted turns
    simulate.py      the same rule over demand that is recorded or made up, with a model of the fleet
    data/            recorded demand
    draw.py          the picture in docs/how-to/scale.md

Everything is looked at from outside: answers of the API, events, the file of effects, logs and exit codes. The view is read
because that is what an autoscaler reads.
"""
