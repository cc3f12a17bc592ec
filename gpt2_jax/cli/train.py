"""The verb `gpt2-jax train`, which is `python launch.py`.

    gpt2-jax train --config=small[:RECIPE] [--workdir=DIR] [--config.SECTION.KEY=VALUE …]

A config is one of the package's by its name (tiny, small, medium, large, xl, finetune), or a file:
`configs/small.py` of a checkout, or your own.

The same command again continues a run that was stopped or killed. On several hosts it is started on
each; where no cluster is found, with --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gpt2_jax import configs
from gpt2_jax.core.bounds import shortened
from gpt2_jax.core.errors import UserError, near, versions

CONFIG = config_flags.DEFINE_config_file(
  'config', help_string='Config, by name or as a file, with :RECIPE after it.'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run. Default: runs/NAME of the config and recipe.'
)
DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Compile, print parameters, FLOPs and bytes a device, and stop.'
)
DISTRIBUTED = flags.DEFINE_enum(
  'distributed',
  'auto',
  ['auto', 'on', 'off'],
  'Whether this is one process of several. auto: where the environment shows a cluster.',
)
COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, where nothing in the environment says it.'
)
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes there are.', 1, 2**20)
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.', 0, 2**20)


def usage() -> str:
  """Returns the text of --help."""
  return f"""{(__doc__ or '').strip()}

{flags.FLAGS.module_help(__name__)}

examples:
  gpt2-jax train --config=tiny
  gpt2-jax train --config=small --dry_run
  python launch.py --config=configs/small.py:openwebtext --workdir=runs/a --config.train.steps=1000

The knobs, --config.SECTION.KEY=VALUE, and what they do: gpt2-jax config small."""


def with_paths(argv: list[str]) -> list[str]:
  """A command line with the path of a config in place of its name: '--config=tiny'."""
  found, words = [], iter(argv)
  for word in words:
    if word == '--config':
      word = f'--config={next(words, "")}'
    if word.startswith('--config='):
      word = f'--config={configs.path_of(word.removeprefix("--config="))}'
    found.append(word)
  return found


def config_files(argv: list[str]) -> list[str]:
  """The files that a command line names as its config, after `with_paths`."""
  named = [word.partition('=')[2] for word in argv if word.startswith('--config=')]
  return [name.partition(':')[0] for name in named]


def parse_flags(argv: list[str]) -> None:
  """Parses the flags; if they are wrong, leaves with a line that says so."""
  argv = sys.argv = with_paths(argv)  # where config_flags looks for the knobs
  if {'--help', '-h', '-help', '--helpfull', '--helpshort'} & set(argv[1:]):
    print(usage())
    sys.exit(0)
  if '--version' in argv[1:]:
    print(versions())
    sys.exit(0)
  try:
    for file in config_files(argv):
      if not Path(file).is_file():
        names = ', '.join(configs.NAMES)
        raise ValueError(f'--config={file} is neither a file nor one of the configs {names}')
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f'what is {rest[1]!r}? Options begin with --')
    if CONFIG.value is None:
      raise ValueError('say which config: --config=tiny, or --config=configs/tiny.py')
    _ = CONFIG.value.model  # a file that can't be loaded is an error only now
  except Exception as e:  # of many kinds, some with a traceback as their text
    sys.exit(
      f'error: {shortened(wrong_flag(e, argv))} (the knobs: gpt2-jax config, or configs/base.py)'
    )


def wrong_flag(e: Exception, argv: list[str]) -> str:
  """Says in a line what is wrong with the flags; names those that are like an unknown one."""
  if isinstance(e, flags.UnrecognizedFlagError):
    return f'there is no flag --{e.flagname}{near(e.flagname, flags.FLAGS)}'
  if isinstance(e, (KeyError, AttributeError)):
    from gpt2_jax.cli.plan import load_config
    from gpt2_jax.model.config import wrong_knob

    file = config_files(argv)[-1:]
    with contextlib.suppress(UserError):
      if file and (wrong := wrong_knob(load_config(file[0])[0], argv)):
        return wrong
  return (str(e) or repr(e)).strip().splitlines()[-1].strip()


def default_workdir() -> str:
  """Returns runs/CONFIG, or runs/CONFIG-RECIPE: of configs/small.py:x runs/small-x."""
  path, _, recipe = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
  return os.path.join('runs', '-'.join(filter(None, [Path(path).stem, recipe])))


def use_huge_pages() -> None:
  """Starts this program anew with glibc's large buffers on huge pages, unless GLIBC_TUNABLES is set.

  A training step on a CPU allocates gigabytes and gives them back; on small pages, a tenth of its
  time goes to page faults. A process can't ask for it once it has started.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, sys.orig_argv)


def main(argv: list[str], began: float | None = None) -> int:
  """Runs the training that the command line describes. Returns its exit status.

  Args:
    argv: the program, and its flags.
    began: when it was started, by `time.monotonic`.
  """
  parse_flags(argv)
  from gpt2_jax.checkpoints import saved_steps
  from gpt2_jax.core import determinism
  from gpt2_jax.parallel import multihost
  from gpt2_jax.training import compile_cache, run_folder, run_plan, train

  workdir = WORKDIR.value or default_workdir()
  try:
    run_folder.checked(workdir)
    if CONFIG.value.deterministic:
      determinism.require()
    multihost.initialize(DISTRIBUTED.value, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if DRY_RUN.value:
      made = run_plan.make_plan(CONFIG.value, held=saved_steps.held_positions(workdir))
      compile_cache.keep_compiled(workdir)  # the run itself then finds it compiled
      print(run_plan.dry_run(made))
      return 0
    return train.train(CONFIG.value, workdir, began)
  except UserError as e:
    multihost.leave(f'error: {e}')
    sys.exit(f'error: {e}')
  except Exception:
    multihost.leave(traceback.format_exc())
    raise
