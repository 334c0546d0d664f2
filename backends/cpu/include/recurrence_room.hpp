// What a chunk is and the memory it works in.

// Whether the normaliser is read from running sums of keys: they stay in registers, one decay each.
constexpr bool KEY_SUMS = ONES && CAUSAL && DECAY != CHANNEL && KV_ <= 8;

struct Scratch {
    alignas(64) float S[DKP * DVP], z[DKP], ahead[DKP];
    alignas(64) float kt[DKP * CP], P[CHUNK * CP], M[CHUNK * CP];
    alignas(64) float q[CHUNK * DKP], k[CHUNK * DKP], v[CHUNK * DVP];
    alignas(64) float u[CHUNK * DVP];   // values that are written, if not v itself
    alignas(64) float ve[CHUNK * DVP];  // written values, or keys, decayed to the end of the chunk
    alignas(64) float kd[CHUNK * DKP];
    alignas(64) float a[CORRECTION == UNTIED ? CHUNK * DKP : 1];  // erase
    alignas(64) float b[CORRECTION == UNTIED ? CHUNK * DKP : 1];  // add, and its transpose
    alignas(64) float bt[CORRECTION == UNTIED ? DKP * CP : 1];
    // Tiles: operands in bf16, pairs of neighbours in the summed index for the right-hand ones.
    alignas(64) bf16 rows[TILES ? 3 * CHUNK * (DK > DV ? DK : DV) : 1];  // q, k, v of a short chunk
    alignas(64) bf16 kc[TILES ? DK * CHUNK : 1], weights[TILES ? CHUNK * CHUNK : 1];
    alignas(64) pair kp[TILES ? DK / 2 * CHUNK : 1], vp[TILES ? CHUNK / 2 * DV : 1];
    alignas(64) pair vh[TILES ? CHUNK / 2 * DV : 1], vl[TILES ? CHUNK / 2 * DV : 1];
    alignas(64) pair Sp[TILES ? DK / 2 * DV : 1], Sl[TILES ? DK / 2 * DV : 1];  // high, low
    alignas(64) float inter[TILES ? CHUNK * DV : 1], intra[TILES ? CHUNK * DV : 1];
    ScalarDecay scalar;
    ChannelDecay channel;
    int tabled = 0;
};

struct Chunk {
    const T *q, *k, *v;
    T* out;
    const float *g, *beta, *erase, *add, *bonus;
    int n;
};

struct Strides {
    long q, qh, k, v, out, oh, g, beta, erase, add, group;
    bool stream;  // whether outputs in whole lines go past the caches
};

// The chunk in tiles of bf16 (recurrence_tiles.hpp), where the unit has them.
template <bool READ, bool WRITE>
static void tile_chunk(Scratch& s, const Chunk& c, const Strides& st);
