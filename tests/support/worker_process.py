"""A worker process with the settings of the environment: ``python -m tests.support.worker_process``."""

from __future__ import annotations

import logging
import sys

from longshift import config as settings
from longshift import fleet
from longshift.agent import load_agents
from longshift.worker import Worker


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    config = settings.load()
    runtime = Worker(config, load_agents(config.agents))
    return fleet.run(fleet.create_app(redis_url=config.require("redis_url"), queues=config.queues, runtime=runtime))


if __name__ == "__main__":
    sys.exit(main())
