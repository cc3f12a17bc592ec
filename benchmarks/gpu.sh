#!/usr/bin/env bash
# All that is measured on a GPU, in one call of under ten minutes: bash benchmarks/gpu.sh [FOLDER]
#
# What is there is used as it is; what is missing is named, and what needs it left out. Needed: jax with
# a GPU, flax, optax, orbax-checkpoint. For the peers: torch with a GPU, and transformers. The rest of
# this package's requirements is fetched by pip where it can be.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/jax_cache}

have() { python -c "import $1" 2>/dev/null; }
for module in jax flax optax orbax.checkpoint torch transformers; do
  have "$module" || echo "missing: $module"
done
missing=()
for pair in absl:absl-py etils:etils filelock:filelock grain:grain ml_collections:ml-collections \
  msgpack:msgpack rich:rich safetensors:safetensors tiktoken:tiktoken tokenizers:tokenizers \
  tyro:tyro yaml:pyyaml scipy:scipy tensorboardX:tensorboardX huggingface_hub:huggingface_hub; do
  have "${pair%%:*}" || missing+=("${pair##*:}")
done
if [ "${#missing[@]}" -gt 0 ]; then
  echo "missing: ${missing[*]}"
  timeout 60 pip install --quiet "${missing[@]}" || echo 'pip could not fetch them'
fi
python - <<'EOF' || { echo 'no GPU that JAX sees: nothing to measure'; exit 1; }
import jax
print('jax', jax.__version__, jax.devices())
raise SystemExit(jax.default_backend() != 'gpu')
EOF
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true

modes=(eager sdpa sdpa+compile)
have torch && have transformers || modes=()
step() {  # step NAME LIMIT COMMAND…: what it prints, and how it ended
  local name=$1 limit=$2
  shift 2
  printf '\n=== %s (%s s)\n' "$name" "$SECONDS"
  timeout "$limit" "$@" 2>"$out/$name.err" | tee "$out/$name.txt"
  local status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || { echo "$name ended with $status:"; tail -n 5 "$out/$name.err"; }
}
step kernels 60 python -m benchmarks.kernels --json "$out/kernels.json"
step train-small 190 python -m benchmarks.train --sizes small --shapes 16x1024 --dtypes bfloat16 \
  --modes "${modes[@]}" --levers scan_layers=True remat=full --steps 10 --repeats 4 \
  --json "$out/train-small.json"
step train-xl 95 python -m benchmarks.train --sizes xl --shapes 4x1024 --dtypes bfloat16 \
  --modes --steps 3 --repeats 3 --json "$out/train-xl.json"
if [ "${#modes[@]}" -gt 0 ]; then
  step decode 140 python -m benchmarks.decode --dtypes bfloat16 --batches 1 8 64 --prompts 16 960 \
    --new 128 --no-stream --json "$out/decode.json"
fi
step startup 40 python -m benchmarks.startup --json "$out/startup.json"
printf '\nall done in %s s: %s\n' "$SECONDS" "$out"
