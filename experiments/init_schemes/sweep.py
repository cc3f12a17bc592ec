"""Initial weights as transformers and nanoGPT draw them, against OpenAI's released code."""

from experiments import plots, results
from experiments.sweeps import grid, seeds

HF = {'model.init_scheme': 'hf', 'model.initializer_range': 0.02}


def sweep():
  others = grid({'model.init_scheme': ['openai_release'], 'model.initializer_range': [0.02]})
  others += grid({'model.init_scheme': ['hf'], 'model.initializer_range': [0.1]})
  return seeds([{}, *others], 5)  # without overrides it is HF: runs that are shared


def report(runs, axes):
  found = [
    results.Group({key: group.settings[key] or HF[key] for key in HF}, group.values)
    for group in results.groups(runs)
  ]
  plots.dots(
    axes,
    found,
    [
      '{model.init_scheme}\n{model.initializer_range}'.replace('model.', '').format(
        **{k.removeprefix('model.'): v for k, v in group.settings.items()}
      )
      for group in found
    ],
  )
  axes.set_xlabel('init_scheme and initializer_range')
  return [results.table(found, HF)]
