"""The attention view in a notebook, and as a picture."""

import dataclasses
import functools
import html
import json
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from gpt2_jax.core.errors import UserError, saving
from gpt2_jax.core.files import local
from gpt2_jax.model.pretrained_model import Model
from gpt2_jax.serving.attention_data import attention_data, unpack

STATIC = Path(__file__).parent / 'static'
STYLES = ('style.css', 'attention.css')
MODULES = (
  'playground/dom.js',
  *(
    f'attention/{name}.js'
    for name in ('reading', 'pens', 'drawing', 'lines', 'matrix', 'map', 'lens', 'view')
  ),
)  # importers last

ROW, COLUMN, GAP, TOP = 20, 130, 200, 64  # of the picture, in pixels
LEFT = 2 * COLUMN + GAP + 48 + 92  # of the triangle
INK, LINE, ACCENT = '#23262b', '#e3e0d8', '#2a5d63'  # as the page's light theme
FONT = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace'
LINES, LEAST = 2500, 0.01  # the most lines, and the smallest weight that gets one
SIGNS = {i: 0x2400 + i for i in range(32)} | {
  ord('\n'): '↵',
  ord('\t'): '⇥',
  ord(' '): '·',
  0x7F: '␡',
  0xFFFE: '\ufffd',
  0xFFFF: '\ufffd',
}


@functools.cache
def _script() -> str:
  """The page's modules as one: a notebook's frame has no addresses to import from."""
  parts = ['const modules = {};']
  for name in MODULES:
    code = (STATIC / name).read_text()
    made = re.findall(r'^export (?:const|class|function) (\w+)', code, re.M)
    code = re.sub(r'^export ', '', code, flags=re.M)
    code = re.sub(
      r"^import (\{[^}]*\}) from '.*?(\w+\.js)';", r"const \1 = modules['\2'];", code, flags=re.M
    )
    parts.append(
      f"modules['{Path(name).name}'] = (() => {{\n{code}\nreturn {{ {', '.join(made)} }};\n}})();"
    )
  return '\n'.join(parts)


@dataclasses.dataclass(frozen=True)
class AttentionFigure:
  """What a notebook shows when this is a cell's last value.

  Attributes:
    data: of `attention_data`.
    heads: which are shown at first, averaged; head n of layer l has the number l · N + n.
    height: of the frame in the notebook, in pixels.
  """

  data: dict[str, Any]
  heads: list[int]
  height: int = 900

  @property
  def html(self) -> str:
    """The view as a page of its own, which needs no network."""
    given = json.dumps([self.data, self.heads]).replace('<', '\\u003c')
    style = ''.join((STATIC / name).read_text() for name in STYLES)
    return (
      '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Attention</title>'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      f'<style>{style}</style></head><body class="attention"><main><div id="view"></div>'
      '<p class="sr" id="live" role="status" aria-live="polite"></p></main><script type="module">'
      f'{_script()}\nconst [data, heads] = {given};\n'
      "new modules['view.js'].View(document.getElementById('view'), data, heads);"
      '</script></body></html>'
    )

  def _repr_html_(self) -> str:
    return (
      f'<iframe title="Attention" srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" '
      f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
    )

  @property
  def svg(self) -> str:
    """Lines between the tokens, and the matrix, as SVG on white."""
    return _draw(self.data, self.heads)

  def save(self, path: str | os.PathLike) -> None:
    """Writes the picture (.svg) or the page (.html).

    Raises:
      UserError: another ending, or it can't be written there.
    """
    contents = {'.svg': lambda: self.svg, '.html': lambda: self.html}
    suffix = local(path).suffix
    if suffix not in contents:
      raise UserError(f'{path}: the attention view is saved as .svg or .html.')
    with saving('the attention view', path):
      Path(path).write_text(contents[suffix](), encoding='utf-8')


def attention_figure(
  model: Model,
  text: str,
  layer: int | None = None,
  head: int | None = None,
  *,
  lens: int | None = None,
  max_tokens: int = 256,
  height: int = 900,
  allow_special: bool = False,
) -> AttentionFigure:
  """Where a model's heads look in a text, to be seen in a notebook or saved.

  Args:
    model, text, lens, max_tokens, allow_special: as in `attention_data`.
    layer, head: which are shown at first, counted from 0. A layer alone is the mean of its heads, a
      head alone that of all layers; neither: the head with the strongest character.
    height: of the frame, in pixels.

  Raises:
    UserError: there is no such layer or head, or as in `attention_data`.
  """
  for name, number, count in (
    ('layer', layer, model.config.n_layer),
    ('head', head, model.config.n_head),
  ):
    if number is not None and not 0 <= number < count:
      raise UserError(f'{name} {number}: the model has {count}, counted from 0.')
  data = attention_data(model, text, lens=lens, max_tokens=max_tokens, allow_special=allow_special)
  if layer is None and head is None:
    layer, head = data['strongest']
  numbers_LN = np.arange(data['layers'] * data['heads']).reshape(data['layers'], -1)
  pick = lambda i: slice(None) if i is None else slice(i, i + 1)
  return AttentionFigure(data, numbers_LN[pick(layer), pick(head)].ravel().tolist(), height)


