"""Eight simulated devices, compiled programs kept between runs, and small things to test with."""

import os
from pathlib import Path

from support.models import tiny_gpt2

from support.processes import ONLINE  # isort: skip  # it sets the environment of what follows

import numpy as np
import pytest
from support import forked
from support.contexts import begun, texts  # noqa: F401
from support.hub import hub  # noqa: F401
from support.runs import finished  # noqa: F401
from support.serving import browser, byte_server, open_page  # noqa: F401
from support.texts import make_text

from gpt2_jax.model.config import GPTConfig


def pytest_addoption(parser):
  parser.addoption('--released', action='store_true', help='run tests/released on released weights')
  parser.addoption('--expected', metavar='FILE', help='what they expect, if not its expected.json')


def pytest_collection_finish():
  forked.collect_rarely()


def pytest_configure(config):
  if config.getoption('released'):
    os.environ['HF_HUB_OFFLINE'] = ONLINE  # read when the library is loaded, which is later


@pytest.fixture(scope='session')
def text_folder(tmp_path_factory) -> Path:
  """40 files of made-up text, about 130 kB."""
  folder = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  for i in range(40):
    (folder / f'{i:02d}.txt').write_text(make_text(rng, 600))
  return folder


@pytest.fixture
def tiny() -> GPTConfig:
  """Odd sizes on purpose; weights large enough that every part matters."""
  return tiny_gpt2()
