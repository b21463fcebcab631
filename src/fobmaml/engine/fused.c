/* Gradients and Hessian products of a network's softmax cross-entropy for many rows of parameters, all passes in one
call.

Each row has its own parameters and examples and belongs to one thread, which takes a block of examples through all
layers and back before the next, so that its activations stay in the cache. Signals are channels-last and padded by one
place on both sides: the window of a convolution is a run of consecutive numbers, and nothing is copied for it. The
products are sums over tiles held in registers; the activation, SiLU, and its derivatives are taken of a tile before it
leaves them. Compiled for each of two instruction sets; Python picks one.

A Hessian product is the derivative of all that a gradient takes as the parameters move along a vector: what is called
``moving`` has the derivatives of what ``at`` has. It does not take the gradient again: a gradient can keep its signals
for products at the same point. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <omp.h>
#ifdef __SANITIZE_ADDRESS__ /* scripts/sanitize_kernel.py */
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes)
#endif

#ifdef __AVX512F__
enum { LANES = 16, HEIGHT = 8, WIDTH = 3 }; /* a tile is HEIGHT x WIDTH vectors: 24 of 32 registers */
#else
enum { LANES = 8, HEIGHT = 4, WIDTH = 3 }; /* 12 of 16 */
#endif
enum { DEPTH = 512, AHEAD = 16 }; /* windows summed at a time in a weight's gradient; rows a panel is fetched ahead */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ALIGNED __attribute__((aligned(64)))
#define CEIL(a, b) (((a) + (b) - 1) / (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Cuts columns into panels of at most WIDTH vectors, as equal as can be; each has a first column and a width. */
#define EACH_PANEL(columns, first, width)                                                                      \
    for (int64_t all = CEIL(columns, LANES), parts = CEIL(all, WIDTH), part = 0, first = 0, width;             \
         part < parts && (width = (part + 1) * all / parts - part * all / parts); first += width * LANES, part++)
/* CALL(width), with a width known to the compiler. */
#define BY_WIDTH(width, CALL)              \
    do {                                   \
        if ((width) == 3) CALL(3);         \
        else if ((width) == 2) CALL(2);    \
        else CALL(1);                      \
    } while (0)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* A layer's parameters are weights [out][kernel_size][in] and biases [out], at the places ``weight`` and ``bias`` of a row. A
dense layer is one window over the whole signal; a turned one has weights [out][in][kernel_size] there. */
typedef struct {
    int64_t kernel_size, stride, in, out, length_in, length_out, dense, turned, weight, bias;
} Layer;

/* What a thread keeps of a layer, for a block of examples. Windows m go over all examples. */
typedef struct {
    float *forward;       /* weights as panels [kernel_size * in][up to WIDTH vectors of out] */
    float *weights;       /* and as [out][kernel_size * in] */
    float *turned;        /* a part of their gradient as that, where a row has them turned */
    float *bias;
    float *h;             /* the input, [examples][1 + length_in + 1][in] */
    float *gh;            /* the loss's derivative by it, zero until it is summed up */
    float *gz;            /* the derivative by z, [examples][length_out][out]; of what is moving, first a part of it */
    float *slope;         /* a'(z), in the place of gz where nothing is kept */
    float *bend;          /* first a''(z), then a''(z) times the derivative by a(z); NULL where nothing is kept */
    int64_t *from, *to;   /* where window m starts in h, and where its outputs go in the next layer's h */
    float *part;          /* room for a part of one of these, in another order */
} Buffers;

INLINE vec load(const float *p) { return *(const unaligned *)p; }

INLINE void store(float *p, vec v) { *(unaligned *)p = v; }

/* The first n lanes, and zeros. */
INLINE vec load_first(const float *p, int64_t n) {
    if (n >= LANES) return load(p);
#ifdef __AVX512F__
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vec v = {0};
    for (int64_t i = 0; i < n; i++) v[i] = p[i];
    return v;
#endif
}

INLINE void store_first(float *p, vec v, int64_t n) {
    if (n >= LANES) {
        store(p, v);
        return;
    }
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
#endif
}

