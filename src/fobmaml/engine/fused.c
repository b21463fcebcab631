/* Gradients and Hessian products of a network's softmax cross-entropy for many rows of parameters, all passes in one
call.

Each row has its own parameters and examples and belongs to one thread, which takes a block of examples through all
layers and back before the next, so that its activations stay in the cache. Signals are channels-last and padded by one
place on both sides: the window of a convolution is a run of consecutive numbers, and nothing is copied for it. The
products are sums over tiles held in registers; the activation, SiLU, and its derivatives are taken of a tile before it
leaves them. Compiled for each instruction set; Python picks one.

A Hessian product is the derivative of all that a gradient takes as the parameters move along a vector: what is called
``moving`` has the derivatives of what ``at`` has. It does not take the gradient again: a gradient can keep its signals
for products at the same point. */

#include <math.h>

#include "threads.h"
#include "vectors.h"

#if LANES == 8
enum { HEIGHT = 6, WIDTH = 2 }; /* a tile is HEIGHT x WIDTH vectors: 12 of AVX2's 16 registers */
#else
enum { HEIGHT = 8, WIDTH = 3 }; /* 24 of 32 */
#endif
enum { DEPTH = 512, AHEAD = 16 }; /* windows summed at a time in a weight's gradient; rows a panel is fetched ahead */

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

/* Where the vectors of a panel begin, of all ``columns`` from its first one on. The last one ends where they end, and has
some lanes of the one before. Only where there are fewer columns than lanes, the lanes behind them are the next window's:
written over by it, or not written. */
INLINE int64_t place(const int width, int v, int64_t columns) {
    return v + 1 < width ? v * LANES : MAX(MIN(columns, width * LANES) - LANES, 0);
}

/* sum[i][v] += sum over p of a[i][p] * panel[p][v], for ``width`` vectors, the last one from ``last`` on; ``stride``
numbers from p to p + 1. */
INLINE void multiply(const int width, int64_t depth, const float *const *a, const float *panel, int64_t stride,
                     int64_t last, vec sum[HEIGHT][WIDTH]) {
    const float *row[HEIGHT];
    vec s[HEIGHT][WIDTH];
    UNROLL for (int i = 0; i < HEIGHT; i++) {
        row[i] = a[i];
        UNROLL for (int v = 0; v < width; v++) s[i][v] = sum[i][v];
    }
    for (int64_t p = 0; p < depth; p++) {
        vec b[WIDTH];
        UNROLL for (int v = 0; v < width; v++) {
            b[v] = load(panel + p * stride + (v + 1 < width ? v * LANES : last));
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
    int64_t depth = layer->kernel_size * layer->in, columns = layer->out - first;
    vec b[WIDTH];
    UNROLL for (int v = 0; v < width; v++) b[v] = load(at->bias + first + place(width, v, columns));
    for (int64_t m = 0; m < windows; m += HEIGHT) {
        const float *a[HEIGHT];
        vec z[HEIGHT][WIDTH];
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            a[i] = at->h + at->from[MIN(m + i, windows - 1)];
            UNROLL for (int v = 0; v < width; v++) z[i][v] = b[v];
        }
        multiply(width, depth, a, at->forward + first * depth, width * LANES, (width - 1) * LANES, z);
        for (int i = 0; i < MIN(windows - m, HEIGHT); i++) {
            UNROLL for (int v = 0; v < width; v++) {
                int64_t o = first + place(width, v, columns), n = width > 1 ? LANES : columns;
                int64_t to = at->to[m + i] + o, own = (m + i) * layer->out + o;
                if (!activate) {
                    store_first(at[1].h + to, z[i][v], n);
                    continue;
                }
                vec e = exponential(-z[i][v]), sigmoid = 1.0f / (1.0f + e), silu = z[i][v] * sigmoid;
                vec rest = e * sigmoid;
                store_first(at[1].h + to, silu, n);
                store(at->slope + own, sigmoid + silu * rest);
                if (at->bend) /* s (1 - s) (2 + z (1 - 2 s)) */
                    store(at->bend + own, sigmoid * rest * (2.0f + z[i][v] * (rest - sigmoid)));
            }
        }
    }
}

/* dz = W dh + V h + c, where W moves along V and b along c: dh' = a'(z) dz, and into dgz goes what the derivative of
a'(z) gives. The inputs do not move: their dh is NULL. */
INLINE void moving_panel(const int width, const int activate, const Layer *layer, const Buffers *at,
                         const Buffers *moving, int64_t windows, int64_t first) {
    int64_t depth = layer->kernel_size * layer->in, columns = layer->out - first;
    vec c[WIDTH];
    UNROLL for (int v = 0; v < width; v++) c[v] = load(moving->bias + first + place(width, v, columns));
    for (int64_t m = 0; m < windows; m += HEIGHT) {
        const float *a[HEIGHT], *da[HEIGHT];
        vec dz[HEIGHT][WIDTH];
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            int64_t from = at->from[MIN(m + i, windows - 1)];
            a[i] = at->h + from;
            da[i] = moving->h ? moving->h + from : NULL;
            UNROLL for (int v = 0; v < width; v++) dz[i][v] = c[v];
        }
        multiply(width, depth, a, moving->forward + first * depth, width * LANES, (width - 1) * LANES, dz);
        if (moving->h) multiply(width, depth, da, at->forward + first * depth, width * LANES, (width - 1) * LANES, dz);
        for (int i = 0; i < MIN(windows - m, HEIGHT); i++) {
            UNROLL for (int v = 0; v < width; v++) {
                int64_t o = first + place(width, v, columns), n = width > 1 ? LANES : columns;
                int64_t to = at->to[m + i] + o, own = (m + i) * layer->out + o;
                if (activate) {
                    store(moving->gz + own, load(at->bend + own) * dz[i][v]);
                    dz[i][v] *= load(at->slope + own);
                }
                store_first(moving[1].h + to, dz[i][v], n);
            }
        }
    }
}

