// The server's API, which is OpenAI's. A request outlives a missing key and a full queue; it ends
// with an answer, an abort, or `Refused`.

import * as trouble from './trouble.js';

const KEY = 'gpt2_jax.key';  // of sessionStorage: gone when the tab is closed

export class Refused extends Error {
  constructor(message, code = null) {
    super(message);
    this.code = code;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

async function ask(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
    const post = body && { method: 'POST', body: JSON.stringify(body) };
    if (body) headers['Content-Type'] = 'application/json';
    let response;
    try {
      response = await fetch(path, { ...post, headers, signal });
    } catch (e) {
      if (signal?.aborted) throw e;
      throw new Refused('The server can’t be reached. Your text is kept here.');
    }
    if (response.ok) return response;
    const said = (await response.json().catch(() => null))?.error;
    const message = said?.message ?? `The server answers ${response.status} ${response.statusText}.`;
    if (response.status === 401) {
      sessionStorage.setItem(KEY, await trouble.askForKey(key !== null, signal));
    } else if (response.status === 429) {
      await trouble.wait(Number(response.headers.get('Retry-After')) || 1, signal);
    } else {
      throw new Refused(message, said?.code);
    }
  }
}

export async function models() {
  return (await (await ask('/v1/models')).json()).data;
}

// What /v1/attention says of a text.
export async function attention(model, text, lens, signal) {
  return (await ask('/v1/attention', { model, input: text, lens }, signal)).json();
}

// What patches between two texts restore, and what comes after texts without some heads.
export async function patch(body, signal) {
  return (await ask('/v1/patch', body, signal)).json();
}
export async function ablate(model, texts, heads, signal) {
  return (await ask('/v1/ablate', { model, input: texts, heads }, signal)).json();
}

// The objects of a stream of server-sent events, as they come.
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused('The server stopped in the middle. Your text is kept here.');
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines.filter(line => line.startsWith('data:'))) {
        const data = line.slice(5).trim();
        if (data === '[DONE]') return;
        const event = JSON.parse(data);
        if (event.error) throw new Refused(event.error.message, event.error.code);
        yield event;
      }
    }
  } catch (e) {
    if (signal?.aborted || e instanceof Refused) throw e;
    throw new Refused('The connection to the server broke. Your text is kept here.');
  } finally {
    reader.cancel().catch(() => {});
  }
}

// The end of a text, from the start of a line or a word if one is near, with no character halved.
export function tail(text, length) {
  if (text.length <= length) return text;
  const end = text.slice(text.length - Math.max(1, length));
  const near = end.slice(0, Math.floor(end.length / 4));
  const start = near.search(/\n(?!\n)/) + 1 || Math.max(0, near.search(/\s\S/));
  return end.slice(start || (/^[\udc00-\udfff]/.test(end) ? 1 : 0));
}

const rooms = new Map();  // characters that had room, by what had to fit

// Sends a prompt, and of one that is too long the end that the model has room for: the server alone
// counts tokens, so it is asked until it agrees. Returns [prompt, response].
async function fitted(body, signal) {
  const what = `${body.model} ${body.max_tokens}`;
  let prompt = tail(body.prompt, rooms.get(what) ?? Infinity);
  for (;;) {
    try {
      const response = await ask('/v1/completions', { ...body, prompt }, signal);
      if (prompt.length < body.prompt.length) rooms.set(what, prompt.length);
      return [prompt, response];
    } catch (e) {
      if (e.code !== 'context_length_exceeded' || prompt.length < 2) throw e;
      const [, context, tokens] = e.message.match(/length is (\d+) .*\((\d+) in your prompt/) ?? [];
      const share = 0.98 * (context - body.max_tokens) / tokens;  // NaN where the message is another
      prompt = tail(prompt, Math.floor(prompt.length * (share > 0 && share < 0.98 ? share : 0.75)));
    }
  }
}

// Continues body.prompt. Returns the prompt that had room and a stream of {index, text, finish}.
export async function complete(body, signal) {
  const [prompt, response] = await fitted({ ...body, stream: true }, signal);
  const pieces = async function* () {
    for await (const { choices } of events(response, signal)) {
      for (const { index, text, finish_reason: finish } of choices ?? []) yield { index, text, finish };
    }
  };
  return { prompt, pieces: pieces() };
}

// What the model holds of each token of a text: {prompt, tokens: [{start, end, p, top}]}, of the end
// of the text that has room. Places count JavaScript's units in `text`; `top` is [{text, p}], the
// likeliest first; p is null where nothing comes before.
export async function score(model, text, signal) {
  const [prompt, response] = await fitted(
    { model, prompt: text.toWellFormed(), max_tokens: 0, echo: true, logprobs: 5 }, signal);
  const { token_logprobs: logprobs, top_logprobs: tops, text_offset: offsets } =
    (await response.json()).choices[0].logprobs;
  const units = [text.length - prompt.length];  // of each character, as Python counts them
  for (const character of prompt) units.push(units.at(-1) + character.length);
  const tokens = [];
  let sum = 0;  // of tokens that are parts of one character
  for (let i = 0; i < offsets.length; i++) {
    const [start, end] = [units[offsets[i]], units[offsets[i + 1] ?? units.length - 1]];
    sum = logprobs[i] === null || sum === null ? null : sum + logprobs[i];
    if (end <= start) continue;
    const top = Object.entries(tops[i] ?? {}).map(([text, l]) => ({ text, p: Math.exp(l) }));
    top.sort((a, b) => b.p - a.p);
    tokens.push({ start, end, p: sum === null ? null : Math.exp(sum), top });
    sum = 0;
  }
  return { prompt, tokens };
}
