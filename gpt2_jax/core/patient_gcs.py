"""gcsfs, with patience. Importing this needs gcsfs, the extra `gcs`."""

import asyncio
import logging
import sys
import time
from typing import Any

import aiohttp
import google.auth.exceptions
from gcsfs import retry
from gcsfs.core import GCSFileSystem

from gpt2_jax.core.errors import BUCKET_WAY_OUT, Unreachable, brief

PATIENCE_S = 600  # how long a bucket that was reached before may be out of reach
logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs each try with a traceback


class PatientGCS(GCSFileSystem):
  """gcsfs, which tries for half a minute, and longer where it has reached the bucket before."""

  reached = False  # by any thread: each has a file system of its own

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs | {'use_listings_cache': False})

  async def _call(self, method, path, *args, **kwargs):
    began, told = time.monotonic(), False
    while True:
      try:
        answer = await super()._call(method, path, *args, **kwargs)
        if told:
          print(f'the bucket is there again ({self._said(args)})', file=sys.stderr, flush=True)
        type(self).reached = True
        return answer
      except (retry.HttpError, aiohttp.ClientError, google.auth.exceptions.GoogleAuthError) as e:
        again = retry.is_retriable(e) and self.reached
        if not again or time.monotonic() - began > PATIENCE_S:
          raise Unreachable(
            f"{self._said(args)} can't be had: {str(e) or type(e).__name__}. {BUCKET_WAY_OUT}"
          ) from e
        if not told:
          print(
            f"{self._said(args)} can't be reached ({brief(str(e))}): trying again for "
            f'{PATIENCE_S // 60} minutes',
            file=sys.stderr,
            flush=True,
          )
        told = True
        await asyncio.sleep(5)
      except FileNotFoundError as e:
        if path != 'b/{}/o':
          raise
        raise Unreachable(f'there is no bucket {self._said(args[:1])}.') from e
      except OSError as e:
        if 'Forbidden' not in str(e):
          raise
        raise Unreachable(f'{self._said(args)}: {str(e).splitlines()[-1]}. {BUCKET_WAY_OUT}') from e

  # theirs take any error for a sign that nothing is there

  async def _exists(self, path, **kwargs):
    try:
      return bool(await self._info(path, **kwargs))
    except FileNotFoundError:
      return False

  async def _isdir(self, path, **kwargs):
    try:
      about: Any = await self._info(path, **kwargs)
      return about['type'] == 'directory'
    except FileNotFoundError:
      return False

  @staticmethod
  def _said(args: tuple) -> str:
    return 'gs://' + '/'.join(str(part) for part in args[:2])