def _shown(token: str, most: int = 14) -> str:
  """A token on one line, what can't be seen made visible; XML has no control characters."""
  text = token.replace('\r\n', '\n').translate(SIGNS)
  return text if len(text) <= most else text[: most - 1] + '…'


def _title(data: dict[str, Any], heads: list[int]) -> str:
  layer, head = divmod(heads[0], data['heads'])
  if len(heads) > 1:
    return f'{len(heads)} heads, averaged'
  character = data['character'][layer][head]
  kind = max(character, key=character.__getitem__)
  return f'Layer {layer}, head {head}: {kind} {character[kind]:.2f}'


class _Picture:
  """An SVG, part by part."""

  def __init__(self, width: float, height: float, title: str):
    size = {'width': f'{width:g}', 'height': f'{height:g}'}
    space = {'xmlns': 'http://www.w3.org/2000/svg', 'viewBox': f'0 0 {width:g} {height:g}'}
    font = {'font-family': FONT, 'font-size': '12'}
    self.root = ElementTree.Element('svg', space | {'role': 'img'} | size | font)
    ElementTree.SubElement(self.root, 'title').text = title
    self.add('rect', width='100%', height='100%', fill='#ffffff')
    self.write(24, 30, title, font_size=15)

  def add(self, tag: str, text: str | None = None, **attributes: str | float) -> None:
    """Adds an element; an underscore in the name of an attribute stands for a hyphen."""
    written = {
      name.replace('_', '-'): value if isinstance(value, str) else f'{value:.6g}'
      for name, value in attributes.items()
    }
    ElementTree.SubElement(self.root, tag, written).text = text

  def write(self, x: float, y: float, text: str, **attributes: str | float) -> None:
    """Adds a text whose middle is at the height y."""
    self.add('text', text, x=x, y=y, fill=INK, dominant_baseline='central', **attributes)

  def __str__(self) -> str:
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(self.root, 'unicode')


def _middle(i: int) -> float:
  """Returns the height of the middle of a row of tokens."""
  return TOP + 92 + ROW * (i + 0.5)


def _draw_lines(picture: _Picture, seen: list[tuple[int, int, float]]) -> None:
  """Draws a line from each query to each key, as wide as its weight, where that is not too little."""
  least = max(LEAST, sorted(weight for *_, weight in seen)[-min(LINES, len(seen))])
  x0, x1, between = COLUMN + 8, COLUMN + GAP - 8, COLUMN + GAP / 2
  for t, s, weight in seen:
    if weight >= least:
      y0, y1 = f'{_middle(t):g}', f'{_middle(s):g}'
      picture.add(
        'path',
        d=f'M{x0} {y0}C{between:g} {y0} {between:g} {y1} {x1} {y1}',
        fill='none',
        stroke=ACCENT,
        stroke_width=0.7 + 3 * weight,
        stroke_opacity=min(0.85, 0.03 + 0.85 * weight),
      )


def _draw_matrix(picture: _Picture, seen: list[tuple[int, int, float]], T: int, cell: float) -> None:
  """Draws the weights as cells of a triangle, a query a row."""
  left, top = LEFT, TOP + 92
  for t in range(T):
    size: Any = dict(x=left, y=top + cell * t, width=cell * (t + 1), height=cell)
    picture.add('rect', **size, fill=LINE, fill_opacity=0.35)
  for t, s, weight in seen:
    if weight > 0.002:
      size: Any = dict(x=left + cell * s, y=top + cell * t, width=cell, height=cell)
      picture.add('rect', **size, fill=ACCENT, fill_opacity=min(1, weight**0.6))


def _draw(data: dict[str, Any], heads: list[int]) -> str:
  """Returns a picture of the weights, averaged over heads: lines between tokens, and a triangle."""
  tokens = [_shown(token) for token in data['tokens']]
  T, top = len(tokens), TOP + 92
  weights_LNTT = unpack(data['attentions'], data['layers'], data['heads'], T)
  weights_TT = weights_LNTT.reshape(-1, T, T)[heads].mean(0)
  queries, keys = np.tril_indices(T)
  seen = list(zip(queries.tolist(), keys.tolist(), weights_TT[queries, keys].tolist()))
  cell = min(ROW, 900 / T)
  picture = _Picture(LEFT + cell * T + 24, top + ROW * T + 24, _title(data, heads))
  _draw_lines(picture, seen)
  _draw_matrix(picture, seen, T, cell)
  for i, token in enumerate(tokens):
    picture.write(COLUMN, _middle(i), token, text_anchor='end')
    picture.write(COLUMN + GAP, _middle(i), token)
    if cell > 10:
      x, y = LEFT + cell * (i + 0.5), top + cell * (i + 0.5)
      picture.write(LEFT - 6, y, token, text_anchor='end')
      picture.write(x, top - 6, token, transform=f'rotate(-90 {x:g} {top - 6:g})')
  return str(picture)