/* v[i][j] becomes v[j][i]: blocks of h x h change places, for h = LANES / 2, ..., 2, 1. */
INLINE void transpose(vec v[LANES]) {
    UNROLL for (int h = LANES / 2; h; h /= 2) UNROLL for (int i = 0; i < LANES; i++) {
        if (i & h) continue;
        ivec upper, lower;
        UNROLL for (int j = 0; j < LANES; j++) {
            upper[j] = j & h ? LANES + j - h : j;
            lower[j] = j & h ? LANES + j : j + h;
        }
        vec above = v[i];
        v[i] = __builtin_shuffle(above, v[i + h], upper);
        v[i + h] = __builtin_shuffle(above, v[i + h], lower);
    }
}

INLINE vec clamp(vec x, float low, float high) {
#ifdef __AVX512F__
    return (vec)_mm512_min_ps(_mm512_max_ps((__m512)x, _mm512_set1_ps(low)), _mm512_set1_ps(high));
#else
    return (vec)_mm256_min_ps(_mm256_max_ps((__m256)x, _mm256_set1_ps(low)), _mm256_set1_ps(high));
#endif
}

/* 1 / x, to an ulp or two. */
INLINE vec inverse(vec x) {
#ifdef __AVX512F__
    vec r = (vec)_mm512_rcp14_ps((__m512)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

/* e^x for |x| <= 87: 2^n e^r with |r| <= ln(2) / 2, where a polynomial is within two ulp. */
INLINE vec exponential(vec x) {
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded, into its last bits */
    x = clamp(x, -87.0f, 87.0f);
    vec t = x * 1.44269504f + to_integer;
    ivec n = (ivec)t << 23;
    t -= to_integer;
    vec r = x - t * 0.693359375f + t * 2.12194440e-4f; /* ln(2), in two parts */
    vec p = 1.0f / 5040 * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return (vec)((ivec)p + n);
}

/* sum[i][v] += sum over p of a[i][p] * panel[p][v], for ``width`` vectors; ``stride`` numbers from p to p + 1. */
INLINE void multiply(const int width, int64_t depth, const float *const *a, const float *panel, int64_t stride,
                     vec sum[HEIGHT][WIDTH]) {
    const float *row[HEIGHT];
    vec s[HEIGHT][WIDTH];
    UNROLL for (int i = 0; i < HEIGHT; i++) {
        row[i] = a[i];
        UNROLL for (int v = 0; v < width; v++) s[i][v] = sum[i][v];
    }
    for (int64_t p = 0; p < depth; p++) {
        vec b[WIDTH];
        UNROLL for (int v = 0; v < width; v++) {
            b[v] = load(panel + p * stride + v * LANES);
            __builtin_prefetch(panel + (p + AHEAD) * stride + v * LANES);
        }
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            float factor = row[i][p];
            UNROLL for (int v = 0; v < width; v++) s[i][v] += factor * b[v];
        }
    }
    UNROLL for (int i = 0; i < HEIGHT; i++) UNROLL for (int v = 0; v < width; v++) sum[i][v] = s[i][v];
}

/* h' = a(z), a'(z) and, if it is kept, a''(z) for z = W h + b, for ``width`` vectors of outputs, from the ``first`` on. */
INLINE void forward_panel(const int width, const int activate, const Layer *layer, const Buffers *at, int64_t windows,
                          int64_t first) {
    int64_t depth = layer->kernel_size * layer->in, columns = MIN(layer->out - first, width * LANES);
    vec b[WIDTH];
    UNROLL for (int v = 0; v < width; v++) b[v] = load(at->bias + first + v * LANES);
    for (int64_t m = 0; m < windows; m += HEIGHT) {
        const float *a[HEIGHT];
        vec z[HEIGHT][WIDTH];
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            a[i] = at->h + at->from[MIN(m + i, windows - 1)];
            UNROLL for (int v = 0; v < width; v++) z[i][v] = b[v];
        }
        multiply(width, depth, a, at->forward + first * depth, width * LANES, z);
        for (int i = 0; i < MIN(windows - m, HEIGHT); i++) {
            UNROLL for (int v = 0; v < width; v++) {
                int64_t to = at->to[m + i] + first + v * LANES, n = columns - v * LANES;
                int64_t place = (m + i) * layer->out + first + v * LANES;
                if (!activate) {
                    store_first(at[1].h + to, z[i][v], n);
                    continue;
                }
                vec e = exponential(-z[i][v]), sigmoid = inverse(1.0f + e), silu = z[i][v] * sigmoid;
                vec rest = e * sigmoid;
                store_first(at[1].h + to, silu, n);
                store_first(at->slope + place, sigmoid + silu * rest, n);
                if (at->bend) /* s (1 - s) (2 + z (1 - 2 s)) */
                    store_first(at->bend + place, sigmoid * rest * (2.0f + z[i][v] * (rest - sigmoid)), n);
            }
        }
    }
}

