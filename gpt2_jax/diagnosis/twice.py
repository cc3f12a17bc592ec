"""Documents of a token store that are there twice, word by word."""

import hashlib

import numpy as np

from gpt2_jax.core.progress import track
from gpt2_jax.data.shards import Shard, Split
from gpt2_jax.data.token_store import TokenStore

SHORT = 32  # tokens; shorter documents are alike by chance, an empty module perhaps


def _begins(shard: Shard, tokens: np.ndarray, eot: int) -> np.ndarray:
  """Where the documents of a shard begin."""
  if shard.index is not None:
    return np.fromfile(str(shard.index), '<u8').astype(np.int64)
  found = np.flatnonzero(tokens == eot)
  return found if len(found) and found[0] == 0 else np.concatenate([[0], found])


def documents(split: Split, eot: int) -> tuple[np.ndarray, np.ndarray]:
  """Names the content of each document of a split, but short ones: hashes, uint64, and tokens."""
  hashes: list[int] = []
  sizes: list[int] = []
  with track(f'comparing {split.name}', len(split), 'tokens') as advance:
    for shard in split.shards:
      tokens = shard.array()
      edges = np.append(_begins(shard, tokens, eot), shard.tokens)
      for a, b in zip(edges[:-1], edges[1:]):
        a += int(a < b and tokens[a] == eot)
        if b - a >= SHORT:
          digest = hashlib.blake2b(tokens[a:b].tobytes(), digest_size=8).digest()
          hashes.append(int.from_bytes(digest, 'little'))
          sizes.append(int(b - a))
      advance(shard.tokens)
  return np.array(hashes, np.uint64), np.array(sizes, np.int64)


def shares(store: TokenStore) -> tuple[float, float]:
  """Shares of tokens: of the held-out ones in a document that is trained on too, and of those to
  train on in a document that came before.
  """
  train, train_sizes = documents(store.splits['train'], store.eot)
  val, val_sizes = documents(store.splits['val'], store.eot)
  leaked = val_sizes[np.isin(val, train)].sum() / max(1, len(store.splits['val']))
  again = np.ones(len(train), bool)
  again[np.unique(train, return_index=True)[1]] = False
  return float(leaked), float(train_sizes[again].sum() / max(1, len(store.splits['train'])))
