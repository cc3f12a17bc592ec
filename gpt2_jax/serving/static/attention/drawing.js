// The two pictures of attention, for either pen.

import { place, short } from './reading.js';

const LINES = 2500;  // the most lines in one picture: the largest weights
const BESIDE = 76;  // pixels for the tokens beside the matrix
const LEAST = 0.01;  // no line below

// The colours of the page as it is now.
export function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = name => style.getPropertyValue(name).trim();
  return { accent: of('--accent'), text: of('--text'), muted: of('--muted'), line: of('--line') };
}
export const ON_PAPER = { accent: '#2a5d63', text: '#23262b', muted: '#666a71', line: '#e3e0d8' };

// The least weight that gets a line.
export function cutoff(weights) {
  if (weights.length <= LINES) return LEAST;
  return Math.max(LEAST, weights.slice().sort().at(-LINES));
}

// Lines from the tokens at x0, which look, to the tokens at x1; rows are `row` high, from y0 on.
// `followed`: the lines of that token alone, small ones too.
export function drawLines(pen, weights, { T, x0, x1, y0 = 0, row, colour, followed = null, skipFirst }) {
  const least = followed ? 0.003 : cutoff(weights);
  const y = i => y0 + row * (i + 0.5);
  const line = (t, s) => {
    const weight = weights[place(t, s)];
    if (weight < least || (skipFirst && s === 0)) return;
    const alpha = followed ? Math.min(1, 0.18 + 0.9 * weight) : Math.min(0.85, 0.03 + 0.85 * weight);
    pen.curve(x0, y(t), x1, y(s), colour, alpha, 0.7 + 3 * weight);
  };
  if (followed?.side === 'from') for (let s = 0; s <= followed.index; s++) line(followed.index, s);
  else if (followed) for (let t = followed.index; t < T; t++) line(t, followed.index);
  else for (let t = 0; t < T; t++) for (let s = 0; s <= t; s++) line(t, s);
}

// How a matrix fits a width: the cell's side and the room for tokens beside and above it, if any.
export function layout(T, width) {
  const label = (width - BESIDE) / T >= 10 ? BESIDE : 0;
  const cell = Math.min(24, (width - label - 1) / T);
  return { label, cell, size: label + cell * T + 1 };
}

// How strong a cell is: small weights are seen too.
const shade = weight => weight < 0.002 ? 0 : Math.min(1, weight ** 0.6);

// The matrix: row t looks, column s is looked at.
export function drawMatrix(pen, weights, tokens, { label, cell, x0 = 0, y0 = 0, colours: c, skipFirst }) {
  const [T, x, y] = [tokens.length, x0 + label, y0 + label];
  for (let t = 0; t < T; t++) {  // what causality leaves, so that an empty cell is seen to be one
    pen.rect(x, y + t * cell, (t + 1) * cell, cell, c.line, 0.35);
  }
  pen.cells(x, y, cell, T, (t, s) => (skipFirst && s === 0 ? 0 : shade(weights[place(t, s)])), c.accent);
  if (!label) return;
  const size = Math.min(11.5, cell * 0.9);
  tokens.forEach((token, i) => {
    pen.text(x - 6, y + (i + 0.5) * cell, short(token, 10), c.muted, { anchor: 'end', size });
    pen.text(x + (i + 0.5) * cell, y - 6, short(token, 10), c.muted, { size, upwards: true });
  });
}
