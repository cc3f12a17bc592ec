// A heat map as a grid: blue restores the clean answer, orange opposes it. Arrow keys move.

import { element } from '../playground/dom.js';

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  Home: [0, -Infinity], End: [0, Infinity], PageUp: [-Infinity, 0], PageDown: [Infinity, 0] };

export const share = x => `${x < 0 ? '−' : ''}${Math.abs(100 * x).toFixed(1)} %`;

// How strong a cell's colour is: of what restores less than all, small shares are seen too.
export const strength = x => Math.min(1, Math.abs(x)) ** 0.7;

export class Heat {
  // `table`: {values: rows of numbers, rows, columns: [{text, says, apart}], name}.
  // `head(row, column)`: [layer, head] of a cell, null where it is of none; `pick` is called with it.
  constructor(table, { head = () => null, pick = () => {} } = {}) {
    Object.assign(this, table, { head, pick, at: [0, 0] });
    const columns = this.columns.map(({ text, apart }) => element('th', { scope: 'col' },
      element('div', { className: apart ? 'tokens apart' : this.words ? 'tokens' : '', textContent: text })));
    this.cells = this.values.map((row, r) => row.map((value, c) => this.#cell(value, r, c)));
    const body = this.cells.map((row, r) => element('tr', {}, element('th', { scope: 'row', textContent: this.rows[r].text }), ...row));
    this.grid = element('table', { className: 'heat' }, element('thead', {}, element('tr', {}, element('th', {}, element('span', { className: 'sr', textContent: this.name })), ...columns)),
      element('tbody', {}, ...body));
    this.grid.setAttribute('role', 'grid');
    this.grid.setAttribute('aria-label', `${this.name}. Arrow keys move${this.anyHead ? '; Enter takes a head away or back' : ''}.`);
    this.said = element('p', { className: 'said' });
    this.node = element('div', {}, element('div', { className: 'scroller' }, this.grid), this.said);
    this.grid.addEventListener('pointerover', event => this.#say(event.target));
    this.grid.addEventListener('focusin', event => this.#say(event.target));
    this.grid.addEventListener('click', event => this.#click(event.target));
    this.grid.addEventListener('keydown', event => this.#key(event));
    this.#rove([0, 0]);
  }

  get anyHead() { return this.head(0, 0) !== null; }

  says(r, c) { return `${this.rows[r].says}, ${this.columns[c].says}: ${share(this.values[r][c])}`; }

  #cell(value, r, c) {
    const cell = element('td', { tabIndex: -1, className: value < 0 ? 'opposes' : 'restores' });
    if (this.head(r, c)) cell.classList.add('head');
    cell.style.setProperty('--strength', strength(value));
    cell.setAttribute('role', 'gridcell');
    cell.setAttribute('aria-label', this.says(r, c));
    return cell;
  }

  // Marks the cells of heads that are taken away.
  mark(away) {
    this.cells.forEach((row, r) => row.forEach((cell, c) => {
      const head = this.head(r, c);
      if (!head) return;
      const out = away.some(([l, n]) => l === head[0] && n === head[1]);
      cell.setAttribute('aria-selected', out);
      cell.textContent = out ? '×' : '';
    }));
  }

  #where(cell) {
    const r = this.cells.findIndex(row => row.includes(cell));
    return r < 0 ? null : [r, this.cells[r].indexOf(cell)];
  }

  #say(target) {
    const where = this.#where(target);
    if (where) this.said.textContent = this.says(...where);
  }

  #rove([r, c]) {
    this.cells[this.at[0]][this.at[1]].tabIndex = -1;
    this.at = [r, c];
    this.cells[r][c].tabIndex = 0;
    return this.cells[r][c];
  }

  #click(target) {
    const where = this.#where(target);
    if (!where) return;
    this.#rove(where).focus();
    const head = this.head(...where);
    if (head) this.pick(head);
  }

  #key(event) {
    const where = this.#where(event.target);
    if (!where || event.altKey || event.ctrlKey || event.metaKey) return;
    const move = MOVES[event.key];
    const inside = (i, most) => Math.max(0, Math.min(most - 1, i));
    if (event.key === 'Enter' || event.key === ' ') {
      const head = this.head(...where);
      if (head) this.pick(head);
    } else if (move) {
      this.#rove([inside(where[0] + move[0], this.rows.length), inside(where[1] + move[1], this.columns.length)]).focus();
    } else return;
    event.preventDefault();
  }
}
