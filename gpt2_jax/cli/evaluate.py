"""The verb `gpt2-jax evaluate`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gpt2_jax.cli import inputs
from gpt2_jax.core.errors import UserError, saving


@dataclasses.dataclass
class Evaluate:
  """Scores a model on benchmarks, by named protocols (docs/evaluation.md).

  A figure stands beside those published for it. What was scored before a kill is not scored again:
  it is kept beside the --json file, or in the workdir of a run.
  """

  checkpoint: str
  """Workdir of a run or a step of it (DIR, DIR@1200, DIR@best), Hugging Face folder, hub name, or
  another checkpoint (docs/conversion.md)."""
  tasks: str
  """Of protocols (lambada/lm-eval), benchmarks (lambada), paper, store:FOLDER; commas between."""
  data: Annotated[str | None, tyro.conf.arg(metavar='PATH')] = None
  """The benchmark's file, or a folder with the files; default: they are downloaded."""
  json: Annotated[Path | None, tyro.conf.arg(metavar='FILE')] = None
  """Write everything here: figures, protocols, hashes of data and model, versions, hardware."""
  tokenizer: str | None = None
  """Where the checkpoint brings none: gpt2, byte, or a folder."""
  dtype: Literal['float32', 'bfloat16'] | None = None
  """Of parameters and activations; default: float32, of a run that of the run."""
  limit: int | None = None
  """The first so many examples only, to try things out; not of corpora."""
  opening: inputs.OpeningFlags = inputs.OpeningFlags()

  def run(self) -> None:
    from gpt2_jax.evaluation import protocols

    wanted = protocols.parse(self.tasks)  # before anything slow
    opened = self.open(wanted)

    import jax

    from gpt2_jax.checkpoints import pretrained
    from gpt2_jax.evaluation import corpus_tasks, example_tasks, figures, report, score_cache
    from gpt2_jax.parallel import sharding

    mesh = sharding.make_mesh(data=-1) if jax.device_count() > 1 else None
    model = pretrained.open_model(
      self.checkpoint,
      self.tokenizer,
      self.opening,
      dtype=self.dtype,
      mesh=mesh,
      needs_tokenizer=any(protocol.kind != 'store' for protocol, _ in opened),
    )
    for protocol, data in opened:  # before anything is scored
      if protocol.kind == 'store':
        corpus_tasks.held_out(model, data)
    fingerprint = score_cache.fingerprint(model)
    asked = figures.Scorer(model, score_cache.Kept(self.scores(), fingerprint))
    said = report.about(model, self.checkpoint, fingerprint)
    print(report.heading(said), flush=True)
    said['results'] = []
    for protocol, data in opened:
      values = example_tasks.KINDS[protocol.kind](asked, protocol, data)
      result = report.entry(protocol, asked, self.describe(model, protocol, data), values)
      said['results'].append(result)
      print(report.rows(result, said['size']), flush=True)
      self.save(said)
    asked.kept.remove()

  def open(self, wanted: list) -> list[tuple[Any, Any]]:
    """Opens the data of protocols. A task of `paper` without data is left out, which is printed."""
    from gpt2_jax.data import benchmarks, token_store, verify

    names = {protocol.benchmark for protocol, _ in wanted if protocol.kind != 'store'}
    if self.data is not None and Path(self.data).is_file() and len(names) > 1:
      raise UserError(
        f'--data {self.data} is one file, but the tasks are of several benchmarks, '
        f'{", ".join(sorted(names))}: name the folder that holds their files.'
      )
    opened, loaded = [], {}
    for protocol, named in wanted:
      name = protocol.name if protocol.kind == 'store' else protocol.benchmark
      try:
        if name not in loaded:
          loaded[name] = (
            token_store.open_store(name.removeprefix('store/'))
            if protocol.kind == 'store'
            else self.cut(benchmarks.load(name, self.data))
          )
        if protocol.kind == 'store':
          verify.verify(loaded[name], [protocol.split])
        opened.append((protocol, loaded[name]))
      except UserError as e:
        if named:
          raise
        print(f'{protocol.name} is left out: {e}', flush=True)
    if not opened:
      raise UserError(
        f'--tasks {self.tasks}: there is no data of any of them; name its folder with --data.'
      )
    return opened

  def cut(self, benchmark):
    """Returns the first examples, with --limit. A corpus, which is one example, stays whole."""
    if self.limit is None:
      return benchmark
    return dataclasses.replace(benchmark, examples=benchmark.examples[: self.limit])

  def describe(self, model, protocol, data) -> dict[str, Any]:
    if protocol.kind == 'store':
      from gpt2_jax.evaluation import corpus_tasks

      tokens, masked = corpus_tasks.training_rows(model)
      return {
        'split': protocol.split,
        'sha256': data.sha256,
        'source': str(data.path),
        'limit': None,
        'rows': {'tokens': tokens, 'document_mask': masked},
      }
    return {
      'split': data.split,
      'sha256': data.sha256,
      'source': data.source,
      'examples': len(data.examples),
      'limit': self.limit,
    }

  def scores(self) -> Path | None:
    """Returns the file that keeps scores until the end; None where nothing keeps them."""
    from gpt2_jax.core import buckets

    if self.json is not None and buckets.is_bucket(self.json):
      return buckets.kept(self.json) / 'scores'
    if self.json is not None:
      with saving('scores', self.json):
        self.json.parent.mkdir(parents=True, exist_ok=True)
      return self.json.with_name(self.json.name + '.scores')
    from gpt2_jax.checkpoints.workdir import split_step

    workdir, _ = split_step(self.checkpoint)
    if not (workdir / 'checkpoints').is_dir():
      return None
    here = workdir if isinstance(workdir, Path) else buckets.kept(workdir)
    return here / 'evaluate.scores'

  def save(self, said: dict[str, Any]) -> None:
    from gpt2_jax.core.files import write_whole

    if self.json is not None:
      with saving('the results', self.json):
        write_whole(self.json, json.dumps(said, indent=2, ensure_ascii=False) + '\n')
