// The attention page: asks the server about a text, and shows the answer.

import { attention, Refused } from '../playground/api.js';
import { announce, find } from '../playground/dom.js';
import { begin } from '../playground/form.js';
import * as trouble from '../playground/trouble.js';
import { download, View } from './view.js';

const EXAMPLE = 'The keeper lit the lamp, and the lamp lit the sea. The keeper saw the sea, and the sea saw the keeper.';
const LENS = 5;  // predictions of each layer

let view = null;
let asked = new AbortController();

async function look() {
  const text = find('text').value;
  asked.abort();
  asked = new AbortController();
  const { signal } = asked;
  trouble.clear();
  find('look').setAttribute('aria-busy', 'true');
  try {
    const data = await attention(find('model').value, text, LENS, signal);
    if (signal.aborted) return;
    const same = view && view.reading.count === data.layers * data.heads;
    const heads = same && view.chosen;
    view?.close();
    view = new View(find('view'), data, heads || undefined);
    find('count').textContent = data.tokens.length === 1 ? '1 token' : `${data.tokens.length} tokens`;
    find('save').disabled = false;
    announce(view.summary.textContent);
  } catch (e) {
    if (signal.aborted) return;
    if (!(e instanceof Refused)) throw e;
    trouble.say(e.message, look);
  } finally {
    if (!signal.aborted) find('look').removeAttribute('aria-busy');
  }
}

function read() {
  find('text').value = new URLSearchParams(location.hash.slice(1)).get('text') ?? EXAMPLE;
}

const address = () => `text=${encodeURIComponent(find('text').value.toWellFormed())}`;

find('save').addEventListener('click', () => download('attention.svg', view.svg(), 'image/svg+xml'));
begin(read, address, look);
