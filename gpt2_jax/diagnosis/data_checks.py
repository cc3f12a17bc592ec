"""Checks of the data: what is in the token store, and how often it is seen."""

from collections.abc import Iterator

from gpt2_jax.diagnosis.facts import Facts

LEAKED, TWICE, DROPPED = 0.01, 0.1, 0.01  # shares of a split's tokens
EPOCHS = 4  # repeats up to here are nearly as good as new text (Muennighoff et al., arXiv:2305.16264)
DROPOUT = 0.1  # with as much, more of them are a choice


def held_out(facts: Facts) -> Iterator[str]:
  """No held-out document is trained on."""
  leaked = facts.shares[0]
  if leaked > LEAKED:
    yield (
      f'{leaked:.1%} of the held-out tokens lie in documents that are trained on too, word by word: '
      'the held-out loss is lower than that of new text. Remove duplicates before the split.'
    )


def duplicates(facts: Facts) -> Iterator[str]:
  """Documents stand in the data once."""
  again = facts.shares[1]
  if again > TWICE:
    yield (
      f'{again:.1%} of the tokens to train on lie in documents that stand there already: they are '
      'learned by heart. Remove duplicates before the text is prepared.'
    )


def epochs(facts: Facts) -> Iterator[str]:
  """The data is not seen again and again."""
  if facts.store is None or not facts.begins:
    return
  there = len(facts.store.splits['train'])
  passes = facts.steps * facts.update / max(1, there)
  dropout = min(facts.model.resid_pdrop, facts.model.embd_pdrop)
  if passes > EPOCHS and dropout < DROPOUT:
    yield (
      f'the run passes {passes:,.1f} times over {there:,} tokens without dropout: after {EPOCHS} '
      'passes repeats teach little. More text, fewer steps, or dropout.'
    )


def tail(facts: Facts) -> Iterator[str]:
  """All of the text is seen, and each step is in the record."""
  if facts.store is not None:
    there = len(facts.store.splits['train'])
    dropped = (there - 1) % facts.T if there > facts.T else there
    if dropped > DROPPED * there:
      yield (
        f'{dropped:,} of {there:,} tokens ({dropped / there:.1%}) are in no row: rows have '
        f'{facts.T:,} tokens, and the last one would not be full. Shorten data.sequence_length.'
      )
  for before, line in zip(facts.lines, facts.lines[1:]):
    seen = line.get('train/tokens', 0) - before.get('train/tokens', 0)
    steps = line['step'] - before['step']
    if 'train/tokens' in line and steps == 1 and before['step'] > 0 and seen > 1.5 * facts.update:
      yield (
        f'between steps {before["step"]:,} and {line["step"]:,} the record counts {seen:,} tokens, '
        f'an update has {facts.update:,}: what lies between was not trained on.'
      )
      return
    if steps > 1:
      yield (
        f'the record has no lines of steps {before["step"] + 1:,} to {line["step"] - 1:,}: they were '
        'lost, or another program wrote them.'
      )
      return
