// The view of one text: the map of heads, lines, matrix, lens. On the page and in notebooks.

import { announce, element } from '../playground/dom.js';
import { drawLines, drawMatrix, layout, ON_PAPER } from './drawing.js';
import { Lens } from './lens.js';
import { Lines } from './lines.js';
import { HeadMap } from './map.js';
import { Matrix } from './matrix.js';
import { SvgPen } from './pens.js';
import { dominant, KINDS, number, Reading, short } from './reading.js';

const panel = (title, note, className, ...children) => {
  const heading = element('h2', { textContent: title });
  const made = element('section', { className: `panel-of ${className}` },
    element('header', {}, heading, element('p', { className: 'muted', textContent: note })), ...children);
  made.setAttribute('aria-label', title);
  return made;
};

const check = (text, changed) => {
  const box = element('input', { type: 'checkbox', onchange: changed });
  return [box, element('label', { className: 'check' }, box, ` ${text}`)];
};

export class View {
  // Draws `data`, what /v1/attention answers, in `root`. `heads`: numbers of those to begin with.
  constructor(root, data, heads) {
    this.reading = new Reading(data);
    const { strongest: [layer, head], heads: N } = this.reading;
    this.pinned = null;
    this.summary = element('p', { className: 'summary-of', id: 'head-summary' });
    this.legend = element('dl', { className: 'legend-of' });
    const [several, severalLabel] = check('Average several', () => {});
    const [skip, skipLabel] = check('Leave out the first token', () => this.#draw());
    Object.assign(this, { several, skip });
    this.map = new HeadMap(this.reading, { choose: heads => this.choose(heads), several: () => several.checked });
    this.lines = new Lines(this.reading, { follow: (token, pin) => this.follow(token, pin) });
    this.matrix = new Matrix(this.reading, { follow: token => this.follow(token) });
    const map = panel('Heads', 'A row a layer, a letter what the head does here.', 'of-map',
      element('div', { className: 'scroller' }, this.map.node), element('div', { className: 'checks' }, severalLabel, skipLabel), this.legend);
    const lines = panel('Who looks where', 'Left looks at right.', 'of-lines', element('div', { className: 'scroller' }, this.lines.node));
    const matrix = panel('The same as a matrix', 'A row looks at its columns.', 'of-matrix', this.matrix.node);
    root.replaceChildren(this.summary, element('div', { className: 'three' }, map, lines, matrix));
    if (data.lens.length) {
      root.append(panel('Logit lens', 'What each layer would say next, were it the last one. ✓: as the text goes on.', 'of-lens',
        new Lens(this.reading).node));
    }
    this.chosen = heads ?? [layer * N + head];
    this.map.show(this.chosen);
    this.watch = new ResizeObserver(() => this.#draw());
    this.watch.observe(this.lines.middle);
    this.watch.observe(this.matrix.node);
    this.themes = new MutationObserver(() => this.#draw());
    this.themes.observe(document.documentElement, { attributes: true, attributeFilter: ['data-theme'] });
    this.system = matchMedia('(prefers-color-scheme: dark)');
    this.redraw = () => this.#draw();
    this.system.addEventListener('change', this.redraw);
    this.#say();
  }

  // Ends what still listens.
  close() {
    this.watch.disconnect();
    this.themes.disconnect();
    this.system.removeEventListener('change', this.redraw);
  }

  choose(heads) {
    this.chosen = heads;
    this.map.show(heads);
    this.#say();
    this.#draw();
    announce(this.summary.textContent);
  }

  // Follows a token; with `pin` until another is pinned, or the same one again.
  follow(token, pin = false) {
    const same = token && this.pinned && token.side === this.pinned.side && token.index === this.pinned.index;
    if (pin) this.pinned = same ? null : token;
    this.lines.mark(pin ? this.pinned : token ?? this.pinned);
  }

  #say() {
    this.summary.textContent = this.reading.summary(this.chosen);
    const character = this.reading.characterOf(this.chosen);
    const [most] = dominant(character);
    this.legend.replaceChildren(...Object.entries(KINDS).map(([kind, { letter, name }]) => {
      const row = element('div', { className: kind === most ? 'most' : '' },
        element('dt', {}, element('b', { className: `kind ${kind}`, textContent: letter }), ` ${name}`),
        element('dd', {}, element('i'), element('span', { textContent: number(character[kind]) })));
      row.style.setProperty('--p', character[kind]);
      return row;
    }));
  }

  #draw() {
    this.weights = this.reading.weights(this.chosen);
    this.lines.show(this.weights, this.skip.checked);
    this.matrix.show(this.weights, this.skip.checked);
  }

  // Lines and matrix as an SVG file that needs nothing else, on white.
  svg() {
    const [{ tokens, T }, row, column, gap, top] = [this.reading, 20, 130, 200, 64];
    const sizes = layout(T, Math.max(420, Math.min(900, T * row)));
    const right = 2 * column + gap + 48;
    const { size } = sizes;
    const [width, height] = [right + size + 24, top + Math.max(T * row, size) + 24];
    const title = this.summary.textContent;
    const pen = new SvgPen(width, height, title);
    const c = ON_PAPER;
    pen.text(24, 30, title, c.text, { size: 15 });
    const skipFirst = this.skip.checked;
    drawLines(pen, this.weights, { T, x0: column + 8, x1: column + gap - 8, y0: top, row, colour: c.accent,
      followed: this.pinned, skipFirst });
    tokens.forEach((token, i) => {
      const y = top + (i + 0.5) * row;
      pen.text(column, y, short(token), c.text, { anchor: 'end' });
      pen.text(column + gap, y, short(token), c.text);
    });
    drawMatrix(pen, this.weights, tokens, { ...sizes, x0: right, y0: top, colours: c, skipFirst });
    return `<?xml version="1.0" encoding="UTF-8"?>\n${pen}\n`;
  }
}

// Hands a text to the browser as a file.
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
