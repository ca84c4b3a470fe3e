"""The Celery app of a worker process: Celery carries wake-ups from Redis to the runtime, and does nothing else.

Postgres holds the truth, so everything in Celery that repairs, remembers or reports is off: no results, no unacked
bookkeeping in Redis, no events, no gossip, no remote control (each costs a connection or a broadcast). Two subclasses
see to it that no message on the list, whatever it holds, can end a worker:

    WakeChannel    reads the envelope: bytes that are no envelope are logged and dropped
    WakeConsumer   reads the message: anything that is not a well-formed wake-up is logged and dropped

Messages are acknowledged late, in this process only (``ack_emulation`` off). When the consumer closes, at the start of
a drain, what is still in hand goes back to Redis at once instead of waiting out the drain.

Signals: SIGTERM or SIGINT drains. The same one again, or SIGQUIT, ends at once what still runs; one more kills.
(SIGTERM after SIGINT is one request, not two: Ctrl-C reaches a whole terminal, then the supervisor sends its own.)
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import WARNING, getLogger
from typing import Any

from celery import Celery
from celery.worker import WorkController, state
from celery.worker.consumer import Consumer
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.message import Message
from kombu.transport import redis as kombu_redis
from pydantic import SecretStr
from redis.connection import parse_url

from longshift import tasks, wakeup
from longshift.errors import ConfigError
from longshift.hot import KEEPALIVE
from longshift.pool import AsyncioPool, Runtime

__all__ = ["FleetApp", "Runtime", "create_app", "run"]

logger = getLogger(__name__)

_GC_ALLOCATIONS = 20_000  # net, between two collections of the youngest objects; Python's default is 700 to 2,000
_RETRY_PAUSE = 2.0  # seconds, at most, between two attempts to reach Redis
_TCP_ONLY = ("host", "port", "socket_connect_timeout", "socket_keepalive", "socket_keepalive_options")
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
_QUIET = ("celery.worker.strategy", "celery.worker.consumer.connection")  # a line per message; a URL that is not ours


class FleetApp(Celery):  # type: ignore[misc]  # Celery ships no types
    """The app of one worker process, with its runtime; ``longshift.pool`` finds both here."""

    longshift_runtime: Runtime
    longshift_pool: AsyncioPool | None = None
    exit_code: int = 0

    def request_stop(self, exit_code: int = 0) -> None:
        """Begin an orderly stop, as SIGTERM does; ``run`` returns ``exit_code``. From any thread, returns at once."""
        self.exit_code = self.exit_code or exit_code
        state.should_stop = self.exit_code
        if self.longshift_pool is not None:
            self.longshift_pool.drain()

    def request_abort(self) -> None:
        """End at once what still runs; ``run`` returns 1 or the code that was asked for before."""
        self.exit_code = self.exit_code or 1
        state.should_terminate = self.exit_code
        if self.longshift_pool is not None:
            self.longshift_pool.abort()


def create_app(
    *,
    redis_url: str,
    queues: Sequence[str],
    runtime: Runtime,
    concurrency: int = 8,
    socket_timeout: float = 5.0,
    connect_timeout: float = 2.0,
) -> FleetApp:
    """The app of a worker process that feeds the wake-ups of ``queues`` to ``runtime``. Connects to nothing.

    Args:
        redis_url: what redis-py reads: ``redis://``, ``rediss://`` or ``unix://``, with its options.
        queues: names of queues, served in turn.
        runtime: see ``Runtime``.
        concurrency: wake-ups in hand at a time; has nothing to do with how many turns the process runs.
        socket_timeout: seconds until a Redis that answers nothing counts as lost.
        connect_timeout: seconds to connect to Redis.

    Raises:
        ConfigError: the URL is not one of Redis, or there is no queue.
        InvalidInput: the name of a queue does not fit.
    """
    keys = [wakeup.queue_key(queue) for queue in dict.fromkeys(queues)]
    if not keys:
        raise ConfigError("a worker needs at least one queue: set LONGSHIFT_QUEUES, for example to 'default'")
    app = FleetApp(
        "longshift", broker=_shown(redis_url), backend="disabled://", set_as_current=False, changes=_settings(keys)
    )
    app.conf.update(
        worker_concurrency=concurrency,
        broker_transport_options={
            "redis_url": SecretStr(redis_url),
            "ack_emulation": False,  # no unacked hash, no visibility timeout: Postgres knows what is to be done
            "priority_steps": [0],  # one list per queue
            "socket_timeout": socket_timeout,
            "socket_connect_timeout": connect_timeout,
            "socket_keepalive": True,
            "socket_keepalive_options": KEEPALIVE,
            "health_check_interval": 25,
        },
    )
    app.longshift_runtime = runtime
    tasks.register(app)
    state.should_stop = state.should_terminate = None  # not in run(): from here on a stop may be asked for
    return app


def run(app: FleetApp) -> int:
    """Run the worker in this process, on the main thread, until it is stopped; returns the exit code."""
    for name in _QUIET:
        getLogger(name).setLevel(WARNING)
    _collect_rarely()
    with _signals(app):
        worker = WorkController(app=app, without_gossip=True, without_mingle=True, without_heartbeat=True)
        worker.start()
    return app.exit_code or worker.exitcode or 0


def _collect_rarely() -> None:
    """Turns leave no cycles behind, so that a search for some, over thousands of living turns, rarely finds any: with
    Python's own thresholds it took a quarter of the CPU time of a busy worker."""
    gc.collect()
    gc.freeze()  # modules and the like are not looked at again
    gc.set_threshold(_GC_ALLOCATIONS, 20, 50)


