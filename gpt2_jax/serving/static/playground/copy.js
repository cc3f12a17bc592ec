// What repeats a continuation elsewhere: a command, a call, a program. Each is quoted for its language.

// A word of bash: '…' as it is, or $'…' where it holds what a terminal can't show.
export function shell(text) {
  if (text.includes('\0')) throw new RangeError('A command can’t hold the character 0: copy curl or Python.');
  if (/^[\w.,:\/@%+-]+$/.test(text)) return text;
  if (!/[\u0001-\u001f\u007f]/.test(text)) return `'${text.replaceAll("'", "'\\''")}'`;
  const escape = c => ({ '\n': '\\n', '\t': '\\t', '\r': '\\r' })[c]
    ?? (/['\\]/.test(c) ? '\\' + c : `\\x${c.charCodeAt(0).toString(16).padStart(2, '0')}`);
  return `$'${text.replace(/[\u0001-\u001f\u007f'\\]/g, escape)}'`;
}

// A text of Python: what JSON makes of it means the same there.
const python = JSON.stringify;

// Names of gpt2_jax.generate for those of the API, without what is its default.
function options({ n, max_tokens, temperature, top_p, top_k, seed, stop }) {
  const given = { max_new_tokens: max_tokens };
  if (temperature === 0) given.do_sample = false;
  else Object.assign(given, n > 1 && { num_return_sequences: n }, temperature !== 1 && { temperature },
    top_p && { top_p }, top_k && { top_k }, { seed });
  if (stop) given.stop_strings = stop;
  return given;
}

export const texts = {
  cli(request, { checkpoint }) {
    const words = [`--checkpoint ${shell(checkpoint)}`, `--prompt=${shell(request.prompt)}`];
    for (const [name, value] of Object.entries(options(request))) {
      if (name === 'do_sample') words.push('--greedy');
      else words.push(`--${name.replaceAll('_', '-')} ${[value].flat().map(v => shell(String(v))).join(' ')}`);
    }
    return `gpt2-jax sample ${words.slice(0, 2).join(' ')} \\\n  ${words.slice(2).join(' ')}\n`;
  },

  curl(request, { origin, key }) {
    const headers = ["-H 'Content-Type: application/json'"];
    if (key) headers.push('-H "Authorization: Bearer $GPT2_JAX_API_KEY"');
    return `curl -s ${shell(origin + '/v1/completions')} ${headers.join(' ')} \\\n  -d ${shell(JSON.stringify(request))}\n`;
  },

  python(request, { index, checkpoint }) {
    const value = v => Array.isArray(v) ? `[${v.map(value).join(', ')}]`
      : v === false ? 'False' : typeof v === 'string' ? python(v) : String(v);
    const given = Object.entries(options(request)).map(([name, v]) => `${name}=${value(v)}`);
    return [
      'import gpt2_jax', '',
      `model = gpt2_jax.from_pretrained(${python(checkpoint)})`,
      `results = gpt2_jax.generate(model, ${python(request.prompt)}, ${given.join(', ')})`,
      `print(results[${index}].text)`, ''].join('\n');
  },
};

// To the clipboard, if the browser lets us. Elsewhere (a server without TLS that is not this machine)
// false: the text is to be shown.
export async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
