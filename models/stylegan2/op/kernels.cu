// CUDA kernels of upfirdn2d and bias + leaky ReLU, with a plain C interface and no dependence on
// PyTorch or Python headers: they compile wherever there is nvcc, and are called through ctypes.
//
// Every launcher returns a cudaError_t as int (0: success). Sums are taken in float (double for
// double tensors). Sizes and offsets are 64-bit.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

template <typename T> struct Sum { using type = float; };
template <> struct Sum<double> { using type = double; };

template <typename T> __device__ __forceinline__ typename Sum<T>::type load(T v) {
    return static_cast<typename Sum<T>::type>(v);
}
template <> __device__ __forceinline__ float load<__half>(__half v) { return __half2float(v); }
template <> __device__ __forceinline__ float load<__nv_bfloat16>(__nv_bfloat16 v) {
    return __bfloat162float(v);
}
template <typename T, typename S> __device__ __forceinline__ T store(S v) {
    return static_cast<T>(v);
}
template <> __device__ __forceinline__ __half store<__half, float>(float v) {
    return __float2half_rn(v);
}
template <> __device__ __forceinline__ __nv_bfloat16 store<__nv_bfloat16, float>(float v) {
    return __float2bfloat16_rn(v);
}

// V values that travel as one memory transaction.
template <typename T, int V> struct alignas(sizeof(T) * V) Pack { T v[V]; };

__host__ __device__ __forceinline__ int64_t floor_div(int64_t a, int64_t b) {
    int64_t q = a / b;
    return q * b > a ? q - 1 : q;
}

struct Filter {
    // Output sizes, input sizes and the layout as element strides; `inner` counts the vectors of
    // V neighbouring channels of the channels-last layout (1 in the contiguous one).
    int64_t n, channels, in_h, in_w, out_h, out_w;
    int64_t in_stride[4], out_stride[4];    // n, c, h, w
    int up, down, left, top, kh, kw;
};

// Any factors and filter sizes: one thread per output.
template <typename T>
__global__ void filter_any(const T* __restrict__ x, const float* __restrict__ taps,
                           T* __restrict__ y, Filter f, bool channels_last) {
    using S = typename Sum<T>::type;
    const int64_t total = f.n * f.channels * f.out_h * f.out_w;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < total;
         i += (int64_t)gridDim.x * blockDim.x) {
        int64_t rest = i, c, ox, oy;
        if (channels_last) {
            c = rest % f.channels; rest /= f.channels;
            ox = rest % f.out_w; rest /= f.out_w;
            oy = rest % f.out_h; rest /= f.out_h;
        } else {
            ox = rest % f.out_w; rest /= f.out_w;
            oy = rest % f.out_h; rest /= f.out_h;
            c = rest % f.channels; rest /= f.channels;
        }
        // Position of the first tap in the zero-inserted image; only multiples of `up` hold data.
        const int64_t x0 = ox * f.down - f.left, y0 = oy * f.down - f.top;
        const T* image = x + rest * f.in_stride[0] + c * f.in_stride[1];
        S sum = 0;
        int64_t iy = -floor_div(-y0, f.up);
        for (int ky = (int)(iy * f.up - y0); ky < f.kh; ky += f.up, ++iy) {
            if (iy < 0 || iy >= f.in_h) continue;
            int64_t ix = -floor_div(-x0, f.up);
            for (int kx = (int)(ix * f.up - x0); kx < f.kw; kx += f.up, ++ix) {
                if (ix < 0 || ix >= f.in_w) continue;
                // A convolution: the filter is flipped.
                sum += (S)taps[(f.kh - 1 - ky) * f.kw + (f.kw - 1 - kx)]
                       * load(image[iy * f.in_stride[2] + ix * f.in_stride[3]]);
            }
        }
        y[rest * f.out_stride[0] + c * f.out_stride[1] + oy * f.out_stride[2]
          + ox * f.out_stride[3]] = store<T, S>(sum);
    }
}

constexpr int kRows = 16;    // output rows a thread walks down
constexpr int kTaps = 4;     // filter_small: taps along an axis, absent ones being zero

// Bits of a pack, so that it is written as one transaction.
template <int BYTES> struct Bits;
template <> struct Bits<2> { using type = unsigned short; };
template <> struct Bits<4> { using type = unsigned int; };
template <> struct Bits<8> { using type = uint2; };
template <> struct Bits<16> { using type = uint4; };

