"""Reference curves: what a config's loss is, step by step, in runs that were looked at.

A file of `bands` holds either a band made here (`made`: mean and standard deviation over seeds of the
mean training loss of ten steps) or points that others published (`published`: held-out losses with
their source).

    python -m gpt2_jax.diagnosis.reference NAME RUN RUN RUN > gpt2_jax/diagnosis/bands/NAME.json
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.core.files import read_json
from gpt2_jax.model.config import Config
from gpt2_jax.training.watch import metrics_file, run_record

FOLDER = Path(__file__).parent / 'bands'
EVERY = 10  # steps of which the losses are averaged
# what makes a run one of a reference's kind; its rates and batches are what is looked at
KEYS = ('model.n_layer', 'model.n_embd', 'model.n_head', 'data.corpus', 'data.tokenizer')
LEAST = 0.12  # nats: another machine, another version of the standard library


def _key(config: Any, key: str) -> Any:
  section, _, name = key.partition('.')
  return config[section].get(name)


@dataclasses.dataclass(frozen=True)
class Reference:
  """Losses that are usual for a config."""

  name: str
  match: dict[str, Any]
  made: dict[str, Any]  # update (tokens), step, mean, deviation
  published: tuple[dict[str, Any], ...] = ()  # tokens, loss, band, source

  def outside(
    self, losses: list[tuple[int, float]], evaluated: list[tuple[int, float]], update: int
  ) -> str | None:
    """Says where losses by step are not in the band; None where they are, or it says nothing.

    Args:
      losses: of training.
      evaluated: held-out ones.
      update: tokens of an update.
    """
    by_step = dict(losses)
    for step, mean, deviation in zip(*(self.made.get(k, ()) for k in ('step', 'mean', 'deviation'))):
      last = round(step * self.made['update'] / update)  # as many tokens
      here = [by_step[s] for s in range(last - EVERY + 1, last + 1) if s in by_step]
      wide = max(LEAST, 5 * deviation)
      if len(here) == EVERY and not mean - wide <= np.mean(here) <= mean + wide:
        return (
          f'around step {last:,} the training loss is {np.mean(here):.3f}; in {self.name} it is '
          f'{mean:.3f} ± {wide:.2f} after as many tokens.'
        )
    for point in self.published:
      near = [(abs(step * update / point['tokens'] - 1), loss) for step, loss in evaluated]
      if near and min(near)[0] < 0.02 and abs(min(near)[1] - point['loss']) > point['band']:
        return (
          f'after {point["tokens"]:.2g} tokens the held-out loss is {min(near)[1]:.3f}; published '
          f'are {point["loss"]} ± {point["band"]} ({point["source"]}).'
        )
    return None


@functools.cache
def known() -> tuple[Reference, ...]:
  """All references."""
  return tuple(_read(path) for path in sorted(FOLDER.glob('*.json')))


def _read(path: Path) -> Reference:
  read = read_json(path, {'name': str, 'match': dict})
  return Reference(
    read['name'], read['match'], read.get('made', {}), tuple(read.get('published', ()))
  )


def of(config: Config) -> Reference | None:
  """The reference of a config; None if there is none of its model and text."""
  for reference in known():
    if all(_key(config, key) == value for key, value in reference.match.items()):
      return reference
  return None


def make(name: str, workdirs: list[Path]) -> dict[str, Any]:
  """Returns the reference that runs of one config and several seeds make."""
  config = read_json(workdirs[0] / 'config.json')
  start = run_record.starts(workdirs[0])[-1]
  losses = np.array([[line['train/loss'] for line in metrics_file.read(at)] for at in workdirs])
  means = losses[:, : losses.shape[1] // EVERY * EVERY].reshape(len(workdirs), -1, EVERY).mean(-1)
  here = {k: start[k] for k in ('python', 'processor', 'git_commit')} | {
    'jax': start['versions']['jax']
  }
  return {
    'name': name,
    'match': {key: _key(config, key) for key in KEYS},
    'made': {
      'from': here | {'seeds': len(workdirs)},
      'update': start['rows'] * start['row_tokens'],
      'step': [EVERY * (i + 1) for i in range(means.shape[1])],
      'mean': [round(float(x), 4) for x in means.mean(0)],
      'deviation': [round(float(x), 4) for x in means.std(0, ddof=1)],
    },
  }


if __name__ == '__main__':
  print(json.dumps(make(sys.argv[1], [Path(name) for name in sys.argv[2:]])))