/* dz = W dh + V h + c, where W moves along V and b along c: dh' = a'(z) dz, and into dgz goes what the derivative of
a'(z) gives. The inputs do not move: their dh is NULL. */
INLINE void moving_panel(const int width, const int activate, const Layer *layer, const Buffers *at,
                         const Buffers *moving, int64_t windows, int64_t first) {
    int64_t depth = layer->kernel_size * layer->in, columns = MIN(layer->out - first, width * LANES);
    vec c[WIDTH];
    UNROLL for (int v = 0; v < width; v++) c[v] = load(moving->bias + first + v * LANES);
    for (int64_t m = 0; m < windows; m += HEIGHT) {
        const float *a[HEIGHT], *da[HEIGHT];
        vec dz[HEIGHT][WIDTH];
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            int64_t from = at->from[MIN(m + i, windows - 1)];
            a[i] = at->h + from;
            da[i] = moving->h ? moving->h + from : NULL;
            UNROLL for (int v = 0; v < width; v++) dz[i][v] = c[v];
        }
        multiply(width, depth, a, moving->forward + first * depth, width * LANES, dz);
        if (moving->h) multiply(width, depth, da, at->forward + first * depth, width * LANES, dz);
        for (int i = 0; i < MIN(windows - m, HEIGHT); i++) {
            UNROLL for (int v = 0; v < width; v++) {
                int64_t to = at->to[m + i] + first + v * LANES, n = columns - v * LANES;
                int64_t place = (m + i) * layer->out + first + v * LANES;
                if (activate) {
                    store_first(moving->gz + place, load_first(at->bend + place, n) * dz[i][v], n);
                    dz[i][v] *= load_first(at->slope + place, n);
                }
                store_first(moving[1].h + to, dz[i][v], n);
            }
        }
    }
}

/* gh += gz W + other V, for ``width`` vectors of the windows; the second product where ``other`` is given. */
INLINE void input_panel(const int width, const Layer *layer, const Buffers *at, int64_t windows, int64_t first,
                        float *gh, const float *gz, const float *w, const float *other, const float *v_rows) {
    int64_t columns = MIN(layer->kernel_size * layer->in - first, width * LANES), out = layer->out;
    for (int64_t m = 0; m < windows; m += HEIGHT) {
        const float *a[HEIGHT], *b[HEIGHT];
        vec sum[HEIGHT][WIDTH];
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            int64_t row = MIN(m + i, windows - 1) * out;
            a[i] = gz + row;
            b[i] = other ? other + row : NULL;
            UNROLL for (int v = 0; v < width; v++) sum[i][v] = (vec){0};
        }
        multiply(width, out, a, w + first, layer->kernel_size * layer->in, sum);
        if (other) multiply(width, out, b, v_rows + first, layer->kernel_size * layer->in, sum);
        for (int i = 0; i < MIN(windows - m, HEIGHT); i++) {
            UNROLL for (int v = 0; v < width; v++) {
                float *to = gh + at->from[m + i] + first + v * LANES;
                store_first(to, load_first(to, columns - v * LANES) + sum[i][v], columns - v * LANES);
            }
        }
    }
}

/* A sum over windows m of gz[m] h[from[m]]^T. */
typedef struct {
    const float *gz, *h;
} Term;

/* into = scale * into + step * the sum of the terms, for ``height`` rows i of ``columns`` numbers; ``out`` numbers from
a window's gz to the next one's. */
INLINE void weight_tile(const int height, const int width, int64_t windows, int64_t out, const int64_t *from, int terms,
                        const Term *term, float *into, int64_t stride, int64_t columns, float scale, float step) {
    vec sum[HEIGHT][WIDTH];
    UNROLL for (int i = 0; i < height; i++) UNROLL for (int v = 0; v < width; v++) {
        sum[i][v] = (vec){0};
        __builtin_prefetch(into + (height + i) * stride + v * LANES, 1); /* the next tile's */
    }
    for (int t = 0; t < terms; t++) {
        const float *gz = term[t].gz, *h = term[t].h;
        for (int64_t m = 0; m < windows; m++) {
            vec b[WIDTH];
            UNROLL for (int v = 0; v < width; v++) b[v] = load(h + from[m] + v * LANES);
            UNROLL for (int i = 0; i < height; i++) {
                float factor = gz[m * out + i];
                UNROLL for (int v = 0; v < width; v++) sum[i][v] += factor * b[v];
            }
        }
    }
    UNROLL for (int i = 0; i < height; i++) UNROLL for (int v = 0; v < width; v++) {
        float *p = into + i * stride + v * LANES;
        vec result = step * sum[i][v];
        if (scale != 0.0f) result += scale * load_first(p, columns - v * LANES);
        store_first(p, result, columns - v * LANES);
    }
}

