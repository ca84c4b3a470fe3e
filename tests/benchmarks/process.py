"""A worker process, with its settings from the environment: ``python -m tests.benchmarks.process``."""

from __future__ import annotations

import logging
import sys

from longshift import fleet
from longshift.agent import load_agents
from longshift.config import load
from longshift.worker import Worker


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    config = load()
    runtime = Worker(config, load_agents(config.agents))
    app = fleet.create_app(redis_url=config.require("redis_url"), queues=config.queues, runtime=runtime)
    return fleet.run(app)


if __name__ == "__main__":
    sys.exit(main())
