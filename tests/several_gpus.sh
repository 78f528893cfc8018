#!/usr/bin/env bash
# What is measured on several GPUs of one host, one after the other:
#
#   tests/several_gpus.sh RANKS FOLDER
#
# A rank has a GPU of its own. Results and logs come into FOLDER, summary.md has them in tables. Every part has a time limit; whatever fails,
# the rest is done, and the exit status is 1. DEVICE=cpu does the same with threads and processes of the CPU, for which everything must be small.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# != 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  sed -n 's/^# \{0,1\}//;2,8p' "$0" >&2
  exit 2
fi
RANKS=$1
mkdir -p "$2" && OUT=$(cd "$2" && pwd) || exit 2

# The binary; without it, it is built. Binaries of tests lie in TESTS; without that, cargo builds them.
DSA80=${DSA80:-}
TESTS=${TESTS:-}
DEVICE=${DEVICE:-cuda}
PARTS=${PARTS:-fixtures collectives start step serve fault summary}
# config.json of the model, whose weights are random, and the tokenizer beside which it is served.
CONFIG=${CONFIG:-model/src/glm_5_2.json}
TOKENIZER=${TOKENIZER:-fixtures/default}
# Layers; without it, as many as a rank's memory holds beside caches of so many tokens.
LAYERS=${LAYERS:-}
TOKENS=${TOKENS:-65536}
# Of `bench step`: where not all layers fit, the whole model in so many ranks, of which as many as there are GPUs step.
SHARDS=${SHARDS:-8}
BATCH=${BATCH:-1,4,8,16,32,64}
CONTEXT=${CONTEXT:-8192,32768}
CHUNK=${CHUNK:-2048,4096,8192}
ROWS=${ROWS:-1,2,4,8,16,32,64,128,256,512,1024,2048}
RUNS=${RUNS:-20}
# Of `bench serve`.
STREAMS=${STREAMS:-1 4 8 16 32 64}
INPUT=${INPUT:-8192}
OUTPUT=${OUTPUT:-512}
EACH=${EACH:-2} # requests of every stream
SERVE=${SERVE:---max-model-len 16384 --max-num-batched-tokens 4096 --max-num-seqs 64}
# Seconds: of a part at most, of a start, of a step.
LIMIT=${LIMIT:-600}
START=${START:-300}
DEADLINE=${DEADLINE:-20}

failed=()
fail() { echo "FAILED: $*"; failed+=("$1"); }

# limited NAME COMMAND...: what it says comes into NAME.txt, and its end is shown if it fails. What a run before left is gone.
limited() {
  local name=$1 began=$SECONDS rc
  shift
  rm -f "$OUT/$name.json"
  timeout -k 10 "$LIMIT" "$@" >"$OUT/$name.txt" 2>&1
  rc=$?
  echo "$name: rc $rc, $((SECONDS - began)) s"
  [ $rc = 0 ] && return 0
  tail -n 15 "$OUT/$name.txt"
  fail "$name (rc $rc)"
  return 1
}

binary() { # NAME: of a test
  if [ -n "$TESTS" ]; then echo "$TESTS/$1"; else
    cargo test -q -p dsa80-tests --test "$1" --no-run --message-format=json | grep -o '"executable":"[^"]*' | tail -1 | cut -d'"' -f4
  fi
}

if [ -z "$DSA80" ]; then
  cargo build --release -p dsa80-serve && DSA80=$PWD/target/release/dsa80 || exit 1
fi

# The model: a config and a tokenizer. Its first layers are the dense ones, so that fewer layers are still the model's beginning.
mkdir -p "$OUT/model"
cp "$TOKENIZER/tokenizer_config.json" "$OUT/model/" || exit 1
# A text for every token: those that the tokenizer has not are called w1000 and so on, since a stream is timed by the texts that come.
number() { grep -oE "$1" "$2" | grep -oE '[0-9]+$' | sort -n | tail -1; }
known=$(number '": *[0-9]+' "$TOKENIZER/tokenizer.json")
seq $((known + 1)) $(($(number '"vocab_size": *[0-9]+' "$CONFIG") - 1)) | sed 's/.*/"w&":&,/' | tr -d '\n' >"$OUT/model/names"
awk 'NR == FNR { names = $0; next } { sub(/"vocab": *[{]/, "&" names); print }' \
  <(cat "$OUT/model/names" && echo) "$TOKENIZER/tokenizer.json" >"$OUT/model/tokenizer.json"