static void weight_rows(int height, int width, int64_t windows, int64_t out, const int64_t *from, int terms,
                        const Term *term, float *into, int64_t stride, int64_t columns, float scale, float step) {
#define TILE(height, width) \
    weight_tile(height, width, windows, out, from, terms, term, into, stride, columns, scale, step)
#define ROWS(height)                              \
    case height:                                  \
        if (width == 3) TILE(height, 3);          \
        else if (width == 2) TILE(height, 2);     \
        else TILE(height, 1);                     \
        break;
    switch (height) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4)
#ifdef __AVX512F__
        ROWS(5) ROWS(6) ROWS(7) ROWS(8)
#endif
    }
#undef ROWS
#undef TILE
}

/* into = scale * into + step * the gradient with respect to the weights, where so few enter an output that lanes
   would be idle. */
static void few_weights(const Layer *layer, const Buffers *at, int64_t windows, const float *gz, const float *h,
                        float *into, float scale, float step) {
    int64_t out = layer->out, depth = layer->kernel_size * layer->in;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t m = 0; m < windows; m++) at->part[k * windows + m] = h[at->from[m] + k];
    for (int64_t first = 0; first < depth; first += HEIGHT) EACH_PANEL(out, o, width) {
        const float *a[HEIGHT];
        vec sum[HEIGHT][WIDTH] = {0};
        for (int i = 0; i < HEIGHT; i++) a[i] = at->part + MIN(first + i, depth - 1) * windows;
#define SUM(width) multiply(width, windows, a, gz + o, out, sum)
        BY_WIDTH(width, SUM);
#undef SUM
        for (int64_t j = 0; j < MIN(out - o, width * LANES); j++)
            for (int64_t k = first; k < MIN(depth, first + HEIGHT); k++) {
                float *p = into + (o + j) * depth + k, result = step * sum[k - first][j / LANES][j % LANES];
                *p = scale == 0.0f ? result : scale * *p + result;
            }
    }
}

/* into = scale * into + step * the gradient with respect to the weights [out][kernel_size * in]: the sum over windows of
gz h. With ``other``, of gz h + other moved. */
static void weight_gradient(const Layer *layer, const Buffers *at, int64_t windows, const float *gz, const float *h,
                            const float *other, const float *moved, float *into, float scale, float step) {
    int64_t out = layer->out, depth = layer->kernel_size * layer->in, groups = CEIL(out, HEIGHT);
    if (depth < LANES) {
        few_weights(layer, at, windows, gz, h, into, scale, step);
        if (other) few_weights(layer, at, windows, other, moved, into, 1.0f, step);
        return;
    }
    for (int64_t m = 0, some; m < windows; m += some, scale = 1.0f) {
        some = MIN(windows - m, DEPTH);
        EACH_PANEL(depth, k, width) for (int64_t group = 0; group < groups; group++) {
            int64_t first = group * out / groups, last = (group + 1) * out / groups, g = m * out + first;
            Term term[2] = {{gz + g, h + k}};
            if (other) term[1] = (Term){other + g, moved + k};
            weight_rows(last - first, width, some, out, at->from + m, other ? 2 : 1, term, into + first * depth + k,
                        depth, depth - k, scale, step);
        }
    }
}

