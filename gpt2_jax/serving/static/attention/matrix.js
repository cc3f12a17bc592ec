// The attention as a matrix: row t looks, column s is looked at.

import { announce, element } from '../playground/dom.js';
import { colours, drawMatrix, layout } from './drawing.js';
import { CanvasPen } from './pens.js';
import { number, place, shown } from './reading.js';

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const HINT = 'Point at a cell, or use the arrows.';

export class Matrix {
  // `follow(token)` as in lines.js: that of the row at the pointer.
  constructor(reading, { follow }) {
    Object.assign(this, { reading, follow, cell: null });
    this.cells = element('canvas');
    this.cross = element('canvas', { className: 'cross' });
    this.field = element('div', { className: 'field-of-cells', tabIndex: 0 }, this.cells, this.cross);
    this.field.setAttribute('role', 'application');
    this.field.setAttribute('aria-roledescription', 'matrix');
    this.field.setAttribute('aria-label', 'Attention matrix: rows look, columns are looked at. Arrow keys move.');
    this.said = element('p', { className: 'said muted', textContent: HINT });
    this.node = element('div', { className: 'matrix' }, this.field, this.said);
    this.field.addEventListener('pointermove', event => this.#point(event));
    this.field.addEventListener('pointerdown', event => this.#point(event));
    this.field.addEventListener('pointerleave', () => this.#leave());
    this.field.addEventListener('focus', () => {
      if (this.field.matches(':focus-visible')) this.#to(this.last ?? [0, 0], true);
    });
    this.field.addEventListener('blur', () => this.#leave());
    this.field.addEventListener('keydown', event => this.#key(event));
  }

  show(weights, skipFirst) {
    Object.assign(this, { weights, skipFirst });
    this.sizes = layout(this.reading.T, this.node.clientWidth);
    const { size } = this.sizes;
    drawMatrix(new CanvasPen(this.cells, size, size), weights, this.reading.tokens,
      { ...this.sizes, colours: colours(), skipFirst });
    this.#mark();
  }

  #point(event) {
    const box = this.field.getBoundingClientRect();
    const { label, cell } = this.sizes;
    const [s, t] = [event.clientX - box.left, event.clientY - box.top].map(x => Math.floor((x - label) / cell));
    if (s >= 0 && s <= t && t < this.reading.T) this.#to([t, s]);
    else this.#leave();
  }

  #key(event) {
    const move = MOVES[event.key];
    if (event.key === 'Escape') this.#leave();
    else if (move && !event.altKey && !event.ctrlKey && !event.metaKey) {
      const [t, s] = this.last ?? [0, 0];
      const row = Math.max(0, Math.min(this.reading.T - 1, t + move[0]));
      this.#to([row, Math.max(0, Math.min(row, s + move[1]))], true);
    } else return;
    event.preventDefault();
  }

  #to(cell, speak = false) {
    if (String(cell) !== String(this.cell)) {
      this.last = this.cell = cell;
      this.#mark();
      this.follow({ side: 'from', index: cell[0] });
    }
    if (speak) announce(this.said.textContent);
  }

  #leave() {
    if (!this.cell) return;
    this.cell = null;
    this.#mark();
    this.follow(null);
  }

  #mark() {
    const { label, cell, size } = this.sizes;
    const pen = new CanvasPen(this.cross, size, size);
    if (!this.cell) {
      this.said.textContent = HINT;
      return;
    }
    const [[t, s], { tokens }, { text }] = [this.cell, this.reading, colours()];
    this.said.textContent = `${shown(tokens[t])} looks at ${shown(tokens[s])}: ${number(this.weights[place(t, s)])}`;
    pen.rect(label, label + t * cell, s * cell, cell, text, 0.1);
    pen.rect(label + s * cell, label, cell, t * cell, text, 0.1);
    pen.frame(label + s * cell, label + t * cell, Math.max(3, cell - 1), Math.max(3, cell - 1), text);
  }
}
