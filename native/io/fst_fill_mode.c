/* fst_fill_mode.c - see fst_fill_mode.h. */
#include "io/fst_fill_mode.h"
#include "base/fst_base.h"

/* Of a worker, of eight. Huge pages take 3.5 ms a MiB where the host has the memory. */
#define SUSPECT_GROWING 6000000u
#define SUSPECT_SINGLE 9000000u
#define JUDGED_BYTES (32u << 20)
/* Before a mode is judged: all workers have just started at once, or another mode's chunks are in
 * flight. With them, one walk of 1.2 GB in two took 1.5 s instead of 1.0 s, by small pages. */
#define SKIPPED_BYTES (32u << 20)
#define AGAIN_BYTES (1u << 30) /* how long small pages are kept without a new measurement */

static struct { /* a change of mode may lose a sample of another worker: no harm */
    atomic_int mode;
    atomic_ullong bytes;                 /* in this mode */
    atomic_ullong judged, nanoseconds;   /* behind those that are skipped */
    atomic_ullong huge_cost, small_cost; /* nanoseconds a MiB; 0: not known */
} state;

int fst_fill_mode_get(void) { return atomic_load(&state.mode); }

static void change(int from, int to) {
    if (!atomic_compare_exchange_strong(&state.mode, &from, to)) return;
    atomic_store(&state.bytes, 0);
    atomic_store(&state.judged, 0);
    atomic_store(&state.nanoseconds, 0);
}

void fst_fill_mode_set(int mode) {
    atomic_store(&state.mode, mode);
    atomic_store(&state.bytes, 0);
    atomic_store(&state.judged, 0);
    atomic_store(&state.nanoseconds, 0);
    atomic_store(&state.huge_cost, 0);
    atomic_store(&state.small_cost, 0);
}

/* Whether small pages are quicker by more than a quarter: less is within the noise. */
static int quicker_mode(uint64_t huge_cost, uint64_t small_cost) {
    return huge_cost > small_cost + small_cost / 4 ? FST_FILL_SMALL : FST_FILL_HUGE;
}

static int after_huge(uint64_t cost, bool growing) {
    uint64_t before = atomic_load(&state.huge_cost), small_cost = atomic_load(&state.small_cost);
    if (before > 0) cost = (before + cost) / 2; /* one slow sample among quick ones is noise */
    atomic_store(&state.huge_cost, cost);
    if (cost <= (growing ? SUSPECT_GROWING : SUSPECT_SINGLE)) return FST_FILL_HUGE;
    return small_cost == 0 ? FST_FILL_TRIAL : quicker_mode(cost, small_cost);
}

static int after_trial(uint64_t cost) {
    atomic_store(&state.small_cost, cost);
    return quicker_mode(atomic_load(&state.huge_cost), cost);
}

void fst_fill_mode_note(int mode, bool growing, uint64_t bytes, uint64_t nanoseconds) {
    uint64_t skipped = mode == FST_FILL_SMALL ? 0 : SKIPPED_BYTES;
    uint64_t enough = mode == FST_FILL_SMALL ? AGAIN_BYTES : JUDGED_BYTES;
    if (fst_fill_mode_get() != mode || bytes < FST_HUGE_PAGE) return;
    if (atomic_fetch_add(&state.bytes, bytes) < skipped) return;
    uint64_t spent = atomic_fetch_add(&state.nanoseconds, nanoseconds) + nanoseconds;
    uint64_t judged = atomic_fetch_add(&state.judged, bytes) + bytes;
    if (judged < enough) return;
    uint64_t cost = spent / (judged >> 20);
    if (mode == FST_FILL_HUGE)
        change(mode, after_huge(cost, growing));
    else
        change(mode, mode == FST_FILL_TRIAL ? after_trial(cost) : FST_FILL_HUGE);
}
