// What the pages with one form share: the models to choose from, sending, and the address.

import { models, Refused } from './api.js';
import { element, find } from './dom.js';
import * as trouble from './trouble.js';

// `read()` fills the form from the address, `address()` is what the address says of the form, and
// `look()` asks the server and shows the answer.
export async function begin(read, address, look) {
  const submit = () => {
    history.replaceState(null, '', `#${address()}`);
    look();
  };
  find('form').addEventListener('submit', event => {
    event.preventDefault();
    submit();
  });
  find('form').addEventListener('keydown', event => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) submit();
  });
  find('model').addEventListener('change', look);
  addEventListener('hashchange', () => {
    read();
    look();
  });
  read();
  await choose(look);
}

async function choose(look) {
  try {
    const all = await models();
    find('model').append(...all.map(({ id }) => element('option', { value: id, textContent: id })));
    find('model-field').hidden = all.length < 2;
    await look();
  } catch (e) {
    if (!(e instanceof Refused)) throw e;
    trouble.say(e.message, () => choose(look));
  }
}