/* The same for all of the layer's parameters, in a row's order; for the biases the sum is of gz. */
static void parameter_gradient(const Layer *layer, const Buffers *at, int64_t windows, const float *gz, const float *h,
                               const float *other, const float *moved, float *into, float scale, float step) {
    int64_t out = layer->out, in = layer->in, size = layer->kernel_size;
    float *bias = into + layer->bias, *weights = into + layer->weight;
    for (int64_t o = 0; o < out; o += LANES) {
        vec sum = {0};
        for (int64_t m = 0; m < windows; m++) sum += load(gz + m * out + o);
        sum *= step;
        if (scale != 0.0f) sum += scale * load_first(bias + o, out - o);
        store_first(bias + o, sum, out - o);
    }
    if (!layer->turned) {
        weight_gradient(layer, at, windows, gz, h, other, moved, weights, scale, step);
        return;
    }
    weight_gradient(layer, at, windows, gz, h, other, moved, at->turned, 0.0f, step);
    for (int64_t o = 0; o < out; o++)
        for (int64_t c = 0; c < in; c++)
            for (int64_t k = 0; k < size; k++) {
                float *p = weights + (o * in + c) * size + k, part = at->turned[(o * size + k) * in + c];
                *p = scale == 0.0f ? part : scale * *p + part;
            }
}

/* to = a + b; b may be missing. */
INLINE void add(float *to, const float *a, const float *b, int64_t number) {
    if (b)
        for (int64_t i = 0; i < number; i++) to[i] = a[i] + b[i];
    else
        memcpy(to, a, number * sizeof(float));
}

/* to = a + b, weights [out][in][kernel_size] that become [out][kernel_size][in]; b may be missing. */
static void turn(const Layer *layer, const float *a, const float *b, float *to) {
    int64_t in = layer->in, size = layer->kernel_size;
    for (int64_t o = 0; o < layer->out; o++)
        for (int64_t c = 0; c < in; c++)
            for (int64_t k = 0; k < size; k++) {
                int64_t from = (o * in + c) * size + k;
                to[(o * size + k) * in + c] = b ? a[from] + b[from] : a[from];
            }
}

