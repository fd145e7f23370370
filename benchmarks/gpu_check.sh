#!/usr/bin/env bash
# Every check and measurement that needs a GPU, one after the other:
#
#     benchmarks/gpu_check.sh OUTPUT_DIR
#
# Each command writes OUTPUT_DIR/<name>.txt. A failure does not stop the others; the exit code is
# the number of failures (at most 125). PYTHON names the interpreter (default: python3).
set -u

if [ $# -ne 1 ]; then
    echo "usage: $0 OUTPUT_DIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
failed=()

check() {
    local name=$1 begin=$SECONDS code
    shift
    echo "$name: $*"
    { echo "\$ $*"; "$@" 2>&1; code=$?; echo "exit code $code, $((SECONDS - begin)) s"; } \
        > "$out/$name.txt"
    if [ "$code" -ne 0 ]; then
        failed+=("$name")
        echo "    FAILED, see $out/$name.txt"
    fi
}

check gpu nvidia-smi
check tests_gpu "$python" -m pytest -q -m gpu tests
check tests_ops "$python" -m pytest -q tests/test_cuda_ops.py
check ops "$python" benchmarks/ops.py --device=cuda --markdown
for size in 256 512; do
    for precision in fp32 fp16 bf16; do
        check "train_generator_${size}_${precision}" "$python" benchmarks/train_step.py \
            --net=generator --size=$size --precision=$precision --device=cuda --breakdown
    done
    # fp32 and mixed precision at the published batch of 8.
    for precision in fp32 bf16; do
        check "train_encoder_${size}_${precision}" "$python" benchmarks/train_step.py \
            --net=encoder --batch=8 --size=$size --precision=$precision --device=cuda --breakdown
    done
    for precision in fp32 tf32 bf16; do
        check "step_${size}_${precision}" "$python" benchmarks/step.py --size=$size --groups=32 \
            --precision=$precision --device=cuda --markdown
        check "anonymise_${size}_${precision}" "$python" benchmarks/anonymise.py --size=$size \
            --groups=32 --steps=20 --precision=$precision --device=cuda --markdown
    done
done
# Nothing extrapolated: 100 groups of 100 steps, 25 at a time.
check anonymise_512_full "$python" benchmarks/anonymise.py --size=512 --groups=100 \
    --group_batch=25 --steps=100 --precision=bf16 --device=cuda --markdown
check cluster "$python" benchmarks/cluster.py --scaling --device=cuda
# All 8192 dimensions: the exact result.
check cluster_full "$python" benchmarks/cluster.py --memory --reduce=8192 --device=cuda

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit $(( ${#failed[@]} > 125 ? 125 : ${#failed[@]} ))
fi
echo "all passed; results in $out"
