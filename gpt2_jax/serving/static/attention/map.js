// The map of heads: a row a layer, a cell a head, with the letter and colour of what it does.

import { element } from '../playground/dom.js';
import { dominant, KINDS, number } from './reading.js';

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  Home: [0, -Infinity], End: [0, Infinity], PageUp: [-Infinity, 0], PageDown: [Infinity, 0] };

export class HeadMap {
  // `choose(numbers)` is called with the heads to show; `several()` says whether cells add up.
  constructor(reading, { choose, several }) {
    Object.assign(this, { reading, choose, several });
    this.cells = [];
    this.at = 0;
    const all = element('button', { type: 'button', textContent: 'all', title: 'Average all heads' });
    const head = element('tr', {}, element('td', {}, all));
    for (let n = 0; n < reading.heads; n++) head.append(element('th', { scope: 'col', textContent: n }));
    const rows = Array.from({ length: reading.layers }, (_, layer) => this.#row(layer));
    this.node = element('table', { className: 'map' }, element('thead', {}, head), element('tbody', {}, ...rows));
    this.node.style.maxWidth = `${36 + 34 * reading.heads}px`;
    this.node.style.minWidth = `${36 + 24 * reading.heads}px`;
    this.node.setAttribute('role', 'grid');
    this.node.setAttribute('aria-label', 'Heads: a row a layer. Arrows move; the space bar adds a head or takes it away.');
    this.node.setAttribute('aria-multiselectable', 'true');
    all.onclick = () => choose(Array.from({ length: reading.count }, (_, i) => i));
    this.node.addEventListener('click', event => this.#click(event));
    this.node.addEventListener('keydown', event => this.#key(event));
  }

  #row(layer) {
    const { heads, character } = this.reading;
    const numbers = Array.from({ length: heads }, (_, n) => layer * heads + n);
    const whole = element('button', { type: 'button', textContent: layer, title: `Average layer ${layer}` });
    whole.setAttribute('aria-label', `Layer ${layer}: average its heads`);
    whole.onclick = () => this.choose(numbers);
    const cells = numbers.map((_, n) => {
      const [kind, value] = dominant(character[layer][n]);
      const cell = element('td', { tabIndex: -1, textContent: KINDS[kind].letter, className: `kind ${kind}`,
        title: `Layer ${layer}, head ${n}: ${KINDS[kind].name} ${number(value)}` });
      cell.style.setProperty('--strength', value);
      cell.setAttribute('role', 'gridcell');
      cell.setAttribute('aria-label', cell.title);
      return cell;
    });
    this.cells.push(...cells);
    return element('tr', {}, element('th', { scope: 'row' }, whole), ...cells);
  }

  // Marks the chosen heads.
  show(chosen) {
    this.chosen = chosen;
    this.cells.forEach((cell, i) => cell.setAttribute('aria-selected', chosen.includes(i)));
    if (!chosen.includes(this.at)) this.at = chosen[0];
    this.#rove();
  }

  #rove() {
    this.cells.forEach((cell, i) => { cell.tabIndex = i === this.at ? 0 : -1; });
  }

  #toggle(number) {
    const rest = this.chosen.filter(other => other !== number);
    const chosen = rest.length < this.chosen.length ? rest : [...rest, number].sort((a, b) => a - b);
    if (chosen.length) this.choose(chosen);
  }

  #click(event) {
    const number = this.cells.indexOf(event.target);
    if (number < 0) return;
    this.at = number;
    if (this.several() || event.shiftKey || event.ctrlKey || event.metaKey) this.#toggle(number);
    else this.choose([number]);
    this.#rove();
  }

  #key(event) {
    const now = this.cells.indexOf(event.target);
    if (now < 0 || event.altKey) return;
    const { heads, layers } = this.reading;
    if (event.key === ' ') this.#toggle(now);
    else if (event.key === 'Enter') this.choose([now]);
    else if (MOVES[event.key]) {
      const [down, right] = MOVES[event.key];
      const inside = (i, most) => Math.max(0, Math.min(most - 1, i));
      this.at = inside(this.reading.layerOf(now) + down, layers) * heads + inside(this.reading.headOf(now) + right, heads);
      if (!this.several() && !event.ctrlKey && !event.shiftKey) this.choose([this.at]);
      this.#rove();
      this.cells[this.at].focus();
    } else return;
    event.preventDefault();
  }
}
