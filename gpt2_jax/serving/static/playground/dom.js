// Small things that every part needs.

export const find = id => document.getElementById(id);

// An element with properties and children; texts become text nodes, never markup.
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Says something to those who listen. The same text twice in a row is said twice.
export function announce(text) {
  const live = find('live');
  live.textContent = live.textContent === text ? text + '\u00a0' : text;
}

// A text on one line, with what can't be seen made visible.
export const visible = text => (text.trim() ? text : text.replaceAll(' ', '␣')).replace(/\r?\n/g, '↵').replace(/\t/g, '⇥')
  .replace(/[\u0000-\u001f]/g, c => String.fromCharCode(0x2400 + c.charCodeAt(0))).replace(/\u007f/g, '␡');

export const percent = p => p >= 0.9995 ? '100 %' : p >= 0.0995 ? `${(100 * p).toFixed(0)} %`
  : p >= 0.00995 ? `${(100 * p).toFixed(1)} %` : p >= 0.0001 ? `${(100 * p).toFixed(2)} %` : '< 0.01 %';

// What a browser keeps, of this tab or else of the last one that saved it; `fallback` where it keeps
// nothing, or something else than JSON.
export function load(name, fallback) {
  try {
    return JSON.parse(sessionStorage.getItem(name) ?? localStorage.getItem(name)) ?? fallback;
  } catch { return fallback; }
}

// Returns whether it could be kept.
export function save(name, value) {
  try {
    for (const store of [sessionStorage, localStorage]) store.setItem(name, JSON.stringify(value));
    return true;
  } catch { return false; }
}

// `call`, once nothing has asked for it for so many milliseconds; .cancel() forgets it.
export function later(milliseconds, call) {
  let timer;
  const ask = (...given) => { clearTimeout(timer); timer = setTimeout(call, milliseconds, ...given); };
  ask.cancel = () => clearTimeout(timer);
  return ask;
}
