"""The service under Ray Serve: `Api` answers, `Network` computes, in batches, and `SlideJobs` scores whole slides.

A Serve config names it by `import_path: lgd.serve.replicas:build`, with `lgd.serve.options.ServeOptions` as `args`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import numpy as np
from fastapi import HTTPException
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

from lgd.base.errors import ConfigError, DataError
from lgd.scoring.images import Fitted, Mpp
from lgd.serve.batches import Batches
from lgd.serve.calls import Reply
from lgd.serve.names import UnknownName
from lgd.serve.neighbours import Filters
from lgd.serve.network import Network, Values
from lgd.serve.options import ServeOptions
from lgd.serve.slide_jobs import SlideJobs, SlideState

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

APPLICATION = "lgd"
NETWORK, JOBS = "Network", "SlideJobs"
_BATCH = 16
_ONGOING, _QUEUED = 64, 256
"""Requests that a copy of the network has in hand, and that wait for one: more are refused with 503."""
_STOP_SECONDS, _STOP_LOOP = 5, 0.5
_TRIES, _PAUSE = 20, 0.5
"""How often and after how many seconds a call is made again whose process died: a new copy takes some to load."""

_Given = ParamSpec("_Given")


def _reply(
    work: "Callable[Concatenate[NetworkReplica, _Given], Awaitable[dict[str, object]]]",
) -> "Callable[Concatenate[NetworkReplica, _Given], Awaitable[Reply]]":
    """The answer, or why there is none: an error of this process would reach the caller as one of Ray's."""

    async def reply(self: "NetworkReplica", /, *args: _Given.args, **options: _Given.kwargs) -> Reply:
        try:
            return Reply(await work(self, *args, **options))
        except (ConfigError, DataError) as error:
            return Reply({}, self.network.explain(error), isinstance(error, UnknownName))

    return reply


class NetworkReplica:
    """A copy of the network, the store and its index."""

    def __init__(self, options: ServeOptions) -> None:
        self.network = Network(options)
        self._batches = Batches(self.network.score, _BATCH)

    async def _see(self, fitted: Fitted) -> Values:
        return await self._batches.ask(fitted.pixels)

    @_reply
    async def describe(self) -> dict[str, object]:
        return self.network.describe()

    @_reply
    async def predict(self, content: bytes, mpp: str) -> dict[str, object]:
        fitted = await asyncio.to_thread(self.network.fit, content, _read_mpp(mpp))
        return self.network.predict(fitted, await self._see(fitted))

    @_reply
    async def query(self, content: bytes, mpp: str, filters: Filters) -> dict[str, object]:
        fitted = await asyncio.to_thread(self.network.fit, content, _read_mpp(mpp))
        return await asyncio.to_thread(self.network.query, fitted, await self._see(fitted), filters)

    @_reply
    async def query_stored(self, name: str, filters: Filters) -> dict[str, object]:
        fitted = await asyncio.to_thread(self.network.read_stored, name)
        return await asyncio.to_thread(self.network.query, fitted, await self._see(fitted), filters, stored=name)

    @_reply
    async def query_region(self, pixels: np.ndarray, filters: Filters, slide: str) -> dict[str, object]:
        fitted = Fitted(pixels, [])
        return await asyncio.to_thread(self.network.query, fitted, await self._see(fitted), filters, slide=slide)


class JobsReplica:
    """The scoring of slides."""

    def __init__(self, options: ServeOptions) -> None:
        self.jobs = SlideJobs(options)

    async def list_states(self) -> dict[str, SlideState]:
        return await asyncio.to_thread(self.jobs.list_states)

    async def get_state(self, identity: str) -> SlideState:
        return await asyncio.to_thread(self.jobs.get_state, identity)

    async def start(self, identity: str) -> SlideState:
        return await asyncio.to_thread(self.jobs.start, identity)


