// The versions of a text, kept in the browser: where it parted, both ways stay.

import { element, find, load, save, visible } from './dom.js';

const KEY = 'gpt2_jax.branches';
const MOST = 50;
const AROUND = 28;  // characters of a branch that are shown, on both sides of where it parts

export class Branches {
  #all = [];  // {id, text, at}: at is where it parted from another, -1: it didn't
  #current = 0;

  constructor() {
    const kept = load(KEY, {});
    this.#all = (Array.isArray(kept.all) ? kept.all : []).filter(({ text }) => typeof text === 'string');
    if (!this.#all.length) this.#all = [{ id: 1, text: '', at: -1 }];
    this.#current = this.#all.some(({ id }) => id === kept.current) ? kept.current : this.#all[0].id;
    this.#count();
  }

  get current() { return this.#all.find(({ id }) => id === this.#current); }

  // The current one's text is now this. Returns whether the browser could keep it.
  keep(text) {
    this.current.text = text;
    return this.#save();
  }

  // A new branch, whose text parts from the current one's at a place; the oldest make room.
  add(text, at) {
    const id = Math.max(...this.#all.map(({ id }) => id)) + 1;
    this.#all.push({ id, text, at });
    this.#all = this.#all.slice(-MOST);
    this.#current = id;
    this.#save();
  }

  // Draws the list; `open(text)` shows one that was chosen.
  draw(open) {
    const redraw = () => this.draw(open);
    find('branch-list').replaceChildren(...this.#all.toReversed().map(branch => {
      const { id, text, at } = branch;
      const part = at < 0 ? 0 : Math.min(at, text.length);
      const choose = element('button', { type: 'button', className: 'branch' },
        element('span', { className: 'muted', textContent:
          (part > AROUND ? '…' : '') + visible(text.slice(Math.max(0, part - AROUND), part)) }),
        element('b', { textContent: visible(text.slice(part, part + AROUND)) || (part ? '' : 'empty') }));
      if (id === this.#current) choose.setAttribute('aria-current', 'true');
      choose.addEventListener('click', () => {
        this.#current = id;
        this.#save();
        open(text);
        redraw();
      });
      const forget = element('button', { type: 'button', className: 'forget', textContent: '×',
        disabled: id === this.#current });
      forget.setAttribute('aria-label', `Forget ${visible(text.slice(part, part + AROUND)) || 'the empty text'}`);
      forget.addEventListener('click', () => {
        this.#all = this.#all.filter(other => other !== branch);
        this.#save();
        redraw();
        find('branch-list').querySelector('button')?.focus();
      });
      return element('li', {}, choose, forget);
    }));
  }

  #count() { find('branch-count').textContent = this.#all.length; }

  #save() {
    this.#count();
    return save(KEY, { all: this.#all, current: this.#current });
  }
}