template <typename T, int V, typename S>
__device__ __forceinline__ void put(T* at, const S (&values)[V]) {
    using Raw = typename Bits<sizeof(T) * V>::type;
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.v[v] = store<T, S>(values[v]);
    // A plain assignment is split into scalar stores again before sm_100.
    __stwb(reinterpret_cast<Raw*>(at), *reinterpret_cast<const Raw*>(&pack));
}

// `N` packs of an input row, `step` elements apart; zeros outside of the image.
template <typename T, int V, int N, typename S>
__device__ __forceinline__ void read_row(S (&row)[N][V], const T* at, int64_t step,
                                         const bool (&inside)[N], bool there) {
    Pack<T, V> packs[N];
#pragma unroll
    for (int b = 0; b < N; ++b) {
        packs[b] = Pack<T, V>{};
        if (there && inside[b]) packs[b] = *reinterpret_cast<const Pack<T, V>*>(at + b * step);
    }
#pragma unroll
    for (int b = 0; b < N; ++b)
#pragma unroll
        for (int v = 0; v < V; ++v) row[b][v] = load(packs[b].v[v]);
}

template <int V, typename S>
__device__ __forceinline__ void add_taps(S (&sum)[V], const S (&taps)[kTaps],
                                         const S (&row)[kTaps][V]) {
#pragma unroll
    for (int b = 0; b < kTaps; ++b)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += taps[b] * row[b][v];
}

// Where a thread reads and writes: the pack of V channels of one image at input row 0 and output
// row 0, its first input column and its output column or pair of columns.
template <typename T> struct Spot { const T* in; T* out; int64_t in_x, out_x; };

// Without resampling. Every input row, when it is read, goes into the four output rows it belongs
// to: row iy is tap a of output row iy + top - a, whose sum stands in slot (output row) % 4.
template <typename T, int V, typename S>
__device__ __forceinline__ void walk_plain(const Spot<T>& spot, const S (&weight)[kTaps][kTaps],
                                           const Filter& f, int first, int last) {
    bool inside[kTaps];
#pragma unroll
    for (int b = 0; b < kTaps; ++b) inside[b] = spot.in_x + b >= 0 && spot.in_x + b < f.in_w;
    int iy = first - f.top;
    const T* at = spot.in + iy * f.in_stride[2] + spot.in_x * f.in_stride[3];
    T* target = spot.out + first * f.out_stride[2] + spot.out_x * f.out_stride[3];
    S sum[kTaps][V] = {};
    for (int oy = first - (kTaps - 1); oy < last; oy += kTaps) {
#pragma unroll
        for (int r = 0; r < kTaps; ++r, ++iy, at += f.in_stride[2]) {
            S row[kTaps][V];
            read_row<T, V, kTaps>(row, at, f.in_stride[3], inside, iy >= 0 && iy < f.in_h);
#pragma unroll
            for (int a = 0; a < kTaps; ++a)
                add_taps<V>(sum[(r + kTaps - a) % kTaps], weight[a], row);
            const int slot = (r + 1) % kTaps;    // output row oy + r, now complete
            if (oy + r >= first && oy + r < last) {
                put<T, V>(target, sum[slot]);
                target += f.out_stride[2];
            }
#pragma unroll
            for (int v = 0; v < V; ++v) sum[slot][v] = 0;
        }
    }
}

// Every second output row and column is kept: two input rows end one output row (taps 2 and 3)
// and begin the next (taps 0 and 1).
template <typename T, int V, typename S>
__device__ __forceinline__ void walk_down(const Spot<T>& spot, const S (&weight)[kTaps][kTaps],
                                          const Filter& f, int first, int last) {
    bool inside[kTaps];
#pragma unroll
    for (int b = 0; b < kTaps; ++b) inside[b] = spot.in_x + b >= 0 && spot.in_x + b < f.in_w;
    int iy = 2 * first - f.top;
    const T* at = spot.in + iy * f.in_stride[2] + spot.in_x * f.in_stride[3];
    T* target = spot.out + first * f.out_stride[2] + spot.out_x * f.out_stride[3];
    S sum[2][V] = {};
    for (int oy = first - 1; oy < last; oy += 2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int a = 0; a < 2; ++a, ++iy, at += f.in_stride[2]) {
                S row[kTaps][V];
                read_row<T, V, kTaps>(row, at, f.in_stride[3], inside, iy >= 0 && iy < f.in_h);
                add_taps<V>(sum[r], weight[2 + a], row);
                add_taps<V>(sum[1 - r], weight[a], row);
            }
            if (oy + r >= first && oy + r < last) {
                put<T, V>(target, sum[r]);
                target += f.out_stride[2];
            }
#pragma unroll
            for (int v = 0; v < V; ++v) sum[r][v] = 0;
        }
    }
}

