// The playground: puts the parts together.

import { Alternatives } from './alternatives.js';
import { hasKey, models, Refused, tail } from './api.js';
import { Branches } from './branches.js';
import { Continuations } from './continuations.js';
import { texts, toClipboard } from './copy.js';
import { announce, element, find, later } from './dom.js';
import { Editor } from './editor.js';
import { Settings } from './settings.js';
import * as trouble from './trouble.js';

const EXAMPLES = [
  'Hello, I\'m a language model,',
  'In a shocking finding, scientists discovered a herd of unicorns living in a remote valley.',
  'import os\n\n\ndef main(',
];
const LINK = 2000;  // characters that the attention view is given

const branches = new Branches();
find('text').value = branches.current.text;  // before anything can be undone
const editor = new Editor(find('text'), find('mirror'));
const settings = new Settings();
const continuations = new Continuations(editor, settings);
const alternatives = new Alternatives(editor, settings, (place, text) => {
  const parted = editor.text.slice(0, place) + text;
  keep();
  branches.add(parted, place);
  show(parted);
  announce('A new branch.');
  continuations.ask({ n: 1, take: true });
});

function show(text) {
  continuations.drop();
  editor.insert(0, editor.text.length, text);
  editor.focus();
}

// ---- the document ---------------------------------------------------------

function keep() {
  if (!branches.keep(editor.text)) {
    trouble.say('This browser keeps no more text: copy it before you leave.');
  }
}
const keepSoon = later(150, keep);

function changed() {
  find('empty').hidden = editor.text !== '';
  const text = tail(editor.text, LINK).toWellFormed();
  find('attention').href = text ? `/attention#text=${encodeURIComponent(text)}` : '/attention';
}

editor.area.addEventListener('input', () => {
  continuations.drop();
  find('note').textContent = '';
  changed();
  keepSoon();
});
addEventListener('pagehide', keep);

// ---- keys -----------------------------------------------------------------

let leaving = false;  // Tab leaves the document, after Esc

editor.area.addEventListener('keydown', event => {
  const { key, shiftKey, altKey, ctrlKey, metaKey } = event;
  if (event.isComposing) return;
  if (key === 'ArrowDown' && altKey && alternatives.on) alternatives.enter();
  else if (ctrlKey || metaKey || altKey) return;
  else if (key === 'Tab' && !shiftKey && !leaving) {
    alternatives.close();
    continuations.ask();
  } else if (key === 'Escape') {
    if (alternatives.open || continuations.open) {
      alternatives.close();
      continuations.drop();
      announce('Dropped.');
    } else {
      leaving = true;
      announce('Tab now leaves the document.');
    }
  } else if (continuations.open && key === 'ArrowDown') continuations.choose(1);
  else if (continuations.open && key === 'ArrowUp') continuations.choose(-1);
  else if (continuations.open && key === 'Enter') continuations.take();
  else {
    if (continuations.open && /^(Arrow|Home|End|Page)/.test(key)) continuations.drop();
    if (key !== 'Shift') leaving = false;
    return;
  }
  event.preventDefault();
});
editor.area.addEventListener('blur', () => { leaving = false; });
editor.area.addEventListener('pointerdown', () => continuations.drop());

const button = find('continue');
button.addEventListener('pointerdown', event => event.preventDefault());  // the field keeps the focus
button.addEventListener('click', () => {
  editor.focus();
  continuations.ask();
});

// ---- menus ----------------------------------------------------------------

find('branches').addEventListener('beforetoggle', () => { keep(); branches.draw(show); });
find('new-branch').addEventListener('click', () => {
  keep();
  branches.add('', -1);
  show('');
  find('branches').hidePopover();
});

find('copy').addEventListener('beforetoggle', () => {
  find('copied').hidden = true;
  find('copy-what').textContent = continuations.last ? 'The last continuation, as' : 'What Tab would ask for, as';
});
find('copy-menu').addEventListener('click', async event => {
  const what = event.target.closest('[data-copy]')?.dataset.copy;
  if (!what) return;
  const { request, index } = continuations.last ?? {
    request: settings.request(editor.text.slice(0, editor.caret), 3, settings.get('seed')), index: 0 };
  try {
    const text = what === 'text' ? editor.text
      : texts[what](request, {
        index, checkpoint: settings.sourceOf(request), origin: location.origin, key: hasKey() });
    const done = await toClipboard(text);
    Object.assign(find('copied'), { value: text, hidden: false });
    if (!done) find('copied').select();
    announce(done ? 'Copied.' : 'Select and copy the text below.');
  } catch (e) {
    if (!(e instanceof RangeError)) throw e;
    trouble.say(e.message);
  }
});

find('settings').addEventListener('settings', ({ detail }) => {
  if (detail === 'model') alternatives.refresh();
});

find('examples').append(...EXAMPLES.map(text => element('li', {}, element('button', {
  type: 'button', textContent: text.split('\n').filter(Boolean).join(' … '), onclick: () => {
    show(text);
    continuations.ask();
  } }))));

// ---- start ----------------------------------------------------------------

async function connect() {
  try {
    settings.offer(await models());
    alternatives.refresh();
  } catch (e) {
    if (!(e instanceof Refused)) throw e;
    trouble.say(e.message, connect);
  }
}

changed();
editor.area.setSelectionRange(editor.text.length, editor.text.length);
if (matchMedia('(pointer: fine)').matches) editor.focus();
connect();