/* gh += gz W + other V, for ``width`` vectors of the windows; the second product where ``other`` is given. */
INLINE void input_panel(const int width, const Layer *layer, const Buffers *at, int64_t windows, int64_t first,
                        float *gh, const float *gz, const float *w, const float *other, const float *v_rows) {
    int64_t depth = layer->kernel_size * layer->in, columns = depth - first, out = layer->out;
    int64_t last = place(width, width - 1, columns);
    for (int64_t m = 0; m < windows; m += HEIGHT) {
        const float *a[HEIGHT], *b[HEIGHT];
        vec sum[HEIGHT][WIDTH];
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            int64_t row = MIN(m + i, windows - 1) * out;
            a[i] = gz + row;
            b[i] = other ? other + row : NULL;
            UNROLL for (int v = 0; v < width; v++) sum[i][v] = (vec){0};
        }
        multiply(width, out, a, w + first, depth, last, sum);
        if (other) multiply(width, out, b, v_rows + first, depth, last, sum);
        for (int i = 0; i < MIN(windows - m, HEIGHT); i++) {
            float *to = gh + at->from[m + i] + first;
            if (width == 1) sum[i][0] = only_first(sum[i][0], columns);
            UNROLL for (int v = 0; v < width; v++) sum[i][v] += load(to + place(width, v, columns));
            UNROLL for (int v = 0; v < width; v++) store(to + place(width, v, columns), sum[i][v]);
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
            UNROLL for (int v = 0; v < width; v++) b[v] = load(h + from[m] + place(width, v, columns));
            UNROLL for (int i = 0; i < height; i++) {
                float factor = gz[m * out + i];
                UNROLL for (int v = 0; v < width; v++) sum[i][v] += factor * b[v];
            }
        }
    }
    UNROLL for (int i = 0; i < height; i++) {
        float *p = into + i * stride;
        UNROLL for (int v = 0; v < width; v++) {
            sum[i][v] *= step;
            if (scale != 0.0f) sum[i][v] += scale * load(p + place(width, v, columns));
        }
        UNROLL for (int v = 0; v < width; v++) store(p + place(width, v, columns), sum[i][v]);
    }
}

