"""Checks of the recipe: what a config says, beside those that are known to work."""

import functools
import math
from collections.abc import Iterator

import numpy as np

from gpt2_jax import configs
from gpt2_jax.configs import recipes
from gpt2_jax.core.chips import COMPUTE, LINKS, chip_of
from gpt2_jax.diagnosis.facts import Facts
from gpt2_jax.model.config import Config
from gpt2_jax.model.sizes import flops_per_token
from gpt2_jax.training.memory_estimate import divisors
from gpt2_jax.training.optimizer import moments

# GPT-3's learning rates (arXiv:2005.14165, table 2.1) of GPT-2's four sizes, and that of
# configs/tiny.py, whose sweep is experiments/lr_sweep: parameters, rate.
RATES = ((1.09e6, 2e-3), (1.24e8, 6e-4), (3.55e8, 3e-4), (7.74e8, 2.5e-4), (1.558e9, 2e-4))
FAR = 5  # times the table's rate, or a fifth of it
TANH = ('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast', 'gelu_python_tanh')
LION = 5  # Lion's rates are a third to a tenth of AdamW's (arXiv:2302.06675)
LARGE_RUN, SMALL_UPDATE = 1e9, 2**17  # tokens: a quarter of GPT-3's 0.5 M


def vocabulary(facts: Facts) -> Iterator[str]:
  """The model has an id for each of the tokenizer's, and no more than padding beside them."""
  have, want = facts.model.vocab_size, facts.vocabulary
  if want is None or not facts.begins:
    return
  if have < want:
    yield f'the model has {have:,} ids, the tokenizer of its data {want:,}: some have no row.'
  elif have > -(-want // 128) * 128:
    yield (
      f'the model has {have:,} ids, the tokenizer of its data {want:,}: the loss begins at '
      f'{math.log(have):.2f} in place of {math.log(want):.2f}, and rows of ids that never come are '
      'trained to be unlikely. Leave model.vocab_size unset.'
    )


def activation(facts: Facts) -> Iterator[str]:
  """GPT-2's GELU is the tanh form."""
  if (name := facts.model.activation_function) not in TANH:
    yield (
      f'model.activation_function = {name} is not the GELU of GPT-2 (gelu_new, the tanh form): '
      'released weights drift in it, and no published loss is of it.'
    )


def table_rate(params: float) -> float:
  """The learning rate for so many parameters, by RATES, on a straight line of logarithms between."""
  sizes, rates = np.log(np.array(RATES)).T
  return float(np.exp(np.interp(math.log(params), sizes, rates)))


def learning_rate(facts: Facts) -> Iterator[str]:
  """The peak learning rate is near the one of the table for its size."""
  optim = facts.config.optim
  own = optim.name == 'adafactor' or (optim.name == 'muon' and optim.muon_scale == 'original')
  if own or facts.model.parametrization == 'mup':
    return  # rates of their own kind
  if not facts.begins:
    most = 5e-3 if facts.model.lora is not None else 2e-4
    if optim.peak_lr > most:
      yield (
        f'optim.peak_lr = {optim.peak_lr:g} to go on with trained weights (usual: 2e-5 for all '
        'parameters, 3e-4 for adapters): what they know is lost.'
      )
    return
  rate = table_rate(facts.params) / (LION if optim.name == 'lion' else 1)
  if not rate / FAR <= optim.peak_lr <= rate * FAR:
    yield (
      f'optim.peak_lr = {optim.peak_lr:g} is {optim.peak_lr / rate:.2g} times the {rate:.2g} that '
      f'models of {facts.params:,} parameters are trained with.'
    )


def warm_up(facts: Facts) -> Iterator[str]:
  """The rate rises over a while, and the run goes on after it."""
  optim = facts.config.optim
  steps = optim.warmup_steps
  if optim.warmup_tokens is not None:
    steps = optim.warmup_tokens / facts.update
  if facts.begins and steps < 10:
    yield (
      f'the learning rate is at its peak after {steps:g} steps: the moments of the optimizer are not '
      'known yet, and the first steps are too large. GPT-2 recipes take 700 to 2,000.'
    )
  elif steps > facts.steps / 2:
    yield (
      f'the warm-up takes {steps:,.0f} of {facts.steps:,.0f} steps: most of the run has less than '
      'the rate that it was given.'
    )


def decay(facts: Facts) -> Iterator[str]:
  """The decay ends where the run does."""
  optim = facts.config.optim
  if optim.schedule == 'constant':
    return
  last = optim.decay_steps
  if optim.decay_tokens is not None:
    last = optim.decay_tokens / facts.update
  if last is not None and not 0.9 * facts.steps <= last <= 1.1 * facts.steps:
    yield (
      f'the decay of the learning rate ends at step {last:,.0f}, the run at {facts.steps:,.0f}: a '
      'loss at its end is not to be compared with one of a whole decay.'
    )


@functools.cache
def _shipped() -> tuple[tuple[str, Config], ...]:
  names = [name for name in configs.NAMES if name != 'finetune']
  return tuple((f'{n}:{r}', configs.load(f'{n}:{r}')) for n in names for r in recipes.RECIPES)


def shipped_like(config: Config) -> tuple[str, Config] | None:
  """The shipped config with this model and this text, with its name; None if there is none."""
  sizes = lambda c: (c.model.get('n_layer'), c.model.get('n_embd'), c.data.corpus)
  found = [(name, c) for name, c in _shipped() if sizes(c) == sizes(config)]
  return found[0] if found else None


def batch(facts: Facts) -> Iterator[str]:
  """An update sees as many tokens as its recipe says."""
  if not facts.begins:
    return
  known, total = shipped_like(facts.config), facts.steps * facts.update
  if known and facts.update <= known[1].train.global_batch_tokens / 2:
    name, config = known
    yield (
      f'an update sees {facts.update:,} tokens, in {name} {config.train.global_batch_tokens:,}: '
      'train.global_batch_tokens is part of the recipe; what does not fit the memory is for '
      'micro-batches.'
    )
  elif total >= LARGE_RUN and facts.update < SMALL_UPDATE:
    yield (
      f'an update sees {facts.update:,} tokens in a run of {total:,.0f}: GPT-2 and GPT-3 were '
      'trained with 524,288; the noise of small batches keeps the loss high at these learning rates.'
    )


def optimizer_state(facts: Facts) -> Iterator[str]:
  """What the optimizer keeps is float32."""
  narrow = {k: v for k, v in facts.state.items() if v.startswith(('bfloat16', 'float16', 'float8'))}
  if narrow:
    name, kind = next(iter(narrow.items()))
    yield (
      f'{len(narrow)} arrays of the optimizer are {kind.partition("[")[0]} ({name}, …): a second '
      'moment with 8 bits does not move where an update is below 1/256 of it (b2 = '
      f'{facts.config.optim.b2:g} adds {1 - facts.config.optim.b2:.1%}).'
    )


def mesh(facts: Facts) -> Iterator[str]:
  """Weights are split no further than memory asks, or their gathers hide behind the products."""
  fsdp, tensor = facts.mesh.get('fsdp', 1), facts.mesh.get('tensor', 1)
  if fsdp == 1 or facts.limit is None:
    return
  state = 4 * (2 + moments(facts.config.optim, facts.model)) * facts.params / tensor
  wanted = next((f for f in divisors(fsdp) if state / f <= facts.limit / 4), fsdp)
  if wanted == fsdp:
    return
  width = 2 if facts.model.dtype == 'bfloat16' else 4
  gathered = facts.A * 2 * width * facts.params / tensor * (fsdp - 1) / fsdp
  share = ''
  if chip := chip_of(facts.device):
    device = flops_per_token(facts.model, facts.T) * facts.update / math.prod(facts.mesh.values())
    times = gathered / (LINKS * chip.ici) / (device / (COMPUTE * chip.flops))
    if times < 0.5:
      return
    share = f', {times:.1f} times as long as its products take'
  yield (
    f'mesh.fsdp = {fsdp} gathers {gathered / 1e6:,.1f} MB of weights a step and device{share}, where '
    f'{wanted} would hold the state: leave mesh.fsdp unset, and `data` takes the rest.'
  )
