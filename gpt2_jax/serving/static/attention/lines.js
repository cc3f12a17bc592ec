// Two columns of tokens, those that look and those looked at, and the lines between them.

import { announce, element } from '../playground/dom.js';
import { colours, drawLines } from './drawing.js';
import { CanvasPen } from './pens.js';
import { number, place, shown } from './reading.js';

const WORDS = { from: 'looks at', to: 'is looked at by' };

export class Lines {
  // `follow(token, pin)` is called with the token to follow, {side: 'from' | 'to', index}, or null.
  constructor(reading, { follow }) {
    Object.assign(this, { reading, follow });
    this.at = { side: 'from', index: 0 };  // where Tab enters
    this.columns = { from: this.#column('from'), to: this.#column('to') };
    this.all = element('canvas', { className: 'all' });
    this.some = element('canvas');  // those of the followed token, over the others
    this.middle = element('div', { className: 'strings' }, this.all, this.some);
    this.middle.setAttribute('aria-hidden', 'true');
    this.node = element('div', { className: 'lines' }, this.columns.from, this.middle, this.columns.to);
    this.node.addEventListener('pointerover', event => this.#point(event));
    this.node.addEventListener('pointerleave', () => follow(null));
    this.node.addEventListener('focusin', event => this.#focus(event));
    this.node.addEventListener('focusout', () => follow(null));
    this.node.addEventListener('click', event => {
      const token = this.#token(event);
      if (token) follow(token, true);
    });
    this.node.addEventListener('keydown', event => this.#key(event));
  }

  #column(side) {
    const column = element('ol', { className: side });
    column.setAttribute('aria-label', side === 'from' ? 'Tokens that look' : 'Tokens looked at');
    column.append(...this.reading.tokens.map((token, i) => {
      const button = element('button', { type: 'button', tabIndex: -1 }, element('code', { textContent: shown(token) }),
        element('span'));
      Object.assign(button.dataset, { side, index: i });
      return element('li', {}, button);
    }));
    return column;
  }

  #button({ side, index }) { return this.columns[side].children[index].firstChild; }
  #token(event) {
    const button = event.target.closest('button');
    return button && { side: button.dataset.side, index: Number(button.dataset.index) };
  }

  #point(event) {
    if (event.pointerType !== 'mouse') return;
    const token = this.#token(event);
    if (token) this.follow(token);
  }

  #focus(event) {
    const token = this.#token(event);
    if (!token) return;
    this.#button(this.at).tabIndex = -1;
    this.at = token;
    this.#button(this.at).tabIndex = 0;
    if (!event.target.matches(':focus-visible')) return;  // a click says what it wants by itself
    this.follow(token);
    announce(this.says(token));
  }

  #key(event) {
    const token = this.#token(event);
    if (!token || event.altKey || event.ctrlKey || event.metaKey) return;
    const last = this.reading.T - 1;
    const to = {
      ArrowUp: { index: Math.max(0, token.index - 1) }, ArrowDown: { index: Math.min(last, token.index + 1) },
      ArrowLeft: { side: 'from' }, ArrowRight: { side: 'to' }, Home: { index: 0 }, End: { index: last },
    }[event.key];
    if (event.key === 'Escape') this.follow(null, true);
    else if (to) this.#button({ ...token, ...to }).focus();
    else return;
    event.preventDefault();
  }

  // What a token does, for those who listen.
  says(token) {
    const others = this.reading.strongestOf(token, this.weights).map(
      ([i, weight]) => `${shown(this.reading.tokens[i])} ${number(weight)}`);
    return `${shown(this.reading.tokens[token.index])} ${WORDS[token.side]} ${others.join(', ')}`;
  }

  #options(followed) {
    const rows = this.columns.from;
    return { T: this.reading.T, x0: 0, x1: this.width, row: rows.offsetHeight / this.reading.T, colour: colours().accent,
      followed, skipFirst: this.skipFirst };
  }

  show(weights, skipFirst) {
    Object.assign(this, { weights, skipFirst, width: this.middle.clientWidth });
    this.#button(this.at).tabIndex = 0;
    drawLines(new CanvasPen(this.all, this.width, this.columns.from.offsetHeight), weights, this.#options(null));
    this.mark(this.followed ?? null);
  }

  // Follows a token: its lines and values; null shows all lines.
  mark(followed) {
    this.followed = followed;
    const pen = new CanvasPen(this.some, this.width, this.columns.from.offsetHeight);
    this.node.classList.toggle('following', followed !== null);
    if (followed) drawLines(pen, this.weights, this.#options(followed));
    for (const side of ['from', 'to']) {
      [...this.columns[side].children].forEach(({ firstChild: button }, i) => {
        const weight = !followed || side === followed.side ? null : this.#between(followed, i);
        button.classList.toggle('followed', followed?.side === side && followed.index === i);
        button.lastChild.textContent = weight !== null && weight >= 0.005 ? number(weight) : '';
        button.style.setProperty('--weight', weight ?? 0);
      });
    }
  }

  #between({ side, index }, other) {
    const [t, s] = side === 'from' ? [index, other] : [other, index];
    return s <= t ? this.weights[place(t, s)] : 0;
  }
}
