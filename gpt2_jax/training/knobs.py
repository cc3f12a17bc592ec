"""The values that each knob of configs/base.py may have. Several knobs together are checked where
they are used, by `plan.make_plan` above all.
"""

from typing import Any

from gpt2_jax.core.bounds import (
  FLOAT32,
  LARGE,
  SEED_MOST,
  Bool,
  Choice,
  Float,
  Int,
  Optional,
  Place,
  Several,
  Table,
  Text,
  Tuple,
)
from gpt2_jax.core.errors import UserError, brief, near
from gpt2_jax.data.splits import SETTINGS
from gpt2_jax.model.config import DTYPES, LORA, MODEL, Config
from gpt2_jax.model.cross_entropy import LOSS_TERMS
from gpt2_jax.model.remat import REMAT_POLICIES
from gpt2_jax.parallel import sharding
from gpt2_jax.training import compile_cache
from gpt2_jax.training.longer_context import WAYS
from gpt2_jax.training.optimizer import OPTIMIZERS, SCHEDULES
from gpt2_jax.training.optimizers.muon import APART, SCALES
from gpt2_jax.training.optimizers.orthogonal import ITERATIONS
from gpt2_jax.training.optimizers.parts import DECAYS
from gpt2_jax.training.trackers.feeds import TRACKERS

STEPS = 10**9  # most of them; they are counted in int32
TOKENS = 2**62
MOST_ROWS = 2**20  # of an evaluation batch
DERIVED = ('num_labels', 'classifier_dropout', 'form')  # fields of a model that are no knobs
# What the model section says also where a model is there to begin with (init_from), beside its sizes.
ALWAYS = ('dtype', 'remat', 'scan_layers', 'attention', 'reduce_dtype', 'head', 'vocab_multiple')

TOP: Table = dict(
  init_from=Optional(Place()),
  init_base=Optional(Place()),
  init_ignore_extra=Bool(),
  init_positions=Choice(WAYS),
  deterministic=Bool(),
)
SECTIONS: dict[str, Table] = dict(
  model={name: kind for name, kind in MODEL.items() if name not in DERIVED}
  | dict(
    vocab_size=Optional(MODEL['vocab_size']),
    n_positions=Optional(MODEL['n_positions']),
    dtype=Choice(('auto', *DTYPES)),
    reduce_dtype=Choice(DTYPES),
    remat=Choice(('auto', *REMAT_POLICIES)),
    scan_layers=Optional(Bool()),
  ),
  data=dict(SETTINGS)
  | dict(
    tokenizer=Optional(Place()),
    label_field=Text(1000),
    store=Optional(Place()),
    directory=Place(),
    sequence_length=Optional(Int(1)),
    document_mask=Bool(),
  ),
  lora=dict(LORA) | dict(r=Int(0, 2**16)),
  optim=dict.fromkeys(LOSS_TERMS, Float(0, 1e3))
  | dict(
    name=Choice(OPTIMIZERS),
    peak_lr=Float(0, 1e30),
    schedule=Choice(SCHEDULES),
    warmup_steps=Int(0, STEPS),
    decay_steps=Optional(Int(1, STEPS)),
    warmup_tokens=Optional(Int(0, TOKENS)),
    decay_tokens=Optional(Int(1, TOKENS)),
    end_lr_fraction=Float(0, 1),
    wsd_decay_fraction=Float(0, 1),
    b1=Float(0, 1, open_high=True),
    b2=Float(0, 1, open_high=True),
    eps=Float(1e-30, 1),  # without it, what has no gradient would be 0 / 0
    weight_decay=Float(0, 1e3),
    decay_schedule=Choice(DECAYS),
    cautious_decay=Bool(),
    muon_momentum=Float(0, 1, open_high=True),
    muon_nesterov=Bool(),
    muon_iteration=Choice(ITERATIONS),
    muon_steps=Int(1, 100),
    muon_dtype=Choice(('auto', *DTYPES)),
    muon_scale=Choice(SCALES),
    muon_lr_factor=Float(0, 1e6),
    muon_apart=Choice(APART),
    muon_normalize_rows=Bool(),
    soap_every=Int(1, STEPS),
    soap_wide=Bool(),
    clip_norm=Float(0, FLOAT32),
    skip_zscore=Float(0, FLOAT32),
    skip_warmup=Int(0, STEPS),
    ema_decay=Float(0, 1, open_high=True),
  ),
  train=dict(
    steps=Int(1, STEPS),
    tokens=Optional(Int(1, TOKENS)),
    epochs=Optional(Float(1e-9, 1e9)),
    seed=Int(0, SEED_MOST),
    global_batch_tokens=Int(1),
    micro_batch_rows=Optional(Int(1)),
    compiler_options=Text(),
    verify_every=Int(0, STEPS),
    verify_replicas_every=Int(0, STEPS),
  ),
  checkpoint=dict(
    every=Int(1, STEPS), keep=Int(1, STEPS), keep_every=Int(0, STEPS), keep_best=Int(0, STEPS)
  ),
  mesh=dict(
    data=Optional(Int(-1, 2**20)),
    fsdp=Int(-1, 2**20),
    seq=Int(-1, 2**20),
    tensor=Int(-1, 2**20),
    slices_over=Choice(sharding.AXES),
  ),
  evaluate=dict(every=Int(1, STEPS), batch_rows=Optional(Int(1, MOST_ROWS)), patience=Int(0, STEPS)),
  profile=dict(steps=Tuple(Int(0, STEPS), 2)),
  log=dict(
    to=Several(TRACKERS),
    straggler_every=Int(0, STEPS),
    layers_every=Int(0, STEPS),
    sample_prompt=Text(LARGE),
    sample_tokens=Int(1),
    sample_temperature=Float(1e-30, 1e30),
    sample_top_k=Int(1),
  ),
)


def check(config: Config) -> None:
  """Checks each knob of a run.

  Raises:
    UserError: names the first knob that is missing, unknown, or of a value that it can't have.
  """
  _check(TOP, {name: config[name] for name in config if name not in SECTIONS}, '', TOP)
  for section, table in SECTIONS.items():
    if section not in config or not hasattr(config[section], 'items'):
      raise UserError(f'the config has no section {section}: begin with configs/base.py.')
    needed = ALWAYS if section == 'model' and config.init_from is not None else table
    _check(table, dict(config[section].items()), f'{section}.', needed)
  compile_cache.options(config.train.compiler_options)


def _check(table: Table, values: dict[str, Any], prefix: str, needed) -> None:
  for name, value in values.items():
    if name not in table:
      known = [prefix + each for each in table]
      raise UserError(
        f'there is no knob {prefix}{brief(name)[1:-1]}{near(prefix + name, known)} '
        '(the knobs: configs/base.py).'
      )
    table[name].check(prefix + name, value)
  for name in needed:
    if name not in values:
      raise UserError(f'the config does not say {prefix}{name}: begin with configs/base.py.')
