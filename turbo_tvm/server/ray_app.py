"""The server on a Ray cluster: the same application in as many replicas as the requests under way need.

    serve run turbo_tvm.server.ray_app:build files=minilm.turbo max_replicas=8

or `serve.run(application(Settings(files=(Path("minilm.turbo"),))))`. A file is read by every replica: it must lie at
the same path on every machine. Ray routes, restarts replicas that die, and adds some when each has more than
`target_ongoing` requests to answer. Needs the extra `ray`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turbo_tvm.errors import InputError
from turbo_tvm.server.settings import Settings

TARGET_ONGOING = 32  # requests of a replica: enough that batches form, few enough that they do not wait for long


def application(
    settings: Settings,
    *,
    min_replicas: int = 1,
    max_replicas: int = 1,
    target_ongoing: int = TARGET_ONGOING,
    cpus: float | None = None,
) -> Any:
    """Make a Ray Serve application of these settings. It ignores ports, TLS and workers, which Ray provides.

    min_replicas, max_replicas: the range in which Ray chooses the number of replicas by the load.
    target_ongoing: requests under way per replica that Ray aims at.
    cpus: of a replica; by default its threads.

    Raises InputError.
    """
    if not 1 <= min_replicas <= max_replicas:
        raise InputError(f"replicas are from 1 up, not {min_replicas} to {max_replicas}")
    from ray import serve

    def app() -> Any:
        from turbo_tvm.server.app import create_app

        return create_app(settings)

    deployment = serve.deployment(
        name="turbo_tvm",
        max_ongoing_requests=settings.max_queue,
        ray_actor_options={"num_cpus": float(settings.threads or 1) if cpus is None else cpus},
        autoscaling_config={
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": target_ongoing,
        },
        graceful_shutdown_timeout_s=settings.drain_s,
    )
    return deployment(serve.ingress(app)()).bind()


def build(arguments: dict[str, str]) -> Any:
    """Make the application for `serve run`.

    arguments: `files`, paths with commas between, and the numbers `threads`, `min_replicas`, `max_replicas` and
    `target_ongoing`. Raises InputError for others.
    """
    known = {"files", "threads", "min_replicas", "max_replicas", "target_ongoing"}
    if "files" not in arguments or not set(arguments) <= known:
        raise InputError(f"arguments are files=a.turbo,b.turbo and {', '.join(sorted(known - {'files'}))}")
    numbers = {name: int(value) for name, value in arguments.items() if name != "files"}
    threads = numbers.pop("threads", None)
    files = tuple(Path(file).resolve() for file in arguments["files"].split(","))
    return application(Settings(files=files, threads=threads), **numbers)
