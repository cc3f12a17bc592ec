// What the server says of a text, made ready to be drawn. Head n of layer l has the number l · N + n.

import { visible } from '../playground/dom.js';

// A head's character; the letter says it where the colour is not seen. `does`: what such a head looks at.
export const KINDS = {
  previous: { letter: 'P', name: 'previous token', does: 'the previous token' },
  self: { letter: 'S', name: 'the token itself', does: 'the token itself' },
  repeat: { letter: 'R', name: 'earlier occurrences', does: 'earlier occurrences of the same token' },
  induction: { letter: 'I', name: 'what followed them', does: 'what followed earlier occurrences of the same token' },
  first: { letter: 'F', name: 'first token', does: 'the first token' },
  broad: { letter: 'B', name: 'spread out', does: 'spread over many tokens' },
};

// A token on one line, spaces made visible too.
export const shown = token => visible(token).replace(/ /g, '·');
export const short = (token, most = 14) => {
  const characters = [...shown(token)];
  return characters.length > most ? characters.slice(0, most - 1).join('') + '…' : characters.join('');
};
export const number = x => x.toFixed(2);

// Weights lie row after row, row t with t + 1 of them.
export const place = (t, s) => t * (t + 1) / 2 + s;

function numbers(base64) {
  const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true) / 65535);
}

export class Reading {
  constructor(data) {
    Object.assign(this, data);  // tokens, ids, layers, heads, character, strongest, lens
    this.T = data.tokens.length;
    this.size = place(this.T, 0);
    this.all = numbers(data.attentions);
  }

  get count() { return this.layers * this.heads; }
  layerOf(number) { return Math.floor(number / this.heads); }
  headOf(number) { return number % this.heads; }

  // Weights, the mean over some heads.
  weights(chosen) {
    const sum = new Float32Array(this.size);
    for (const number of chosen) {
      const from = number * this.size;
      for (let i = 0; i < this.size; i++) sum[i] += this.all[from + i];
    }
    return sum.map(x => x / chosen.length);
  }

  // Each kind's number, the mean over some heads.
  characterOf(chosen) {
    const of = number => this.character[this.layerOf(number)][this.headOf(number)];
    return Object.fromEntries(Object.keys(KINDS).map(
      kind => [kind, chosen.reduce((sum, number) => sum + of(number)[kind], 0) / chosen.length]));
  }

  name(chosen) {
    if (chosen.length === 1) return `Layer ${this.layerOf(chosen[0])}, head ${this.headOf(chosen[0])}`;
    if (chosen.length === this.count) return `All ${this.count} heads, averaged`;
    const layers = new Set(chosen.map(number => this.layerOf(number)));
    const whole = layers.size === 1 && chosen.length === this.heads;
    return whole ? `Layer ${[...layers][0]}, averaged` : `${chosen.length} heads, averaged`;
  }

  // What some heads do, in a sentence.
  summary(chosen) {
    const name = this.name(chosen);
    if (this.T < 3) return `${name}: a text of fewer than three tokens does not tell.`;
    const [kind, value] = dominant(this.characterOf(chosen));
    const much = kind === 'broad' ? '' : value >= 0.5 ? 'mostly ' : 'above all ';
    return `${name}: ${much}${KINDS[kind].does} (${number(value)})`;
  }

  // The strongest weights from a token, or to it: [[index, weight], …].
  strongestOf({ side, index }, weights, most = 3) {
    const others = side === 'from' ? Array.from({ length: index + 1 }, (_, s) => [s, weights[place(index, s)]])
      : Array.from({ length: this.T - index }, (_, i) => [index + i, weights[place(index + i, index)]]);
    return others.sort((a, b) => b[1] - a[1]).slice(0, most);
  }
}

// The kind with the largest number: [kind, number].
export const dominant = character => Object.entries(character).reduce((a, b) => b[1] > a[1] ? b : a);
