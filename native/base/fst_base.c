/* fst_base.c - errors and counters. */
#include "base/fst_base.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

fst_counters fst_counts;

void fst_set_error(fst_error *err, int code, int sys_errno, const char *format, ...) {
    va_list arguments;
    err->code = code;
    err->sys_errno = sys_errno;
    va_start(arguments, format);
    int written = vsnprintf(err->message, sizeof err->message, format, arguments);
    va_end(arguments);
    if (written < 0) err->message[0] = '\0';
}

int fst_fail_call(fst_error *err, const char *path, const char *call, int sys_errno) {
    return fst_fail(err, FST_E_SYS, sys_errno, "%s: %s failed: %s", path, call,
                    strerror(sys_errno));
}