class RemoteNetwork:
    """The deployment `Network`, called from another process."""

    def __init__(self) -> None:
        self._handle: DeploymentHandle[Any] = serve.get_deployment_handle(NETWORK, APPLICATION)

    async def describe(self) -> Reply:
        return Reply(*await _call(self._handle.describe))

    async def predict(self, content: bytes, mpp: str) -> Reply:
        return Reply(*await _call(self._handle.predict, content, mpp))

    async def query(self, content: bytes, mpp: str, filters: Filters) -> Reply:
        return Reply(*await _call(self._handle.query, content, mpp, filters))

    async def query_stored(self, name: str, filters: Filters) -> Reply:
        return Reply(*await _call(self._handle.query_stored, name, filters))

    async def query_region(self, pixels: np.ndarray, filters: Filters, slide: str) -> Reply:
        return Reply(*await _call(self._handle.query_region, pixels, filters, slide))


class RemoteJobs:
    """The deployment `SlideJobs`, called from another process."""

    def __init__(self) -> None:
        self._handle: DeploymentHandle[Any] = serve.get_deployment_handle(JOBS, APPLICATION)

    async def list_states(self) -> dict[str, SlideState]:
        states: dict[str, SlideState] = await _call(self._handle.list_states)
        return states

    async def get_state(self, identity: str) -> SlideState:
        return SlideState(*await _call(self._handle.get_state, identity))

    async def start(self, identity: str) -> SlideState:
        return SlideState(*await _call(self._handle.start, identity))


async def _call(method: "DeploymentHandle[Any]", *args: object) -> Any:
    """What a method of a deployment returns. Where its process dies, it is called again, of another one.

    Raises what the method raises, and `HTTPException` where no process is free for so long that the request would only
    wait.
    """
    for left in reversed(range(_TRIES)):
        try:
            return await method.remote(*args)
        except BackPressureError as error:
            raise HTTPException(503, "too many requests wait already: ask again later", {"Retry-After": "5"}) from error
        except RayTaskError as error:
            # Its text is the trace of the other process.
            raise error.cause from error
        except RayActorError:
            if not left:
                raise
            await asyncio.sleep(_PAUSE)
    raise AssertionError("the last try returns or raises")


def make_application(options: ServeOptions, token: str) -> "Application":
    """What `serve.run` takes."""
    reserved = {"num_cpus": options.cpus, "num_gpus": options.gpus or 0}
    network = serve.deployment(
        name=NETWORK,
        num_replicas=options.replicas,
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_QUEUED,
        ray_actor_options=reserved,
        graceful_shutdown_timeout_s=_STOP_SECONDS,
        graceful_shutdown_wait_loop_s=_STOP_LOOP,
    )(NetworkReplica)
    parts = [network.bind(options)]
    if options.slides:
        jobs = serve.deployment(
            name=JOBS,
            max_ongoing_requests=_ONGOING,
            ray_actor_options=reserved,
            graceful_shutdown_timeout_s=_STOP_SECONDS,
            graceful_shutdown_wait_loop_s=_STOP_LOOP,
        )(JobsReplica)
        parts.append(jobs.bind(options))

    def make_app() -> "FastAPI":
        """In the process that answers."""
        from lgd.serve.application import create_app

        return create_app(options, token, RemoteNetwork(), RemoteJobs() if options.slides else None)

    api = serve.deployment(
        name="Api",
        max_ongoing_requests=4 * _ONGOING,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_STOP_SECONDS,
        graceful_shutdown_wait_loop_s=_STOP_LOOP,
    )(serve.ingress(make_app)())
    application: Application = api.bind(*parts)
    return application


def build(arguments: dict[str, object]) -> "Application":
    """The application of a Serve config. It always needs a token, for the address is not among its arguments."""
    options = ServeOptions.read(arguments)
    return make_application(options, options.read_token(needed=True))


def _read_mpp(text: str) -> Mpp:
    return "unknown" if text == "unknown" else float(text) if text else None
