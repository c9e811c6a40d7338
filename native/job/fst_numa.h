/* fst_numa.h - where threads run, on machines of several NUMA nodes. */
#pragma once

#include <sched.h>

#include "file/fst_file.h"

#define FST_ANYWHERE (-1) /* no NUMA node in particular */

typedef struct fst_placement { /* of a thread */
    cpu_set_t allowed;         /* the CPUs it was started with */
    int node;                  /* near which it was placed */
    bool placeable;            /* false for callers that help: their threads are not ours to move */
} fst_placement;

/* The node of the disk that a file is on; FST_ANYWHERE if that is not known, or makes no
 * difference. */
int fst_numa_of_file(const fst_file *file);
/* The calling thread may be placed from now on, within its present CPUs. */
void fst_numa_start(fst_placement *place);
/* Moves the calling thread near a node that so many threads shall serve. */
void fst_numa_place(fst_placement *place, int node, int threads);
/* For tests: reads the machine from another folder than /sys. Not while workers run. */
void fst_numa_pretend(const char *root);