/* Lays out the parameters start + moved for the products. */
static void pack(const Layer *layer, const float *start, const float *moved, Buffers *at) {
    int64_t out = layer->out, depth = layer->kernel_size * layer->in;
    add(at->bias, start + layer->bias, moved ? moved + layer->bias : NULL, out);
    if (layer->turned) turn(layer, start + layer->weight, moved ? moved + layer->weight : NULL, at->weights);
    else add(at->weights, start + layer->weight, moved ? moved + layer->weight : NULL, out * depth);
    EACH_PANEL(out, first, width) for (int64_t o = first; o < first + width * LANES; o += LANES) {
        for (int64_t k = 0; k < depth; k += LANES) {
            vec v[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                v[i] = o + i < out ? load(at->weights + (o + i) * depth + k) : (vec){0};
            transpose(v);
            for (int64_t i = 0; i < MIN(depth - k, LANES); i++)
                store(at->forward + first * depth + (k + i) * width * LANES + o - first, v[i]);
        }
    }
}

/* A vector's lanes behind the end of a buffer are read, but not stored; nothing is read behind that. */
#define PLACE(pointer, number)                                                     \
    do {                                                                           \
        if (memory) (pointer) = (void *)(memory + used);                           \
        used += (((number) * (int64_t)sizeof *(pointer) + 63) / 64 + 4) * 64;      \
        if (memory) ASAN_POISON_MEMORY_REGION(memory + used - 3 * 64, 3 * 64);     \
    } while (0)

/* Gives the signals of a block their places, from ``memory`` on if it is given, all that products need if they are
``kept``; returns how many bytes that takes. */
static int64_t arrange_signals(const Layer *layers, int64_t count, int64_t block, int kept, char *memory, Buffers *at) {
    int64_t used = 0;
    for (int64_t l = 0; l < count; l++) {
        Buffers *b = at + l;
        int64_t size = block * layers[l].length_out * layers[l].out;
        PLACE(b->h, block * (layers[l].length_in + 2) * layers[l].in);
        PLACE(b->gz, size);
        b->slope = b->gz;
        b->bend = NULL;
        if (kept && l + 1 < count) {
            PLACE(b->slope, size);
            PLACE(b->bend, size);
        }
    }
    PLACE(at[count].h, block * layers[count - 1].out); /* the outputs, then their softmax */
    return used;
}

/* The same for all else that a thread needs. */
static int64_t arrange(const Layer *layers, int64_t count, int64_t block, char *memory, Buffers *at) {
    int64_t used = 0, largest = 0;
    for (int64_t l = 0; l < count; l++) {
        Buffers *b = at + l;
        const Layer *layer = layers + l;
        int64_t depth = layer->kernel_size * layer->in, windows = block * layer->length_out;
        if (depth < LANES) largest = MAX(largest, windows * depth);
        PLACE(b->weights, layer->out * depth);
        b->turned = NULL;
        if (layer->turned) PLACE(b->turned, layer->out * depth);
        PLACE(b->forward, CEIL(layer->out, LANES) * LANES * depth);
        PLACE(b->bias, layer->out);
        PLACE(b->from, windows);
        PLACE(b->to, windows);
        b->gh = NULL;
        if (l) PLACE(b->gh, block * (layer->length_in + 2) * layer->in); /* nobody asks for that of the inputs */
    }
    PLACE(at[count].part, largest);
    for (int64_t l = 0; memory && l < count; l++) at[l].part = at[count].part;
    return used;
}
#undef PLACE

/* How many bytes of scratch memory a thread needs. */
int64_t fused_scratch(const Layer *layers, int64_t count, int64_t block) {
    Buffers at[count + 1];
    return arrange(layers, count, block, NULL, at) + arrange_signals(layers, count, block, 0, NULL, at);
}

/* How many bytes a gradient keeps of a block of examples. */
int64_t fused_kept(const Layer *layers, int64_t count, int64_t block) {
    Buffers at[count + 1];
    return arrange_signals(layers, count, block, 1, NULL, at);
}

/* Gives every buffer its place in a thread's scratch memory. */
static void arrange_all(const Layer *layers, int64_t count, int64_t block, char *scratch, Buffers *at) {
    arrange_signals(layers, count, block, 0, scratch + arrange(layers, count, block, scratch, at), at);
}

/* Makes zeroed scratch memory ready. What pads a signal stays zero from then on. */
void fused_prepare(const Layer *layers, int64_t count, int64_t block, char *scratch, int threads) {
    Buffers at[count + 1];
    for (int thread = 0; thread < threads; thread++) {
        scratch += arrange(layers, count, block, scratch, at);
        scratch += arrange_signals(layers, count, block, 0, scratch, at);
        for (int64_t l = 0; l < count; l++) {
            const Layer *layer = layers + l;
            for (int64_t n = 0, m = 0; n < block; n++) {
                for (int64_t i = 0; i < layer->length_out; i++, m++) {
                    int64_t start = layer->dense ? 1 : i * layer->stride;
                    at[l].from[m] = (n * (layer->length_in + 2) + start) * layer->in;
                    at[l].to[m] = l + 1 < count ? (n * (layer->length_out + 2) + 1 + i) * layer->out : n * layer->out;
                }
            }
        }
    }
}

/* Zeros what pads the signals, in memory that is not zeroed. */
static void pad(const Layer *layers, int64_t count, int64_t examples, const Buffers *at) {
    for (int64_t l = 0; l < count; l++) {
        int64_t in = layers[l].in, size = (layers[l].length_in + 2) * in;
        for (int64_t n = 0; n < examples; n++) {
            memset(at[l].h + n * size, 0, in * sizeof(float));
            memset(at[l].h + (n + 1) * size - in, 0, in * sizeof(float));
        }
    }
}

static void forward(const Layer *layers, int64_t count, int64_t examples, const float *x, const int64_t *order,
                    const Buffers *at) {
    int64_t size = layers->length_in * layers->in;
    for (int64_t n = 0; n < examples; n++)
        memcpy(at->h + n * (size + 2 * layers->in) + layers->in, x + (order ? order[n] : n) * size, 4 * size);
    for (int64_t l = 0; l < count; l++) {
        const Layer *layer = layers + l;
        int64_t windows = examples * layer->length_out;
#define HIDDEN(width) forward_panel(width, 1, layer, at + l, windows, o)
#define LAST(width) forward_panel(width, 0, layer, at + l, windows, o)
        EACH_PANEL(layer->out, o, width) {
            if (l + 1 < count) BY_WIDTH(width, HIDDEN);
            else BY_WIDTH(width, LAST);
        }
#undef HIDDEN
#undef LAST
    }
}

/* How the signals of ``forward`` move. */
static void move(const Layer *layers, int64_t count, int64_t examples, const Buffers *at, const Buffers *moving) {
    for (int64_t l = 0; l < count; l++) {
        const Layer *layer = layers + l;
        int64_t windows = examples * layer->length_out;
#define HIDDEN(width) moving_panel(width, 1, layer, at + l, moving + l, windows, o)
#define LAST(width) moving_panel(width, 0, layer, at + l, moving + l, windows, o)
        EACH_PANEL(layer->out, o, width) {
            if (l + 1 < count) BY_WIDTH(width, HIDDEN);
            else BY_WIDTH(width, LAST);
        }
#undef HIDDEN
#undef LAST
    }
}

/* p = softmax(outputs) in their place, and gz = weight * (p - targets). */
static void loss_gradient(int64_t examples, int64_t classes, const float *targets, const int64_t *order,
                          const float *weights, const Buffers *at) {
    for (int64_t n = 0; n < examples; n++) {
        const float *target = targets + (order ? order[n] : n) * classes;
        float *p = at[1].h + n * classes, *g = at->gz + n * classes, top = p[0], sum = 0.0f;
        for (int64_t c = 1; c < classes; c++) top = p[c] > top ? p[c] : top;
        for (int64_t c = 0; c < classes; c++) sum += p[c] = expf(p[c] - top);
        for (int64_t c = 0; c < classes; c++) {
            p[c] /= sum;
            g[c] = weights[n] * (p[c] - target[c]);
        }
    }
}

/* Its derivative, as the outputs move along t: weight * p (t - p.t). */
static void loss_product(int64_t examples, int64_t classes, const float *weights, const Buffers *at,
                         const Buffers *moving) {
    for (int64_t n = 0; n < examples; n++) {
        const float *p = at[1].h + n * classes, *t = moving[1].h + n * classes;
        float *g = moving->gz + n * classes, mean = 0.0f;
        for (int64_t c = 0; c < classes; c++) mean += p[c] * t[c];
        for (int64_t c = 0; c < classes; c++) g[c] = weights[n] * p[c] * (t[c] - mean);
    }
}

/* Into ``into`` goes the gradient. */
static void backward(const Layer *layers, int64_t count, int64_t examples, const Buffers *at, float *into, float scale,
                     float step) {
    for (int64_t l = count - 1; l >= 0; l--) {
        const Layer *layer = layers + l;
        const Buffers *a = at + l;
        int64_t windows = examples * layer->length_out, size = layer->length_out * layer->out;
        for (int64_t n = 0; n < examples && l + 1 < count; n++) {
            float *padded = at[l + 1].gh + n * (size + 2 * layer->out), *gh = padded + layer->out;
            float *gz = a->gz + n * size;
            const float *slope = a->slope + n * size;
            if (a->bend)
                for (int64_t i = 0; i < size; i++) a->bend[n * size + i] *= gh[i];
            for (int64_t i = 0; i < size; i++) gz[i] = slope[i] * gh[i];
            memset(padded, 0, (size + 2 * layer->out) * sizeof(float)); /* for the next block */
        }
        parameter_gradient(layer, a, windows, a->gz, a->h, NULL, NULL, into, scale, step);
#define INPUT(width) input_panel(width, layer, a, windows, k, a->gh, a->gz, a->weights, NULL, NULL)
        if (l) EACH_PANEL(layer->kernel_size * layer->in, k, width) BY_WIDTH(width, INPUT);
#undef INPUT
    }
}

/* Into ``into`` goes how the gradient moves. */
static void move_back(const Layer *layers, int64_t count, int64_t examples, const Buffers *at, const Buffers *moving,
                      float *into, float scale, float step) {
    for (int64_t l = count - 1; l >= 0; l--) {
        const Layer *layer = layers + l;
        const Buffers *a = at + l, *d = moving + l;
        int64_t windows = examples * layer->length_out, size = layer->length_out * layer->out;
        for (int64_t n = 0; n < examples && l + 1 < count; n++) {
            float *padded = moving[l + 1].gh + n * (size + 2 * layer->out), *gh = padded + layer->out;
            float *gz = d->gz + n * size;
            const float *slope = a->slope + n * size;
            for (int64_t i = 0; i < size; i++) gz[i] += slope[i] * gh[i];
            memset(padded, 0, (size + 2 * layer->out) * sizeof(float));
        }
        parameter_gradient(layer, a, windows, d->gz, a->h, l ? a->gz : NULL, d->h, into, scale, step);
#define INPUT(width) input_panel(width, layer, a, windows, k, d->gh, d->gz, a->weights, a->gz, d->weights)
        if (l) EACH_PANEL(layer->kernel_size * layer->in, k, width) BY_WIDTH(width, INPUT);
#undef INPUT
    }
}

/* At t = 0, ..., times - 1: into[r] = scale[t] * into[r] + step[t] * the gradient at phi[r] of the sum over n of
weights[r][n] * cross-entropy.

phi[r] = start[r] + moved[r], or start[r] where ``moved`` is NULL; ``into`` may be ``moved``, which makes it gradient
descent, without a thread waiting for another between the steps. start [rows][parameters], with ``stride`` numbers from
a row to the next, moved and into [rows][parameters]; x [rows][examples][length][channels];
targets [rows][examples][classes], one-hot; weights [rows][examples].

Where ``order`` [rows][times][chosen] is given, the examples at time t are those at order[r][t] of x and targets, and
weights are [rows][times][chosen]; otherwise chosen = examples. Examples are taken in blocks of ``block``. ``scratch``:
threads * fused_scratch(layers, count, block) prepared bytes, aligned to 64. ``kept``: rows * (chosen / block, rounded
up) * fused_kept(layers, count, block) bytes, aligned to 64, for what fused_product takes of the last time, or NULL.
What it returns does not depend on the number of threads. */
void fused_gradient(const Layer *layers, int64_t count, int64_t rows, int64_t examples, int64_t chosen, int64_t block,
                    int64_t parameters, const float *start, int64_t stride, const float *moved, const float *x,
                    const float *targets, const float *weights, const int64_t *order, int64_t times, const float *scale,
                    const float *step, float *into, char *kept, char *scratch, int threads) {
    int64_t bytes = fused_scratch(layers, count, block), inputs = layers->length_in * layers->in;
    int64_t classes = layers[count - 1].out, blocks = CEIL(chosen, block), bytes_kept = fused_kept(layers, count, block);
#pragma omp parallel num_threads(threads)
    {
        Buffers at[count + 1];
        arrange_all(layers, count, block, scratch + omp_get_thread_num() * bytes, at);
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t t = 0; t < times; t++) {
                for (int64_t l = 0; l < count; l++)
                    pack(layers + l, start + r * stride, moved ? moved + r * parameters : NULL, at + l);
                for (int64_t n = 0; n < chosen; n += block) {
                    int64_t some = MIN(block, chosen - n), first = r * examples + (order ? 0 : n);
                    int64_t weight = (order ? r * times + t : r) * chosen + n;
                    const int64_t *which = order ? order + weight : NULL;
                    if (kept) {
                        arrange_signals(layers, count, block, 1, kept + (r * blocks + n / block) * bytes_kept, at);
                        pad(layers, count, some, at);
                    }
                    forward(layers, count, some, x + first * inputs, which, at);
                    loss_gradient(some, classes, targets + first * classes, which, weights + weight, at + count - 1);
                    backward(layers, count, some, at, into + r * parameters, n ? 1.0f : scale[t], step[t]);
                }
            }
        }
    }
}