static void weight_rows(int height, int width, int64_t windows, int64_t out, const int64_t *from, int terms,
                        const Term *term, float *into, int64_t stride, int64_t columns, float scale, float step) {
#define TILE(height, width) \
    weight_tile(height, width, windows, out, from, terms, term, into, stride, columns, scale, step)
#define ROWS(height)                              \
    case height:                                  \
        if (width == WIDTH) TILE(height, WIDTH);  \
        else if (width == 2) TILE(height, 2);     \
        else TILE(height, 1);                     \
        break;
    switch (height) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#if LANES != 8
        ROWS(7) ROWS(8)
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
#define SUM(width) multiply(width, windows, a, gz + o, out, (width - 1) * LANES, sum)
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
static void pack(const Layer *layer, const float *start, const float *moved, const Buffers *at) {
    int64_t out = layer->out, depth = layer->kernel_size * layer->in;
    add(at->bias, start + layer->bias, moved ? moved + layer->bias : NULL, out);
    if (layer->turned) turn(layer, start + layer->weight, moved ? moved + layer->weight : NULL, at->weights);
    else add(at->weights, start + layer->weight, moved ? moved + layer->weight : NULL, out * depth);
    EACH_PANEL(out, first, width) for (int64_t which = 0; which < width; which++) {
        int64_t o = first + place(width, which, out - first);
        for (int64_t k = 0; k < depth; k += LANES) {
            vec v[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                v[i] = o + i < out ? load(at->weights + (o + i) * depth + k) : (vec){0};
            transpose(v);
            for (int64_t i = 0; i < MIN(depth - k, LANES); i++)
                store(at->forward + first * depth + ((k + i) * width + which) * LANES, v[i]);
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

/* Makes scratch memory ready. What pads a signal stays zero from then on. */
void fused_prepare(const Layer *layers, int64_t count, int64_t block, char *scratch, int threads) {
    Buffers at[count + 1];
    memset(scratch, 0, threads * fused_scratch(layers, count, block));
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

/* What fused_gradient and fused_product are told, see there. */
typedef struct {
    const Layer *layers;
    int64_t count, examples, chosen, block, parameters;
    const float *start;
    int64_t stride;
    const float *moved, *along, *x, *targets, *weights;
    const int64_t *order;
    int64_t times;
    const float *scale, *step;
    float *into;
    char *kept, *scratch;
} Job;

/* Gives the signals of the block from example ``n`` of row r on their places in what is kept. */
static void arrange_kept(const Job *job, int64_t r, int64_t n, Buffers *at) {
    int64_t blocks = CEIL(job->chosen, job->block), bytes = fused_kept(job->layers, job->count, job->block);
    arrange_signals(job->layers, job->count, job->block, 1, job->kept + (r * blocks + n / job->block) * bytes, at);
}

static void gradient_row(const Job *job, int64_t r, Buffers *at) {
    const Layer *layers = job->layers;
    int64_t count = job->count, inputs = layers->length_in * layers->in, classes = layers[count - 1].out;
    for (int64_t t = 0; t < job->times; t++) {
        for (int64_t l = 0; l < count; l++)
            pack(layers + l, job->start + r * job->stride, job->moved ? job->moved + r * job->parameters : NULL, at + l);
        for (int64_t n = 0; n < job->chosen; n += job->block) {
            int64_t some = MIN(job->block, job->chosen - n), first = r * job->examples + (job->order ? 0 : n);
            int64_t weight = (job->order ? r * job->times + t : r) * job->chosen + n;
            const int64_t *which = job->order ? job->order + weight : NULL;
            if (job->kept) {
                arrange_kept(job, r, n, at);
                pad(layers, count, some, at);
            }
            forward(layers, count, some, job->x + first * inputs, which, at);
            loss_gradient(some, classes, job->targets + first * classes, which, job->weights + weight, at + count - 1);
            backward(layers, count, some, at, job->into + r * job->parameters, n ? 1.0f : job->scale[t], job->step[t]);
        }
    }
}

static void gradient_rows(Shared *shared, int thread) {
    const Job *job = shared->job;
    Buffers at[job->count + 1];
    int64_t bytes = fused_scratch(job->layers, job->count, job->block), r;
    arrange_all(job->layers, job->count, job->block, job->scratch + thread * bytes, at);
    while ((r = next_row(shared)) >= 0) gradient_row(job, r, at);
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
    Job job = {.layers = layers, .count = count, .examples = examples, .chosen = chosen, .block = block,
               .parameters = parameters, .start = start, .stride = stride, .moved = moved, .x = x, .targets = targets,
               .weights = weights, .order = order, .times = times, .scale = scale, .step = step, .into = into,
               .kept = kept, .scratch = scratch};
    share(gradient_rows, &job, rows, threads);
}

static void product_row(const Job *job, int64_t r, Buffers *at, const Buffers *moving) {
    const Layer *layers = job->layers;
    int64_t count = job->count, classes = layers[count - 1].out;
    for (int64_t l = 0; l < count; l++) {
        pack(layers + l, job->start + r * job->stride, NULL, at + l);
        pack(layers + l, job->along + r * job->parameters, NULL, moving + l);
    }
    for (int64_t n = 0; n < job->examples; n += job->block) {
        int64_t some = MIN(job->block, job->examples - n);
        arrange_kept(job, r, n, at);
        move(layers, count, some, at, moving);
        loss_product(some, classes, job->weights + r * job->examples + n, at + count - 1, moving + count - 1);
        move_back(layers, count, some, at, moving, job->into + r * job->parameters, n ? 1.0f : *job->scale, *job->step);
    }
}

static void product_rows(Shared *shared, int thread) {
    const Job *job = shared->job;
    Buffers at[job->count + 1], moving[job->count + 1];
    int64_t bytes = fused_scratch(job->layers, job->count, job->block), r;
    char *own = job->scratch + 2 * thread * bytes;
    arrange_all(job->layers, job->count, job->block, own, at);
    arrange_all(job->layers, job->count, job->block, own + bytes, moving);
    moving->h = NULL;
    while ((r = next_row(shared)) >= 0) product_row(job, r, at, moving);
}

/* into[r] = scale * into[r] + step * the Hessian at start[r] times along[r], of what fused_gradient took there once and
``kept``: all of the ``examples``, with these ``weights``. along and into [rows][parameters]; ``scratch``: 2 * threads *
fused_scratch(layers, count, block) prepared bytes. All else is as there. */
void fused_product(const Layer *layers, int64_t count, int64_t rows, int64_t examples, int64_t block,
                   int64_t parameters, const float *start, int64_t stride, const float *along, const float *weights,
                   float scale, float step, float *into, char *kept, char *scratch, int threads) {
    Job job = {.layers = layers, .count = count, .examples = examples, .chosen = examples, .block = block,
               .parameters = parameters, .start = start, .stride = stride, .along = along, .weights = weights,
               .scale = &scale, .step = &step, .into = into, .kept = kept, .scratch = scratch};
    share(product_rows, &job, rows, threads);
}