// With zeros between the samples: input rows q - 1 and q and columns m - 1 and m make the output
// rows 2q + top - 3 and - 2 and the columns 2m + left - 3 and - 2, from the odd and the even taps.
// first, last: values of q; spot: column m - 1, and the first column of the pair.
template <typename T, int V, typename S>
__device__ __forceinline__ void walk_up(const Spot<T>& spot, const S (&weight)[kTaps][kTaps],
                                        const Filter& f, int first, int last) {
    bool inside[2], wanted[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        inside[b] = spot.in_x + b >= 0 && spot.in_x + b < f.in_w;
        wanted[b] = spot.out_x + b >= 0 && spot.out_x + b < f.out_w;
    }
    int iy = first - 1, oy = 2 * first + f.top - 3;
    const T* at = spot.in + iy * f.in_stride[2] + spot.in_x * f.in_stride[3];
    T* target = spot.out + oy * f.out_stride[2] + spot.out_x * f.out_stride[3];
    S row[2][2][V];    // the older and the newer input row take turns
    read_row<T, V, 2>(row[0], at, f.in_stride[3], inside, iy >= 0 && iy < f.in_h);
    for (int q = first; q < last; q += 2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            ++iy;
            at += f.in_stride[2];
            read_row<T, V, 2>(row[1 - r], at, f.in_stride[3], inside, iy >= 0 && iy < f.in_h);
#pragma unroll
            for (int y = 0; y < 2; ++y, ++oy, target += f.out_stride[2]) {
                if (q + r >= last || oy < 0 || oy >= f.out_h) continue;
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    S sum[V];
#pragma unroll
                    for (int v = 0; v < V; ++v)
                        sum[v] = weight[1 - y][1 - x] * row[r][0][v]
                                 + weight[1 - y][3 - x] * row[r][1][v]
                                 + weight[3 - y][1 - x] * row[1 - r][0][v]
                                 + weight[3 - y][3 - x] * row[1 - r][1][v];
                    if (wanted[x]) put<T, V>(target + x * f.out_stride[3], sum);
                }
            }
        }
    }
}

// How the outputs are shared out: units of `width` x `height`, each one output column (a pair of
// columns when UP == 2) and output row (pair of rows), in strips of `rows` units; x0 and y0 are
// the numbers of the first ones.
struct Units { int64_t x0, y0, width, height, rows, strips; };

Units units_of(const Filter& f) {
    Units u = {0, 0, f.out_w, f.out_h, kRows, 0};
    if (f.up == 2) {
        u.x0 = -floor_div(f.left - 2, 2);
        u.y0 = -floor_div(f.top - 2, 2);
        u.width = floor_div(f.out_w + 2 - f.left, 2) - u.x0 + 1;
        u.height = floor_div(f.out_h + 2 - f.top, 2) - u.y0 + 1;
        u.rows = kRows / 2;
    }
    u.strips = (u.height + u.rows - 1) / u.rows;
    return u;
}

