"""CRC-32C, the checksum of TensorFlow's files, in NumPy."""

import functools

import numpy as np

LANES = 2**14  # 32-bit words that are checksummed side by side


def masked_crc32c(data: np.ndarray) -> int:
  """Returns the checksum that TensorFlow stores: rotated, since a CRC of CRCs is weak."""
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def crc32c(data: np.ndarray) -> int:
  """Computes the CRC-32C (RFC 3720, appendix B.4) of an array of uint8, at about 1 GB/s.

  A CRC is linear over GF(2): those of many interleaved strands are computed side by side and joined
  at the end.
  """
  lanes = LANES
  while lanes > 1 and 4 * lanes > len(data):
    lanes //= 2
  head = len(data) % (4 * lanes)
  first = np.zeros(4 * lanes, np.uint8)  # zeros in front change nothing
  first[4 * lanes - head :] = data[:head]
  crc = first.view('<u4')
  for row in data[head:].view('<u4').reshape(-1, lanes):
    crc = _after_zeros(crc, 4 * lanes) ^ row
  while lanes > 1:
    lanes //= 2
    crc = _after_zeros(crc[:lanes], 4 * lanes) ^ crc[lanes:]
  start = 0xFFFFFFFF
  for bit in range(len(data).bit_length()):
    if len(data) >> bit & 1:
      start = _apply(_matrix(1 << bit), start)
  return int(_after_zeros(crc, 4)[0]) ^ start ^ 0xFFFFFFFF


def _apply(matrix: list[int], crc: int) -> int:
  """Multiplies a matrix over GF(2), as 32 columns, by a vector."""
  result = 0
  for bit, column in enumerate(matrix):
    result ^= column * (crc >> bit & 1)
  return result


@functools.cache
def _matrix(size: int) -> list[int]:
  """Returns the effect of `size` bytes of zeros, a power of two, on a CRC, as a matrix."""
  if size > 1:
    half = _matrix(size // 2)
    return [_apply(half, column) for column in half]
  columns = [1 << bit for bit in range(32)]
  for _ in range(8):
    columns = [crc >> 1 ^ 0x82F63B78 * (crc & 1) for crc in columns]
  return columns


@functools.cache
def _tables(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the products of `_matrix` with all vectors that have a low half, or a high one, alone."""
  low, high = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
  for bit, column in enumerate(_matrix(size)):
    if bit < 16:
      low = np.concatenate([low, low ^ np.uint32(column)])
    else:
      high = np.concatenate([high, high ^ np.uint32(column)])
  return low, high


def _after_zeros(crc: np.ndarray, size: int) -> np.ndarray:
  low, high = _tables(size)
  halves = crc.view('<u2')
  return low.take(halves[::2]) ^ high.take(halves[1::2])
