"""Load over HTTP: a client that costs little, in closed and in open loops. Latencies in an open loop count from when a
request was due, so that a server which falls behind cannot hide it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST_CONNECTIONS = 4000


@dataclass(frozen=True)
class Answers:
    """What came of a load. latency_s: of the requests that were answered with 200, in the order of their arrival;
    statuses: how many had which, 0 for no answer; seconds: from the first request to the last answer.
    """

    latency_s: tuple[float, ...]
    statuses: dict[int, int]
    seconds: float

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latency_s) / self.seconds

    def percentile(self, percent: float) -> float:
        """Of the latencies; infinite where there are none."""
        return float(np.percentile(self.latency_s, percent)) if self.latency_s else float("inf")


class Connection:
    """One connection that is kept."""

    def __init__(self, host: str, port: int):
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        if self._streams is not None and self._streams[0].at_eof():
            self.close()  # the server hung up on a connection that nobody used for long
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        try:
            raw = await reader.readuntil(b"\r\n\r\n")
            status, length = int(raw[9:12]), _length(raw)
            return status, await reader.readexactly(length)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ValueError("an answer without a length")


def closed_loop(host: str, port: int, path: str, bodies: Sequence[bytes], clients: int) -> Answers:
    """So many clients, each of which sends its next request when it has the answer to the last."""
    return asyncio.run(_closed(host, port, path, bodies, clients))


async def _closed(host: str, port: int, path: str, bodies: Sequence[bytes], clients: int) -> Answers:
    left = iter(enumerate(bodies))
    latencies: dict[int, float] = {}
    statuses: dict[int, int] = {}
    started = time.perf_counter()

    async def client() -> None:
        connection = Connection(host, port)
        for i, body in left:
            begun = time.perf_counter()
            await _one(connection, path, body, i, begun, latencies, statuses)
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return Answers(tuple(latencies[i] for i in sorted(latencies)), statuses, time.perf_counter() - started)


def open_loop(
    host: str, port: int, path: str, bodies: Sequence[bytes], arrivals_s: Sequence[float], patience_s: float = 30.0
) -> Answers:
    """Each request when it is due, whatever became of those before."""
    return asyncio.run(_open(host, port, path, bodies, arrivals_s, patience_s))


async def _open(
    host: str, port: int, path: str, bodies: Sequence[bytes], arrivals_s: Sequence[float], patience_s: float
) -> Answers:
    idle: list[Connection] = []
    latencies: dict[int, float] = {}
    statuses: dict[int, int] = {}
    places = asyncio.Semaphore(_MOST_CONNECTIONS)
    started = time.perf_counter()

    async def send(i: int, body: bytes, due: float) -> None:
        async with places:
            connection = idle.pop() if idle else Connection(host, port)
            try:
                await asyncio.wait_for(_one(connection, path, body, i, due, latencies, statuses), patience_s)
            except asyncio.TimeoutError:
                statuses[0] = statuses.get(0, 0) + 1
                connection.close()
            idle.append(connection)

    tasks = []
    for i, (body, after) in enumerate(zip(bodies, arrivals_s, strict=True)):
        due = started + after
        pause = due - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        tasks.append(asyncio.create_task(send(i, body, due)))
    await asyncio.gather(*tasks)
    seconds = time.perf_counter() - started
    for connection in idle:
        connection.close()
    return Answers(tuple(latencies[i] for i in sorted(latencies)), statuses, seconds)


async def _one(
    connection: Connection,
    path: str,
    body: bytes,
    number: int,
    begun: float,
    latencies: dict[int, float],
    statuses: dict[int, int],
) -> None:
    try:
        status, _ = await connection.post(path, body)
    except (OSError, EOFError, ValueError):
        status = 0
    statuses[status] = statuses.get(status, 0) + 1
    if status == 200:
        latencies[number] = time.perf_counter() - begun
