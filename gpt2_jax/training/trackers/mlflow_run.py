"""MLflow. Its server or database is its own matter: MLFLOW_TRACKING_URI; default: mlflow.db here."""

import os
import time
from pathlib import Path
from typing import Any

from gpt2_jax.training.trackers.protocol import Start, flat, numbers

A_CALL, LETTERS = 1000, 500  # metrics and parameters' values that every server takes
OUTCOMES = {'finished': 'FINISHED', 'stopped': 'KILLED', 'failed': 'FAILED'}


class MLflow:
  """A point a step and key. Points can't be taken back: those beyond a checkpoint stay."""

  needs = 'mlflow'

  def __init__(self, start: Start):
    from mlflow import MlflowClient, entities  # pyright: ignore[reportMissingImports]

    self._entities, self._client = entities, MlflowClient()
    self.run = self._of_earlier(start.run) or self._new(start)
    self.sent = start.sent if self.run == start.run else 0
    self._client.log_dict(self.run, start.config, f'config-{start.step}.json')
    self.where = f'mlflow ui --backend-store-uri {self._client.tracking_uri}'

  def _of_earlier(self, run: str | None) -> str | None:
    """Returns a run that there is, which goes on; None if it is in another place, or deleted."""
    from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode  # pyright: ignore[reportMissingImports]

    if run is None:
      return None
    try:
      self._client.update_run(run, 'RUNNING')
    except MlflowException as e:
      if e.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
        raise
      return None
    return run

  def _new(self, start: Start) -> str:
    name = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'gpt2_jax')
    found = self._client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else self._client.create_experiment(name)
    run = self._client.create_run(experiment, run_name=start.workdir.resolve().name).info.run_id
    knobs = [
      self._entities.Param(key, str(value)[:LETTERS]) for key, value in flat(start.config).items()
    ]
    for first in range(0, len(knobs), 100):
      self._client.log_batch(run, params=knobs[first : first + 100])
    return run

  def log(self, lines: list[dict[str, Any]]) -> None:
    now = int(time.time() * 1000)
    points = [
      self._entities.Metric(key, float(value), now, line['step'])
      for line in lines
      for key, value in numbers(line).items()
    ]
    for first in range(0, len(points), A_CALL):
      self._client.log_batch(self.run, metrics=points[first : first + A_CALL])

  def close(self, outcome: str, summary: dict[str, Any], picture: Path | None) -> None:
    if picture:
      self._client.log_artifact(self.run, str(picture))
    for key, value in summary.items():
      self._client.set_tag(self.run, f'summary.{key}', str(value))
    self._client.set_terminated(self.run, OUTCOMES[outcome])
