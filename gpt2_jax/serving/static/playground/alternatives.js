// Tokens coloured by their probability, and what might have stood in their place.

import { Refused, score } from './api.js';
import { announce, element, find, later, load, percent, save, visible } from './dom.js';
import * as trouble from './trouble.js';

const KEY = 'gpt2_jax.colour';

export class Alternatives {
  #abort = null;
  #scored = '';  // the text that the tokens are of
  #shown = -1;  // the token whose alternatives are shown
  #refresh = later(500, () => this.refresh());
  #hide = later(250, () => this.close());

  on = false;

  // `branch(place, text)`: the text up to a place, and another one from there.
  constructor(editor, settings, branch) {
    Object.assign(this, { editor, settings, branch, card: find('card') });
    find('colour').addEventListener('click', () => this.toggle(!this.on));
    editor.area.addEventListener('input', () => this.#edited());
    editor.area.addEventListener('click', () => this.show(editor.tokenAtCaret()));
    editor.area.addEventListener('keyup', ({ key }) => {
      if (/^(Arrow|Home|End|Page)/.test(key)) this.show(editor.tokenAtCaret(), true);
    });
    const hover = event => {
      if (!this.on || event.pointerType !== 'mouse') return;
      const token = editor.tokenAtPoint(event.clientX, event.clientY);
      if (token >= 0) this.show(token); else this.#hide();
    };
    editor.area.addEventListener('pointermove', hover);
    editor.area.addEventListener('pointerleave', () => this.#hide());
    this.card.addEventListener('pointerenter', () => this.#hide.cancel());
    this.card.addEventListener('pointerleave', () => this.#hide());
    this.card.addEventListener('keydown', event => this.#keys(event));
    this.toggle(load(KEY, false));
  }

  toggle(on) {
    this.on = on;
    save(KEY, on);
    find('colour').setAttribute('aria-pressed', on);
    find('legend').hidden = !on;
    find('editor').classList.toggle('coloured', on);
    if (on) return this.refresh();
    this.#abort?.abort();
    this.#refresh.cancel();
    this.close();
    this.editor.mark([]);
  }

  async refresh() {
    this.#abort?.abort();
    this.#refresh.cancel();
    const { text } = this.editor;
    if (!this.on || !this.settings.get('model')) return;
    const { signal } = this.#abort = new AbortController();
    try {
      const { tokens } = text ? await score(this.settings.get('model'), text, signal) : { tokens: [] };
      if (signal.aborted) return;
      this.#scored = text;
      this.editor.mark(tokens);
    } catch (e) {
      if (signal.aborted) return;
      if (!(e instanceof Refused)) throw e;
      trouble.say(e.message, () => this.refresh());
    }
  }

  // What lies before an edit is as likely as it was; the rest is asked for once the typing rests.
  #edited() {
    this.close();
    if (!this.on) return;
    this.#abort?.abort();
    const { text, tokens } = this.editor;
    let same = 0;
    while (same < text.length && text[same] === this.#scored[same]) same++;
    this.#scored = text.slice(0, same);
    this.editor.mark(tokens.filter(({ end }) => end <= same));
    this.#refresh();
  }

  show(index, speak = false) {
    this.#hide.cancel();
    const token = this.on ? this.editor.tokens[index] : undefined;
    if (!token) return this.close();
    if (index === this.#shown) return;
    this.#shown = index;
    const text = this.editor.text.slice(token.start, token.end);
    const says = token.p === null ? 'the first token' : percent(token.p);
    find('card-head').replaceChildren(
      element('code', { textContent: visible(text) }), element('span', { textContent: says }));
    find('alternatives').replaceChildren(...token.top.map(({ text: other, p }) => {
      // part of a character, or a token with a meaning of its own, is no text to go on from
      const broken = /^bytes:|\ufffd|^<\|.*\|>$/.test(other);
      const name = element('code', { textContent: visible(other) });
      const share = element('i');
      share.style.width = `${100 * p}%`;
      const button = element('button', { type: 'button', disabled: broken || other === text },
        name, element('div', { className: 'share' }, share), element('span', { textContent: percent(p) }));
      if (other === text) button.setAttribute('aria-current', 'true');
      button.addEventListener('click', () => {
        this.close();
        this.branch(token.start, other);
      });
      return element('li', {}, button);
    }));
    this.card.hidden = false;
    const [box, main] = [this.editor.boxOf(index), this.card.offsetParent.getBoundingClientRect()];
    const most = main.width - this.card.offsetWidth;
    this.card.style.left = `${Math.max(0, Math.min(box.left - main.left, most))}px`;
    this.card.style.top = `${box.bottom - main.top + 2}px`;
    if (speak) announce(`${visible(text)}: ${says}`);
  }

  close() {
    this.#hide.cancel();
    this.#shown = -1;
    if (this.card.contains(document.activeElement)) this.editor.focus();
    this.card.hidden = true;
  }

  get open() { return !this.card.hidden; }

  // To the alternatives of the token at the caret.
  enter() {
    this.show(this.editor.tokenAtCaret());
    this.card.querySelector('button:enabled')?.focus();
  }

  #keys(event) {
    const buttons = [...this.card.querySelectorAll('button:enabled')];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === 'Escape') this.close();
    else if (step) buttons.at((buttons.indexOf(document.activeElement) + step) % buttons.length).focus();
    else return;
    event.preventDefault();
  }
}