/* into[r] = scale * into[r] + step * the Hessian at start[r] times along[r], of what fused_gradient took there once and
``kept``: all of the ``examples``, with these ``weights``. along and into [rows][parameters]; ``scratch``: 2 * threads *
fused_scratch(layers, count, block) prepared bytes. All else is as there. */
void fused_product(const Layer *layers, int64_t count, int64_t rows, int64_t examples, int64_t block,
                   int64_t parameters, const float *start, int64_t stride, const float *along, const float *weights,
                   float scale, float step, float *into, char *kept, char *scratch, int threads) {
    int64_t bytes = fused_scratch(layers, count, block), bytes_kept = fused_kept(layers, count, block);
    int64_t classes = layers[count - 1].out, blocks = CEIL(examples, block);
#pragma omp parallel num_threads(threads)
    {
        Buffers at[count + 1], moving[count + 1];
        char *own = scratch + 2 * omp_get_thread_num() * bytes;
        arrange_all(layers, count, block, own, at);
        arrange_all(layers, count, block, own + bytes, moving);
        moving->h = NULL;
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t l = 0; l < count; l++) {
                pack(layers + l, start + r * stride, NULL, at + l);
                pack(layers + l, along + r * parameters, NULL, moving + l);
            }
            for (int64_t n = 0; n < examples; n += block) {
                int64_t some = MIN(block, examples - n);
                arrange_signals(layers, count, block, 1, kept + (r * blocks + n / block) * bytes_kept, at);
                move(layers, count, some, at, moving);
                loss_product(some, classes, weights + r * examples + n, at + count - 1, moving + count - 1);
                move_back(layers, count, some, at, moving, into + r * parameters, n ? 1.0f : scale, step);
            }
        }
    }
}
