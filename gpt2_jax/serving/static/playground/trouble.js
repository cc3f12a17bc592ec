// One line that says what went wrong, and what to do about it.

import { element, find } from './dom.js';

const [line, form, key] = ['error', 'key-form', 'key'].map(find);

export function clear() {
  line.hidden = true;
}

// `retry`, if given, becomes a button.
export function say(text, retry) {
  line.replaceChildren(element('span', { textContent: text }));
  const button = (textContent, then) => element('button', { type: 'button', textContent, onclick: () => {
    clear();
    find('text').focus();
    then?.();
  } });
  if (retry) line.append(button('Try again', retry));
  line.append(button('Close'));
  line.hidden = false;
}

const aborted = signal => new Promise((_, reject) => signal?.addEventListener(
  'abort', () => reject(signal.reason), { once: true }));

// The server is busy: counts down, then returns for the next try.
export async function wait(seconds, signal) {
  const over = aborted(signal);
  try {
    for (let left = Math.ceil(seconds); left > 0; left--) {
      say(`The server is busy: trying again in ${left} s.`);
      await Promise.race([over, new Promise(done => setTimeout(done, 1000))]);
    }
  } finally {
    clear();
  }
}

let asked = null;  // one form for all requests that wait for a key

export async function askForKey(refused, signal) {
  if (refused) say('The server does not know this key.');
  asked ??= new Promise(resolve => {
    form.hidden = false;
    key.focus();
    form.onsubmit = event => {
      event.preventDefault();
      form.hidden = true;
      clear();
      resolve(key.value);
      key.value = '';
      find('text').focus();
      asked = null;
    };
  });
  return Promise.race([asked, aborted(signal)]);
}