// Filters of up to 4x4 taps without resampling (UP = DOWN = 1) or with a factor of two. A thread
// owns a column of outputs of V channels and walks down a strip of rows, so that each input row
// is read once per column and not once per tap.
template <typename T, int V, int UP, int DOWN>
__global__ void filter_small(const T* __restrict__ x, const float* __restrict__ taps,
                             T* __restrict__ y, Filter f, Units u, int64_t groups,
                             bool channels_last) {
    using S = typename Sum<T>::type;
    S weight[kTaps][kTaps];    // flipped: a convolution
#pragma unroll
    for (int a = 0; a < kTaps; ++a)
#pragma unroll
        for (int b = 0; b < kTaps; ++b)
            weight[a][b] = a < f.kh && b < f.kw
                ? (S)taps[(f.kh - 1 - a) * f.kw + (f.kw - 1 - b)] : (S)0;

    const int64_t total = f.n * groups * u.strips * u.width;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < total;
         i += (int64_t)gridDim.x * blockDim.x) {
        int64_t rest = i, group, column, strip;
        if (channels_last) {
            group = rest % groups; rest /= groups;
            column = rest % u.width; rest /= u.width;
            strip = rest % u.strips; rest /= u.strips;
        } else {
            column = rest % u.width; rest /= u.width;
            strip = rest % u.strips; rest /= u.strips;
            group = rest % groups; rest /= groups;
        }
        column += u.x0;
        Spot<T> spot;
        spot.in = x + rest * f.in_stride[0] + group * V * f.in_stride[1];
        spot.out = y + rest * f.out_stride[0] + group * V * f.out_stride[1];
        spot.in_x = UP == 2 ? column - 1 : column * DOWN - f.left;
        spot.out_x = UP == 2 ? 2 * column + f.left - 3 : column;
        const int first = (int)(u.y0 + strip * u.rows);
        const int64_t end = u.y0 + u.height;
        const int last = (int)(first + u.rows < end ? first + u.rows : end);
        if (UP == 2) walk_up<T, V>(spot, weight, f, first, last);
        else if (DOWN == 2) walk_down<T, V>(spot, weight, f, first, last);
        else walk_plain<T, V>(spot, weight, f, first, last);
    }
}

int blocks_for(int64_t threads, int per_block) {
    const int64_t wanted = (threads + per_block - 1) / per_block;
    return (int)(wanted < 1 ? 1 : wanted > (1 << 30) ? (1 << 30) : wanted);
}

template <typename T, int V>
void launch_small(const T* x, const float* taps, T* y, const Filter& f, bool channels_last,
                  cudaStream_t stream) {
    const int64_t groups = f.channels / V;
    const Units u = units_of(f);
    const int blocks = blocks_for(f.n * groups * u.strips * u.width, 128);
    if (f.up == 2)
        filter_small<T, V, 2, 1><<<blocks, 128, 0, stream>>>(x, taps, y, f, u, groups,
                                                             channels_last);
    else if (f.down == 2)
        filter_small<T, V, 1, 2><<<blocks, 128, 0, stream>>>(x, taps, y, f, u, groups,
                                                             channels_last);
    else
        filter_small<T, V, 1, 1><<<blocks, 128, 0, stream>>>(x, taps, y, f, u, groups,
                                                             channels_last);
}

template <typename T>
int run_filter(const void* xv, const float* taps, void* yv, const Filter& f, cudaStream_t stream) {
    const T* x = static_cast<const T*>(xv);
    T* y = static_cast<T*>(yv);
    // A contiguous map of 1x1 has neighbouring channels too, so the input is asked as well.
    const bool channels_last = f.out_stride[1] == 1 && f.in_stride[1] == 1 && f.channels > 1;
    const bool small = f.kh <= 4 && f.kw <= 4 && f.up * f.down <= 2;
    constexpr int V = 8 / sizeof(T) < 2 ? 2 : 8 / sizeof(T);
    if (f.n * f.channels * f.out_h * f.out_w == 0) return 0;
    if (!small) {
        const int64_t total = f.n * f.channels * f.out_h * f.out_w;
        filter_any<T><<<blocks_for(total, 256), 256, 0, stream>>>(x, taps, y, f, channels_last);
    } else if (channels_last && f.channels % V == 0 && (uintptr_t)x % (sizeof(T) * V) == 0
               && (uintptr_t)y % (sizeof(T) * V) == 0) {
        launch_small<T, V>(x, taps, y, f, true, stream);
    } else {
        launch_small<T, 1>(x, taps, y, f, channels_last, stream);
    }
    return (int)cudaGetLastError();
}

