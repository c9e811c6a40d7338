/* fst_feed.c - asking a callback for bytes, and how many callbacks run at a time. */
#include <errno.h>

#include "file/fst_feed.h"

#define SECOND 1000000000u

static atomic_bool shut; /* the process ends: see fst_feed_end */

void fst_feed_shut(void) { atomic_store(&shut, true); }

int fst_feed_fill(const fst_fed *fed, const char *name, uint64_t offset, uint64_t bytes, void *into,
                  fst_error *err) {
    if (bytes == 0) return FST_OK;
    if (atomic_load(&shut))
        return fst_fail(err, FST_E_CANCELLED, ECANCELED, "%s: the process ends", name);
    int64_t got = fed->feed(fed->context, offset, bytes, into);
    if (got == (int64_t)bytes) return FST_OK;
    if (got < 0)
        return fst_fail(err, FST_E_FEED, got < -INT32_MAX ? INT32_MAX : (int)-got,
                        "%s: no bytes at offset %llu", name, (unsigned long long)offset);
    return fst_fail(err, (uint64_t)got < bytes ? FST_E_TRUNCATED : FST_E_INVALID, 0,
                    "%s: %lld bytes came at offset %llu, not %llu", name, (long long)got,
                    (unsigned long long)offset, (unsigned long long)bytes);
}

/* ---- how many at a time ---- */

static void measure_anew(fst_window *window, uint64_t now) {
    window->begun = now;
    window->bytes = 0;
    window->ended = 0;
}

/* Twice as many calls, as long as that brings 3% more; else as many as before. When the rate has
 * halved or doubled since, the link is another one. */
static void decide(fst_window *window, int32_t most, uint64_t rate) {
    uint64_t before = window->rate;
    bool other = rate < before / 2 || rate / 2 > before;
    if (window->settled && !other) return;
    if (window->settled || before == 0 || rate > before + before / 32) {
        window->rate = rate;
        window->before = window->open;
        window->settled = window->open >= most;
        if (!window->settled) window->open = window->open > most / 2 ? most : 2 * window->open;
    } else {
        window->settled = true;
        window->open = window->before;
    }
}

/* How many calls may run. */
static int32_t width(const fst_window *window, int32_t most) {
    return window->open < most ? window->open : most;
}

void fst_window_begin(fst_window *window, int32_t most, uint64_t now) {
    window->calls++;
    if (window->begun == 0 && window->calls >= width(window, most)) measure_anew(window, now);
}

bool fst_window_end(fst_window *window, int32_t most, uint64_t bytes, uint64_t now) {
    int32_t before = window->open, wide = width(window, most);
    window->calls--;
    if (window->begun == 0) return false;
    if (window->calls < wide / 2) { /* nothing is asked for: this says nothing of the link */
        window->begun = 0;
        return false;
    }
    window->bytes += bytes;
    if (++window->ended < 2 * wide || now <= window->begun) return false;
    window->measured++;
    decide(window, most,
           (uint64_t)((double)window->bytes / (double)(now - window->begun) * SECOND));
    measure_anew(window, now);
    return window->open > before;
}
