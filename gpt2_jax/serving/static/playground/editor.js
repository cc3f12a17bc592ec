// The document: a plain text field, which holds caret, selection, undo and input methods, over a
// mirror that draws its text: coloured tokens, and a continuation at the caret that is not taken yet.
// Both break lines alike, since they have the same style; the field's own text is transparent.

import { element } from './dom.js';

export class Editor {
  #tokens = [];
  #ghost = null;  // {at, text}

  constructor(area, mirror) {
    this.area = area;
    this.mirror = mirror;
    area.addEventListener('input', () => this.render());
    this.render();
  }

  get text() { return this.area.value; }
  get caret() { return this.area.selectionEnd; }
  get tokens() { return this.#tokens; }

  focus() { this.area.focus({ preventScroll: true }); }

  // Puts a text in the place of [from, to), such that it can be undone.
  insert(from, to, text) {
    text = text.replace(/\r\n?/g, '\n');
    const wanted = this.text.slice(0, from) + text + this.text.slice(to);
    if (wanted === this.text) return;
    this.focus();
    this.area.setSelectionRange(from, to);
    // deprecated, and the one way that keeps what the user can undo
    const done = text ? document.execCommand('insertText', false, text) : document.execCommand('delete');
    if (!done || this.text !== wanted) {
      this.area.value = wanted;
      this.area.dispatchEvent(new InputEvent('input'));
    }
    this.area.setSelectionRange(from + text.length, from + text.length);
  }

  // Shows a text that is not there yet.
  ghost(at, text) {
    this.#ghost = { at, text };
    this.render();
  }

  dropGhost() {
    this.#ghost = null;
    this.render();
  }

  // Marks [{start, end, p}], in order.
  mark(tokens) {
    this.#tokens = tokens;
    this.render();
  }

  // Draws the mirror.
  render() {
    const at = this.#ghost?.at ?? Infinity;
    const nodes = [];
    let place = 0;
    const put = (end, token, index) => {
      for (const stop of place < at && at < end ? [at, end] : [end]) {
        const text = this.text.slice(place, stop);
        if (token) nodes.push(element('span', { className: `token ${level(token.p)}`, token: index }, text));
        else if (text) nodes.push(text);
        place = stop;
        if (stop === at) nodes.push(element('ins', { className: 'ghost' }, this.#ghost.text));
      }
    };
    if (at === 0) put(0);
    this.#tokens.forEach((token, i) => {
      if (token.start > place) put(token.start);
      put(token.end, token, i);
    });
    if (place < this.text.length) put(this.text.length);
    nodes.push('\u200b');  // a last line that is empty has its height, too
    this.mirror.replaceChildren(...nodes);
  }

  // Where the ghost ends, or where a token stands: boxes on the screen.
  ghostEnd() { return [...this.mirror.querySelector('.ghost').getClientRects()].at(-1); }
  boxOf(index) {
    return [...this.mirror.querySelectorAll('.token')].find(span => span.token === index)?.getClientRects()[0];
  }

  // The index of the token at a point of the screen, or at the caret; -1: there is none.
  tokenAtPoint(x, y) {
    return document.elementsFromPoint(x, y).find(e => e.token !== undefined)?.token ?? -1;
  }

  tokenAtCaret() {
    return this.#tokens.findIndex(({ start, end }) =>
      start <= this.caret && (this.caret < end || end === this.text.length));
  }
}

function level(p) {
  return p === null ? 'unknown' : `p${[0.5, 0.1, 0.01, 0.001].filter(limit => p < limit).length}`;
}
