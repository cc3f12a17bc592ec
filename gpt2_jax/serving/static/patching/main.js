// The patching page: asks the server about two texts, and shows the answers.

import { download } from '../attention/view.js';
import { ablate, patch, Refused } from '../playground/api.js';
import { announce, find } from '../playground/dom.js';
import { begin } from '../playground/form.js';
import * as trouble from '../playground/trouble.js';
import { SITES, View } from './view.js';

const FIELDS = ['text', 'corrupted', 'right', 'wrong'];
const EXAMPLE = { text: 'print(x); print(', corrupted: 'print(y); print(', right: 'x', wrong: 'y' };

let view = null;
const asked = {};  // what is being asked, by kind: a later request takes the place of an earlier one

// Runs `work(signal)`, and shows what it says if nothing has been asked after it.
async function alone(kind, work, retry) {
  asked[kind]?.abort();
  const mine = asked[kind] = new AbortController();
  trouble.clear();
  find('look').setAttribute('aria-busy', 'true');
  try {
    await work(mine.signal);
  } catch (e) {
    if (mine.signal.aborted) return;
    if (!(e instanceof Refused)) throw e;
    trouble.say(e.message, retry);
  } finally {
    if (asked[kind] === mine) {
      delete asked[kind];
      if (!Object.keys(asked).length) find('look').removeAttribute('aria-busy');
    }
  }
}

const value = id => find(id).value;
const pair = () => ({ model: value('model'), clean: value('text'), corrupted: value('corrupted'), answers: [value('right'), value('wrong')] });

function look() {
  const body = pair();
  const site = view?.site.value ?? 'resid_pre';
  for (const kind of ['over', 'ablate']) asked[kind]?.abort();
  alone('look', async signal => {
    const positions = await patch({ ...body, over: site, by: SITES[site].by }, signal);
    const heads = await patch({ ...body, over: 'z', by: ['head'] }, signal);
    if (signal.aborted) return;
    view = new View(find('view'), positions, heads, {
      over: site => alone('over', async signal => {
        const data = await patch({ ...body, over: site, by: SITES[site].by }, signal);
        if (!signal.aborted) view.show(data);
      }),
      ablate: heads => alone('ablate', async signal => {
        const data = await ablate(body.model, [body.clean, body.corrupted], heads, signal);
        if (!signal.aborted) view.list(data);
      }),
    });
    find('save').disabled = false;
    view.take([]);
    announce(view.summary.textContent);
  }, look);
}

const address = () => new URLSearchParams(FIELDS.map(id => [id, value(id).toWellFormed()]));

function read() {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const id of FIELDS) find(id).value = said.has('text') ? said.get(id) ?? '' : EXAMPLE[id];
}

find('save').addEventListener('click', () => download('patching.svg', view.svg(), 'image/svg+xml'));
begin(read, address, look);