rm "$OUT/model/names"
all=$(number '"num_hidden_layers": *[0-9]+' "$CONFIG")
with_layers() { sed "s/\"num_hidden_layers\": *[0-9]*/\"num_hidden_layers\": $1/" "$CONFIG" >"$OUT/model/config.json"; }
if [ -z "$LAYERS" ]; then
  LAYERS=$all
  if [ "$DEVICE" = cuda ]; then
    # What workspace and kernels leave, in GiB.
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sort -n | head -1) || exit 1
    memory=$((memory * 9 / 10 / 1024 - 4))
    for ((; LAYERS > 4; LAYERS -= 2)); do
      with_layers "$LAYERS"
      held=$("$DSA80" inspect "$OUT/model" --tp "$RANKS" --memory "$memory" --json | grep -o '"cache_tokens": *[0-9]*' | grep -o '[0-9]*$')
      [ "${held:-0}" -ge "$TOKENS" ] && break
    done
  fi
fi
with_layers "$LAYERS"
echo "$RANKS ranks on $DEVICE; served with $LAYERS of $all layers; parts: $PARTS"
model=(--model "$OUT/model" --load-format dummy --device "$DEVICE")

fixtures() {
  [ "$DEVICE" = cuda ] || { echo "fixtures: left out: those on the CPU are in cargo test"; return; }
  export DSA80_PARITY=gpu
  limited fixtures_nccl "$(binary nccl)" --nocapture --test-threads 1
  limited fixtures_peers "$(binary model_on_cuda)" ranks_on_a_gpu_each steps_of_several_ranks --nocapture --test-threads 1
  local name
  for name in fixtures_nccl fixtures_peers; do
    # A test that leaves out these ranks passes, and so does a name that no test has.
    grep -qE "left out: ($RANKS ranks|NCCL between $RANKS GPUs|NCCL \(|a GPU)|running 0 tests" "$OUT/$name.txt" && fail "$name (left out $RANKS ranks)"
  done
}

collectives() {
  limited collectives "$DSA80" bench collectives --device "$DEVICE" --tp "$RANKS" --rows "$ROWS" --runs "$RUNS" --json "$OUT/collectives.json"
}

start() {
  # shellcheck disable=SC2086
  limited start "$DSA80" bench start "${model[@]}" --tp "$RANKS" $SERVE --json "$OUT/start.json"
}

step() {
  local which=(--tp "$RANKS" --live "$RANKS")
  if [ "$LAYERS" = "$all" ] || [ "$RANKS" -ge "$SHARDS" ]; then
    which+=(--model "$OUT/model")
  else
    with_layers "$all"
    which=(--model "$OUT/model" --tp "$SHARDS" --live "$RANKS")
  fi
  limited step "$DSA80" bench step "${which[@]}" --device "$DEVICE" --batch "$BATCH" --context "$CONTEXT" --chunk "$CHUNK" --runs "$RUNS" \
    --json "$OUT/step.json"
  with_layers "$LAYERS"
}

# Processes that are ours, and the address of the first.
pids=()
address=

stop() { # SIGNAL
  local pid
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null; done
}
trap 'stop KILL' EXIT

# All have ended within SECONDS: prints how long that took.
all_end() {
  local began pid
  began=$(date +%s%N)
  while :; do
    local there=0
    for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null && there=1; done
    local ms=$((($(date +%s%N) - began) / 1000000))
    [ $there = 0 ] && { echo $ms; return 0; }
    [ $ms -gt $(($1 * 1000)) ] && return 1
    sleep 0.1
  done
}

