// Continuations at the caret: asked for, streamed, chosen among, taken or dropped.

import { complete, Refused } from './api.js';
import { announce, element, find, visible } from './dom.js';
import * as trouble from './trouble.js';

export class Continuations {
  #abort = null;
  #asked = null;  // {at, seed, texts, done, take}: what is shown
  #selected = 0;
  #frame = 0;

  last = null;  // {request, index}: what repeats the latest text

  constructor(editor, settings) {
    Object.assign(this, { editor, settings, box: find('choices-box'), list: find('choices') });
    addEventListener('resize', () => this.open && this.#draw());
  }

  get open() { return this.#asked !== null; }

  // Asks for n continuations. `take`: the first is put into the text once it is whole.
  async ask({ n = 3, take = false } = {}) {
    const { editor, settings } = this;
    const again = this.#asked;
    const at = again?.at ?? editor.caret;
    this.drop();
    const seed = settings.nextSeed(again?.seed);
    const abort = this.#abort = new AbortController();
    const whole = editor.text.slice(0, at);
    const request = settings.request(whole, n, seed);
    const asked = this.#asked = {
      at, seed, take, request, texts: Array(request.n).fill(''), done: Array(request.n).fill(false) };
    this.#selected = 0;
    trouble.clear();
    this.#draw();
    announce(`Asking for ${request.n === 1 ? 'a continuation' : `${request.n} continuations`}.`);
    try {
      const { prompt, pieces } = await complete(request, abort.signal);
      request.prompt = prompt;
      this.last = { request, index: 0 };
      find('note').textContent = prompt.length < whole.length
        ? `The model reads the last ${prompt.length.toLocaleString()} characters.` : '';
      for await (const { index, text, finish } of pieces) {
        asked.texts[index] += text;
        if (finish) asked.done[index] = true;
        cancelAnimationFrame(this.#frame);
        this.#frame = requestAnimationFrame(() => this.open && this.#draw());
      }
      asked.done.fill(true);
      this.#draw();
      if (take) return this.take();
      announce(`${request.n} ${request.n === 1 ? 'continuation' : 'continuations'}. ${this.#spoken()}`);
    } catch (e) {
      if (abort.signal.aborted) return;
      if (!(e instanceof Refused)) throw e;
      if (asked.texts.some(Boolean)) asked.done.fill(true);  // what came can still be taken
      else this.drop();
      trouble.say(e.message, () => this.ask({ n, take }));
    }
  }

  choose(step) {
    const { length } = this.#asked.texts;
    this.#selected = (this.#selected + step + length) % length;
    this.#draw();
    announce(this.#spoken());
  }

  take(index = this.#selected) {
    const { at, texts, done } = this.#asked;
    const text = texts[index];
    if (!text && !done[index]) return;  // nothing to take yet
    if (this.last) this.last.index = index;
    this.drop();
    if (!text) return;
    this.editor.insert(at, at, text);
    announce('Taken.');
  }

  // Forgets what is shown, and ends its request.
  drop() {
    if (!this.open) return;
    this.#abort.abort();
    this.#asked = null;
    this.box.hidden = true;
    this.editor.dropGhost();
  }

  #spoken() {
    const { texts } = this.#asked;
    return `${this.#selected + 1} of ${texts.length}: ${texts[this.#selected].trim() || 'nothing yet'}`;
  }

  #draw() {
    const { at, texts, done, seed } = this.#asked;
    this.editor.ghost(at, texts[this.#selected]);
    this.list.replaceChildren(...texts.map((text, i) => {
      const option = element('li', { id: `choice-${i}`, role: 'option', className: done[i] ? '' : 'coming' });
      option.setAttribute('aria-selected', i === this.#selected);
      const shown = text ? visible(text).trimStart() : done[i] ? 'the text ends here' : '…';
      option.append(element('span', { className: text ? 'choice' : 'choice muted', textContent: shown }));
      option.addEventListener('pointerdown', event => event.preventDefault());  // the field keeps the focus
      option.addEventListener('click', () => this.take(i));
      return option;
    }));
    find('choices-foot').replaceChildren(
      element('span', { textContent: `seed ${seed}` }),
      this.#button('More', () => this.ask()), this.#button('Drop', () => this.drop()));
    this.box.hidden = false;
    const [end, main] = [this.editor.ghostEnd(), this.box.offsetParent.getBoundingClientRect()];
    this.box.style.top = `${end.bottom - main.top}px`;
    this.box.scrollIntoView({ block: 'nearest' });
  }

  #button(textContent, onclick) {
    return element('button', { type: 'button', textContent, onclick, onpointerdown: e => e.preventDefault() });
  }
}
