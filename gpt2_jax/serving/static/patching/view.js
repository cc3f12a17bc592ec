// The view of one pair of texts: two maps of what patches restore, and what comes next without heads.

import { short, shown } from '../attention/reading.js';
import { SvgPen } from '../attention/pens.js';
import { announce, element, percent } from '../playground/dom.js';
import { Heat, strength } from './heat.js';

// What the map by position may be of: a site, and the axes beside the layer.
export const SITES = {
  resid_pre: { text: 'Residual stream', by: ['position'] },
  attn_out: { text: 'Attention outputs', by: ['position'] },
  mlp_out: { text: 'MLP outputs', by: ['position'] },
  z: { text: 'Heads', by: ['head', 'position'] },
};
const PAPER = { restores: '#8fb8e8', opposes: '#f2b27a', text: '#23262b', line: '#f1efea' };

const panel = (title, note, className, ...children) => {
  const made = element('section', { className: `panel-of ${className}` },
    element('header', {}, element('h2', { textContent: title }), element('p', { className: 'muted', textContent: note })), ...children);
  made.setAttribute('aria-label', title);
  return made;
};
const scale = () => element('p', { className: 'scale' }, element('span', { textContent: 'opposes' }), element('i'),
  element('span', { textContent: 'restores the clean answer' }));
const numbers = (n, what) => Array.from({ length: n }, (_, i) => ({ text: `${i}`, says: `${what} ${i}` }));

// The table of an answer of /v1/patch.
export function tableOf(data) {
  const { by, restored, layers, heads, clean, corrupted } = data;
  const tokens = clean.map((token, t) => {
    const apart = token !== corrupted[t];
    const text = apart ? `${short(token, 10)} | ${short(corrupted[t], 10)}` : short(token, 16);
    return { text, apart, says: `position ${t}, ${shown(token)}${apart ? ` for ${shown(corrupted[t])}` : ''}` };
  });
  if (by.join() === 'head') {
    return { values: restored, rows: numbers(layers, 'layer'), columns: numbers(heads, 'head'), name: 'Heads: a row a layer' };
  }
  if (by.length === 1) {
    return { values: restored, rows: numbers(layers, 'layer'), columns: tokens, words: true, name: `${SITES[data.over].text} by layer and position` };
  }
  const rows = restored.flatMap((of, layer) => of.map((_, n) => ({ text: `${layer}.${n}`, says: `layer ${layer}, head ${n}` })));
  return { values: restored.flat(), rows, columns: tokens, words: true, name: 'Heads by position: a row a head' };
}

export class View {
  // `positions`, `heads`: answers of /v1/patch. `asks.over(site)` and `asks.ablate(heads)` ask for more.
  constructor(root, positions, heads, asks) {
    Object.assign(this, { asks, away: [], data: heads });
    const [right, wrong] = heads.answers.map(shown);
    this.summary = element('p', { className: 'summary-of' },
      element('code', { textContent: right }), ' over ', element('code', { textContent: wrong }),
      `: ${heads.clean_difference.toFixed(2)} after the clean text, ${heads.corrupted_difference.toFixed(2)} after the corrupted one`);
    this.site = element('select', { onchange: () => asks.over(this.site.value) },
      ...Object.entries(SITES).map(([value, { text }]) => element('option', { value, textContent: text })));
    this.site.setAttribute('aria-label', 'Activations');
    this.place = element('div');
    const left = panel('By position', 'Put into the corrupted text, one at a time.', 'of-positions', this.place, scale());
    left.querySelector('header').append(this.site);
    this.heads = new Heat(tableOf(heads), { head: (r, c) => [r, c], pick: head => this.toggle(head) });
    const middle = panel('By head', 'Click one to take it away.', 'of-heads', this.heads.node, scale());
    this.lists = element('div', { className: 'nexts' });
    this.back = element('button', { type: 'button', textContent: 'All heads back', disabled: true, onclick: () => this.take([]) });
    this.which = element('p', { className: 'muted', id: 'away' });
    this.next = panel('What comes next', '', 'of-next', this.lists);
    this.next.querySelector('header p').replaceWith(this.which);
    this.next.querySelector('header').append(this.back);
    root.replaceChildren(this.summary, element('div', { className: 'maps' }, left, middle, this.next));
    this.show(positions);
  }

