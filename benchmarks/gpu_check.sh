#!/usr/bin/env bash
# Every check and measurement that needs a GPU, the most telling first:
#
#     benchmarks/gpu_check.sh OUTPUT_DIR
#
# Each command writes OUTPUT_DIR/<name>.txt and may take 8 minutes; OUTPUT_DIR/table.md has a row of
# each. What has passed is not run again, so an interrupted check goes on where it was; whoever
# interrupts it stops the command that runs, too. A failure does not stop the others; the exit code
# is the number of failures (at most 125).
# PYTHON: the interpreter (default: python3). TOY=1: the smallest sizes, without the tests and torch.compile, to see
# that every command runs; with PYTHON="python3 tests/support/pretended_device.py" on no GPU at all.
set -u

if [ $# -ne 1 ]; then
    echo "usage: $0 OUTPUT_DIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
read -ra python <<< "${PYTHON:-python3}"
toy=${TOY:-}
failed=() running=
# `timeout` gives its command a process group of its own, which no Ctrl-C reaches.
stop() {
    [ -z "$running" ] || kill "$running" 2> /dev/null
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
{ echo "| check | result | seconds |"; echo "|---|---|---|"; } > "$out/table.md"

# The line of a result that says most.
gist() {
    grep -E 's/kimg|times the published|whole step|passed|failed|blur.*forward|relative|NVIDIA|Error' \
        "$1" | tail -n 1 | tr '|' ' ' | tr -s ' \t' ' ' | cut -c 1-120
}

check() {
    local name=$1 begin=$SECONDS code file="$out/$1.txt"
    shift
    if ! tail -n 1 "$file" 2> /dev/null | grep -q '^exit code 0,'; then
        echo "$name: $*"
        echo "\$ $*" > "$file"
        timeout 480 "$@" >> "$file" 2>&1 &
        running=$!
        wait $running
        code=$? running=
        echo "exit code $code, $((SECONDS - begin)) s" >> "$file"
        if [ "$code" -ne 0 ]; then
            failed+=("$name")
            echo "    FAILED, see $file"
        fi
    fi
    echo "| $name | $(gist "$file") | $(tail -n 1 "$file" | sed 's/.*code //; s/, / exit, /') |" \
        >> "$out/table.md"
}

if [ -n "$toy" ]; then
    sizes=(32) groups=1 train=(--cfg=small --batch=2 --steps=1)
    narrow=(--encoder_size=64 --channels=16)
    encoder=(--batch=2 --steps=1 "${narrow[@]}")
    ours=(--k=2 --steps=1 --n_steps=1 "${narrow[@]}")
    full=(--size=32 --groups=2 --group_batch=1 "${ours[@]}")
    step=(--k=2 --repeats=1 "${narrow[@]}")
    joint=(--size=64 --encoder_size=64 --channels=16 --batch=5 --steps=1)
    ops=(--shapes=1x4x8x8 --repeats=1) demo=(--n_patients=40 --k=2)
    cluster=(--sizes 60) features=(--sizes 60 --reduce=8)
else
    sizes=(256 512) groups=32 train=() encoder=(--batch=8)
    ours=(--steps=20) step=() ops=() cluster=() joint=(--size=128 --encoder_size=128) demo=()
    # Nothing extrapolated: 100 groups of 100 steps, 25 at a time.
    full=(--size=512 --groups=100 --group_batch=25 --steps=100)
    # All 8192 dimensions: the exact result.
    features=(--reduce=8192)
    check gpu nvidia-smi
    check tests "${python[@]}" -m pytest -q -m gpu tests
fi

for size in "${sizes[@]}"; do
    check "anonymise_${size}_bf16" "${python[@]}" benchmarks/anonymise.py --size="$size" \
        --groups=$groups "${ours[@]}" --precision=bf16 --device=cuda --markdown
    check "train_generator_${size}_fp16" "${python[@]}" benchmarks/train_step.py \
        --net=generator --size="$size" --precision=fp16 "${train[@]}" --device=cuda
done
check ops "${python[@]}" benchmarks/ops.py "${ops[@]}" --no_compile --device=cuda --markdown
check demo "${python[@]}" scripts/demo.py --out_dir="$out/demo" "${demo[@]}" --device=cuda
check train_joint_bf16 "${python[@]}" benchmarks/train_step.py --net=joint "${joint[@]}" \
    --precision=bf16 --device=cuda
for size in "${sizes[@]}"; do
    check "train_encoder_${size}_bf16" "${python[@]}" benchmarks/train_step.py \
        --net=encoder --size="$size" --precision=bf16 "${encoder[@]}" --device=cuda
    for precision in fp32 tf32; do
        check "anonymise_${size}_${precision}" "${python[@]}" benchmarks/anonymise.py \
            --size="$size" --groups=$groups "${ours[@]}" --precision=$precision --device=cuda \
            --markdown
    done
    for precision in fp32 bf16; do
        check "train_generator_${size}_${precision}" "${python[@]}" benchmarks/train_step.py \
            --net=generator --size="$size" --precision=$precision "${train[@]}" --device=cuda
    done
    for precision in fp32 tf32 bf16; do
        check "step_${size}_${precision}" "${python[@]}" benchmarks/step.py --size="$size" \
            --groups=$groups "${step[@]}" --precision=$precision --device=cuda --markdown
    done
    check "train_encoder_${size}_fp32" "${python[@]}" benchmarks/train_step.py \
        --net=encoder --size="$size" --precision=fp32 "${encoder[@]}" --device=cuda
done
[ -n "$toy" ] || check ops_compiled "${python[@]}" benchmarks/ops.py --shapes=8x128x256x256 \
    --dtypes=fp32,fp16 --device=cuda --markdown
check anonymise_full "${python[@]}" benchmarks/anonymise.py "${full[@]}" --precision=bf16 \
    --device=cuda --markdown
check cluster "${python[@]}" benchmarks/cluster.py --scaling "${cluster[@]}" --device=cuda
check cluster_full "${python[@]}" benchmarks/cluster.py --memory "${features[@]}" --device=cuda

cat "$out/table.md"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit $(( ${#failed[@]} > 125 ? 125 : ${#failed[@]} ))
fi
echo "all passed; results in $out"
