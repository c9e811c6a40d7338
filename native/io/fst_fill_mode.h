/* fst_fill_mode.h - the size of pages with which read-ahead fills the page cache.
 *
 * Some hosts back a guest's free memory only when it is touched, and have taken back whole free
 * blocks. Reading into one waits for the host: 1.7 GB took 2.1 s by huge pages, 1.2 s by folios of
 * the read-ahead window's size. The guest's processor time does not show it, so each mode is timed.
 * Where huge pages are fast nothing else is tried. The state is the process's; it has no lock.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum fst_fill_mode {
    FST_FILL_HUGE,
    FST_FILL_TRIAL, /* of small pages */
    FST_FILL_SMALL  /* they were quicker */
};

int fst_fill_mode_get(void);
/* Records how long a worker took to read a chunk of cold bytes in a mode. `growing`: small pages
 * are folios of the read-ahead window's size here. Single pages, which a large window leaves, are
 * tried later, because they gain less. */
void fst_fill_mode_note(int mode, bool growing, uint64_t bytes, uint64_t nanoseconds);
/* Forgets what was measured. For tests, and for a mode that turns out to be impossible. */
void fst_fill_mode_set(int mode);