// y = clamp(gain * lrelu(x + b)); with `saved` the derivative: x * gain * (1 or slope) wherever
// the saved output is inside the clamp, by the sign of the saved output.
template <typename T, int V>
__global__ void activate(const T* __restrict__ x, const T* __restrict__ bias,
                         const T* __restrict__ saved, T* __restrict__ y, int64_t n_packs,
                         int64_t inner, int64_t channels, float slope, float gain, float limit) {
    using S = typename Sum<T>::type;
    const S edge = load(store<T, S>((S)limit));    // what a clamped output was saved as
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n_packs;
         i += (int64_t)gridDim.x * blockDim.x) {
        const Pack<T, V> in = reinterpret_cast<const Pack<T, V>*>(x)[i];
        Pack<T, V> out, old;
        if (saved) old = reinterpret_cast<const Pack<T, V>*>(saved)[i];
        // With inner == 1 (channels last) the V values are V neighbouring channels.
        const int64_t c0 = bias ? (i * V / inner) % channels : 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            S value = load(in.v[v]);
            if (saved) {
                const S s = load(old.v[v]);
                value *= (S)gain * (s < 0 ? (S)slope : (S)1);
                if (limit >= 0 && (s >= edge || s <= -edge)) value = 0;
            } else {
                if (bias) value += load(bias[inner == 1 ? c0 + v : c0]);
                value *= (S)gain * (value < 0 ? (S)slope : (S)1);
                if (limit >= 0) {
                    value = value > (S)limit ? (S)limit : value;
                    value = value < -(S)limit ? -(S)limit : value;
                }
            }
            out.v[v] = store<T, S>(value);
        }
        reinterpret_cast<Pack<T, V>*>(y)[i] = out;
    }
}

template <typename T>
int run_activate(const void* xv, const void* bias, const void* saved, void* yv, int64_t total,
                 int64_t inner, int64_t channels, float slope, float gain, float limit,
                 cudaStream_t stream) {
    const T* x = static_cast<const T*>(xv);
    const T* b = static_cast<const T*>(bias);
    const T* s = static_cast<const T*>(saved);
    T* y = static_cast<T*>(yv);
    constexpr int V = 16 / sizeof(T);
    if (total == 0) return 0;
    const uintptr_t where = (uintptr_t)x | (uintptr_t)y | (uintptr_t)s;
    const bool whole = total % V == 0 && where % 16 == 0
        && (!bias || (inner == 1 ? channels % V == 0 : inner % V == 0));
    if (whole)
        activate<T, V><<<blocks_for(total / V, 256), 256, 0, stream>>>(
            x, b, s, y, total / V, inner, channels, slope, gain, limit);
    else
        activate<T, 1><<<blocks_for(total, 256), 256, 0, stream>>>(
            x, b, s, y, total, inner, channels, slope, gain, limit);
    return (int)cudaGetLastError();
}

}  // namespace

enum { kFloat = 0, kHalf = 1, kBfloat16 = 2, kDouble = 3 };

// sizes: n, c, in_h, in_w, out_h, out_w, 4 input strides, 4 output strides (n, c, h, w).
extern "C" int ksalsa_upfirdn2d(const void* x, const float* taps, void* y, const int64_t* sizes,
                                int up, int down, int left, int top, int kh, int kw, int dtype,
                                void* stream) {
    Filter f;
    f.n = sizes[0]; f.channels = sizes[1]; f.in_h = sizes[2]; f.in_w = sizes[3];
    f.out_h = sizes[4]; f.out_w = sizes[5];
    for (int i = 0; i < 4; ++i) { f.in_stride[i] = sizes[6 + i]; f.out_stride[i] = sizes[10 + i]; }
    f.up = up; f.down = down; f.left = left; f.top = top; f.kh = kh; f.kw = kw;
    cudaStream_t s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case kFloat: return run_filter<float>(x, taps, y, f, s);
        case kHalf: return run_filter<__half>(x, taps, y, f, s);
        case kBfloat16: return run_filter<__nv_bfloat16>(x, taps, y, f, s);
        case kDouble: return run_filter<double>(x, taps, y, f, s);
    }
    return (int)cudaErrorInvalidValue;
}

// bias and saved may be null. inner: elements between two channels (1 for channels last).
// limit < 0: no clamp.
extern "C" int ksalsa_activate(const void* x, const void* bias, const void* saved, void* y,
                               int64_t total, int64_t inner, int64_t channels, float slope,
                               float gain, float limit, int dtype, void* stream) {
    cudaStream_t s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case kFloat:
            return run_activate<float>(x, bias, saved, y, total, inner, channels, slope, gain,
                                       limit, s);
        case kHalf:
            return run_activate<__half>(x, bias, saved, y, total, inner, channels, slope, gain,
                                        limit, s);
        case kBfloat16:
            return run_activate<__nv_bfloat16>(x, bias, saved, y, total, inner, channels, slope,
                                               gain, limit, s);
        case kDouble:
            return run_activate<double>(x, bias, saved, y, total, inner, channels, slope, gain,
                                        limit, s);
    }
    return (int)cudaErrorInvalidValue;
}
