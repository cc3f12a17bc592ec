"""When a device runs out of memory: a profile of what lies there, a table of what may help."""

import shlex
from pathlib import Path

import jax

from gpt2_jax.training.memory_estimate import Parts

PROFILE = 'memory.prof'


def save_profile(workdir: str | Path | None) -> str:
  """Writes a profile of the devices' memory, for pprof. Returns a line that says where it is.

  Never raises: it is called while an error is on its way.
  """
  if workdir is None:
    return ''
  suffix = f'-{jax.process_index()}' if jax.process_count() > 1 else ''
  path = Path(workdir) / (PROFILE + suffix)
  try:
    jax.profiler.save_device_memory_profile(str(path))
  except Exception as e:  # whatever: the memory is full, and that is what is to be told
    return f'\n(No memory profile: {str(e).splitlines()[0][:100] if str(e) else type(e).__name__}.)'
  return f'\nWhat lay in memory: {path} (`pprof -top {shlex.quote(str(path))}`).'


def table(parts: Parts, knobs: dict[str, Parts], limit: int) -> str:
  """Returns the estimate of a step's memory by use, as a table with a row for each knob.

  Args:
    parts: as it is.
    knobs: the flag that turns it -> as it would be.
    limit: bytes to plan with.
  """
  rows = [('as it is', parts), *knobs.items()]
  width = max(len(name) for name, _ in rows)
  head = ''.join(f'{name:>13}' for name in (*parts, 'in all'))
  return '\n'.join(
    [
      f'GiB a device, by estimate, of {limit / 2**30:.2f} to plan with:',
      f'  {"":{width}}{head}',
      *(
        f'  {name:{width}}'
        + ''.join(f'{size / 2**30:13.2f}' for size in (*row.values(), sum(row.values())))
        for name, row in rows
      ),
    ]
  )
