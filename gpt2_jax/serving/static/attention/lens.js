// The logit lens: what each layer would say next, after each token.

import { element, percent } from '../playground/dom.js';
import { shown } from './reading.js';

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export class Lens {
  constructor(reading) {
    this.reading = reading;
    const { tokens, lens } = reading;
    const head = element('tr', {}, element('th', { scope: 'row', textContent: 'after' }),
      ...tokens.map(token => element('th', { scope: 'col', textContent: shown(token) })));
    this.rows = lens.map((row, l) => row.map((top, t) => this.#cell(top, tokens[t + 1])));
    const body = this.rows.map((cells, l) => element('tr', {},
      element('th', { scope: 'row', textContent: l ? `layer ${l - 1}` : 'embeddings' }), ...cells));
    const next = element('tr', { className: 'next' }, element('th', { scope: 'row', textContent: 'the text' }),
      ...tokens.map((_, t) => element('td', { textContent: t + 1 < tokens.length ? shown(tokens[t + 1]) : '' })));
    const table = element('table', { className: 'lens' }, element('thead', {}, head), element('tbody', {}, ...body, next));
    table.setAttribute('aria-label', 'What each layer would predict after each token. Arrow keys move.');
    table.setAttribute('role', 'grid');
    this.card = element('div', { className: 'lens-card', hidden: true });
    this.card.setAttribute('role', 'status');
    this.scroller = element('div', { className: 'scroller' }, table);
    this.node = element('div', { className: 'lens-box' }, this.scroller, this.card);
    this.rows[0][0].tabIndex = 0;
    table.addEventListener('pointerover', event => this.#show(event.target.closest('td.guess')));
    table.addEventListener('pointerleave', () => this.#show(null));
    table.addEventListener('click', event => this.#show(event.target.closest('td.guess')));
    table.addEventListener('focusin', event => this.#show(event.target));
    table.addEventListener('focusout', () => this.#show(null));
    table.addEventListener('keydown', event => this.#key(event));
    this.scroller.addEventListener('scroll', () => this.#place());
  }

  #cell([[token, p]], next) {
    const right = token === next;
    const cell = element('td', { className: right ? 'guess right' : 'guess', tabIndex: -1 },
      element('code', { textContent: shown(token) }), element('small', { textContent: right ? `${percent(p)} ✓` : percent(p) }));
    cell.style.setProperty('--p', p);
    return cell;
  }

  #where(cell) {
    const l = this.rows.findIndex(row => row.includes(cell));
    return [l, this.rows[l]?.indexOf(cell)];
  }

  #key(event) {
    const [l, t] = this.#where(event.target);
    const move = MOVES[event.key];
    if (event.key === 'Escape') this.#show(null);
    else if (move && l >= 0 && !event.altKey && !event.ctrlKey && !event.metaKey) {
      const to = this.rows[l + move[0]]?.[t + move[1]];
      if (to) {
        event.target.tabIndex = -1;
        to.tabIndex = 0;
        to.focus();
      }
    } else return;
    event.preventDefault();
  }

  // The likeliest tokens of a cell, beside it.
  #show(cell) {
    this.shown?.classList.remove('open');
    this.shown = cell;
    this.card.hidden = !cell;
    if (!cell) return;
    cell.classList.add('open');
    const [l, t] = this.#where(cell);
    this.card.replaceChildren(
      element('p', {}, l ? `Layer ${l - 1} after ` : 'Embeddings after ', element('code', { textContent: shown(this.reading.tokens[t]) })),
      element('ol', {}, ...this.reading.lens[l][t].map(([token, p]) => {
        const row = element('li', {}, element('code', { textContent: shown(token) }), element('i'), element('span', { textContent: percent(p) }));
        row.style.setProperty('--p', p);
        return row;
      })));
    this.#place();
  }

  #place() {
    if (!this.shown) return;
    const [cell, box] = [this.shown.getBoundingClientRect(), this.node.getBoundingClientRect()];
    const left = Math.max(0, Math.min(cell.left - box.left, box.width - this.card.offsetWidth));
    this.card.style.left = `${left}px`;
    const above = cell.top - box.top - this.card.offsetHeight - 4;
    const over = cell.bottom + this.card.offsetHeight + 8 > innerHeight;
    this.card.style.top = `${over ? above : cell.bottom - box.top + 4}px`;
  }
}
