"""The service under Ray Serve: copies of `Api` answer and compute, and `SlideJobs` scores whole slides.

A Serve config names it by `import_path: lgd.serve.replicas:build`, with `lgd.serve.options.ServeOptions` as `args`.
"""

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from lgd.base.environment import count_cpus
from lgd.serve.network import Network
from lgd.serve.options import ServeOptions
from lgd.serve.slide_jobs import SlideJobs, SlideState

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

APPLICATION = "lgd"
API, JOBS = "Api", "SlideJobs"
_ONGOING = 256
"""Requests that a process has in hand, of all kinds: more than the network takes, which refuses others."""
_STOP_SECONDS, _STOP_LOOP = 5, 0.5
_TRIES, _PAUSE = 20, 0.5
"""How often and after how many seconds a call is made again whose process died: a new copy takes some to load."""


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
    """What a method of a deployment returns, or raises. Where its process dies, it is called again, of another one."""
    for left in reversed(range(_TRIES)):
        try:
            return await method.remote(*args)
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
    deploy = functools.partial(
        serve.deployment,
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus or 0},
        graceful_shutdown_timeout_s=_STOP_SECONDS,
        graceful_shutdown_wait_loop_s=_STOP_LOOP,
    )

    def make_app() -> "FastAPI":
        """In the process that answers."""
        import torch

        from lgd.serve.application import create_app

        torch.set_num_threads(options.cpus or count_cpus())
        return create_app(options, token, Network(options), RemoteJobs() if options.slides else None)

    jobs = [deploy(name=JOBS)(JobsReplica).bind(options)] if options.slides else []
    api = deploy(name=API, num_replicas=options.replicas)(serve.ingress(make_app)())
    application: Application = api.bind(*jobs)
    return application


def build(arguments: dict[str, object]) -> "Application":
    """The application of a Serve config. It always needs a token, for the address is not among its arguments."""
    options = ServeOptions.read(arguments)
    return make_application(options, options.read_token(needed=True))
