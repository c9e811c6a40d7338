/* fake_open.h - the fake device driver for test programs, which do not link it.
 *
 * FAKE(name) is the function of that name in the library that FAKE_CUDA names: run.sh sets
 * it. The engine opens the same path, and so talks to the same fake.
 */
#ifndef FAKE_OPEN_H
#define FAKE_OPEN_H

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "fake_cuda.h"

static inline const char *fake_path(void) {
    const char *path = getenv("FAKE_CUDA");
    if (path != NULL && path[0] != '\0') return path;
    (void)fputs("FAKE_CUDA does not name libfake_cuda.so\n", stderr);
    exit(77); /* skipped */
}

static inline void *fake_symbol(const char *name) {
    static _Thread_local void *library; /* opened once a thread, and never closed */
    if (library == NULL) library = dlopen(fake_path(), RTLD_NOW | RTLD_LOCAL);
    void *symbol = library == NULL ? NULL : dlsym(library, name);
    if (symbol != NULL) return symbol;
    (void)fprintf(stderr, "%s\n", dlerror());
    exit(1);
}

#define FAKE(name) ((__typeof__(&name))fake_symbol(#name))

#endif
