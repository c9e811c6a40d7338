/* fst_feed.h - files that are no file here: a callback gives their bytes, as from a network.
 *
 * A call waits for its bytes, so several run at a time. How many is found out: a window opens while
 * that makes the bytes come faster, up to the most that a file's owner allows. All files share it:
 * they mostly come by one link.
 */
#pragma once

#include "base/fst_base.h"

#define FST_MOST_CALLS 64
#define FST_WINDOW_FIRST 4 /* calls at a time before anything is known */

typedef struct fst_window {
    int32_t open;      /* calls that may run at a time */
    int32_t calls;     /* that run now */
    int32_t before;    /* that were open before the last change */
    bool settled;      /* a wider one was no faster */
    uint64_t rate;     /* bytes a second, when it was last measured; 0: not yet */
    uint64_t measured; /* times that a rate was measured */
    /* The measurement in progress, which begins when the window is full. */
    uint64_t begun; /* nanoseconds; 0: none is in progress */
    uint64_t bytes;
    int32_t ended; /* calls */
} fst_window;

typedef struct fst_fed { /* what a fed file has in place of a descriptor */
    fst_feed feed;
    void *context;
    int32_t most;  /* calls at a time */
    int32_t calls; /* that run now; guarded by the queue's lock */
} fst_fed;

/* A call begins. `most` of them may run now, however wide the window is. */
void fst_window_begin(fst_window *window, int32_t most, uint64_t now);
/* A call has ended, and brought so many bytes. Returns whether more calls may run than before. */
bool fst_window_end(fst_window *window, int32_t most, uint64_t bytes, uint64_t now);

/* Calls the callback for exactly these bytes. FST_E_CANCELLED after fst_feed_end. */
int fst_feed_fill(const fst_fed *fed, const char *name, uint64_t offset, uint64_t bytes, void *into,
                  fst_error *err);
/* From now on no callback is called. */
void fst_feed_shut(void);
