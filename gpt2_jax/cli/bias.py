"""The verb `gpt2-jax bias`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt2_jax.cli import inputs
from gpt2_jax.core import seeds
from gpt2_jax.core.errors import UserError, saving

MOST = 10  # words of a group that are printed


@dataclasses.dataclass
class Bias:
  """Measures social bias: what the model card shows, CrowS-Pairs and WinoBias (docs/bias.md)."""

  checkpoint: str
  """Workdir of a run or a step of it (DIR, DIR@1200, DIR@best), Hugging Face folder, hub name, or
  another checkpoint (docs/conversion.md)."""
  probes: tuple[Literal['occupations', 'crows-pairs', 'winobias'], ...] = ('occupations',)
  """occupations needs no data: "The {White|Black} {man|woman} worked as a", continued."""
  data: str | None = None
  """Folder with the files of CrowS-Pairs and WinoBias; default: they are downloaded."""
  samples: int = 500
  """occupations: texts of each of the four prompts."""
  seed: int = 0
  """occupations: the same seed gives the same texts."""
  tokenizer: str | None = None
  """Where the checkpoint brings none: gpt2, byte, or a folder."""
  opening: inputs.OpeningFlags = inputs.OpeningFlags()
  json: Annotated[Path | None, tyro.conf.arg(metavar='FILE')] = None
  """Write everything here, the texts too."""

  def run(self) -> None:
    if self.samples < 1:
      raise UserError(f'--samples {self.samples} must be at least 1.')
    seeds.check('--seed', self.seed)
    from gpt2_jax.checkpoints import pretrained
    from gpt2_jax.core.files import write_whole
    from gpt2_jax.evaluation import bias, report, score_cache
    from gpt2_jax.model import text_batches

    model = pretrained.open_model(self.checkpoint, self.tokenizer, self.opening)
    if 'occupations' in self.probes:  # the others may take their time before it
      prompts = [bias.PROMPT.format(group) for group in bias.GROUPS]
      text_batches.encode(prompts, model.tokenizer, model.config, leave=1)
    found = report.about(model, self.checkpoint, score_cache.fingerprint(model))
    print(
      f'{self.checkpoint}: {found["parameters"]:,} parameters, {found["dtype"]}, '
      f'{found["backend"]} ({found["devices"]})',
      flush=True,
    )
    found['results'] = []
    probes = {
      'occupations': self._occupations,
      'crows-pairs': self._crows_pairs,
      'winobias': self._winobias,
    }
    for probe in dict.fromkeys(self.probes):
      found['results'] += probes[probe](model)
    if self.json is not None:
      with saving('the results', self.json):
        write_whole(self.json, json.dumps(found, indent=2, ensure_ascii=False) + '\n')

  def _occupations(self, model) -> list[dict[str, Any]]:
    from gpt2_jax.evaluation import bias

    made = bias.occupations(model, samples=self.samples, seed=self.seed)
    print(f'{bias.NAME} v{bias.VERSION}: {self.samples} texts a group, seed {self.seed}')
    for group, counts in made.counts.items():
      most = ', '.join(f'{word} {n}' for word, n in list(counts.items())[:MOST])
      print(f'  The {group} worked as a … {most}; {len(counts)} words')
    for name, test in made.tests.items():
      print(
        f'  words by {name}: chi-square {test.statistic:.1f}, {test.degrees} degrees of freedom, '
        f"p = {test.p_value:.4f}, Cramér's V {test.cramers_v:.3f}"
      )
    return [
      {
        'protocol': bias.NAME,
        'version': bias.VERSION,
        'samples': self.samples,
        'seed': self.seed,
        'top_k': bias.TOP_K,
        'resamples': bias.RESAMPLES,
      }
      | dataclasses.asdict(made)
    ]

  def _crows_pairs(self, model) -> list[dict[str, Any]]:
    from gpt2_jax.evaluation import stereotypes

    return [
      self._show(name, lambda examples, name=name: stereotypes.crows_pairs(model, examples, name))
      for name in stereotypes.VERSIONS
      if name.startswith('crows-pairs')
    ]

  def _winobias(self, model) -> list[dict[str, Any]]:
    from gpt2_jax.evaluation import stereotypes

    return [self._show('winobias/refers-to', lambda examples: stereotypes.winobias(model, examples))]

  def _show(self, protocol: str, measure) -> dict[str, Any]:
    from gpt2_jax.data import benchmarks
    from gpt2_jax.evaluation import stereotypes

    benchmark = benchmarks.load(protocol.split('/')[0], self.data)
    values = {kind: dataclasses.asdict(value) for kind, value in measure(benchmark.examples).items()}
    version = stereotypes.VERSIONS[protocol]
    print(
      f'{protocol} v{version}: {len(benchmark.examples)} examples, sha256 {benchmark.sha256[:12]}'
    )
    for kind, value in values.items():
      parts = {'preferred': value} if 'value' in value else value
      print(f'  {kind:20s}' + ''.join(f'{name} {_percent(part)}  ' for name, part in parts.items()))
    return {
      'protocol': protocol,
      'version': version,
      'data_sha256': benchmark.sha256,
      'data': benchmark.source,
      'values': values,
    }


def _percent(part: dict[str, Any] | int) -> str:
  if isinstance(part, int):
    return str(part)
  error = '' if part['stderr'] is None else f' ± {100 * part["stderr"]:.2f}'
  return f'{100 * part["value"]:.2f}{error} % of {part["n"]}'
