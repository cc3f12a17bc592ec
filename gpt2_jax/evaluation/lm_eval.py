"""The command line of lm-evaluation-harness, with `--model gpt2_jax`.

    python -m gpt2_jax.evaluation.lm_eval --model gpt2_jax --model_args pretrained=X --tasks hellaswag

takes all that `lm_eval` takes. The harness (0.4.13) looks for models in its own tree alone, so that
`lm_eval` itself does not know ours.
"""

import sys

from gpt2_jax.core.errors import UserError


def main() -> None:
  """Runs the harness on the process's arguments. Exit status 1 and one message for bad input."""
  try:
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    from gpt2_jax.evaluation import lm_eval_adapter  # noqa: F401  registers the model
  except ModuleNotFoundError as e:
    sys.exit(f"error: {e}: install lm-evaluation-harness, pip install 'gpt2_jax[lm-eval]'.")
  try:
    cli_evaluate()
  except UserError as e:
    sys.exit(f'error: {e}')


if __name__ == '__main__':
  main()
