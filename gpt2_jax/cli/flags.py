"""What the flags of the command line's verbs may be, beside those that are one of a few words.

Prompts, origins and options of generation are checked where they are read, an API key is shown to
nobody.
"""

from typing import Any

from gpt2_jax.core import bounds
from gpt2_jax.core.bounds import SEED_MOST, Corpus, Float, Int, Optional, Place, Table, Text

PATH = Optional(Place())
COUNT = Int(1, 2**20)
STEER = bounds.Tuple(Place())

# name of a verb -> its table
FLAGS: dict[str, Table] = {
  'Prepare': dict(
    corpus=Corpus(),
    output=Place(),
    tokenizer=Place(),
    val_fraction=Float(0, 1, True, True),
    split_seed=Int(-(2**63), 2**63 - 1),
    text_field=Text(1000),
    workers=Optional(COUNT),
    part=Optional(Text(20)),
  ),
  'Sample': dict(
    checkpoint=Place(),
    tokenizer=PATH,
    prompt_file=PATH,
    batch_size=COUNT,
    assistant=PATH,
    steer=STEER,
  ),
  'Serve': dict(
    checkpoint=bounds.OneOrMore(Place()),
    host=Text(255),
    port=Int(0, 2**16 - 1),
    tokenizer=PATH,
    steer=STEER,
    slots=COUNT,
    queue=COUNT,
    max_prompt_tokens=Optional(Int(1)),
    max_tokens=Optional(Int(1)),
    max_texts=COUNT,
    max_body_bytes=Int(1, 2**40),
    max_connections=COUNT,
    timeout=Float(0, 1e9, open_low=True),
  ),
  'Convert': dict(source=Place(), target=Place()),
  'Evaluate': dict(
    checkpoint=Place(),
    tasks=Text(10_000),
    data=PATH,
    json=PATH,
    tokenizer=PATH,
    limit=Optional(Int(1)),
  ),
  'Bias': dict(
    checkpoint=Place(), data=PATH, samples=COUNT, seed=Int(0, SEED_MOST), tokenizer=PATH, json=PATH
  ),
  'Steer': dict(
    checkpoint=Place(),
    toward=Place(),
    away=Place(),
    layer=Int(-(2**20), 2**20),
    output=Place(),
    site=Text(100),
    tokenizer=PATH,
  ),
  'Patch': dict(
    checkpoint=Place(),
    clean=Text(),
    corrupted=Text(),
    answers=bounds.Tuple(Text(), 2),
    over=Text(100),
    png=PATH,
    json=PATH,
    tokenizer=PATH,
  ),
  'Plan': dict(
    config=Place(),
    topology=Text(100),
    slices=Optional(COUNT),
    tokens=Optional(Int(1, 2**62)),
    batch=Optional(Int(1)),
    prompt=Optional(Int(1)),
    new=Optional(Int(1)),
    search_limit=COUNT,
    workers=Optional(COUNT),
    json=PATH,
    dump=PATH,
  ),
  'Train': {},
  'Config': dict(name=Text(1000)),
  'Reproduce': dict(workdir=Place(), output=PATH),
  'Doctor': dict(run_or_config=PATH, plan=PATH),
}


def check(verb: Any) -> None:
  """Checks a verb before it runs.

  Raises:
    UserError: names the flag, as it is typed, and what it must be.
  """
  bounds.check_flags(FLAGS[type(verb).__name__], verb)
  if hasattr(verb, 'opening'):
    bounds.check_flags({'base': PATH}, verb.opening)
