"""The local stack: a real PostgreSQL and a real Redis in one folder, for `longshift up` and for the tests.

::

    with Guardian() as guardian:  # stops everything, also when this process is killed
        postgres = LocalPostgres(folder / "postgres", guardian=guardian)
        redis = LocalRedis(folder / "redis", guardian=guardian)
        database_url, redis_url = postgres.start(), redis.start()
        worker = subprocess.Popen([...], start_new_session=True)
        guardian.watch(worker.pid, grace=timedelta(seconds=20))
        ...
        redis.stop()
        postgres.stop()
"""

from longshift.embedded.postgres import LocalPostgres
from longshift.embedded.processes import FolderLock, Guardian
from longshift.embedded.redis import LocalRedis

__all__ = ["FolderLock", "Guardian", "LocalPostgres", "LocalRedis"]
