// How continuations are drawn. Kept over a reload.

import { element, find, load, save } from './dom.js';

const KEY = 'gpt2_jax.settings';
const DEFAULTS = { model: '', temperature: 0.8, top_p: 0.95, top_k: 0, length: 24, seed: 42, fixed: false,
  newline: false, face: 'serif' };
const NUMBERS = ['temperature', 'top_p', 'top_k', 'length', 'seed'];

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;

export class Settings {
  #values = { ...DEFAULTS };
  #sources = {};
  #contexts = {};

  constructor() {
    const kept = load(KEY, {});
    for (const name of Object.keys(DEFAULTS)) {
      if (typeof kept[name] === typeof DEFAULTS[name]) this.#values[name] = kept[name];
    }
    for (const name of NUMBERS) {
      for (const input of [find(name), find(`${name}-slider`)].filter(Boolean)) {
        input.addEventListener('input', () => {
          if (!input.checkValidity()) return;  // the browser marks it; the last good one holds
          this.set(name, Number(input.value), input);
          if (name === 'seed') this.set('fixed', true);
        });
        input.addEventListener('change', () => this.#show());
      }
    }
    for (const name of ['fixed', 'newline']) {
      find(name).addEventListener('change', () => this.set(name, find(name).checked));
    }
    for (const name of ['model', 'face']) {
      find(name).addEventListener('change', () => this.set(name, find(name).value));
    }
    find('dice').addEventListener('click', () => {
      this.set('seed', randomSeed());
      this.set('fixed', true);
    });
    find('settings').addEventListener('submit', event => event.preventDefault());
    this.#show();
  }

  get(name) { return this.#values[name]; }

  set(name, value, typing) {
    this.#values[name] = value;
    save(KEY, this.#values);
    this.#show(typing);
    find('settings').dispatchEvent(new CustomEvent('settings', { detail: name }));
  }

  // The server's checkpoints; one that was chosen before stays chosen.
  offer(models) {
    find('model').replaceChildren(...models.map(({ id }) => element('option', { value: id, textContent: id })));
    this.#sources = Object.fromEntries(models.map(({ id, root }) => [id, root ?? id]));
    this.#contexts = Object.fromEntries(models.map(({ id, context_length: context }) => [id, context]));
    if (!models.some(({ id }) => id === this.#values.model)) this.#values.model = models[0]?.id ?? '';
    find('model-field').hidden = models.length < 2;
    this.#show();
  }

  // Where the checkpoint of a request came from, as a command line names it.
  sourceOf({ model }) { return this.#sources[model] ?? model; }

  // The seed of the next request; `last`: that of one whose texts were not enough.
  nextSeed(last) {
    if (this.#values.fixed) return last === undefined ? this.#values.seed : (last + 1) % 2 ** 32;
    this.set('seed', randomSeed());
    return this.#values.seed;
  }

  // The body of a request for n continuations. At temperature 0 there is but one.
  request(prompt, n, seed) {
    prompt = prompt.toWellFormed();  // half a character can't be sent
    const { model, temperature, top_p, top_k, length, newline } = this.#values;
    const context = this.#contexts[model] ?? Infinity;  // of which the half is kept for the text
    const most = length < context ? length : Math.max(1, Math.floor(context / 2));
    const body = { model, prompt, n: temperature === 0 ? 1 : n, max_tokens: most, temperature, seed };
    if (temperature > 0 && top_p < 1) body.top_p = top_p;
    if (temperature > 0 && top_k > 0) body.top_k = top_k;
    if (newline) body.stop = ['\n'];
    return body;
  }

  #show(typing) {
    const values = this.#values;
    for (const name of NUMBERS) {
      for (const input of [find(name), find(`${name}-slider`)].filter(Boolean)) {
        if (input !== typing) input.value = values[name];
      }
    }
    find('fixed').checked = values.fixed;
    find('newline').checked = values.newline;
    for (const name of ['model', 'face']) find(name).value = values[name];
    document.documentElement.dataset.face = values.face;
    find('summary').replaceChildren(...[
      find('model-field').hidden ? null : values.model,
      values.temperature === 0 ? 'greedy' : `temperature ${values.temperature}`,
      values.temperature > 0 && values.top_p < 1 && `top-p ${values.top_p}`,
      values.temperature > 0 && values.top_k > 0 && `top-k ${values.top_k}`,
      `${values.length} tokens`,
      values.temperature > 0 && `seed ${values.seed}${values.fixed ? ' (fixed)' : ''}`,
    ].filter(Boolean).map(textContent => element('span', { textContent })));
  }
}
