# %% [markdown]
# # Serve
#
# OpenAI's completions API on your own checkpoint: any client of it can ask.

# %%
import subprocess
import sys

REPOSITORY = 'URL'  # in Colab: the address that this notebook was opened from
if 'google.colab' in sys.modules:
  package = f'gpt2_jax[serve] @ git+{REPOSITORY}'
  subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', package], check=True)

# %% [markdown]
# A small model to look at: four layers, 60 steps on the source code of Python's own library, half a
# minute on a CPU. With the internet `gpt2_jax.from_pretrained('gpt2')` is the released one, and all that
# follows works with it.

# %%
import gpt2_jax

run = gpt2_jax.train('tiny', 'runs/small', train={'steps': 60}, log={'sample_tokens': 20})
model = run.model
model

# %% [markdown]
# The server is a program of its own. Here it runs beside the notebook, on a port that is free.

# %%
import json
import socket
import time
import urllib.request

with socket.socket() as free:
  free.bind(('127.0.0.1', 0))
  port = free.getsockname()[1]
command = ['serve', '--checkpoint', str(run.workdir), '--port', str(port)]
server = subprocess.Popen([sys.executable, '-m', 'gpt2_jax', *command])
url = f'http://127.0.0.1:{port}'


def ask(path, body=None):
  data = None if body is None else json.dumps(body).encode()
  request = urllib.request.Request(url + path, data, {'Content-Type': 'application/json'})
  return json.loads(urllib.request.urlopen(request, timeout=120).read())


for _ in range(240):  # until it answers
  try:
    print(ask('/v1/models'))
    break
  except OSError:
    time.sleep(0.5)

# %%
name = ask('/v1/models')['data'][0]['id']
answer = ask('/v1/completions', {'model': name, 'prompt': 'import', 'max_tokens': 20, 'seed': 1})
print(answer['choices'][0]['text'])
print(answer['usage'])

# %% [markdown]
# The same by OpenAI's package, where it is installed (`pip install openai`).

# %%
import importlib.util

if importlib.util.find_spec('openai'):
  import openai

  client = openai.OpenAI(base_url=f'{url}/v1', api_key='none')
  for chunk in client.completions.create(
    model=name, prompt='class', max_tokens=20, seed=1, stream=True
  ):
    print(chunk.choices[0].text if chunk.choices else '', end='')

# %% [markdown]
# A page to write on is at the address below, and at `/attention` what each head looks at. At the end the
# server is stopped.

# %%
print(url)
server.terminate()
server.wait()