  // Shows an answer of /v1/patch in the map by position.
  show(data) {
    this.positions = data;
    this.site.value = data.over;
    const N = data.heads;
    const head = data.by.length === 2 ? r => [Math.floor(r / N), r % N] : () => null;
    this.map = new Heat(tableOf(data), { head, pick: head => this.toggle(head) });
    this.map.mark(this.away);
    this.place.replaceChildren(this.map.node);
  }

  toggle([layer, head]) {
    const rest = this.away.filter(([l, n]) => l !== layer || n !== head);
    this.take(rest.length < this.away.length ? rest : [...this.away, [layer, head]]);
  }

  // Takes these heads away, and no others.
  take(heads) {
    this.away = heads;
    this.heads.mark(heads);
    this.map.mark(heads);
    this.back.disabled = !heads.length;
    this.which.textContent = heads.length ? `without ${heads.map(head => head.join('.')).join(', ')}` : 'with all heads';
    this.asks.ablate(heads);
  }

  // Shows an answer of /v1/ablate.
  list({ heads, next }) {
    const without = heads.length > 0;
    const bar = p => { const made = element('i'); made.style.setProperty('--p', p); return made; };
    this.lists.replaceChildren(...next.map((tokens, i) => element('section', {},
      element('h3', { textContent: `After the ${['clean', 'corrupted'][i]} text${without ? ': with all heads, and without' : ''}` }),
      element('ol', {}, ...tokens.slice(0, 10).map(([token, before, after]) => element('li', {},
        element('code', { textContent: shown(token) }),
        element('div', { className: 'bars' }, bar(before), ...(without ? [bar(after)] : [])),
        element('span', { className: without ? 'muted' : '', textContent: percent(before) }),
        element('span', { className: 'after', textContent: without ? percent(after) : '' })))))));
    if (without) announce(`${this.which.textContent}: after the clean text ${shown(next[0][0][0])} ${percent(next[0][0][2])}, was ${percent(next[0][0][1])}`);
  }

  // Both maps as an SVG file that needs nothing else, on white.
  svg() {
    const [cell, left, top] = [22, 56, 150];
    const tables = [tableOf(this.positions), tableOf(this.data)];
    const widths = tables.map(({ columns }) => left + cell * columns.length + 24);
    const high = Math.max(...tables.map(({ rows }) => rows.length));
    const pen = new SvgPen(Math.max(560, widths[0] + widths[1]), top + cell * high + 24, this.summary.textContent);
    pen.text(24, 24, this.summary.textContent, PAPER.text, { size: 14 });
    tables.forEach(({ values, rows, columns, name }, i) => {
      const x0 = left + (i ? widths[0] : 0);
      pen.text(x0, 52, name, PAPER.text);
      columns.forEach(({ text }, c) => pen.text(x0 + (c + 0.5) * cell, top - 6, text, PAPER.text, { size: 11, upwards: true }));
      rows.forEach(({ text }, r) => pen.text(x0 - 6, top + (r + 0.5) * cell, text, PAPER.text, { size: 11, anchor: 'end' }));
      values.forEach((row, r) => row.forEach((value, c) => {
        pen.rect(x0 + c * cell, top + r * cell, cell - 2, cell - 2, PAPER.line);
        pen.rect(x0 + c * cell, top + r * cell, cell - 2, cell - 2, value < 0 ? PAPER.opposes : PAPER.restores, strength(value));
      }));
    });
    return `<?xml version="1.0" encoding="UTF-8"?>\n${pen}\n`;
  }
}
