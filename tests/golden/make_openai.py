"""Makes tests/golden/openai/: checkpoints by TensorFlow itself, and the tensors that they hold.

Run with TensorFlow (2.21 made the files there), which the tests themselves don't need:
  python tests/golden/make_openai.py
"""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf

FOLDER = Path(__file__).parent / 'openai'
V, Q, D, L, H = 13, 8, 12, 2, 3


def variables() -> dict[str, np.ndarray]:
  """Those of openai/gpt-2 `src/model.py`, with random numbers."""
  rng = np.random.default_rng(0)
  shapes = {'wte': [V, D], 'wpe': [Q, D], 'ln_f/g': [D], 'ln_f/b': [D]}
  for i in range(L):
    for module, n, m in (
      ('attn/c_attn', D, 3 * D),
      ('attn/c_proj', D, D),
      ('mlp/c_fc', D, 4 * D),
      ('mlp/c_proj', 4 * D, D),
    ):
      shapes |= {f'h{i}/{module}/w': [1, n, m], f'h{i}/{module}/b': [m]}
    shapes |= {f'h{i}/{ln}/{x}': [D] for ln in ('ln_1', 'ln_2') for x in 'gb'}
  return {
    f'model/{name}': rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()
  }


def save(values: dict[str, np.ndarray], path: Path) -> None:
  """As TensorFlow 1's Saver does, V2 format."""
  with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    made = [tf.compat.v1.get_variable(name, initializer=value) for name, value in values.items()]
    session.run(tf.compat.v1.global_variables_initializer())
    saver = tf.compat.v1.train.Saver(made, save_relative_paths=True)
    saver.save(session, str(path), write_meta_graph=False)


def save_shards(values: dict[str, np.ndarray], path: Path) -> None:
  """In three shards, as the Savers of several machines do."""
  prefixes = []
  for i in range(3):
    prefixes.append(f'{path}_part{i}')
    names = sorted(values)[i::3]
    tf.raw_ops.SaveV2(
      prefix=prefixes[-1],
      tensor_names=names,
      shape_and_slices=[''] * len(names),
      tensors=[tf.constant(values[name]) for name in names],
    )
  tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=prefixes, destination_prefix=str(path))


def main():
  values = variables()
  np.savez(FOLDER / 'expected.npz', **values)
  hparams = {'n_vocab': V, 'n_ctx': Q, 'n_embd': D, 'n_head': H, 'n_layer': L}
  # what fine-tuning leaves beside the weights
  state = {
    f'{name}/{slot}': np.zeros_like(value)
    for name, value in values.items()
    for slot in ('Adam', 'Adam_1')
    if 'ln_f' in name
  }
  state |= {'global_step': np.int64(7), 'beta1_power': np.float32(0.9)}
  for folder, write in (
    ('plain', lambda path: save(values, path / 'model.ckpt')),
    ('tuned', lambda path: save(values | state, path / 'model-7')),
    ('shards', lambda path: save_shards(values, path / 'model.ckpt')),
  ):
    (FOLDER / folder).mkdir(parents=True, exist_ok=True)
    write(FOLDER / folder)
    (FOLDER / folder / 'hparams.json').write_text(json.dumps(hparams))
  types = {
    f'x/{dtype}': tf.cast(tf.range(-3, 3), dtype)
    for dtype in ('float16', 'bfloat16', 'float64', 'int32', 'int64', 'uint8')
  }
  types |= {
    'x/string': tf.constant(['a', 'bc']),
    'x/scalar': tf.constant(2.5),
    'x/empty': tf.zeros([0, 3]),
  }
  tf.raw_ops.SaveV2(
    prefix=str(FOLDER / 'types'),
    tensor_names=list(types),
    shape_and_slices=[''] * len(types),
    tensors=list(types.values()),
  )
  # a variable in two slices, as a partitioner makes them
  tf.raw_ops.SaveV2(
    prefix=str(FOLDER / 'sliced'),
    tensor_names=['x', 'x'],
    shape_and_slices=['4 3 0,2:-', '4 3 2,2:-'],
    tensors=[tf.zeros([2, 3]), tf.ones([2, 3])],
  )


if __name__ == '__main__':
  main()