def _settings(keys: Sequence[str]) -> dict[str, Any]:
    return {
        "task_queues": [Queue(key, routing_key=key, no_declare=True) for key in keys],
        "task_default_queue": keys[0],
        "task_create_missing_queues": False,
        "accept_content": ["json"],
        "task_serializer": "json",
        "task_ignore_result": True,
        "worker_pool": AsyncioPool,
        "worker_consumer": WakeConsumer,
        "broker_transport": WakeTransport,
        # Never take a message that cannot be handed over now: it would wait here while another worker is idle.
        "worker_disable_prefetch": True,
        "worker_prefetch_multiplier": 1,
        "worker_enable_prefetch_count_reduction": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # Redis away, at the start or later: try again for ever, and after errors that are no lost connection as well.
        "broker_connection_retry_on_startup": True,
        "broker_connection_retry": True,
        "broker_connection_max_retries": None,
        "broker_channel_error_retry": True,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "worker_disable_rate_limits": True,
        "worker_detect_quorum_queues": False,
    }


def _shown(redis_url: str) -> str:
    """A URL for logs, and for kombu to choose its defaults by: without user, password and options.

    Raises:
        ConfigError: redis-py cannot read ``redis_url``.
    """
    try:
        options = parse_url(redis_url)
    except ValueError:
        raise ConfigError(
            "LONGSHIFT_REDIS_URL is not a URL of Redis: use redis://host:6379/0, rediss://... or unix:///path"
        ) from None
    return f"redis://{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db', 0)}"


class WakeChannel(kombu_redis.Channel):
    """kombu's Redis channel, connected as redis-py reads the URL, and deaf to what is no envelope."""

    _lost = False  # this channel's connection; after a reconnect there is a new channel

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        secret: SecretStr = self.connection.client.transport_options["redis_url"]
        options: dict[str, Any] = dict(parse_url(secret.get_secret_value()))
        self.connection_class = options.pop("connection_class", kombu_redis.Channel.connection_class)
        params: dict[str, Any] = super()._connparams(asynchronous=asynchronous)  # type: ignore[no-untyped-call]
        if "path" in options:
            for name in _TCP_ONLY:
                params.pop(name, None)
        return params | options

    def _brpop_read(self, **options: Any) -> bool:
        try:
            return bool(super()._brpop_read(**options))  # type: ignore[no-untyped-call]
        except _MALFORMED as error:  # first, because kombu counts KeyError among the connection errors
            logger.warning("a malformed message was dropped", extra={"error": _brief(error)})
            return True
        except self.connection_errors:
            self._lost = True
            raise

    def _restore(self, message: Message, leftmost: bool = False) -> None:
        """Put a message back; when Redis is away, let it go: the sweeper rings again.

        kombu would wait out the timeout for each message and dump them into a file for an operator.
        """
        if self._lost:
            return
        try:
            super()._restore(message, leftmost=leftmost)  # type: ignore[no-untyped-call]
        except (*self.connection_errors, self.ResponseError) as error:
            self._lost = True
            logger.info("wake-ups in hand were not put back", extra={"error": _brief(error)})


class WakeTransport(kombu_redis.Transport):
    """kombu's Redis transport with our channel."""

    Channel = WakeChannel


class WakeConsumer(Consumer):  # type: ignore[misc]  # Celery ships no types
    """Celery's consumer, which lets through well-formed wake-ups only and lets go of Redis before the pool drains."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], None]:
        """The function that Celery calls with each message."""
        handle: Callable[[Message], None] = super().create_task_handler(*args, **kwargs)

        def on_message(message: Message) -> None:
            try:
                _check(message)
            except Exception as error:  # noqa: BLE001  # whatever a message does, it must not end the worker
                self.on_decode_error(message, error)
            else:
                handle(message)

        return on_message

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Drop a message; Celery's own version logs all of it, with a traceback."""
        logger.warning("a malformed message was dropped", extra={"error": _brief(exc)})
        message.reject_log_error(logger, self.connection_errors)

    def ensure_connected(self, conn: Connection) -> Connection:
        """Connect, for as long as it takes; ends when the worker shall stop.

        Celery's own pauses grow to 30 s, so that workers would stand idle long after Redis is back.
        """

        def failed(error: Exception, pause: float) -> None:
            logger.warning("cannot reach Redis, trying again", extra={"error": _brief(error), "seconds": pause})

        conn.ensure_connection(
            failed, interval_start=0.2, interval_step=0.4, interval_max=_RETRY_PAUSE, callback=state.maybe_shutdown
        )
        self.first_connection_attempt = False
        return conn

    def stop(self) -> None:
        """Stop consuming and disconnect now, not after the drain.

        A BRPOP on its way could otherwise swallow the wake-up that a draining turn sends to the other workers and keep
        it until the drain is over. Closing reads that reply (for up to a second) and puts all messages in hand back.
        """
        super().stop()
        self.shutdown()


def _check(message: Message) -> None:
    """Raise if Celery could stumble over this message, or if it is no wake-up."""
    headers = message.headers
    if headers.get("task") != wakeup.TASK or not isinstance(headers.get("id"), str):
        raise ValueError("it is not a wake-up")
    if headers.get("eta") or headers.get("expires") or headers.get("stamped_headers"):
        raise ValueError("a wake-up has no time and no stamps")
    _args, kwargs, _embed = message.payload
    wakeup.decode(kwargs)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


@contextmanager
def _signals(app: FleetApp) -> Iterator[None]:
    """Handle the signals of a worker; what was set before is restored."""
    seen: set[int] = set()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

    def on_signal(number: int, _frame: object) -> None:
        if number in seen or number == signal.SIGQUIT:
            for each in numbers:
                signal.signal(each, signal.SIG_DFL)
            app.request_abort()
        else:
            app.request_stop()
        seen.add(number)

    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
