"""What the requests to one application share."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from gpt2_jax.core.errors import UserError, brief
from gpt2_jax.model.edits import Edit
from gpt2_jax.model.pretrained_model import Pretrained
from gpt2_jax.serving.engine import Engine
from gpt2_jax.serving.hosts import Hosts
from gpt2_jax.serving.metrics import Metrics
from gpt2_jax.serving.schemas import ApiError, Json, Limits, busy, stopping


class Serving:
  """What the requests to one application share: engines, limits and counters.

  Attributes:
    roots: model -> where it came from, as a command line would name it.
    hosts: by whose names it may be asked, as `make_app` and `make_server` set them.
    draining: whether the server is being stopped.
    connections: the most at a time, as `make_server` sets it.
  """

  def __init__(
    self,
    models: dict[str, Pretrained],
    limits: Limits,
    *,
    slots: int,
    queue: int,
    roots: Mapping[str, str],
    edits: Sequence[Edit] = (),
  ):
    self.limits, self.roots, self.metrics = limits, roots, Metrics()
    self.engines = {
      name: Engine(name, model, self.metrics, slots=slots, queue=queue, edits=edits)
      for name, model in models.items()
    }
    self.hosts, self.draining, self.connections = Hosts(), False, 1000
    self._one_at_a_time = asyncio.Semaphore(1)  # forward passes beside the engines
    self.passes, self._most_passes = 0, queue  # how many of these wait or run

  def engine(self, name: str | None) -> Engine:
    """Returns the engine of a model; None: of the first one.

    Raises:
      ApiError: there is no such model, or the server is being stopped.
    """
    if self.draining:
      raise stopping()
    found = self.engines.get(name if name is not None else next(iter(self.engines)))
    if found is None:
      raise ApiError(
        404,
        f'The model {brief(name)} does not exist; there is {", ".join(self.engines)}.',
        param='model',
        code='model_not_found',
      )
    return found

  async def in_thread(self, work: Callable[[], Any]) -> Json:
    """Returns the answer that `work` makes in another thread. Once begun, it is finished.

    Raises:
      ApiError: too many requests wait for such work, it waited too long, or its input can't be used.
    """
    if self.passes >= self._most_passes:
      raise busy()
    self.passes += 1
    try:
      async with asyncio.timeout(self.limits.seconds):
        await self._one_at_a_time.acquire()
      try:
        return await run_in_threadpool(lambda: Json(work()))
      finally:
        self._one_at_a_time.release()
    except TimeoutError:
      raise ApiError(
        504, 'The request waited longer than this server allows.', code='timeout'
      ) from None
    except UserError as e:
      raise ApiError(400, str(e), param='input') from None
    finally:
      self.passes -= 1

  def drain(self) -> None:
    """Refuses new requests from now on; those that run are finished."""
    self.draining = True
    for engine in self.engines.values():
      engine.queue.close()

  @property
  def idle(self) -> bool:
    """Whether no request is being worked on."""
    return not self.passes and all(engine.queue.idle for engine in self.engines.values())