# Waits until the first process of log NAME answers.
ready() {
  local end=$((SECONDS + START))
  address=
  while [ $SECONDS -lt $end ] && kill -0 "${pids[0]}" 2>/dev/null; do
    address=$(grep -o 'ready: http://[^/]*' "$OUT/$1.txt" | head -1)
    address=${address#ready: }
    [ -n "$address" ] && return 0
    sleep 0.2
  done
  tail -n 15 "$OUT/$1.txt"
  fail "$1 (not ready within $START s)"
  return 1
}

ask() { # NAME STREAMS REQUESTS INPUT OUTPUT
  limited "$1" "$DSA80" bench serve --base-url "$address" --concurrency "$2" --num-requests "$3" --input-len "$4" --output-len "$5" \
    --ignore-eos --warmup 1 --seed "$2" --json "$OUT/$1.json" || return 1
  # An answer that failed is an error, too.
  grep -q '"errors": {}' "$OUT/$1.json" || fail "$1 (errors)"
}

serve() {
  local streams
  : >"$OUT/server.txt"
  # shellcheck disable=SC2086
  "$DSA80" serve "${model[@]}" --tp "$RANKS" $SERVE --port 0 >"$OUT/server.txt" 2>&1 &
  pids=($!)
  if ready server; then
    for streams in $STREAMS; do
      ask "serve_$streams" "$streams" $((streams * EACH)) "$INPUT" "$OUTPUT" || break
    done
  fi
  stop TERM
  all_end 60 >/dev/null || { stop KILL; fail "server (does not stop)"; }
  pids=()
}

# A process for every rank, as a launcher starts them.
launch() { # NAME
  local rank port=$((20000 + RANDOM % 20000))
  pids=()
  for ((rank = 0; rank < RANKS; rank++)); do
    : >"$OUT/$1_$rank.txt"
    # shellcheck disable=SC2086
    RANK=$rank WORLD_SIZE=$RANKS LOCAL_RANK=$rank MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      "$DSA80" serve "${model[@]}" $SERVE --step-timeout "$DEADLINE" --port 0 >"$OUT/$1_$rank.txt" 2>&1 &
    pids+=($!)
  done
  ready "$1_0"
}

# The last rank is killed while requests run: all must end with the reason, and a restart must answer again.
fault() {
  local last=$((RANKS - 1)) rank ms asking
  [ "$RANKS" -gt 1 ] || { echo "fault: left out: one rank has no others"; return; }
  rm -f "$OUT/fault.json" "$OUT/fault_load.json"
  if launch fault; then
    "$DSA80" bench serve --base-url "$address" --concurrency 4 --num-requests 1000 --input-len 64 --output-len "$OUTPUT" --ignore-eos --warmup 0 \
      --json "$OUT/fault_load.json" >"$OUT/fault_load.txt" 2>&1 &
    asking=$!
    # Until it serves them.
    sleep "${LOAD:-4}"
    kill -KILL "${pids[$last]}"
    { wait "${pids[$last]}"; } 2>/dev/null
    if ms=$(all_end $((DEADLINE + 10))); then
      echo "fault: rank $last of $RANKS killed under load; all had ended after $ms ms"
    else
      stop KILL
      fail "fault (ranks outlive the one that was killed)"
    fi
    wait "$asking"
    for ((rank = 0; rank < last; rank++)); do
      wait "${pids[$rank]}" && fail "fault_$rank (ended with 0)"
      grep -q "rank $last has closed its connection" "$OUT/fault_$rank.txt" || fail "fault_$rank (does not say why)"
    done
    tail -n 1 "$OUT/fault_0.txt"
    grep -q "rank $last has closed its connection" "$OUT/fault_load.json" || fail "fault_load (no request was told why)"
    printf '{"fault": "rank %s of %s killed under load", "all_ended_after_ms": %s, "deadline_s": %s}\n' "$last" "$RANKS" "${ms:-null}" "$DEADLINE" \
      >"$OUT/fault.json"
  else
    stop KILL
  fi
  if launch restart; then
    ask restart 1 2 64 8
    stop TERM
    all_end 60 >/dev/null || { stop KILL; fail "restart (does not stop)"; }
  else
    stop KILL
  fi
  pids=()
}

summary() {
  local files=() name
  for name in start collectives step; do [ -s "$OUT/$name.json" ] && files+=("$OUT/$name.json"); done
  for name in $STREAMS; do [ -s "$OUT/serve_$name.json" ] && files+=("$OUT/serve_$name.json"); done
  limited summary "$DSA80" bench summary "${files[@]}" && cp "$OUT/summary.txt" "$OUT/summary.md"
}

for part in $PARTS; do
  case $part in
    fixtures | collectives | start | step | serve | fault | summary) "$part" ;;
    *) fail "$part (no such part: fixtures, collectives, start, step, serve, fault, summary)" ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all done in $SECONDS s: $OUT"
